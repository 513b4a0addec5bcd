"""Costs of variants in an engine that runs whole models only: the costs are differences between models.

A stack of a few copies fits into a processor's cache and runs faster than in a real model, above all when it decodes.
So models of the parent's full depth are timed: layer 0 is the parent's, and all other layers are copies of one
candidate.

    cost of a candidate = (T(layer 0, candidate, candidate, ...) - T(layer 0)) / (depth - 1)

Each model is timed in turns with the parent, and its time is taken as a share of the parent's in the same round, so
that whatever else the machine does falls on both.

The engines want an FFN after every attention. An attention is therefore timed with the narrowest FFN, whose own cost is
subtracted. An FFN that is linear or absent is timed behind the parent's attention, whose cost is subtracted.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from blocks.engine_limits import check_parent
from blocks.parent import Parent
from blocks.records import LayerChoice, Metric, Turn
from blocks.resources import parameters_of
from blocks.variant import Variant
from profiles.schema import Hardware, Measure
from tasks.engines.base import LoadOptions, Session
from tasks.engines.timing_in_turns import LONGEST, Unsure, in_turns, is_unsure, median_metric, tokens_before
from tasks.measure.hardware_description import clock_for, threads_of
from tasks.measure.variant_timing import NON_BLOCK, PARENT, KeptFigures, Load, Timing, name_of
from tasks.running.progress import Progress

Shares = tuple[Metric, Metric]  # times of a prefill and of a decode step, as shares of the parent's
PARENT_LAYER, FIRST = LayerChoice(), "layer 0"
# times `measure.rounds`, at most: the ratio of two types multiplies every cost of a type, with its error
RATIO_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """A model to time: layer 0 is the parent's, all others are `repeated`; None: it has no others."""

    name: str
    repeated: LayerChoice | None


def narrowest_ffn(reader: Parent, variants: Sequence[Variant]) -> str:
    """The label of the narrowest FFN that has a width. Every attention variant is timed in a layer with this FFN."""
    sized = [variant for variant in variants if variant.subblock == "ffn" and variant.size]
    return min(sized, key=lambda variant: parameters_of(reader, variant)).label if sized else "parent"


def models_to_time(reader: Parent, variants: Sequence[Variant]) -> list[WholeModel]:
    """The models that are timed beside the parent."""
    narrowest = narrowest_ffn(reader, variants)
    choices = {FIRST: None, f"ffn {narrowest}": LayerChoice(attention="no_op", ffn=narrowest)}
    for variant in variants:
        name = name_of(variant)
        if variant.subblock == "ffn":
            choices[name] = LayerChoice(attention="no_op" if _is_whole(variant) else "parent", ffn=variant.label)
        elif variant.kind != "no_op":
            choices[name] = LayerChoice(attention=variant.label, ffn=narrowest)
    return [WholeModel(name=name, repeated=choice) for name, choice in choices.items()]


def _is_whole(variant: Variant) -> bool:
    return variant.kind not in ("no_op", "linear")


class WholeModelTimer(ABC):
    """Makes the models, times them, and takes their times apart. One subclass per engine loads them."""

    def __init__(self, reader: Parent, variants: Sequence[Variant], hardware: Hardware, measure: Measure) -> None:
        check_parent([hardware.engine], reader.config, hardware.precision)
        self.reader, self.variants, self.hardware, self.measure = reader, variants, hardware, measure
        self.threads, self.clock = threads_of(hardware), clock_for(hardware)
        self.narrowest = narrowest_ffn(reader, variants)
        self.models = {model.name: model for model in models_to_time(reader, variants)}
        self._loaded: tuple[Load, Session] | None = None

    @abstractmethod
    def _open(self, folder: Path, layers: Sequence[LayerChoice], load: Load) -> Session:
        """Load a model of these layers. Its weights are noise, because time does not depend on them.

        `folder` is there for the model's file, which may be removed as soon as the model is loaded.
        """

    def _release(self, model: Session) -> None:
        """A model has been timed."""
        model.close()

    def time(self, what: str, load: Load, kept: KeptFigures, progress: Progress) -> None:
        """See VariantTimer."""
        names = list(self.models)
        if not kept.of(load, what):
            rest = self.models[what].repeated
            layers = [PARENT_LAYER, *([] if rest is None else [rest] * (self.reader.depth - 1))]
            with tempfile.TemporaryDirectory(prefix="puzzle-costs-") as temporary:
                parent = self._parent(Path(temporary), load)
                other = self._open(Path(temporary), layers, load)
            turns = self._turns({"parent": parent, "other": other}, load, self.measure.rounds)
            self._release(other)
            kept.add(load, what, **{name: [turn.model_dump() for turn in own] for name, own in turns.items()})
        progress(names.index(what) + 1, len(names))

    def _parent(self, folder: Path, load: Load) -> Session:
        """The parent, loaded once for all models of a load."""
        if self._loaded is None or self._loaded[0] != load:
            self.close()
            layers = [PARENT_LAYER] * self.reader.depth
            self._loaded = (load, self._open(folder, layers, load))
        return self._loaded[1]

    def beside(self, other: "WholeModelTimer", load: Load) -> Shares:
        """The times of another timer's parent as shares of this one's, the two in turns, until a request's is sure."""
        layers = [PARENT_LAYER] * self.reader.depth
        with tempfile.TemporaryDirectory(prefix="puzzle-costs-") as temporary:
            models = {
                name: timer._open(Path(temporary), layers, load) for name, timer in (("parent", self), ("other", other))
            }
        least = -(-RATIO_ROUNDS * self.measure.rounds // LONGEST)
        turns = self._turns(models, load, least, is_unsure(load.scenario.generated_tokens))
        for timer, model in ((self, models["parent"]), (other, models["other"])):
            timer._release(model)
        return self._shares(turns)

    def close(self) -> None:
        """See VariantTimer."""
        if self._loaded is not None:
            self._release(self._loaded[1])
        self._loaded = None

    def timings(self, load: Load, kept: KeptFigures) -> dict[str, Timing]:
        """See VariantTimer."""
        shares: dict[str, Shares] = {}
        parents: list[tuple[float, float]] = []
        for name in self.models:
            (row,) = kept.of(load, name)
            turns = {which: [Turn(**turn) for turn in row[which]] for which in ("parent", "other")}
            parents += [self._clock(turn) for turn in turns["parent"]]
            shares[name] = self._shares(turns)
        return self._apart(shares, parents)

    def _how(self, load: Load) -> LoadOptions:
        """Options with room for the requests that are timed."""
        scenario, steps = load.scenario, self.measure.decode_steps
        return LoadOptions(
            precision=self.hardware.precision,
            kv_precision=self.hardware.kv_precision or LoadOptions.kv_precision,
            threads=self.threads,
            batch_size=load.batch,
            context_tokens=scenario.prompt_tokens + tokens_before(scenario.generated_tokens, steps) + steps,
        )

    def _turns(
        self, models: Mapping[str, Session], load: Load, rounds: int, unsure: Unsure | None = None
    ) -> dict[str, list[Turn]]:
        prompt = torch.randint(
            self.reader.config.vocab_size,
            (load.batch, load.scenario.prompt_tokens),
            generator=torch.Generator().manual_seed(0),
        )
        steps = self.measure.decode_steps
        grow = tokens_before(load.scenario.generated_tokens, steps)
        requests = {name: partial(model.request, prompt, steps, grow) for name, model in models.items()}
        for request in requests.values():
            request()  # warms caches up
        return in_turns(requests, rounds, unsure=unsure)

    def _clock(self, turn: Turn) -> tuple[float, float]:
        return (turn.prefill_cpu, turn.step_cpu) if self.clock == "CPU" else (turn.prefill, turn.step)

    def _shares(self, turns: Mapping[str, Sequence[Turn]]) -> Shares:
        """The other model's times over the parent's of the same round."""
        pairs = [
            (self._clock(other), self._clock(own)) for other, own in zip(turns["other"], turns["parent"], strict=True)
        ]
        prefill, decode = (median_metric([other[phase] / own[phase] for other, own in pairs]) for phase in (0, 1))
        return prefill, decode

    def _apart(self, shares: Mapping[str, Shares], parents: Sequence[tuple[float, float]]) -> dict[str, Timing]:
        """Costs of single subblocks from the whole models' shares of the parent's time."""
        found: dict[str, list[Metric]] = {}
        for phase in (0, 1):
            parent = median_metric([turn[phase] for turn in parents])
            times = {name: scaled(pair[phase], parent.value) for name, pair in shares.items()}
            for name, cost in self._one_phase(times, parent).items():
                found.setdefault(name, []).append(cost)
        return {name: Timing.of(*phases) for name, phases in found.items()}

    def _one_phase(self, times: Mapping[str, Metric], parent: Metric) -> dict[str, Metric]:
        first, copies = times[FIRST], self.reader.depth - 1

        def cost(name: str, *less: float) -> Metric:
            seconds = times[name]
            value = max(0.0, (seconds.value - first.value) / copies - sum(less))
            return Metric(value=value, se=seconds.se / copies, n=seconds.n)

        narrowest = cost(f"ffn {self.narrowest}").value
        attention = cost("attention parent", narrowest).value
        found: dict[str, Metric] = {}
        for variant in self.variants:
            name = name_of(variant)
            if variant.subblock == "ffn":
                found[name] = cost(name) if _is_whole(variant) else cost(name, attention)
            else:
                free = variant.kind == "no_op"
                found[name] = Metric(value=0.0, se=0.0, n=parent.n) if free else cost(name, narrowest)
        outside = max(0.0, first.value - attention - found["ffn parent"].value)
        return found | {NON_BLOCK: first.model_copy(update={"value": outside}), PARENT: parent}


def scaled(metric: Metric, factor: float) -> Metric:
    """A value and its standard error, both multiplied."""
    return Metric(value=metric.value * factor, se=metric.se * factor, n=metric.n)
