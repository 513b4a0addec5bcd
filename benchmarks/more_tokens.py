"""What more tokens buy: the score of trained variants against BLD tokens, and a child's KL against GKD tokens.

    .venv/bin/python -m benchmarks.more_tokens

BLD: a few variants in a few layers, each on so many distinct tokens, shard by shard. GKD: one child, measured on test
text on its way. Every seed orders the text of BLD differently, and chooses other text for GKD. What is finished is
reused.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, arguments, table, write_page
from benchmarks.scale_tokens import Place
from blocks import estimates
from blocks.compute import HOST
from blocks.estimates import Estimate
from blocks.library import BlockLibrary, read_tensors, read_value, write_value
from blocks.records import BlockRecord, LayerChoice, LayerRecord, Score, Value
from blocks.runtime import configure_torch
from profiles.load import load_profile
from profiles.schema import Profile
from tasks.distill.bld import Job
from tasks.distill.gkd_job import Job as GlobalJob
from tasks.distill.gkd_job import built, job_of, kl_after, open_checkpoint
from tasks.distill.gkd_targets import record_teacher
from tasks.distill.jobs import jobs_of
from tasks.distill.record import clear, record_layer
from tasks.evaluate.quality import ParentTargets, parent_targets, sequence_figures
from tasks.inputs.corpus import documents_of
from tasks.running.progress import say
from tasks.score.scoring import ScoringSet, by_document, score_sequences

SETTINGS = (
    "hardware.threads=1",
    "corpus.train_sequences=1024",
    "record.statistics_sequences=64",
    "record.validation_sequences=16",
    "scoring.sequences=16",
    "search_space.attention=[kv1]",
    "search_space.ffn=[ffn768,ffn256]",
    "bld.closed_form=compare",
)
STEPS = 1024  # of GKD that are never all done: the rate does not depend on them


Records = dict[int, LayerRecord]  # by layer


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked: the profile, the layers that BLD is measured in, those whose FFN is narrower in the child of GKD,
    how many tokens, and the seeds.
    """

    profile: Profile
    workspace: Path
    layers: tuple[int, ...]
    child: tuple[int, ...]
    bld: tuple[int, ...]
    gkd: tuple[int, ...]
    seeds: tuple[int, ...]

    def place(self, tokens: int) -> Place:
        """The workspace, with a recording for BLD on so many tokens."""
        bld = self.profile.bld.model_copy(update={"tokens": tokens})
        return Place(self.profile.model_copy(update={"bld": bld}), self.workspace, HOST)

    def record(self, place: Place) -> Records:
        """The statistics of the layers that are asked for, each from the states that the one before left."""
        layers = sorted({*self.layers, *self.child})
        assert len(place.recording.counted) == 1 and not place.recording.kept
        records = {layer: record_layer(layer, place.recording, self.workspace, HOST) for layer in layers}
        clear(place.recording, self.workspace)
        return records

    def jobs(self, place: Place, records: Records, layers: Sequence[int]) -> list[Job]:
        """Every variant in some layers, with every seed."""
        space = place.profile.search_space.model_copy(update={"layers": tuple(layers)})
        profiles = [place.profile.model_copy(update={"seed": seed, "search_space": space}) for seed in self.seeds]
        every = [records.get(layer, records[layers[0]]) for layer in range(place.reader.depth)]
        return [job for profile in profiles for job in jobs_of(profile, place.recording, every, place.reader)]


class Point(Value):
    """KL of a child on every test sequence, and what its training took until then."""

    kl: tuple[float, ...]
    cpu_seconds: float


def main() -> None:
    """Train, score, and write benchmarks/more_tokens.md."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 16], help="in which BLD is measured")
    parser.add_argument("--child", type=int, nargs="+", default=list(range(4, 27, 2)), help="layers narrowed for GKD")
    parser.add_argument("--bld-tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--gkd-tokens", type=int, nargs="+", default=[16384, 32768, 49152])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    run = asked(parser.parse_args())
    place = run.place(max(run.bld))
    records = run.record(place)
    write_page("more_tokens", "What more tokens buy", [intro(place), of_bld(run, records), of_gkd(run, records)])


def asked(options: argparse.Namespace) -> Run:
    """The options as a run."""
    profile = load_profile(options.profile, [*SETTINGS, *options.set])
    workspace = (options.workspace or ROOT / "workspace" / "more-tokens").resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    configure_torch(profile.hardware.threads)
    return Run(
        profile=profile,
        workspace=workspace,
        layers=tuple(options.layers),
        child=tuple(options.child),
        bld=tuple(sorted(options.bld_tokens)),
        gkd=tuple(sorted(options.gkd_tokens)),
        seeds=tuple(options.seeds),
    )


def intro(place: Place) -> str:
    """What is the same in both parts."""
    return (
        f"{place.parent.name}; corpus: {place.corpus.description}, sequences of {place.corpus.sequence_length} tokens. "
        "KL(parent || child) in nats per token, ± one standard error over documents. *Change*: against the row "
        "above, paired by document, both means over the seeds."
    )


def of_bld(run: Run, records: Records) -> str:
    """Variants after each number of tokens; 0: as they start."""
    library, trained = BlockLibrary(run.workspace), dict[tuple[str, int], list[BlockRecord]]()
    for tokens in run.bld:
        place = run.place(tokens)
        jobs = run.jobs(place, records, run.layers)
        starts = [untrained(job) for job in jobs if job.seed == run.seeds[0]] if tokens == run.bld[0] else []
        say(f"BLD on {tokens:,} tokens: {len(jobs)} variants")
        place.bld([*starts, *jobs])
        for job in [*starts, *jobs]:
            block = library.find(job.key)
            assert block is not None and block.status == "trained", job
            trained.setdefault((way(job), tokens * (job.settings.steps > 0)), []).append(block)
    settings, scored = run.profile.bld, scoring_set(run, place, records)
    scores = scores_of(scored, [block for blocks in trained.values() for block in blocks], place, records)
    rows, before = list[list[str]](), None
    for (name, tokens), blocks in sorted(trained.items(), key=lambda item: (item[0][0], item[0][1])):
        of_seeds = [[block for block in blocks if block.seed == seed] or blocks for seed in run.seeds]
        every = [mean_kl([scores[block.key] for block in some]) for some in of_seeds]
        both, cpu = mean_of(every), sum(block.cpu_seconds for block in blocks) / len(blocks)
        nmse = [f"{sum(block.nmse_after or math.nan for block in some) / len(some):.4f}" for some in of_seeds]
        figures = [*nmse, *(estimates.rounded(one.metric) for one in every), change(both, before if tokens else None)]
        rows.append([name, f"{tokens:,}", *figures, f"{cpu:.1f}"])
        before = both
    header = ["variant", "tokens", *headed("nMSE", run), *headed("KL", run), "change of KL", "CPU-s"]
    return (
        f"## BLD\n\nMean over layers {', '.join(map(str, run.layers))}. nMSE on "
        f"{run.profile.record.validation_sequences} held-out sequences, replace-1-block KL on {scored.count} x "
        f"{scored.length} held-out tokens of {len(set(next(iter(scores.values())).documents))} documents. Steps of "
        f"{settings.batch_sequences} sequences at {settings.learning_rate:g}, each token once; 0 tokens: the start, "
        f"by a ridge regression on {run.profile.record.statistics_sequences} sequences, or the parent's weights, "
        "pruned. CPU-seconds of one variant, its layer's states not counted.\n\n" + table(header, rows)
    )


def untrained(job: Job) -> Job:
    """The same without steps, which are all that the seed decides."""
    return job.model_copy(update={"settings": job.settings.model_copy(update={"steps": 0}), "seed": 0})


def way(job: Job) -> str:
    """The variant, and how it starts."""
    return f"{job.subblock} {job.variant}, {'closed form' if job.settings.closed_form else 'pruned'}"


def scoring_set(run: Run, place: Place, records: Records) -> ScoringSet:
    """The held-out tokens of the replace-1-block scores."""
    settings = run.profile.scoring
    length = settings.tokens_per_sequence or place.corpus.sequence_length
    return ScoringSet(corpus=place.corpus, last=records[max(records)], count=settings.sequences, length=length)


def scores_of(scored: ScoringSet, blocks: Sequence[BlockRecord], place: Place, records: Records) -> dict[str, Score]:
    """Scores by the block's key."""
    documents = documents_of(place.corpus, "validation", place.workspace, scored.length)[: scored.count]
    found: dict[str, Score] = {}
    for layer in sorted({block.layer for block in blocks}):
        own = [block for block in blocks if block.layer == layer]
        say(f"scoring {len(own)} blocks of layer {layer}")
        work = [(block, scored.sequences) for block in own]
        made = score_sequences(work, records[layer], scored, place.parent, place.workspace, HOST)
        scores = (by_document(score, documents) for score in made)
        found |= {block.key: score for block, score in zip(own, scores, strict=True)}
    return found


def mean_kl(scores: Sequence[Score]) -> Estimate:
    """The mean over layers."""
    return estimates.mean(np.mean([score.kl_per_sequence for score in scores], axis=0), scores[0].documents)


def mean_of(every: Sequence[Estimate]) -> Estimate:
    """The mean of several figures of one sample."""
    moves = np.mean([one.moves for one in every], axis=0)
    return Estimate(value=sum(one.value for one in every) / len(every), moves=moves)


def change(now: Estimate, before: Estimate | None) -> str:
    """What was gained or lost; words where it is within its error."""
    if before is None:
        return "–"
    difference = estimates.paired_difference(now, before)
    return estimates.rounded(difference) + ("" if estimates.is_clear(difference) else ", not clear")


def headed(name: str, run: Run) -> list[str]:
    """A column for each seed."""
    return [f"{name}, seed {seed}" for seed in run.seeds]


def of_gkd(run: Run, records: Records) -> str:
    """A child on its way through GKD."""
    place, step = run.place(run.bld[0]), run.profile.gkd.batch_sequences * run.profile.corpus.sequence_length
    layers, blocks = child(run, place, records)
    tokens = read_tensors(run.workspace, place.corpus.tokens, ["test"])["test"][: run.profile.evaluate.sequences]
    documents = documents_of(place.corpus, "test", run.workspace)[: len(tokens)]
    targets = parent_targets(place.reader.model(), tokens, HOST)
    points = [count // step for count in run.gkd]
    settings = run.profile.gkd.model_copy(
        update={
            "steps": STEPS,
            "warmup_fraction": 4 / STEPS,
            "schedule": "constant",
            "evaluate_every": math.gcd(*points),
            "recorded_gib": 0.0,  # no disk; the result is the same
        }
    )
    found: dict[int, list[Estimate]] = {count: [] for count in (0, *points)}
    cpu = dict.fromkeys(found, 0.0)
    for count in found:
        for seed in run.seeds:
            own = settings.model_copy(update={"seed": seed})
            teacher = record_teacher(place.parent, place.corpus, own, run.workspace, HOST)
            point = measured(count, job_of(layers, blocks, teacher, own, HOST), targets, run.workspace)
            found[count].append(estimates.mean(point.kl, documents))
            cpu[count] += point.cpu_seconds / len(run.seeds)
            say(f"GKD, seed {seed}, {count * step:,} tokens: KL {estimates.rounded(found[count][-1].metric)}")
    rows, before = list[list[str]](), None
    for count, every in found.items():
        both = mean_of(every)
        figures = [*(estimates.rounded(one.metric) for one in every), change(both, before)]
        rows.append([f"{count * step:,}", *figures, f"{cpu[count]:.0f}"])
        before = both
    header = ["tokens", *headed("KL", run), "change", "CPU-s"]
    return (
        f"## GKD\n\nA child with {run.profile.search_space.ffn[-1]} in layers {', '.join(map(str, run.child))}, in "
        f"closed form. KL on {len(tokens)} test sequences of {len(set(documents))} documents, with the weights "
        f"that were best on {settings.validation_sequences} validation sequences until then. Steps of "
        f"{settings.batch_sequences} sequences at {settings.learning_rate:g}, a rate that does not fall, so that "
        "each row is also the end of a shorter training. CPU-seconds of one training, the parent beside it.\n\n"
        + table(header, rows)
    )


def measured(count: int, job: GlobalJob, targets: ParentTargets, workspace: Path) -> Point:
    """The child after so many steps."""
    path = workspace / job.folder / f"test-{count}.json"
    if path.exists():
        return read_value(path, Point)
    model, cpu = built(job, workspace, HOST), 0.0
    if count:
        kl_after(count, job, workspace, HOST, watch=lambda seen: say(f"GKD step {seen.step}: {seen.text}"))
        there = open_checkpoint(workspace / job.folder)
        assert there is not None and there.course.step == count, f"it was killed: delete {workspace / job.folder}"
        model, cpu = there.model(), there.course.cpu_seconds
    values = sequence_figures(model, targets, targets.tokens, HOST)["kl"]
    point = Point(kl=tuple(values.tolist()), cpu_seconds=cpu)
    write_value(path, point)
    return point


def child(run: Run, place: Place, records: Records) -> tuple[list[LayerChoice], list[BlockRecord]]:
    """A child with a narrower FFN in some layers, in closed form."""
    depth, label = place.reader.depth, run.profile.search_space.ffn[-1]
    every = [job for job in run.jobs(place, records, run.child) if job.seed == run.seeds[0]]
    jobs = [untrained(job) for job in every if job.variant == label]
    say(f"a child: {len(jobs)} blocks")
    place.bld(jobs)
    library = BlockLibrary(run.workspace)
    blocks = [block for job in jobs if (block := library.find(job.key))]
    return [LayerChoice(ffn=label) if layer in run.child else LayerChoice() for layer in range(depth)], blocks


if __name__ == "__main__":
    main()
