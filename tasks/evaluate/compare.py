"""Parent, child and baselines compared on the same text, the same benchmark items and after the same GKD tokens.

A contender is an architecture with the trained blocks it is made of, before or after GKD. Its evaluation is stored
under a digest of everything it depends on, so a run that was killed evaluates nothing twice.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blocks.child import assemble, for_passes, library_of
from blocks.compute import Compute
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.images import features_in, see
from blocks.library import digest_of, made_once, read_tensors
from blocks.parent import in_dtype
from blocks.records import (
    Architecture,
    BlockRecord,
    Candidate,
    CorpusInfo,
    Floor,
    HeldTime,
    LayerChoice,
    Metric,
    OnCapability,
    ParentInfo,
    Throughput,
    Value,
)
from profiles.schema import GENERAL, GKD, MINITRON, Evaluate
from tasks.distill.gkd import GKDResult, Watch, no_watch
from tasks.distill.gkd_job import distill_globally, job_of
from tasks.distill.gkd_student import load_trained
from tasks.distill.gkd_targets import TeacherRecord
from tasks.distill.record import open_parent
from tasks.engines.base import LoadOptions
from tasks.engines.llama_cpp import LlamaCpp
from tasks.evaluate.quality import (
    BenchmarkResult,
    ParentTargets,
    Quality,
    parent_targets,
    quality_of,
    retention,
    run_benchmarks,
    sequence_figures,
    session_figures,
)
from tasks.gguf.reader import read_gguf
from tasks.inputs.corpus import documents_of, weights_of
from tasks.inputs.precision import as_written
from tasks.running.progress import Progress, no_progress

Rows = int | tuple[int, ...]  # the first so many sequences of a split, or these
SHIPPED = "shipped"  # the parent in the file that it came in, as a contender
VERSION = 1
EVALUATION_VERSION = 4  # benchmarks read a question once, in float32 after the logits


class Contender(Value):
    """A model that is compared. `blocks`: the trained blocks of its architecture.

    file: the GGUF file that it is served from, relative to the workspace, where the search chose types of numbers
    or named one for the KV cache (tasks/evaluate/typed_file.py). rounded: how it was trained as that file holds it.
    cache: the type of number of the KV cache that llama.cpp serves it with, where the profile names one.
    """

    name: str
    architecture: Architecture
    blocks: tuple[BlockRecord, ...]
    gkd: GKDResult | None = None
    file: str = ""
    rounded: GKDResult | None = None
    cache: str = ""

    @property
    def stage(self) -> Literal["parent", "assembled", "distilled"]:
        """Parent, or a child before or after GKD."""
        return "parent" if self.name in ("parent", SHIPPED) else "distilled" if self.gkd else "assembled"

    @property
    def key(self) -> str:
        """Digest of what the model is made of: choices, blocks, trained weights. Its name is not part of it."""
        more = {"head": self.architecture.head} if self.architecture.head else {}
        more |= {"rounded": self.rounded.weights.sha256} if self.rounded else {}
        return digest_of(
            **more,
            layers=self.architecture.layers,
            blocks=[block.key for block in self.blocks],
            gkd=self.gkd.weights.sha256 if self.gkd else "",
            version=VERSION,
        )

    @property
    def served_key(self) -> str:
        """Digest of the weights that it is served with: a file of its own, which its name tells from others, holds them
        rounded. The shipped file holds the parent's own.
        """
        rounded = self.file and self.name != SHIPPED
        return digest_of(model=self.key, file=Path(self.file).name) if rounded else self.key


class Lineage(Value):
    """What a finished run writes beside its child: the parent, the text that stages saw, and every block of the child
    by digest. rival: the best baseline. held_times, floors: the limits that the child was measured for. They, the texts
    of capabilities and the rival are missing where an earlier version wrote it.
    """

    parent: ParentInfo
    corpus: CorpusInfo
    child: Contender
    capabilities: tuple[CorpusInfo, ...] = ()
    rival: Contender | None = None
    held_times: tuple[HeldTime, ...] = ()
    floors: tuple[Floor, ...] = ()


LINEAGE = "lineage.json"


class Evaluation(Value):
    """Quality on the test sequences, their single values (`samples`) and documents, and results of the benchmarks.

    capabilities: the same on the test sequences of each; they are stored by themselves.
    """

    quality: Quality
    samples: dict[str, tuple[float, ...]]
    documents: tuple[int, ...] = ()
    benchmarks: dict[str, BenchmarkResult]
    capabilities: dict[str, "Evaluation"] = {}


def blocks_of(layers: Sequence[LayerChoice], blocks: Sequence[BlockRecord]) -> tuple[BlockRecord, ...]:
    """Those of `blocks` that a choice per layer uses."""
    wanted = set()
    for layer, choice in enumerate(choice.bare for choice in layers):
        if choice.coupled:
            wanted.add((layer, "block", choice.block_label))
        else:
            wanted |= {(layer, "attention", choice.attention), (layer, "ffn", choice.ffn)}
    return tuple(block for where, block in library_of(list(blocks)).items() if where in wanted)


def contender(name: str, architecture: Architecture, blocks: Sequence[BlockRecord]) -> Contender:
    """A contender before GKD, with those of `blocks` that its architecture uses."""
    return Contender(name=name, architecture=architecture, blocks=blocks_of(architecture.layers, blocks))


def parent_contender(architecture: Architecture) -> Contender:
    """The parent as a contender; `architecture` gives its totals."""
    parents = architecture.model_copy(
        update={
            "method": "parent",
            "head": "",
            "layers": (LayerChoice(),) * len(architecture.layers),
            "score": 0.0,
            "score_se": 0.0,
            "totals": architecture.parent_totals,
        }
    )
    return Contender(name="parent", architecture=parents, blocks=())


def served(
    which: Contender, parent: ParentInfo, workspace: Path, compute: Compute, dtype: torch.dtype = torch.float32
) -> DeciLMForCausalLM:
    """The contender with the weights that it is served with: those of its file where it has one, else rounded to
    `dtype` as in an export.
    """
    if not which.file:
        return as_written(build(which, parent, workspace, compute), dtype)
    model: Any = read_gguf(workspace / which.file)
    see(model.model.embed_tokens, features_in(workspace / parent.folder))
    whole: DeciLMForCausalLM = in_dtype(model.to(compute.device), compute.dtype)
    return whole


def figures_of(
    which: Contender,
    targets: ParentTargets,
    workspace: Path,
    compute: Compute,
    model: Callable[[], Any],
) -> dict[str, Tensor]:
    """Loss, KL and agreement on the text of the targets. They are llama.cpp's own where the profile names a KV cache
    for it, since nothing else rounds keys and values as it does. model: gives the contender in torch.
    """
    if not which.cache:
        return sequence_figures(model(), targets, targets.tokens, compute)
    length = targets.tokens.shape[1]
    how = LoadOptions(threads=torch.get_num_threads(), context_tokens=length, kv_precision=which.cache)
    with closing(LlamaCpp().load(workspace / which.file, how)) as session:
        return session_figures(session, targets)


def build(which: Contender, parent: ParentInfo, workspace: Path, compute: Compute) -> DeciLMForCausalLM:
    """The contender as a model, GKD weights included, whatever types its numbers shall have."""
    folder = workspace / parent.folder

    def made(on: Compute) -> DeciLMForCausalLM:
        model = assemble(open_parent(folder, on), library_of(list(which.blocks)), which.architecture, workspace)
        if which.gkd is not None:
            load_trained(model, read_tensors(workspace, which.gkd.weights, device=on.device))
        return model

    return for_passes(made, compute, open_parent(folder, compute).weight_bytes)


def distill_contender(
    which: Contender,
    teacher: TeacherRecord,
    settings: GKD,
    workspace: Path,
    compute: Compute,
    devices: Sequence[str] = (),
    watch: Watch = no_watch,
) -> Contender:
    """GKD of a contender, stored under a digest of all that decides it; on several devices where they are named."""
    job = job_of(bare_layers(which), which.blocks, teacher, settings, compute)
    return which.model_copy(update={"gkd": distill_globally(job, workspace, compute, devices, watch), "file": ""})


def bare_layers(which: Contender) -> tuple[LayerChoice, ...]:
    """The layers without types of number: GKD is in float, the types come after."""
    return tuple(choice.bare for choice in which.architecture.layers)


@lru_cache(maxsize=1)
def targets_on(
    split: str, rows: Rows, parent: ParentInfo, corpus: CorpusInfo, workspace: Path, compute: Compute
) -> ParentTargets:
    """What the parent says about sequences of a split of the corpus, or of a capability's text."""
    folder = workspace / parent.folder
    model = for_passes(lambda on: open_parent(folder, on).model(), compute, open_parent(folder, compute).weight_bytes)
    return targets_of(model, split, rows, corpus, workspace, compute)


def targets_of(
    parent_model: Any, split: str, rows: Rows, corpus: CorpusInfo, workspace: Path, compute: Compute
) -> ParentTargets:
    """As `targets_on`, of a parent that is in memory."""
    wanted = slice(rows) if isinstance(rows, int) else list(rows)
    found = parent_targets(parent_model, read_tensors(workspace, corpus.tokens, [split])[split][wanted], compute)
    # all words of the corpus count alike in the final comparison; of a capability those count that show it
    weights = weights_of(corpus, split, workspace) if corpus.judged_by_weight else None
    return replace(found, weights=None if weights is None else weights[wanted])


def evaluation_path(
    which: Contender,
    parent: ParentInfo,
    corpus: CorpusInfo,
    settings: Evaluate,
    compute: Compute,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Where a contender's evaluation lies, relative to the workspace."""
    asked = settings.model_dump(include={"sequences", "benchmarks", "benchmark_limit", "benchmark_package"})
    formats = {"weights": dtype, "products": compute.dtype}
    asked |= {name: str(one) for name, one in formats.items() if one != torch.float32}
    asked |= {"cache": which.cache} if which.cache else {}
    asked |= {"weighed": True} if corpus.judged_by_weight else {}
    key = digest_of(
        model=which.served_key, parent=parent.fingerprint, corpus=corpus.fingerprint, asked=asked, v=EVALUATION_VERSION
    )
    return f"evaluations/{key}.json"


def evaluate_contender(
    which: Contender,
    source: tuple[ParentInfo, CorpusInfo],
    settings: Evaluate,
    workspace: Path,
    compute: Compute,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> Evaluation:
    """Loss, KL and agreement on the test split, and the benchmarks, with weights rounded to `dtype` as in an export.

    The parent, with which all are compared, keeps its own weights whatever the children are exported in. progress: of
    the benchmarks, which take longest.
    """
    parent, corpus = source
    dtype = torch.float32 if which.stage == "parent" else dtype

    def made() -> Evaluation:
        model = cache(lambda: served(which, parent, workspace, compute, dtype))
        targets = targets_on("test", settings.sequences, parent, corpus, workspace, compute)
        figures = figures_of(which, targets, workspace, compute, model)
        documents = documents_of(corpus, "test", workspace)[: settings.sequences]
        return Evaluation(
            quality=quality_of(figures, documents),
            documents=documents,
            samples={name: tuple(values.tolist()) for name, values in figures.items()},
            benchmarks=run_benchmarks(
                model(),
                workspace / parent.folder,
                settings.benchmarks,
                settings.benchmark_limit,
                settings.benchmark_package,
                progress,
            )
            if settings.benchmarks
            else {},
        )

    path = workspace / evaluation_path(which, parent, corpus, settings, compute, dtype)
    return made_once(path, Evaluation, workspace, made)


def kl_on_each(found: Evaluation) -> dict[str, Metric]:
    """The KL on every capability, and on the corpus."""
    return {GENERAL: found.quality.kl} | {name: one.quality.kl for name, one in found.capabilities.items()}


def on_capability(settings: Evaluate, corpus: CorpusInfo) -> Evaluate:
    """What is evaluated on the text of a capability: all its test sequences, and no benchmarks."""
    return settings.model_copy(update={"sequences": corpus.test_sequences, "benchmarks": ()})


def candidate(
    which: Contender,
    found: Evaluation,
    parents: Evaluation,
    speed: Mapping[str, Sequence[Throughput]],
    bytes_per_parameter: float,
    scored_by: str,
    workspace: Path,
) -> Candidate:
    """A model of the final table; its speed is that of the first scenario."""
    summed = which.stage == "assembled" and which.name != MINITRON and scored_by == "kl"  # of blocks that it has not
    totals, file_bytes = which.architecture.totals[0], (workspace / which.file).stat().st_size if which.file else 0
    weights = math.ceil(totals.parameters * bytes_per_parameter)
    shipped = which.name == SHIPPED  # its totals are those of the parent in the profile's precision
    fast = next(iter(speed.get(which.name, ())), None)
    return Candidate(
        name=which.name,
        stage=which.stage,
        parameters=totals.parameters,
        weight_bytes=file_bytes or weights,
        memory_bytes=totals.memory_bytes + (file_bytes - weights if shipped else 0),
        file_bytes=file_bytes,
        cache=which.cache,
        prefill_tokens_per_second=fast.prefill_tokens_per_second if fast else None,
        decode_tokens_per_second=fast.decode_tokens_per_second if fast else None,
        loss=found.quality.loss,
        kl=found.quality.kl,
        top1_agreement=found.quality.top1_agreement,
        benchmarks={name: result.metric for name, result in found.benchmarks.items()},
        retention=retention(found.benchmarks, parents.benchmarks) if found.benchmarks else None,
        predicted_kl=which.architecture.score if summed else None,
        runtime_seconds=fast.runtime_seconds if fast else None,
        gains=fast.gains if fast else None,
        gkd_tokens=which.gkd.tokens if which.gkd else 0,
        rounded_kl=(which.rounded.curve[0][1], which.rounded.best_kl) if which.rounded else None,
        gkd_kept_start=which.gkd.best_kl if which.gkd and which.gkd.best_step == 0 else None,
        layers=which.architecture.layers,
        samples=found.samples,
        sample_documents=found.documents,
        correct={name: result.correct for name, result in found.benchmarks.items()},
        item_groups={name: result.groups for name, result in found.benchmarks.items()},
        capabilities={
            name: OnCapability(
                **{figure: getattr(one.quality, figure) for figure in Quality.model_fields},
                samples=one.samples,
                documents=one.documents,
            )
            for name, one in found.capabilities.items()
        },
    )
