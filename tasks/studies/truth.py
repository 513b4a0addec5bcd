"""The true KL of a whole architecture on validation sequences, and how it is stored.

    scored   the sequences that the replace-1-block scores were measured on; the searches may look at them
    others   validation sequences that no score and no search looked at: what is reported

The divergence is the one of the scores (blocks/divergence.py), so an architecture that differs from the parent in one
subblock has that subblock's score, sequence by sequence. The test split is not touched.

S = sequences, T = tokens, D = hidden_size.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blocks.compute import Compute
from blocks.divergence import Head, Targets, kl_per_token, targets_of
from blocks.errors import PuzzleError, PuzzleFailure, first_line
from blocks.library import digest_of, made_once, read_tensors
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, BlockRecord, LayerChoice, Value
from blocks.subblock import run_subblock
from tasks.distill.record import open_parent
from tasks.evaluate.compare import blocks_of
from tasks.evaluate.quality import parent_targets, sequence_figures
from tasks.inputs.corpus import documents_of, refuse_images, weights_of
from tasks.running.workers import compute_of
from tasks.score.scoring import load_variant
from tasks.search.program import Floats
from tasks.studies.additivity import Layers, Truth
from tasks.studies.finished import Finished

VERSION = 1
LAYERS_KEPT = 4  # variants of a layer in memory, on average
STATES_BYTES = 256 << 20  # of hidden states kept for architectures that begin alike


class TrueKL(Value):
    """KL(parent || architecture), nats per token, of every sequence; wall seconds of the forward pass."""

    per_sequence: tuple[float, ...]
    tokens: int
    seconds: float


class Sequences(Value):
    """Validation sequences `first` to `last` (excluded), the first `tokens` of each."""

    name: str
    first: int
    last: int
    tokens: int

    def __str__(self) -> str:
        return f"validation sequences {self.first} to {self.last - 1}, {self.tokens} tokens each"


class OtherModel(Value):
    """A model that was not made here, beside the children: its parameters, and KL(parent || it) of every sequence."""

    name: str
    parameters: int
    per_sequence: tuple[float, ...]
    seconds: float


def other_model(folder: Path, meter: "Meter") -> OtherModel:
    """Measure a Hugging Face folder that reads the parent's tokens, such as a smaller model of its family.

    PuzzleError when it cannot be loaded, or has another vocabulary: a KL over other tokens means nothing. All
    tokens count alike.
    """
    from transformers import AutoModelForCausalLM

    refuse_images(meter.finished.corpus, "another model is compared on words")
    started, own = time.perf_counter(), meter.finished.workspace / meter.finished.parent.folder
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        same = vocabulary(folder) == vocabulary(own)
    except (OSError, ValueError, KeyError) as error:
        raise PuzzleError(f"{folder} is no model that can be compared: {first_line(error)}") from error
    if not same or model.config.vocab_size != meter.modules.reader.config.vocab_size:
        raise PuzzleError(f"{folder} reads other tokens than {meter.finished.parent.name}: take one of its family.")
    compute = meter.modules.compute
    targets = parent_targets(meter.modules.reader.model(), meter.tokens, compute)
    return OtherModel(
        name=folder.resolve().name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        per_sequence=tuple(sequence_figures(model.to(compute.device), targets, meter.tokens, compute)["kl"].tolist()),
        seconds=time.perf_counter() - started,
    )


def vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id of a folder's tokenizer.json."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found: dict[str, int] = whole["model"]["vocab"]
    return found


def scored_sequences(finished: Finished) -> Sequences:
    """Those of the scores."""
    count, tokens = finished.scored
    return Sequences(name="scored", first=0, last=count, tokens=tokens)


def other_sequences(finished: Finished, most: int) -> Sequences:
    """Up to `most` sequences behind the scored ones; the scored ones themselves where the split ends with them."""
    count, tokens = finished.scored
    last = min(finished.corpus.validation_sequences, count + most)
    if last <= count:
        return scored_sequences(finished)
    return Sequences(name="others", first=count, last=last, tokens=tokens)


@dataclass(kw_only=True, eq=False)
class Modules:
    """Layers of a finished library in memory, the latest few per layer."""

    finished: Finished
    _kept: "OrderedDict[tuple[int, str, str], nn.Module]" = field(default_factory=OrderedDict)

    def __call__(self, layer: int, part: str, variant: str) -> nn.Module:
        """A layer that holds a trained variant of a part; part "layer": the parent's own, whole."""
        place = (layer, part, variant)
        if place not in self._kept:
            whole = part == "layer"
            module = self.reader.layer(layer) if whole else load_variant(self.reader, *self._stored(place))
            self._kept[place] = module
            if len(self._kept) > LAYERS_KEPT * self.reader.depth:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def _stored(self, place: tuple[int, str, str]) -> tuple[BlockRecord, Path]:
        return self._records[place], self.finished.workspace

    @cached_property
    def compute(self) -> Compute:
        """How the run computed."""
        return compute_of(self.finished.profile)

    @cached_property
    def reader(self) -> Parent:
        """The parent on disk."""
        return open_parent(self.finished.workspace / self.finished.parent.folder, self.compute)

    @cached_property
    def norm(self) -> nn.Module:
        """The final norm."""
        return self.reader.norm()

    @cached_property
    def head(self) -> Head:
        """The parent's head."""
        return self.reader.head()

    @cached_property
    def _records(self) -> dict[tuple[int, str, str], BlockRecord]:
        return {(block.layer, block.subblock, block.variant): block for block in self.finished.blocks}


@dataclass(kw_only=True, eq=False)
class Meter:
    """Measures architectures of one library on some sequences; each is measured once per workspace.

    The layers' states of recent architectures are kept: a swap in a late layer costs the layers behind it.
    """

    finished: Finished
    sequences: Sequences
    modules: Modules
    _states: "OrderedDict[Layers, Tensor]" = field(default_factory=OrderedDict)

    def __call__(self, layers: Sequence[LayerChoice]) -> TrueKL:
        """The true KL of a choice per layer; PuzzleFailure when it is not a number."""
        path = self.finished.workspace / "truth" / f"{self._key(tuple(layers))}.json"
        return made_once(path, TrueKL, self.finished.workspace, lambda: self._measure(tuple(layers)))

    def _key(self, layers: Layers) -> str:
        return digest_of(
            layers=layers,
            blocks=[block.key for block in blocks_of(layers, self.finished.blocks)],
            parent=self.finished.parent.fingerprint,
            corpus=self.finished.corpus.fingerprint,
            **({"weighted": True} if self.finished.corpus.weighted else {}),
            sequences=self.sequences.model_dump(exclude={"name"}),
            version=VERSION,
        )

    @torch.no_grad()
    def _measure(self, layers: Layers) -> TrueKL:
        started, here, own = time.perf_counter(), self.sequences, self.finished
        final = self.modules.norm(self._entering(layers, len(layers))).flatten(0, 1)
        kl = kl_per_token(final, self._targets, self.modules.head)[0].view(-1, here.tokens)
        if not kl.isfinite().all():
            raise PuzzleFailure("the KL of an architecture is not a number: leave out the variants that overflow.")
        weights = weights_of(own.corpus, "validation", own.workspace, (here.first, here.last))
        if weights is not None:
            kl = kl * weights[:, : here.tokens].to(kl)
        took = time.perf_counter() - started
        return TrueKL(per_sequence=tuple(kl.mean(1).tolist()), tokens=kl.numel(), seconds=took)

    def _entering(self, layers: Layers, layer: int) -> Tensor:
        """States (S, T, D) that enter a layer of an architecture, from the longest known beginning on."""
        known = next((n for n in range(layer, 0, -1) if layers[:n] in self._states), 0)
        hidden = self._embedded if not known else self._states[layers[:known]]
        for n in range(known, layer):
            hidden = self._through(n, layers[n], hidden)
            self._states[layers[: n + 1]] = hidden
            if len(self._states) * hidden.nbytes > STATES_BYTES:
                self._states.popitem(last=False)
        return hidden

    def _through(self, layer: int, choice: LayerChoice, hidden: Tensor) -> Tensor:
        context = self._contexts[layer]
        if choice.coupled:
            out: Tensor = self.modules(layer, "block", choice.block_label)(hidden, **context)
            return out
        for subblock in SUBBLOCKS:
            variant = getattr(choice, subblock)
            if variant == "no_op":
                continue
            module: Any = self.modules(layer, subblock if variant != "parent" else "layer", variant)
            change = run_subblock(module, subblock, hidden, context)
            hidden = hidden if change is None else hidden + change
        return hidden

    @cached_property
    def tokens(self) -> Tensor:
        """(S, T) token ids."""
        place = (self.finished.workspace, self.finished.corpus.tokens, ["validation"])
        whole = read_tensors(*place, device=self.modules.compute.device)["validation"]
        return whole[self.sequences.first : self.sequences.last, : self.sequences.tokens].long()

    @cached_property
    def documents(self) -> tuple[int, ...]:
        """(S,) the document of each sequence; empty where they are not known."""
        here, own = self.sequences, self.finished
        return documents_of(own.corpus, "validation", own.workspace, here.tokens)[here.first : here.last]

    @cached_property
    @torch.no_grad()
    def _embedded(self) -> Tensor:
        hidden: Tensor = self.modules.reader.embedding()(self.tokens)
        return hidden

    @cached_property
    def _contexts(self) -> list[dict[str, Any]]:
        return self.modules.reader.contexts(self._embedded[:1])

    @cached_property
    @torch.no_grad()
    def _targets(self) -> Targets:
        parent = (LayerChoice(),) * self.modules.reader.depth
        return targets_of(self.modules.norm(self._entering(parent, len(parent))).flatten(0, 1), self.modules.head)


def truth_of(finished: Finished, others: int) -> tuple[Meter, Meter]:
    """A meter for the scored sequences and one for up to `others` other ones."""
    scored, rest = scored_sequences(finished), other_sequences(finished, others)
    modules = Modules(finished=finished)
    meter = Meter(finished=finished, sequences=scored, modules=modules)
    return meter, meter if rest == scored else Meter(finished=finished, sequences=rest, modules=modules)


def measured_truth(finished: Finished, others: int) -> tuple[tuple[Meter, Meter], Truth]:
    """The two meters, and both as one function for tasks/studies/additivity.py."""
    scored, rest = truth_of(finished, others)

    def truth(layers: Layers, only_scored: bool = False) -> tuple[Floats, Floats]:
        other = () if only_scored else rest(layers).per_sequence
        return np.array(scored(layers).per_sequence), np.array(other)

    return (scored, rest), truth
