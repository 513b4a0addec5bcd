"""A finished block library, found again through the content keys of a profile; nothing of it is made here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.errors import PuzzleError
from blocks.library import BlockLibrary
from blocks.parent import Parent
from blocks.records import BlockRecord, CorpusInfo, CostTable, LayerRecord, ParentInfo, Score
from profiles.schema import Profile
from tasks.distill.jobs import better_of, coupled_jobs, jobs_of
from tasks.distill.record import Recording, open_parent, recorded, recording_of
from tasks.inputs.corpus import prepare_corpus
from tasks.inputs.corpus_sources import iterate_documents
from tasks.inputs.image_questions import by_digest
from tasks.inputs.parent import prepare_parent
from tasks.inputs.parent_answers import with_answers
from tasks.inputs.vision import with_images
from tasks.measure.costs import costs_of
from tasks.running.progress import say
from tasks.running.workers import compute_of
from tasks.score.scoring import scores_of, scoring_sets
from tasks.search.choose import with_most_tokens
from tasks.search.totals import Problem, problem_of


class UnfinishedLibrary(PuzzleError):
    """The workspace holds no finished library of this profile."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """What `puzzle optimize` leaves of a profile before the search: all that does not depend on a budget."""

    profile: Profile
    workspace: Path
    parent: ParentInfo
    corpus: CorpusInfo
    blocks: tuple[BlockRecord, ...]
    scores: tuple[Score, ...]
    costs: CostTable

    @property
    def problem(self) -> Problem:
        """The search under the profile's budget, for the lowest score: at the most tokens a second where those are
        sought.
        """
        return with_most_tokens(problem_of(self.profile, self.scores, self.costs))

    @property
    def scored(self) -> tuple[int, int]:
        """Validation sequences that were scored, and the tokens of each."""
        scoring = self.profile.scoring
        return scoring.sequences, scoring.tokens_per_sequence or self.corpus.sequence_length


def open_finished(profile: Profile, workspace: Path) -> Finished:
    """Find parent, corpus, blocks, scores and costs of a profile. Scores are those on the corpus alone, whatever
    capabilities the profile names: whole models are measured on the corpus too.

    Raises UnfinishedLibrary, naming what is missing, and PuzzleError for a profile whose search chooses types of
    number: the studies judge architectures in float.
    """
    if profile.search_space.precision:
        raise PuzzleError(
            "this study judges architectures in float, and search_space.precision chooses types of number: give the "
            "command with --set search_space.precision=[] --set gkd.rounded_steps=0 and a budget that is meant "
            "without types."
        )
    images = profile.images  # the run's table has those of all texts
    if profile.capabilities:
        say("this study is of the corpus alone: capabilities count for nothing in it")
        profile = profile.model_copy(update={"capabilities": {}})
    if not any((workspace / "parent").glob("*.json")) or not any((workspace / "library").glob("*.json")):
        raise _unfinished(profile, workspace, "no block library")
    parent = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
    parent = with_images(parent, by_digest(images), workspace, compute_of(profile))
    corpus = prepare_corpus(
        with_answers(profile.corpus, parent, workspace, compute_of(profile)),
        workspace / parent.folder,
        parent.fingerprint,
        workspace,
    )
    reader = open_parent(workspace / parent.folder)
    recording = recording_of(profile, parent, corpus, compute_of(profile))
    records = [record for layer in range(reader.depth) if (record := recorded(layer, recording, workspace))]
    if len(records) < reader.depth:
        raise _unfinished(profile, workspace, f"{reader.depth - len(records)} layers that are not recorded")
    blocks = _blocks(profile, workspace, recording, records, reader)
    usable = [block for block in blocks if block.status != "failed"]
    # a score that is not a number is not kept (tasks/score/scoring.py), so some may lack
    found = tuple(scores_of(usable, scoring_sets(profile, corpus, (), records[-1]), workspace))
    if not found:
        raise _unfinished(profile, workspace, "no scores")
    costs = costs_of(profile, parent, workspace)
    if costs is None:
        raise _unfinished(profile, workspace, f"no costs of its scenarios on hardware {profile.hardware.name}")
    return Finished(
        profile=profile,
        workspace=workspace,
        parent=parent,
        corpus=corpus,
        blocks=blocks,
        scores=found,
        costs=costs,
    )


def _blocks(
    profile: Profile, workspace: Path, recording: Recording, records: Sequence[LayerRecord], reader: Parent
) -> tuple[BlockRecord, ...]:
    library = BlockLibrary(workspace)
    jobs = jobs_of(profile, recording, records, reader)
    blocks = [library.find(job.key) for job in jobs]
    there = [block for block in blocks if block is not None]
    if None not in blocks:
        there = better_of(there)
    if profile.bld.coupled and None not in blocks:
        jobs = coupled_jobs(profile, jobs, there, reader)
        blocks = [library.find(job.key) for job in jobs]
        there += [block for block in blocks if block is not None]
    if None in blocks:
        raise _unfinished(profile, workspace, f"{blocks.count(None)} of {len(jobs)} blocks missing")
    return tuple(there)


def _unfinished(profile: Profile, workspace: Path, lacks: str) -> UnfinishedLibrary:
    return UnfinishedLibrary(
        f"{workspace} has no finished library of profile {profile.name} ({lacks}): run `puzzle optimize` with this "
        "profile, workspace and --set first."
    )
