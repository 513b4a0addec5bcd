"""The stage after the choice: the chosen child keeps every `max_kl` itself (tasks/evaluate/floors.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.library import digest_of
from blocks.records import (
    Architecture,
    BlockRecord,
    CorpusInfo,
    CostTable,
    Floor,
    LayerRecord,
    Metric,
    ParentInfo,
    Score,
)
from flows.number_types import score_types, with_files
from flows.run import task_of
from flows.stages import choose_child, runnable
from flows.tracked_run import TrackedRun
from profiles.schema import GENERAL, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import Contender, contender
from tasks.evaluate.floors import Chosen, Held, check, floors_of, hold, in_words, tighter
from tasks.inputs.precision import child_dtype
from tasks.running.progress import say
from tasks.running.sharing import TaskKey, exclusive
from tasks.running.workers import compute_of
from tasks.search.totals import problem_of

tighter_task = task_of("choose", "choose, with tighter limits")(tighter)


@dataclass(frozen=True, kw_only=True)
class Library:
    """What children are chosen from. scores: before those in types of number."""

    records: Sequence[LayerRecord]
    blocks: Sequence[BlockRecord]
    scores: Sequence[Score]
    costs: CostTable


@task_of("check floor", "KL of {which.name}{corpus.where} before GKD")
def floor_task(which: Contender, parent: ParentInfo, corpus: CorpusInfo, profile: Profile, workspace: Path) -> Any:
    """See tasks.evaluate.floors.check."""
    dtype = child_dtype(profile.hardware, open_parent(workspace / parent.folder))
    what = TaskKey(key=f"floor-{digest_of(model=which.served_key, text=corpus.fingerprint)}", what="a child's KL")
    with exclusive(workspace, what):
        return check(which, parent, corpus, workspace, compute_of(profile), dtype)


def hold_floors(
    run: TrackedRun,
    source: tuple[ParentInfo, CorpusInfo],
    capabilities: Sequence[CorpusInfo],
    first: Chosen,
    library: Library,
) -> Held:
    """The choice with every `max_kl` kept by each of its children, and how they keep them."""
    rounds = run.profile.search.floor_rounds
    if not run.profile.capability_limits or not rounds:
        return Held(chosen=first, floors=((),) * len(first.near))
    search = _Search(run=run, source=source, capabilities=capabilities, library=library)
    search.choices.append((first, run.task_runs.get("choice")))
    held = hold(first, rounds, search.measure, search.again)
    search.went_on_with(held.chosen)
    for (name, _), floors in zip(named(held.chosen.near), held.floors, strict=True):
        for floor in floors:
            say(f"{name}: {in_words(floor)}")
    if held.chosen.scores != first.scores:  # more was scored in types of number
        run.keep_tables(*source, library.blocks, held.chosen.scores, library.costs)
    return held


def named(near: Sequence[Architecture]) -> list[tuple[str, Architecture]]:
    """The children of a choice with their names: candidates of a race where there are several."""
    names = ["child"] if len(near) == 1 else [f"candidate-{place}" for place in range(1, len(near) + 1)]
    return list(zip(names, near, strict=True))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The answers of one search under limits that become lower, each with the task run that gave it."""

    run: TrackedRun
    source: tuple[ParentInfo, CorpusInfo]
    capabilities: Sequence[CorpusInfo]
    library: Library
    choices: list[tuple[Chosen, UUID | None]] = field(default_factory=list)

    def measure(self, chosen: Chosen) -> list[tuple[Floor, ...]]:
        """Every child of an answer on the text of every limit."""
        run, profile, (parent, corpus) = self.run, self.run.profile, self.source
        asked, texts = (
            profile.capability_limits,
            {one.capability or GENERAL: one for one in (corpus, *self.capabilities)},
        )
        children = [contender(name, one, self.library.blocks) for name, one in named(chosen.near)]
        children = with_files(run, children, parent, corpus)
        found: list[dict[str, Metric]] = [{} for _ in children]
        with run.stage("hold") as progress:
            for name, most in asked.items():  # the parent's side of a text is there for all children
                for child, own in zip(children, found, strict=True):
                    values = (child, parent, texts[name], profile, run.workspace)
                    own[name] = run.call(floor_task, f"floor {name} {child.name}", *values, after=["choice"])
                    said = f"{child.name}'s KL on {name} {own[name].value:.3g}, asked {most:.3g}"
                    progress(sum(map(len, found)), len(asked) * len(children), said)
        measured_at_most = profile.search.floor_rounds * profile.race.candidates
        pairs = zip(chosen.near, found, strict=True)
        return [floors_of(asked, chosen.problem, one, kl, measured_at_most) for one, kl in pairs]

    def again(self, floors: Sequence[Floor]) -> Chosen | None:
        """The next answer; None where there is none, which ends no run: there is a child already."""
        try:
            found = self._again(floors)
        except PuzzleFailure:
            raise
        except PuzzleError as error:
            say(f"no child under a tighter limit: {error}")
            return None
        if found is not None:
            self.choices.append((found, self.run.task_runs.get("choice")))
        return found

    def _again(self, floors: Sequence[Floor]) -> Chosen | None:
        """What is chosen in a type of number is scored in that type, like the first choice."""
        run, (parent, _), library = self.run, self.source, self.library
        profile, race, scores = run.profile, run.profile.race, self.choices[-1][0].scores
        values = (problem_of(profile, scores, library.costs), floors, race.candidates, race.min_different)
        needs = [one for one in run.task_runs if one.startswith("floor ")]
        with run.stage("choose"):
            found: Chosen | None = run.call(tighter_task, "tighter choice", *values, after=needs, limited=False)
        if found is None:
            return None
        if not profile.search_space.precision:
            if "tighter choice" in run.task_runs:
                run.task_runs["choice"] = run.task_runs["tighter choice"]
            return runnable(run, parent, replace(found, scores=scores))
        tight = replace(run, profile=_under(profile, found.problem.capabilities.most))
        made = (library.records, library.blocks, library.scores, library.costs)
        more = score_types(tight, self.source, *made, self.capabilities)
        return choose_child(tight, parent, more, library.costs, after=["tighter choice"])

    def went_on_with(self, chosen: Chosen) -> None:
        """What is made of an answer hangs on its task run in Prefect's graph."""
        made_by = next(one for answer, one in self.choices if answer.problem is chosen.problem)
        if made_by is not None:
            self.run.task_runs["choice"] = made_by


def _under(profile: Profile, most: Mapping[str, float]) -> Profile:
    """The profile with these limits on its capabilities."""
    lowered = {name: profile.capabilities[name].model_copy(update={"max_kl": kl}) for name, kl in most.items()}
    return profile.model_copy(update={"capabilities": {**profile.capabilities, **lowered}})
