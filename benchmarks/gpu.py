"""The chain on a GPU, beside the CPU: record, BLD, scores, GKD in bfloat16; costs; FLOP utilisation of each stage.

    .venv/bin/python -m benchmarks.gpu --prepare DIR     # where everything is installed: parent and text into DIR
    .venv/bin/python -m benchmarks.gpu DIR               # on the machine with the GPU
    .venv/bin/python -m benchmarks.gpu DIR --prepare DIR --device cpu --tiny  # this script itself, in half a minute

The machine needs no network, and of Python torch, transformers, safetensors, accelerate, pydantic, PyYAML and psutil.
Prefect, MLflow, CVXPY and datasets may be missing: the stages are called as plain functions, and the child has the
narrower FFN in that half of its layers where it scores best. Costs need gguf too, and are left out without it.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from blocks.runtime import configure

configure()

import torch  # noqa: E402

from blocks.compute import HOST, Compute  # noqa: E402
from blocks.files import write_text  # noqa: E402
from blocks.library import read_value, write_value  # noqa: E402
from blocks.records import BlockRecord, CorpusInfo, LayerChoice, LayerRecord, ParentInfo, Score, Value  # noqa: E402
from profiles.load import load_profile  # noqa: E402
from profiles.schema import Profile  # noqa: E402
from tasks.distill.bld import distill  # noqa: E402
from tasks.distill.gkd import GKDResult  # noqa: E402
from tasks.distill.gkd_job import distill_globally, job_of  # noqa: E402
from tasks.distill.gkd_targets import record_teacher  # noqa: E402
from tasks.distill.jobs import jobs_of  # noqa: E402
from tasks.distill.record import open_parent, record_layer, recording_of  # noqa: E402
from tasks.planning import effort, memory  # noqa: E402
from tasks.score.scoring import ScoringSet, open_suffix, score_batch, score_sequences  # noqa: E402

MadeT = TypeVar("MadeT")
CHAIN = ["hardware.must_run=[]", "search_space.attention=[kv1]", "search_space.ffn=[ffn768]", "bld.max_attempts=1"]
CHAIN += ["hardware.micro_batch_tokens=16384", "gkd.batch_sequences=32", "gkd.recorded_gib=0", "bld.batch_sequences=32"]
CHAIN += ["bld.closed_form=false"]  # the utilisation is of products; the fits are solves in float64
TINY = ["search_space.attention=[kv1]", "search_space.ffn=[ffn96]", "bld.closed_form=false", "gkd.steps=4"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # of scores on the device, against float32 on the CPU, relative


class Prepared(Value):
    """What `--prepare` left in a folder."""

    parent: ParentInfo
    corpus: CorpusInfo


class Stage(Value):
    """A stage: seconds on the device, FLOPs of the model alone, and the most memory that torch held."""

    name: str
    seconds: float
    flops: float
    peak_bytes: int


def main() -> None:
    """Prepare, or run and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, nargs="?")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="write parent and text into DIR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny parent, to try this script")
    options = parser.parse_args()
    if options.device.startswith("cuda") and options.workspace and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here: name --device cpu, which tries the script and measures no GPU")
    profile = load_profile("tiny", TINY) if options.tiny else load_profile("smollm2-cpu", CHAIN)
    if options.prepare:
        prepare(profile, options.prepare.resolve())
    if options.workspace:
        if (options.workspace / "record").exists():
            parser.error(
                f"{options.workspace} holds what a run left, which would not be timed again: --prepare another"
            )
        workspace = options.workspace.resolve()
        text = run(profile, workspace, options.device)
        write_text(workspace / "gpu.md", text)
        print(text)


def prepare(profile: Profile, workspace: Path) -> None:
    """Parent and tokens, for a machine that can make neither."""
    from tasks.inputs.corpus import prepare_corpus
    from tasks.inputs.corpus_sources import iterate_documents
    from tasks.inputs.parent import prepare_parent

    workspace.mkdir(parents=True, exist_ok=True)
    parent = prepare_parent(profile.parent, workspace, lambda: iterate_documents(profile.corpus))
    corpus = prepare_corpus(profile.corpus, workspace / parent.folder, parent.fingerprint, workspace)
    write_value(workspace / "prepared.json", Prepared(parent=parent, corpus=corpus))


class Chain:
    """The stages on one device, each timed."""

    def __init__(self, profile: Profile, workspace: Path, device: str, precision: str) -> None:
        there = read_value(workspace / "prepared.json", Prepared)
        self.parent, self.corpus, self.workspace = there.parent, there.corpus, workspace
        self.compute = Compute(
            device=device,
            dtype=getattr(torch, precision),
            attention="sdpa",
            micro_batch_tokens=profile.hardware.micro_batch_tokens,
        )
        hardware = profile.hardware.model_copy(update={"compute_precision": precision})
        self.profile = profile.model_copy(update={"hardware": hardware})
        self.reader = open_parent(workspace / self.parent.folder, self.compute)
        self.shape = effort.shape_of(self.profile, self.reader)
        self.stages: list[Stage] = []

    def timed(self, name: str, work: Callable[[], MadeT], flops: float) -> MadeT:
        """Do it, and note how long it took."""
        on_gpu = self.compute.device.startswith("cuda")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        made = work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() if on_gpu else 0
        self.stages.append(Stage(name=name, seconds=seconds, flops=flops, peak_bytes=peak))
        return made

    def run(self) -> tuple[list[LayerRecord], list[BlockRecord], list[Score], GKDResult]:
        """Record, BLD, scores, GKD."""
        profile, shape, depth = self.profile, self.shape, self.reader.depth
        place: tuple[Path, Compute] = (self.workspace, self.compute)
        wanted = recording_of(profile, self.parent, self.corpus, self.compute)
        work = effort.record_work(shape)
        records = self.timed("record", lambda: [record_layer(i, wanted, *place) for i in range(depth)], work.product)
        jobs, work = jobs_of(profile, wanted, records, self.reader), effort.distill_work(shape, depth)
        blocks = self.timed("distill", lambda: [distill(job, *place) for job in jobs], work.product / effort.ATTEMPTS)
        work = effort.score_work(shape, range(depth))
        scores = self.timed("score", lambda: self.scored(records, blocks), work.product)
        layers = chosen(scores, depth)
        work, kept = effort.teacher_work(shape), self.share(layers)
        teacher = self.timed(
            "GKD parent",
            lambda: record_teacher(self.parent, self.corpus, profile.gkd, *place),
            work.product,
        )
        job, work = job_of(layers, blocks, teacher, profile.gkd, self.compute), effort.gkd_work(shape, *kept)
        result = self.timed("GKD child", lambda: distill_globally(job, *place), work.product)
        return records, blocks, scores, result

    def scoring_set(self, records: Sequence[LayerRecord]) -> ScoringSet:
        """The sequences that are scored."""
        settings = self.profile.scoring
        length = settings.tokens_per_sequence or self.corpus.sequence_length
        return ScoringSet(corpus=self.corpus, last=records[-1], count=settings.sequences, length=length)

    def scored(self, records: Sequence[LayerRecord], blocks: Sequence[BlockRecord]) -> list[Score]:
        """Of every block."""
        asked, found = self.scoring_set(records), []
        for layer, record in enumerate(records):
            work = [(block, asked.sequences) for block in blocks if block.layer == layer]
            found += score_sequences(work, record, asked, self.parent, self.workspace, self.compute)
        return found

    def again(self, compute: Compute, records: Sequence[LayerRecord], blocks: Sequence[BlockRecord]) -> list[float]:
        """KL of these blocks from the tokens on, with nothing stored, computed as `compute` says."""
        asked = replace(self.scoring_set(records), last=records[-1].model_copy(update={"boundary": None}))
        suffix = open_suffix(self.workspace / self.parent.folder, self.workspace, asked, compute)
        found = []
        for block in sorted(blocks, key=lambda each: each.layer):
            states = suffix.entering(block.layer)
            (score,) = score_batch(suffix, [block], states, asked.sequences, self.workspace)
            found.append(float("nan") if score is None else sum(score.kl) / len(score.kl))
        return found

    def share(self, layers: Sequence[LayerChoice]) -> tuple[float, float]:
        """Of the layers' parameters that a child keeps, and the parent's layers that have its FLOPs."""
        ffns = {v.label: v for v in self.shape.variants["ffn"]}
        own, narrow = self.shape.own("ffn"), [ffns[layer.ffn] for layer in layers if layer.ffn != "parent"]
        lost = sum(self.shape.parameters(own) - self.shape.parameters(v) for v in narrow)
        spared = sum(self.shape.flops(own) - self.shape.flops(v) for v in narrow)
        depth = self.reader.depth
        return 1 - lost / depth / self.shape.layer_parameters, depth - spared / self.shape.layer()


def chosen(scores: Sequence[Score], depth: int) -> tuple[LayerChoice, ...]:
    """The half of the layers where a narrower FFN costs least get it."""
    narrow = sorted((score for score in scores if score.subblock == "ffn"), key=lambda score: score.kl)
    taken = {score.layer: score.variant for score in narrow[: depth // 2]}
    return tuple(LayerChoice(ffn=taken.get(layer, "parent")) for layer in range(depth))


def peak_flops(device: str, precision: str) -> float:
    """FLOP/s of the largest square product, the best of five."""
    side, best = 8192 if device.startswith("cuda") else 1024, 0.0
    one = torch.randn(side, side, dtype=getattr(torch, precision), device=device)
    for _ in range(5):
        started = time.perf_counter()
        one @ one
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def costs(chain: Chain) -> str:
    """Seconds of the parent's subblocks and of the variants, in the engine that profiles name `torch`."""
    try:
        from tasks.measure.costs import CostRequest, measure_costs
    except ImportError as error:
        return f"Costs were not measured: {error}."
    hardware = chain.profile.hardware.model_copy(update={"device": chain.compute.device, "precision": "bfloat16"})
    if chain.compute.device == "cpu":
        hardware = hardware.model_copy(update={"precision": "float32"})
    profile = chain.profile.model_copy(update={"hardware": hardware})
    found = measure_costs(CostRequest.of(profile, chain.parent), chain.workspace)
    first = [cost for cost in found.costs if cost.batch_size == found.costs[0].batch_size]
    times = [f"{1e3 * cost.prefill_seconds:.3f} | {1e6 * cost.decode_seconds_per_token:.1f}" for cost in first]
    rows = [f"| {cost.subblock} {cost.variant} | {time} |" for cost, time in zip(first, times, strict=True)]
    said = "Costs in torch, eager: the engine has no CUDA graphs, so small kernels' launches are in them."
    return "\n".join([said, "", "| variant | prefill, ms | decode, us |", "|---|---:|---:|", *rows])


def run(profile: Profile, workspace: Path, device: str) -> str:
    """All of it, as text."""
    precision = "bfloat16" if device.startswith("cuda") else "float32"
    chain, peak = Chain(profile, workspace, device, precision), peak_flops(device, precision)
    started = time.perf_counter()
    records, blocks, scores, result = chain.run()
    seconds = time.perf_counter() - started
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "a CPU: nothing here says anything of a GPU"
    lines = [
        f"# {chain.parent.name} on {name}",
        f"torch {torch.__version__}, {precision}; largest square product {peak / 1e12:.3f} TFLOP/s; the chain took "
        f"{seconds:.0f} s.",
        "| stage | seconds | FLOPs | utilisation, % | peak memory, GiB | planned, GiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    kept = chain.share(chosen(scores, chain.reader.depth))[0]
    planned = {need.stage: need.bytes for need in memory.needs_of(chain.shape, kept)}
    for stage in chain.stages:
        used = 100 * stage.flops / stage.seconds / peak
        sizes = f"{stage.peak_bytes / 2**30:.2f} | {planned[stage.name] / 2**30:.2f}"
        lines.append(f"| {stage.name} | {stage.seconds:.1f} | {stage.flops:.3e} | {used:.1f} | {sizes} |")
    lines.append(f"\nGKD: validation KL {result.curve[0][1]:.4f} before, {result.best_kl:.4f} at its best.")
    lines.append(agreement(chain, records, blocks))
    return "\n".join([*lines, "", costs(chain)]) + "\n"


def agreement(chain: Chain, records: Sequence[LayerRecord], blocks: Sequence[BlockRecord]) -> str:
    """Scores of the last three layers' blocks on the device against those of the CPU in float32."""
    some = [block for block in blocks if block.layer >= chain.reader.depth - 3 and block.status == "trained"]
    here = chain.again(replace(HOST, micro_batch_tokens=chain.compute.micro_batch_tokens), records, some)
    said = []
    for precision in dict.fromkeys(("float32", str(chain.compute.dtype).removeprefix("torch."))):
        there = chain.again(chain.compute.with_weights(getattr(torch, precision)), records, some)
        off = max(abs(a - b) / a for a, b in zip(here, there, strict=True))
        word = "equal" if off <= TOLERANCE[precision] else "NOT equal"
        said.append(f"{precision}: {word}, off by at most {off:.1e} (allowed {TOLERANCE[precision]:g})")
    return (
        f"Scores of {len(some)} blocks on {chain.compute.device}, relative to the CPU's in float32: {'; '.join(said)}."
    )


if __name__ == "__main__":
    main()
