"""Replace-1-block scores (Puzzle, section 3): put one variant into the parent, measure KL(parent || child) and the
rise of the LM loss on held-out sequences. Lower is better; the parent's own subblock scores exactly 0.

Replacing layer i changes nothing before it. So scoring starts from the recorded states that enter the layer, and the
variants of a layer run through the rest of the parent as one batch. The parent's side of the divergence is stored as
one vector per token instead of a whole distribution (blocks/divergence.py).

S = sequences, T = tokens, D = hidden_size.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocks.divergence import Head, Targets, kl_per_token, targets_of
from blocks.estimates import mean
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.library import digest_of, keep, read_tensors, remember
from blocks.packed import pack_linears
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, BlockRecord, CorpusInfo, LayerChoice, LayerRecord, ParentInfo, Ref, Score, Value
from blocks.runtime import kept_per_device
from blocks.subblock import load_subblock, run_subblock
from tasks.distill.record import open_parent
from tasks.running.memory import Parts

VERSION = 4
BATCH_TOKENS = 4096
Sequences = tuple[int, ...]  # indices in the validation split
Work = tuple[BlockRecord, Sequences]


class SequenceScores(Value):
    """The scores of one block so far: KL and rise of the LM loss on single sequences, in nats per token."""

    sequences: Sequences = ()
    kl: tuple[float, ...] = ()
    lm_loss: tuple[float, ...] = ()
    seconds: float = 0.0

    def without(self, sequences: Sequence[int]) -> Sequences:
        """Those of `sequences` that were not scored yet."""
        scored = set(self.sequences)
        return tuple(sequence for sequence in sequences if sequence not in scored)

    def and_also(self, other: "SequenceScores") -> "SequenceScores":
        """Both together."""
        return SequenceScores(
            sequences=self.sequences + other.sequences,
            kl=self.kl + other.kl,
            lm_loss=self.lm_loss + other.lm_loss,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class ScoringSet:
    """The validation tokens that variants are scored on, and where the parent's targets on them come from.

    last: the record of the parent's last layer; count, length: how many sequences, and the tokens of each.
    """

    corpus: CorpusInfo
    last: LayerRecord
    count: int
    length: int

    def validation(self, ref: Ref, workspace: Path, device: str) -> Tensor:
        """These sequences of a file's validation split: (S, T) tokens or (S, T, D) states."""
        whole = read_tensors(workspace, ref, ["validation"], device)["validation"]
        return whole[: self.count, : self.length]


@dataclass(frozen=True, kw_only=True)
class ParentSuffix:
    """The whole parent in memory, with its targets on the scored sequences. Scores run through its last layers."""

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

    def targets_on(self, rows: Tensor) -> Targets:
        """The targets of some sequences, flattened."""
        count, length = self.labels.shape[0], self.labels.shape[1] + 1
        return self.targets[torch.arange(count * length).view(count, length)[rows].flatten()]


@kept_per_device(1)
def open_suffix(folder: Path, workspace: Path, scored: ScoringSet, device: str) -> ParentSuffix:
    """Load the parent and compute its targets from the recorded states that enter its last layer."""
    hidden = scored.validation(scored.last.boundary, workspace, device)
    tokens = scored.validation(scored.corpus.tokens, workspace, device).long()
    return make_suffix(open_parent(folder, device), tokens, hidden)


def make_suffix(reader: Parent, tokens: Tensor, hidden: Tensor) -> ParentSuffix:
    """The parent and its targets on `tokens` (S, T); `hidden` (S, T, D) enters its last layer."""
    layers = nn.ModuleList([reader.layer(layer) for layer in range(reader.depth)])
    pack_linears(layers)
    contexts = reader.contexts(hidden[:1])
    norm, head = reader.norm(), Head(reader.head_weight())
    with torch.no_grad():
        final = norm(layers[-1](hidden, **contexts[-1])).flatten(0, 1)
    return ParentSuffix(
        reader=reader,
        layers=list(layers),  # type: ignore[arg-type]
        norm=norm,
        head=head,
        targets=targets_of(final, head),
        labels=tokens[:, 1:],
        contexts=contexts,
    )


def score_key(record: BlockRecord, length: int) -> str:
    """Digest that names the file of a block's scores. It depends on the block, whose key covers parent and corpus, and
    on the tokens scored of each sequence. Sequences that are scored later are added to the same file.
    """
    return digest_of(block=record.key, tokens=length, version=VERSION)


def _path(record: BlockRecord, length: int, workspace: Path) -> Path:
    return workspace / "scores" / f"{score_key(record, length)}.json"


def _stored(record: BlockRecord, length: int, workspace: Path) -> SequenceScores:
    """The scores measured before; empty when the file is missing or damaged."""
    found = remember(_path(record, length, workspace), SequenceScores, lambda _: [], workspace)
    return found or SequenceScores()


def stored_score(record: BlockRecord, sequences: Sequence[int], length: int, workspace: Path) -> Score | None:
    """The score of a block over these sequences, None when some of them were not scored yet."""
    return _score(record, _stored(record, length, workspace), sequences, length)


def score_sequences(
    work: Sequence[Work], layer: LayerRecord, scored: ScoringSet, parent: ParentInfo, workspace: Path, device: str
) -> list[Score]:
    """Scores of variants of one layer, each on its own sequences of `scored`; values in the order asked.

    Only what no earlier call measured is computed, and each result is stored at once. A variant that failed, or whose
    KL is not a number on some sequence, has no score.
    """
    usable = [(record, sequences) for record, sequences in work if record.status != "failed"]
    length = scored.length
    known = {record.key: _stored(record, length, workspace) for record, _ in usable}
    missing = [(record, known[record.key].without(sequences)) for record, sequences in usable]
    if any(sequences for _, sequences in missing):
        suffix = open_suffix(workspace / parent.folder, workspace, scored, device)
        hidden = scored.validation(layer.boundary, workspace, device)
        parts = Parts(f"score layer {layer.layer}", BATCH_TOKENS // length)
        for batch in batches_of(missing, length):
            for record, more in parts.run(partial(_in_parts, suffix, batch, hidden, workspace)):
                if more is not None:
                    known[record.key] = known[record.key].and_also(more)
                    keep(_path(record, length, workspace), known[record.key], [], workspace)
    scores = [_score(record, known[record.key], sequences, length) for record, sequences in usable]
    return [score for score in scores if score is not None]


Batch = tuple[list[BlockRecord], Sequences]


def _in_parts(
    suffix: ParentSuffix, batch: Batch, hidden: Tensor, workspace: Path, parts: int
) -> list[tuple[BlockRecord, SequenceScores | None]]:
    """`score_batch` of a batch, computed in so many parts to save memory."""
    records, sequences = batch
    return [
        pair
        for fewer, part in batches_of([(record, sequences) for record in records], hidden.shape[1], parts)
        for pair in zip(fewer, score_batch(suffix, fewer, hidden, part, workspace), strict=True)
    ]


def batches_of(work: Iterable[Work], length: int, parts: int = 1) -> Iterator[Batch]:
    """Group the records that need the same sequences into batches of BATCH_TOKENS tokens, or a fraction of that."""
    groups: dict[Sequences, list[BlockRecord]] = {}
    for record, sequences in work:
        groups.setdefault(sequences, []).append(record)
    tokens = BATCH_TOKENS // parts
    most = max(1, tokens // length)
    for sequences, records in groups.items():
        for first in range(0, len(sequences), most):
            part = sequences[first : first + most]
            group = max(1, tokens // (len(part) * length))
            yield from ((records[start : start + group], part) for start in range(0, len(records), group))


@torch.no_grad()
def score_batch(
    suffix: ParentSuffix, records: Sequence[BlockRecord], hidden: Tensor, sequences: Sequences, workspace: Path
) -> list[SequenceScores | None]:
    """Scores of several variants of one layer on some `sequences` of `hidden` (S, T, D), which enters the layer; None
    for a variant whose KL is not a number.
    """
    started = time.perf_counter()
    layer = records[0].layer
    rows = torch.tensor(sequences)
    after = torch.cat([_replaced(suffix, record, hidden[rows], workspace) for record in records])
    states = suffix.finish(after, layer).split(len(sequences))
    losses = [_losses(suffix, each, rows) for each in states]
    seconds = (time.perf_counter() - started) / len(records)
    return [
        SequenceScores(sequences=sequences, kl=tuple(kl.tolist()), lm_loss=tuple(lm.tolist()), seconds=seconds)
        if kl.isfinite().all()
        else None
        for kl, lm in losses
    ]


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
    """A layer that holds only the trained subblock of a record, or both of a coupled block."""
    choice = LayerChoice.only(record.subblock, record.variant)
    module = reader.empty_layer(record.layer, choice).requires_grad_(False)
    if record.weights is not None:
        module.load_state_dict(read_tensors(workspace, record.weights, device=reader.device))
    elif record.variant == "parent":
        whole = reader.layer(record.layer).state_dict()
        load_subblock(module, record.subblock, {n: whole[n] for n in module.state_dict()})  # type: ignore[arg-type]
    return module.eval()


def _losses(suffix: ParentSuffix, states: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """KL and rise of the LM loss, (s,) each, of final states (s, T, D) on the sequences `rows`."""
    count, length = states.shape[:2]
    targets = suffix.targets_on(rows)
    kl, rise = kl_per_token(states.flatten(0, 1), targets, suffix.head)
    kl, rise = kl.view(count, length), rise.view(count, length)[:, :-1]
    shift = (targets.hidden.view_as(states) - states)[:, :-1].double()
    lm = rise + (shift * suffix.head.weight[suffix.labels[rows]].double()).sum(-1)
    return kl.mean(1), lm.mean(1)


def by_document(score: Score, documents: Sequence[int]) -> Score:
    """The same score with errors over the documents of its sequences; as it is where they are not known."""
    if not documents:
        return score
    kl, lm_loss = (mean(values, documents).error for values in (score.kl_per_sequence, score.lm_loss_per_sequence))
    return score.model_copy(update={"documents": tuple(documents), "kl_se": kl, "lm_loss_se": lm_loss})


def _score(record: BlockRecord, known: SequenceScores, sequences: Sequence[int], length: int) -> Score | None:
    if not sequences or known.without(sequences):
        return None
    place = {sequence: index for index, sequence in enumerate(known.sequences)}
    kl, lm_loss = ([values[place[sequence]] for sequence in sequences] for values in (known.kl, known.lm_loss))
    kl_mean, lm_mean = (mean(values).metric for values in (kl, lm_loss))
    return Score(
        layer=record.layer,
        subblock=record.subblock,
        variant=record.variant,
        kl=kl_mean.value,
        kl_se=kl_mean.se,
        lm_loss=lm_mean.value,
        lm_loss_se=lm_mean.se,
        tokens=len(sequences) * length,
        kl_per_sequence=tuple(kl),
        lm_loss_per_sequence=tuple(lm_loss),
        seconds=known.seconds,
    )
