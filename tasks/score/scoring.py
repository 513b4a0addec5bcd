"""Replace-1-block scores (Puzzle, section 3): put one variant into the parent, measure KL(parent || child) and the
rise of the LM loss on held-out sequences. Lower is better; the parent's own subblock scores exactly 0.

Replacing layer i changes nothing before it. So scoring starts from the states that enter the layer, and the variants of
a layer run through the rest of the parent together, one layer after another, in micro-batches. States wait on the host:
the device needs room for one layer and one micro-batch, whatever the size of the parent. The parent's side of the
divergence is one vector per token instead of a whole distribution (blocks/divergence.py).

S = sequences, T = tokens, D = hidden_size, R = rows: the sequences of all variants that run together.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.divergence import Targets, kl_per_token, targets_of
from blocks.error_correction import InputGrams
from blocks.estimates import mean
from blocks.export_code.modeling_decilm import DeciLMDecoderLayer
from blocks.library import digest_of, keep, read_rows, read_tensors, remember
from blocks.parent import Parent
from blocks.records import (
    SUBBLOCKS,
    BlockRecord,
    CorpusInfo,
    LayerChoice,
    LayerRecord,
    ParentInfo,
    Ref,
    Score,
    Subblock,
    Value,
)
from blocks.runtime import free_bytes, kept_per_device
from blocks.subblock import load_subblock, run_subblock
from blocks.typed_labels import FITTED_TO, bare, type_in
from profiles.schema import Profile
from tasks.distill.record import open_parent, slices
from tasks.inputs.corpus import documents_of, weights_of
from tasks.running.memory import Parts
from tasks.score.rounding import Rounding

VERSION = 4
HELD_TOKENS = 131072  # tokens of variants whose states wait on the host together
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
class ScoringText:
    """What decides a block's score beside the block: the tokens of each sequence that count, and the text where it is a
    capability's. fingerprint: of that text; "" for the corpus.
    """

    length: int
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class ScoringSet:
    """The validation tokens that variants are scored on, and where the parent's states on them come from.

    last: the record of the parent's last layer. It holds states of the corpus where all that was recorded fits in one
    shard; else, and for the text of a capability, they are computed from the tokens. first, count, length: which
    sequences, and the tokens of each. general: the profile's corpus, where this is the text of a capability.
    """

    corpus: CorpusInfo
    last: LayerRecord
    count: int
    length: int
    first: int = 0
    general: CorpusInfo | None = None

    @property
    def capability(self) -> str:
        """Whose text it is; "" for the corpus."""
        return self.corpus.capability

    @property
    def fitted_to(self) -> CorpusInfo:
        """The text that types of 4 and 5 bits are fitted to: one for all, since a child has one file."""
        return self.general or self.corpus

    @property
    def text(self) -> ScoringText:
        """What the key of a score on it is made of."""
        return ScoringText(length=self.length, fingerprint=self.corpus.fingerprint if self.capability else "")

    @property
    def recorded(self) -> Ref | None:
        """The states that enter the last layer, where they were recorded."""
        return None if self.capability else self.last.boundary

    def stored(self, record: BlockRecord, workspace: Path) -> Score | None:
        """A block's score on all these sequences; None when some of them were not scored yet."""
        return stored_score(record, self.sequences, self.text, workspace)

    def validation(self, ref: Ref, workspace: Path) -> Tensor:
        """These sequences of a file's validation split: (S, T) tokens or (S, T, D) states."""
        return read_rows(workspace, ref, "validation", self.first, self.first + self.count)[:, : self.length]

    @property
    def sequences(self) -> Sequences:
        """The numbers of the sequences in the validation split."""
        return tuple(range(self.first, self.first + self.count))

    def shards(self, most: int) -> "list[ScoringSet]":
        """The same in parts of at most `most` tokens; the whole where states are recorded."""
        if self.recorded is not None:
            return [self]
        parts = slices(self.count, max(1, most // self.length))
        return [replace(self, first=self.first + first, count=last - first) for first, last in parts]


class Passes:
    """The parent for forward passes over states (R, T, D) that lie on the host; R rows of T tokens.

    Its layers stay in memory where all of them have room, else each is loaded for each pass over the rows.
    """

    def __init__(self, reader: Parent) -> None:
        self.reader, self.compute, self.norm = reader, reader.compute, reader.norm()
        self.head = reader.head()
        self.kept: dict[int, DeciLMDecoderLayer] = {}
        self.have_room = reader.weight_bytes < free_bytes(self.compute.device) / 2

    def layer(self, layer: int) -> DeciLMDecoderLayer:
        """One of the parent's layers."""
        if layer in self.kept:
            return self.kept[layer]
        module = self.reader.layer(layer)
        if self.have_room:
            self.kept[layer] = module
        return module

    def context(self, layer: int, hidden: Tensor) -> dict[str, Any]:
        """The keyword arguments of a layer's attention for rows like `hidden`."""
        return self.reader.contexts(hidden[:1].to(self.compute.device))[layer]

    def micro_batches(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of as many rows (R, T, ...) as one pass takes."""
        return rows.split(self.compute.sequences(rows.shape[1]))

    @torch.no_grad()
    def run(self, module: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Run a function of states over all rows, in place."""
        parts = Parts("score", self.compute.sequences(hidden.shape[1]))

        def made(count: int, batch: Tensor) -> list[Tensor]:
            return [module(part.to(self.compute.device)).cpu() for part in batch.chunk(count)]

        for batch in self.micro_batches(hidden):
            batch.copy_(torch.cat(parts.run(partial(made, batch=batch))))
        return hidden

    def through(self, layers: Iterable[int], hidden: Tensor) -> Tensor:
        """Run the rows through some of the parent's layers, in place."""
        for layer in layers:
            self.run(partial(self.layer(layer), **self.context(layer, hidden)), hidden)
        return hidden

    @torch.no_grad()
    def final(self, hidden: Tensor) -> Tensor:
        """A micro-batch after the final norm, on the device, in float32."""
        out: Tensor = self.norm(hidden.to(self.compute.device)).float()
        return out

    @torch.no_grad()
    def embedded(self, tokens: Tensor) -> Tensor:
        """Tokens (R, T) -> the states that enter the first layer."""
        embedding = self.reader.embedding()
        return torch.cat([embedding(part.to(self.compute.device)).cpu() for part in self.micro_batches(tokens)])


@kept_per_device(1)
def _passes(folder: Path, compute: Compute) -> Passes:
    return Passes(open_parent(folder, compute))


@dataclass(kw_only=True)
class ParentSuffix:
    """The parent and its targets on the scored sequences, which lie on the host. Scores run through its last layers.

    first: number of the first sequence. weights: of the tokens (S, T). rolled: a layer, and the states that enter it,
    where none were recorded.
    """

    passes: Passes
    tokens: Tensor  # (S, T)
    targets: Targets
    first: int = 0
    weights: Tensor | None = None
    rolled: tuple[int, Tensor] | None = None
    one_at_a_time: Lock = field(default_factory=Lock)

    def entering(self, layer: int) -> Tensor:
        """The states (S, T, D) that enter a layer, from the tokens; layers in order are cheapest."""
        with self.one_at_a_time:
            if self.rolled is None or self.rolled[0] > layer:
                self.rolled = (0, self.passes.embedded(self.tokens))
            before, hidden = self.rolled
            self.rolled = (layer, self.passes.through(range(before, layer), hidden))
            return hidden.clone()

    def targets_on(self, rows: Tensor) -> Targets:
        """The targets of some sequences, flattened, on the device."""
        count, length = self.tokens.shape
        found = self.targets[torch.arange(count * length).view(count, length)[rows].flatten()]
        return Targets(**{name: tensor.to(self.passes.compute.device) for name, tensor in vars(found).items()})


@kept_per_device(1)
def open_suffix(folder: Path, workspace: Path, scored: ScoringSet, compute: Compute) -> ParentSuffix:
    """The parent's targets, from the states that enter its last layer where they were recorded."""
    passes, tokens = _passes(folder, compute), scored.validation(scored.corpus.tokens, workspace).long()
    if scored.recorded is None:
        layer, hidden = 0, passes.embedded(tokens)
    else:
        layer, hidden = passes.reader.depth - 1, scored.validation(scored.recorded, workspace)
    suffix = make_suffix(passes, tokens, hidden, layer, scored.first)
    rows = (scored.first, scored.first + scored.count)
    weights = weights_of(scored.corpus, "validation", workspace, rows)
    suffix.weights = None if weights is None else weights[:, : scored.length]
    return suffix


def make_suffix(passes: Passes, tokens: Tensor, hidden: Tensor, layer: int, first: int = 0) -> ParentSuffix:
    """The parent and its targets on `tokens` (S, T); `hidden` (S, T, D) enters `layer` and is changed in place."""
    passes.through(range(layer, passes.reader.depth), hidden)
    found = [targets_of(passes.final(batch).flatten(0, 1), passes.head) for batch in passes.micro_batches(hidden)]
    joined = {name: torch.cat([vars(each)[name].cpu() for each in found]) for name in ("hidden", "moment", "lse")}
    return ParentSuffix(passes=passes, tokens=tokens, targets=Targets(**joined), first=first)


def score_key(record: BlockRecord, text: ScoringText) -> str:
    """Digest that names the file of a block's scores on a text. It depends on the block, whose key covers parent and
    corpus, on the tokens scored of each sequence, and on a capability's text. Sequences that are scored later are added
    to the same file.
    """
    own = {"text": text.fingerprint} if text.fingerprint else {}
    return digest_of(block=record.key, tokens=text.length, version=VERSION, **own)


def _path(record: BlockRecord, text: ScoringText, workspace: Path) -> Path:
    return workspace / "scores" / f"{score_key(record, text)}.json"


def _stored(record: BlockRecord, text: ScoringText, workspace: Path) -> SequenceScores:
    """The scores measured before; empty when the file is missing or damaged."""
    found = remember(_path(record, text, workspace), SequenceScores, lambda _: [], workspace)
    return found or SequenceScores()


def stored_score(record: BlockRecord, sequences: Sequence[int], text: ScoringText, workspace: Path) -> Score | None:
    """The score of a block over these sequences, None when some of them were not scored yet."""
    return _score(record, _stored(record, text, workspace), sequences, text.length)


def scoring_sets(
    profile: Profile, corpus: CorpusInfo, capabilities: Iterable[CorpusInfo], last: LayerRecord
) -> list[ScoringSet]:
    """What blocks are scored on: the corpus first, then each capability's text."""
    length, count = profile.scoring.tokens_per_sequence or corpus.sequence_length, profile.scoring.sequences
    return [
        ScoringSet(corpus=corpus, last=last, count=count, length=length),
        *(
            ScoringSet(
                corpus=own, last=last, count=own.validation_sequences, length=own.sequence_length, general=corpus
            )
            for own in capabilities
        ),
    ]


def scores_of(blocks: Iterable[BlockRecord], scored: Sequence[ScoringSet], workspace: Path) -> list[Score]:
    """The stored scores of blocks, those on capabilities beside those on the corpus, with errors over documents. A
    block that lacks one of them has no score.
    """
    documents = [documents_of(one.corpus, "validation", workspace, one.length)[: one.count] for one in scored]
    found = []
    for block in blocks:
        pairs = zip((one.stored(block, workspace) for one in scored), documents, strict=True)
        scores = [by_document(score, those) for score, those in pairs if score is not None]
        if len(scores) == len(scored):
            first, *others = scores
            own = (score.on(one.capability) for one, score in zip(scored[1:], others, strict=True))
            found.append(first.model_copy(update={"capabilities": tuple(own)}))
    return found


def score_sequences(
    work: Sequence[Work], layer: LayerRecord, scored: ScoringSet, parent: ParentInfo, workspace: Path, compute: Compute
) -> list[Score]:
    """Scores of variants of one layer, each on its own sequences of `scored`; values in the order asked.

    Only what no earlier call measured is computed, and each result is stored at once. A variant that failed, or whose
    KL is not a number on some sequence, has no score.
    """
    usable = [(record, sequences) for record, sequences in work if record.status != "failed"]
    text, length = scored.text, scored.length
    known = {record.key: _stored(record, text, workspace) for record, _ in usable}
    missing = [(record, known[record.key].without(sequences)) for record, sequences in usable]
    if any(sequences for _, sequences in missing):
        suffix = open_suffix(workspace / parent.folder, workspace, scored, compute)
        kept = None if scored.capability else layer.boundary
        recorded = None if kept is None else scored.validation(kept, workspace)
        hidden = suffix.entering(layer.layer) if recorded is None else recorded
        rounding = Rounding(inputs=partial(_inputs, suffix, layer, scored.fitted_to, workspace))
        for records, sequences in batches_of(missing, length):
            found = score_batch(suffix, records, hidden, sequences, workspace, rounding)
            for record, more in zip(records, found, strict=True):
                if more is not None:
                    known[record.key] = known[record.key].and_also(more)
                    keep(_path(record, text, workspace), known[record.key], [], workspace)
    scores = [_score(record, known[record.key], sequences, length) for record, sequences in usable]
    return [score for score in scores if score is not None]


Batch = tuple[list[BlockRecord], Sequences]


def batches_of(work: Iterable[Work], length: int) -> Iterator[Batch]:
    """Group the records that need the same sequences into batches of at most HELD_TOKENS tokens."""
    groups: dict[Sequences, list[BlockRecord]] = {}
    for record, sequences in work:
        groups.setdefault(sequences, []).append(record)
    most = max(1, HELD_TOKENS // length)
    for sequences, records in groups.items():
        for first in range(0, len(sequences), most):
            part = sequences[first : first + most]
            group = max(1, most // len(part))
            yield from ((records[start : start + group], part) for start in range(0, len(records), group))


@torch.no_grad()
def score_batch(
    suffix: ParentSuffix,
    records: Sequence[BlockRecord],
    hidden: Tensor,
    sequences: Sequences,
    workspace: Path,
    rounding: Rounding | None = None,
) -> list[SequenceScores | None]:
    """Scores of several variants of one layer on `sequences`, which are numbers of the validation split.

    hidden (S, T, D) is what enters the layer for the sequences of `suffix`, from number `suffix.first` on. None stands
    for a variant whose KL is not finite. rounding: for variants that name a type of number. Nothing is stored.
    """
    started = time.perf_counter()
    layer, passes = records[0].layer, suffix.passes
    rows = torch.tensor(sequences) - suffix.first
    after = torch.cat([_replaced(passes, record, hidden[rows], workspace, rounding) for record in records])
    passes.through(range(layer + 1, passes.reader.depth), after)
    numbers = rows.repeat(len(records)).split(passes.compute.sequences(hidden.shape[1]))
    pairs = zip(passes.micro_batches(after), numbers, strict=True)
    losses = [_losses(suffix, passes.final(batch), some) for batch, some in pairs]
    seconds = (time.perf_counter() - started) / len(records)
    found = (torch.cat(column).split(len(sequences)) for column in zip(*losses, strict=True))
    return [
        SequenceScores(sequences=sequences, kl=tuple(kl.tolist()), lm_loss=tuple(lm.tolist()), seconds=seconds)
        if kl.isfinite().all()
        else None
        for kl, lm in zip(*found, strict=True)
    ]


@torch.no_grad()
def _inputs(
    suffix: ParentSuffix,
    layer: LayerRecord,
    corpus: CorpusInfo,
    workspace: Path,
    record: BlockRecord,
    module: DeciLMDecoderLayer,
) -> dict[str, Tensor]:
    """Gram matrices of what enters a block's matrices on training text; before an FFN stands the parent's attention.

    The states that enter the layer are those that were recorded, or else computed from the tokens.
    """
    passes = suffix.passes
    if layer.boundary is not None:
        hidden = read_rows(workspace, layer.boundary, "train", 0, FITTED_TO)
    else:
        tokens = read_rows(workspace, corpus.tokens, "train", 0, min(FITTED_TO, corpus.train_sequences)).long()
        hidden = passes.through(range(layer.layer), passes.embedded(tokens))
    parent, context = passes.layer(layer.layer), passes.context(layer.layer, hidden)
    with InputGrams(module) as grams:
        for batch in passes.micro_batches(hidden):
            states = batch.to(passes.compute.device)
            if record.subblock == "ffn":
                out = run_subblock(parent, "attention", states, context)
                states = states if out is None else states + out
            run_subblock(module, cast(Subblock, record.subblock), states, context)
    return {name: gram.cpu() for name, gram in grams.sums.items()}


def _replaced(
    passes: Passes, record: BlockRecord, hidden: Tensor, workspace: Path, rounding: Rounding | None
) -> Tensor:
    """States that leave the layer when the variant stands in it, in place."""
    module, context = passes.layer(record.layer), passes.context(record.layer, hidden)
    variant = load_variant(passes.reader, record, workspace)
    if type_in(record.variant):
        assert rounding is not None, "a type of number is rounded to"
        rounding(record, variant)

    def replaced(states: Tensor) -> Tensor:
        for subblock in SUBBLOCKS:
            source = variant if subblock == record.subblock else module
            out = run_subblock(source, subblock, states, context)
            states = states if out is None else states + out
        return states

    return passes.run(partial(variant, **context) if record.subblock == "block" else replaced, hidden)


def load_variant(reader: Parent, record: BlockRecord, workspace: Path) -> DeciLMDecoderLayer:
    """A layer that holds only the trained subblock of a record, or both of a coupled block."""
    choice = LayerChoice.only(record.subblock, record.variant)
    module = reader.empty_layer(record.layer, choice).requires_grad_(False)
    if record.weights is not None:
        module.load_state_dict(read_tensors(workspace, record.weights, device=reader.compute.device))
    elif bare(record.variant) == "parent":
        whole = reader.layer(record.layer).state_dict()
        load_subblock(module, record.subblock, {n: whole[n] for n in module.state_dict()})  # type: ignore[arg-type]
    return module.eval()


def _losses(suffix: ParentSuffix, states: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """KL and rise of the LM loss, (r,) each, of final states (r, T, D) on the sequences `rows`."""
    count, length = states.shape[:2]
    targets, labels = suffix.targets_on(rows), suffix.tokens[rows, 1:].to(states.device)
    kl, rise = kl_per_token(states.flatten(0, 1), targets, suffix.passes.head)
    kl, rise = kl.view(count, length), rise.view(count, length)[:, :-1]
    lm = rise + suffix.passes.head.label_shift(targets.hidden.view_as(states)[:, :-1], states[:, :-1], labels)
    if suffix.weights is not None:
        weights = suffix.weights[rows].to(kl)
        kl, lm = kl * weights, lm * weights[:, :-1]
    return kl.mean(1).cpu(), lm.mean(1).cpu()


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
