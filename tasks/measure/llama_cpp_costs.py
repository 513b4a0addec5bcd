"""Costs of variants in llama.cpp: full-depth models of one layer repeated, each beside the parent, CPU-paired.

A stack of a few copies fits the caches and is measured too fast, decode above all. So the parent's layer 0 and then
as many copies of a candidate as the parent has further layers are timed, always in turns with the parent:

    cost of a candidate = (T(layer 0, candidate, candidate, ...) - T(layer 0)) / (depth - 1)

An attention is measured with the narrowest FFN after it, whose own cost is taken off, and an FFN that is linear or
absent with the parent's attention before it: GGUF's layers want both, and what packing adds is part of the cost.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from blocks.engine_limits import check_parent
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.parent import Parent
from blocks.records import LayerChoice, Metric, Turn
from blocks.resources import parameters_of
from blocks.variant import Variant
from profiles.schema import Hardware, Measure, Scenario
from tasks.engines.base import Load
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.throughput import in_turns, median_metric, tokens_before
from tasks.gguf.tokenizer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.measure.timing import Timing, clock_for


class Timed(Protocol):
    """A session that is timed: as an engine's, with tokens that grow the cache untimed."""

    def request(self, prompt: Tensor, steps: int, grow: int = 0) -> Turn:
        """Prefill of `prompt` (B, P), `grow` tokens untimed, then `steps` decode steps."""

    def close(self) -> None:
        """Give back what the engine holds."""


Name = tuple[str, str]
Pair = tuple[Metric, Metric]  # prefill and decode step, shares of the parent's
PARENT, FIRST = LayerChoice(), "layer 0"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A model to time: layer 0 is the parent's, `repeated` stands in all others (None: there are no others)."""

    name: str
    repeated: LayerChoice | None


class EngineBench:
    """Writes the models, times them, takes sums apart."""

    def __init__(self, reader: Parent, variants: Sequence[Variant], hardware: Hardware, measure: Measure) -> None:
        check_parent([hardware.engine], reader.config, hardware.precision)
        self.reader, self.variants, self.hardware, self.measure = reader, variants, hardware, measure
        self.threads, self.clock = hardware.threads or torch.get_num_threads(), clock_for(hardware)
        wide = [variant for variant in variants if variant.subblock == "ffn" and variant.size]
        partner = min(wide, key=lambda variant: parameters_of(reader, variant), default=None)
        self.partner = partner.label if partner else "parent"

    def wholes(self) -> list[Whole]:
        """The models that are timed beside the parent."""
        choices = {FIRST: None, self._alone(self.partner): LayerChoice(attention="no_op", ffn=self.partner)}
        for variant in self.variants:
            if variant.subblock == "attention":
                if variant.kind != "no_op":
                    choices[f"attention {variant.label}"] = LayerChoice(attention=variant.label, ffn=self.partner)
            elif self._wide(variant):
                choices[self._alone(variant.label)] = LayerChoice(attention="no_op", ffn=variant.label)
            else:
                choices[f"ffn {variant.label}"] = LayerChoice(attention="parent", ffn=variant.label)
        return [Whole(name=name, repeated=choice) for name, choice in choices.items()]

    @staticmethod
    def _alone(label: str) -> str:
        return f"ffn {label}"

    @staticmethod
    def _wide(variant: Variant) -> bool:
        return variant.kind not in ("no_op", "linear")

    def run(self, scenario: Scenario, batch: int, tell: Callable[[int, int], None]) -> dict[Name, Timing]:
        """Seconds of one copy of every variant, of the non-block part and of the parent.

        With one thread seconds are CPU seconds, which a busy machine does not stretch; with more they are wall time.
        """
        wholes = self.wholes()
        shares: dict[str, Pair] = {}
        parents: list[Turn] = []
        with tempfile.TemporaryDirectory(prefix="puzzle-costs-") as temporary:
            parent = self._open(Path(temporary), [PARENT] * self.reader.depth, scenario, batch)
            for index, whole in enumerate(wholes):
                rest = [] if whole.repeated is None else [whole.repeated] * (self.reader.depth - 1)
                other = self._open(Path(temporary), [PARENT, *rest], scenario, batch)
                turns = self._turns({"parent": parent, "other": other}, scenario, batch)
                other.close()
                parents += turns["parent"]
                shares[whole.name] = self._shares(turns)
                tell(index + 1, len(wholes))
            parent.close()
        return self._apart(shares, [self._clock(turn) for turn in parents])

    def _open(self, folder: Path, layers: Sequence[LayerChoice], scenario: Scenario, batch: int) -> Timed:
        """A model of these layers with noise for weights: time does not depend on them."""
        with no_init_weights():
            model: Any = DeciLMForCausalLM(self.reader.child_config(layers))
        model.tie_weights()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
        path = write_gguf(model, folder / "model.gguf", self.hardware.precision, NO_TOKENIZER, "noise")
        del model
        session = LlamaCpp().load(path, self._how(scenario, batch))
        path.unlink()  # an open file stays readable, its name is free for the next
        return session

    def _how(self, scenario: Scenario, batch: int) -> Load:
        """Room for the requests that are timed."""
        steps = self.measure.decode_steps
        return Load(
            precision=self.hardware.precision,
            threads=self.threads,
            batch_size=batch,
            context_tokens=scenario.prompt_tokens + tokens_before(scenario.generated_tokens, steps) + steps,
        )

    def _turns(self, sessions: Mapping[str, Timed], scenario: Scenario, batch: int) -> dict[str, list[Turn]]:
        prompt = torch.randint(
            self.reader.config.vocab_size,
            (batch, scenario.prompt_tokens),
            generator=torch.Generator().manual_seed(0),
        )
        steps = self.measure.decode_steps
        grow = tokens_before(scenario.generated_tokens, steps)
        requests = {name: partial(session.request, prompt, steps, grow) for name, session in sessions.items()}
        for request in requests.values():
            request()  # warms caches up
        return in_turns(requests, self.measure.rounds)

    def _clock(self, turn: Turn) -> tuple[float, float]:
        return (turn.prefill_cpu, turn.step_cpu) if self.clock == "CPU" else (turn.prefill, turn.step)

    def _shares(self, turns: Mapping[str, Sequence[Turn]]) -> Pair:
        """Times over the parent's of the same round."""
        pairs = [
            (self._clock(other), self._clock(own)) for other, own in zip(turns["other"], turns["parent"], strict=True)
        ]
        prefill, decode = (median_metric([other[i] / own[i] for other, own in pairs]) for i in (0, 1))
        return prefill, decode

    def _apart(self, shares: Mapping[str, Pair], parents: Sequence[tuple[float, float]]) -> dict[Name, Timing]:
        """Costs of single subblocks from the whole models' shares of the parent's time."""
        found: dict[Name, list[tuple[float, float]]] = {}
        for phase in (0, 1):
            seconds = median_metric([turn[phase] for turn in parents])
            times = {
                name: (pair[phase].value * seconds.value, pair[phase].se * seconds.value)
                for name, pair in shares.items()
            }
            for name, figures in self._one_phase(times, (seconds.value, seconds.se)).items():
                found.setdefault(name, []).append(figures)
        return {name: _timing(*phases) for name, phases in found.items()}

    def _one_phase(self, times: Mapping[str, tuple[float, float]], parent: tuple[float, float]) -> dict[Name, Any]:
        first, copies = times[FIRST][0], self.reader.depth - 1

        def cost(name: str, *less: float) -> tuple[float, float]:
            seconds, error = times[name]
            return max(0.0, (seconds - first) / copies - sum(less)), error / copies

        partner = cost(self._alone(self.partner))[0]
        attention = cost("attention parent", partner)[0]
        found: dict[Name, Any] = {}
        for variant in self.variants:
            key = (variant.subblock, variant.label)
            if variant.subblock == "attention":
                free = variant.kind == "no_op"
                found[key] = (0.0, 0.0) if free else cost(f"attention {variant.label}", partner)
            else:
                found[key] = cost(self._alone(variant.label), *([] if self._wide(variant) else [attention]))
        found["non_block", ""] = (max(0.0, first - attention - found["ffn", "parent"][0]), times[FIRST][1])
        found["parent", ""] = parent
        return found


def _timing(prefill: tuple[float, float], decode: tuple[float, float]) -> Timing:
    """Of values and their standard errors."""

    def spread(value: float, error: float) -> float:
        return error / value if value else 0.0

    return Timing(prefill=prefill[0], decode=decode[0], prefill_spread=spread(*prefill), decode_spread=spread(*decode))
