"""Replace-1-block scores (Puzzle, section 3): put one variant into the parent, measure KL(parent || child) and the
rise of the LM loss on held-out sequences. Lower is better; the parent's own subblock scores exactly 0.

Replacing layer i leaves everything before it as it was, so a score starts from the recorded states that enter the
layer, and the variants of a layer run through the rest of the parent as one batch. The divergence needs no vocabulary
sized target (blocks/divergence.py).

S = sequences, T = tokens, D = hidden_size.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocks.divergence import Head, Targets, kl_per_token, targets_of
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.library import digest_of, read_tensors, remember, write_value
from blocks.packed import pack_linears
from blocks.parent import Parent, load_subblock, run_subblock
from blocks.records import SUBBLOCKS, BlockRecord, CorpusInfo, LayerChoice, LayerRecord, ParentInfo, Score
from tasks.evaluate import mean_metric
from tasks.record import open_parent

VERSION = 3
BATCH_TOKENS = 4096
Shape = tuple[int, int]  # scored sequences, tokens of each


@dataclass(frozen=True, kw_only=True)
class ParentSuffix:
    """The whole parent in memory, with its targets on the scored sequences."""

    reader: Parent
    layers: list[DeciLMDecoderLayer]
    norm: nn.Module
    head: Head
    targets: Targets
    labels: Tensor  # (S, T - 1) token that follows each position
    contexts: list[dict[str, Any]]

    def finish(self, hidden: Tensor, layer: int) -> Tensor:
        """States (B, T, D) that leave `layer` -> states after the final norm."""
        for module, context in zip(self.layers[layer + 1 :], self.contexts[layer + 1 :], strict=True):
            hidden = module(hidden, **context)
        out: Tensor = self.norm(hidden)
        return out


@lru_cache(maxsize=1)
def open_suffix(folder: Path, workspace: Path, corpus: CorpusInfo, last: LayerRecord, shape: Shape) -> ParentSuffix:
    """Load the parent and compute its targets from the states that enter its last layer."""
    reader = open_parent(folder)
    layers = nn.ModuleList([reader.layer(layer) for layer in range(reader.depth)])
    pack_linears(layers)
    hidden = read_tensors(workspace, last.boundary, ["validation"])["validation"][: shape[0], : shape[1]]
    contexts = reader.contexts(hidden[:1])
    norm, head = reader.norm(), Head(reader.head_weight())
    with torch.no_grad():
        final = norm(layers[-1](hidden, **contexts[-1])).flatten(0, 1)
    tokens = read_tensors(workspace, corpus.tokens, ["validation"])["validation"][: shape[0], : shape[1]].long()
    return ParentSuffix(
        reader=reader,
        layers=list(layers),  # type: ignore[arg-type]
        norm=norm,
        head=head,
        targets=targets_of(final, head),
        labels=tokens[:, 1:],
        contexts=contexts,
    )


def score_key(record: BlockRecord, shape: Shape) -> str:
    """Content address of a score: the block (which carries parent and corpus) and the scored tokens."""
    return digest_of(block=record.key, shape=shape, version=VERSION)


def _score_path(record: BlockRecord, shape: Shape, workspace: Path) -> Path:
    return workspace / "scores" / f"{score_key(record, shape)}.json"


def stored_score(record: BlockRecord, shape: Shape, workspace: Path) -> Score | None:
    """The score of a block that was measured before, None when it was not or its file is damaged."""
    return remember(_score_path(record, shape, workspace), Score, lambda _: [], workspace)


def score_layer(
    records: Sequence[BlockRecord],
    layer: LayerRecord,
    last: LayerRecord,
    parent: ParentInfo,
    corpus: CorpusInfo,
    shape: Shape,
    workspace: Path,
) -> list[Score]:
    """Scores of all usable variants of one layer on the first `shape` (sequences, tokens) of the recorded validation
    states, each stored as soon as it is known."""
    usable = [record for record in records if record.status != "failed"]
    found = {record.key: stored_score(record, shape, workspace) for record in usable}
    missing = [record for record in usable if found[record.key] is None]
    if missing:
        suffix = open_suffix(workspace / parent.folder, workspace, corpus, last, shape)
        hidden = read_tensors(workspace, layer.boundary, ["validation"])["validation"][: shape[0], : shape[1]]
        group = max(1, BATCH_TOKENS // (shape[0] * shape[1]))
        for start in range(0, len(missing), group):
            batch = missing[start : start + group]
            for record, score in zip(batch, score_batch(suffix, batch, hidden, workspace), strict=True):
                if score is not None:
                    found[record.key] = score
                    write_value(_score_path(record, shape, workspace), score)
    return [score for score in found.values() if score is not None]


@torch.no_grad()
def score_batch(
    suffix: ParentSuffix, records: Sequence[BlockRecord], hidden: Tensor, workspace: Path
) -> list[Score | None]:
    """Scores of several variants of one layer, None where a KL is not a number; `hidden` (S, T, D) enters the layer."""
    started = time.perf_counter()
    layer = records[0].layer
    after = torch.cat([_replaced(suffix, record, hidden, workspace) for record in records])
    final = suffix.finish(after, layer)
    scores: list[Score | None] = []
    for record, states in zip(records, final.split(len(hidden)), strict=True):
        scores.append(_score(suffix, record, states, (time.perf_counter() - started) / len(records)))
    return scores


def _replaced(suffix: ParentSuffix, record: BlockRecord, hidden: Tensor, workspace: Path) -> Tensor:
    """States that leave the layer when the variant stands in it."""
    module, context = suffix.layers[record.layer], suffix.contexts[record.layer]
    variant = load_variant(suffix.reader, record, workspace)
    pack_linears(variant)
    if record.subblock == "block":
        return variant(hidden, **context)
    for subblock in SUBBLOCKS:
        source = variant if subblock == record.subblock else module
        out = run_subblock(source, subblock, hidden, context)
        hidden = hidden if out is None else hidden + out
    return hidden


def load_variant(reader: Parent, record: BlockRecord, workspace: Path) -> DeciLMDecoderLayer:
    """A layer that holds a record's trained subblock (both of a coupled one); the rest is left out."""
    choice = LayerChoice.alone(record.subblock, record.variant)
    module = reader.empty_layer(record.layer, choice).requires_grad_(False)
    if record.weights is not None:
        module.load_state_dict(read_tensors(workspace, record.weights))
    elif record.variant == "parent":
        whole = reader.layer(record.layer).state_dict()
        load_subblock(module, record.subblock, {n: whole[n] for n in module.state_dict()})  # type: ignore[arg-type]
    return module.eval()


def _score(suffix: ParentSuffix, record: BlockRecord, states: Tensor, seconds: float) -> Score | None:
    count, length = states.shape[:2]
    flat = states.flatten(0, 1)
    kl, rise = kl_per_token(flat, suffix.targets, suffix.head)
    if not kl.isfinite().all():
        return None
    kl, rise = kl.view(count, length), rise.view(count, length)[:, :-1]
    shift = (suffix.targets.hidden.view_as(states) - states)[:, :-1].double()
    lm = rise + (shift * suffix.head.weight[suffix.labels].double()).sum(-1)
    kl_each, lm_each = kl.mean(1), lm.mean(1)
    kl_mean, lm_mean = mean_metric(kl_each), mean_metric(lm_each)
    return Score(
        layer=record.layer,
        subblock=record.subblock,
        variant=record.variant,
        kl=kl_mean.value,
        kl_se=kl_mean.se,
        lm_loss=lm_mean.value,
        lm_loss_se=lm_mean.se,
        tokens=count * length,
        kl_per_sequence=tuple(kl_each.tolist()),
        lm_loss_per_sequence=tuple(lm_each.tolist()),
        seconds=seconds,
    )
