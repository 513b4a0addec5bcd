"""`puzzle fuse`: a child whose FFNs without an attention between them run beside each other, as one wide FFN, and what
that costs in quality.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.errors import PuzzleError
from blocks.estimates import rounded
from blocks.fusion import Run, fuse, parts_named, refuse_family, runs_of
from blocks.library import read_tensors, read_value
from blocks.parent import config_of
from blocks.records import Metric
from tasks.evaluate.compare import LINEAGE, Lineage
from tasks.evaluate.quality import mean_metric, parent_targets, sequence_figures
from tasks.export.child_tokenizer import open_tokenizer
from tasks.export.folder import export_folder, layer_sizes
from tasks.export.formats import own_precision, refuse_target
from tasks.export.logits_check import Step, no_step
from tasks.inputs.children import in_precision, open_child
from tasks.inputs.corpus import documents_of, refuse_images, tokens_of_file
from tasks.inputs.precision import as_written

FILE_TOKENS = 256  # of a sequence of a text that a person names


@dataclass(frozen=True, kw_only=True)
class FusionText:
    """Tokens (S, T) that both children are compared on, and the document of each sequence; none where not known."""

    about: str
    tokens: Tensor
    documents: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A fused child. kl: from the child before, in nats per token. losses: the LM loss of that child, and its own.
    rise: of the loss, from pairs of sequences.
    """

    path: Path
    runs: tuple[Run, ...]
    kl: Metric
    losses: tuple[Metric, Metric]
    rise: Metric
    notes: tuple[str, ...]


def fusible(child: Path, target: Path, spans: Sequence[str] = ()) -> list[Run]:
    """The runs of FFNs of a child's folder that can be fused, or the parts of them that are named. Raises PuzzleError
    where there are none, or where the fused child cannot be written to the folder `target`.
    """
    if child.is_file():
        raise PuzzleError(f"{child} is a file: write it as a folder first, `puzzle export --format transformers`.")
    config = config_of(child)
    if getattr(config, "quantization_config", None):
        raise PuzzleError(f"{child} holds integers: fuse the child that it was exported from, and export that again.")
    runs = runs_of(config)
    if not runs:
        raise PuzzleError(
            f"no FFN of {child} comes right after another: an attention or a linear FFN stands between any two. Name a "
            "child that has layers without attention (no_op in search_space.attention)."
        )
    refuse_family(config)
    refuse_target(child, "transformers", target)
    return parts_named(runs, spans) if spans else runs


def fusion_text(child: Path, sequences: int, file: Path | None = None) -> FusionText:
    """The text that is named, or the test text of the run that made a child. Raises PuzzleError without either."""
    if file is not None:
        tokenizer = open_tokenizer(child)
        if tokenizer is None:
            raise PuzzleError(f"--text needs the tokenizer of the child, and none lies in {child}.")
        return FusionText(about=file.name, tokens=tokens_of_file(file, tokenizer, sequences, FILE_TOKENS))
    lineage = child.resolve().parent / LINEAGE
    if not lineage.is_file():
        raise PuzzleError(
            f"beside {child} lies no run whose test text would tell the loss: name a text with --text FILE."
        )
    corpus, workspace = read_value(lineage, Lineage).corpus, lineage.parents[2]
    refuse_images(corpus, "name a text with --text FILE: the two are compared on words")
    tokens = read_tensors(workspace, corpus.tokens, ["test"])["test"][:sequences].long()
    documents = documents_of(corpus, "test", workspace)[:sequences]
    return FusionText(about="the run's test text", tokens=tokens, documents=documents)


def fuse_child(
    child: Path,
    runs: Sequence[Run],
    target: Path,
    text: FusionText,
    compute: Compute,
    step: Step = no_step,
) -> Fused:
    """Write a child's folder with runs of FFNs fused, and compare the two on a text.

    They are compared with the weights that their folders hold, products in float32. Raises ExportError when the folder,
    loaded again, does not give the fused child's logits.
    """
    dtype = getattr(torch, own_precision(child))
    step("the child on the text")
    model: Any = open_child(child, torch.float32)
    model.to(compute.device)
    targets = parent_targets(model, text.tokens, compute)

    def figures() -> dict[str, Tensor]:
        return sequence_figures(model, targets, text.tokens, compute)

    before, was, alone = figures(), _working(model.config), list[str]()
    for run in runs if len(runs) > 1 else ():
        step(f"layers {run[0]}-{run[-1]} fused alone on the text")
        with _restored(model, run):
            fuse(model, [run])
            alone.append(f"; alone KL {rounded(mean_metric(figures()['kl'], text.documents))}")
    step("the fused child on the text")
    fuse(model, runs)
    as_written(model, dtype)
    after = figures()
    kl = mean_metric(after["kl"], text.documents)
    losses = mean_metric(before["loss"], text.documents), mean_metric(after["loss"], text.documents)
    rise = mean_metric(after["loss"] - before["loss"], text.documents)
    what = "documents" if text.documents else "sequences"
    notes = (
        *_told(model.config, runs, alone),
        f"layers that compute anything: {_working(model.config)} instead of {was}",
        f"FFNs beside each other instead of one after the other, on {text.about} ({text.tokens.numel():,} tokens, "
        f"{kl.n} {what}): KL {rounded(kl)} nats from the child, LM loss {losses[1].value:.4f} instead of "
        f"{losses[0].value:.4f}, a difference of {rounded(rise)}",
    )
    step("writing, then reading back to compare logits")
    in_precision(model.to("cpu"), dtype)
    export_folder(model, child, target, _card(child, notes))
    return Fused(path=target, runs=tuple(runs), kl=kl, losses=losses, rise=rise, notes=notes)


def _working(config: Any) -> int:
    """How many layers have an attention or an FFN."""
    return sum(not (block["attention"]["no_op"] and block["ffn"]["no_op"]) for block in config.block_configs)


@contextmanager
def _restored(model: Any, run: Run) -> Iterator[None]:
    """The layers of a run are after the block what they were before it."""
    layers, blocks = model.model.layers, model.config.block_configs
    kept = [(layer, layers[layer], blocks[layer]) for layer in run]
    yield
    for layer, module, block in kept:
        layers[layer], blocks[layer] = module, block


def _told(config: Any, runs: Sequence[Run], alone: Sequence[str]) -> list[str]:
    """A sentence on each wide FFN of a fused child. alone: what each costs by itself, in words."""
    widths = [(layer_sizes(config, run[0])[1] or (0,))[0] for run in runs]
    return [
        f"fused: one FFN of width {width:,} in layer {run[0]} for those of layers {', '.join(map(str, run))}{cost}"
        for run, width, cost in zip(runs, widths, alone or [""] * len(runs), strict=True)
    ]


def _card(child: Path, notes: Sequence[str]) -> str:
    """The child's card, and what is no longer as it says."""
    card = child / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {child.name}\n"
    said = "\n".join(f"* {note}" for note in notes)
    return f"{text}\n## Fused FFNs\n\nTable and figures above are of the child before its FFNs were fused.\n\n{said}\n"
