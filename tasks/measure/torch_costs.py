"""Costs of variants in torch: each variant is a stack of copies of its subblock, and the stacks are timed in turns.

In every round each stack has one turn, so that whatever else the machine does falls on all of them alike. So the parts
of one load are measured together, when the first of them is asked for. Every turn is kept on disk: after a kill the
rounds go on at the turn that was interrupted. The machine may have become faster or slower meanwhile. The turns of each
process are therefore compared with those of the whole parent in the same process.

Every copy has weights of its own. A processor's cache then cannot hold them all, as it cannot hold those of a real
model. Embedding, final norm and head are timed in the same way, and each round ends with the whole parent.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights

from blocks.export_code.modeling_decilm import CACHE, DeciLMForCausalLM, DeciLMModel, layer_contexts, with_own_layers
from blocks.parent import Parent
from blocks.records import LayerChoice
from blocks.runtime import products_as_served
from blocks.variant import Variant
from profiles.schema import Hardware, Measure
from tasks.engines.timing_in_turns import cpu_clock, median_metric, tokens_before, wait_for
from tasks.measure.hardware_description import clock_for
from tasks.measure.variant_timing import NON_BLOCK, PARENT, KeptFigures, Load, Timing, name_of
from tasks.running.progress import Progress


def stacks_to_time(variants: Sequence[Variant]) -> list[str]:
    """The parts that are timed."""
    return [*(name_of(variant) for variant in variants if variant.kind != "no_op"), NON_BLOCK, PARENT]


class TorchTimer:
    """Stacks of every variant, in memory at once, and the parent; runs rounds over them in turn."""

    def __init__(self, reader: Parent, variants: Sequence[Variant], hardware: Hardware, measure: Measure) -> None:
        self.reader, self.measure = reader, measure
        self.device, self.dtype = hardware.device, getattr(torch, hardware.precision)
        self.clock = cpu_clock(1) if clock_for(hardware) == "CPU" else time.perf_counter
        self.copies = min(measure.stack, reader.depth)
        generator = torch.Generator().manual_seed(0)
        self.variants = variants
        self.stacks = {
            name_of(variant): self._stack(variant, generator) for variant in variants if variant.kind != "no_op"
        }
        model: Any = reader.model()
        self.parent = model.to(self.device, self.dtype)

    def _stack(self, variant: Variant, generator: torch.Generator) -> DeciLMModel:
        """A model of `copies` layers that hold this subblock alone; weights are noise, time does not depend on it."""
        alone = LayerChoice.only(variant.subblock, variant.label)
        config = self.reader.child_config([alone] * self.copies)
        config.vocab_size = 8  # the embedding is not run
        config.pad_token_id = None
        config._attn_implementation = "sdpa"
        with no_init_weights():
            stack: Any = DeciLMModel(config)
        for parameter in stack.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
        return stack.to(self.device, self.dtype).eval()

    @products_as_served()
    @torch.inference_mode()
    def time(self, what: str, load: Load, kept: KeptFigures, progress: Progress) -> None:
        """See VariantTimer. All parts take turns, so all that are not finished are measured with this one."""
        jobs: dict[str, Callable[[], tuple[float, float]]] = {
            name: partial(self._time, stack, load, self.copies) for name, stack in self.stacks.items()
        }
        jobs |= {NON_BLOCK: partial(self._time_non_block, load), PARENT: partial(self._time, self.parent, load, 1)}
        have = {(row["what"], row["round"]) for row in kept.of(load)}
        turns = [
            (name, number)
            for number in range(1, self.measure.rounds + 1)
            for name in (jobs if number % 2 else reversed(jobs))
            if (name, number) not in have
        ]
        if not turns:
            return
        for warm_up in jobs.values():
            warm_up()
        if have:  # a killed process left off within a round: its turns and these are compared by the parent
            turns.insert(0, (PARENT, 0))
        for done, (name, number) in enumerate(turns, start=1):
            prefill, decode = jobs[name]()
            kept.add(load, name, round=number, prefill=prefill, decode=decode)
            progress(done, len(turns))

    def timings(self, load: Load, kept: KeptFigures) -> dict[str, Timing]:
        """See VariantTimer."""
        free = {
            name_of(variant): Timing(prefill=0.0, decode=0.0) for variant in self.variants if variant.kind == "no_op"
        }
        return free | {name: summary(seconds) for name, seconds in _at_one_speed(kept.of(load)).items()}

    def close(self) -> None:
        """See VariantTimer."""

    def _time(self, model: DeciLMModel | DeciLMForCausalLM, load: Load, copies: int) -> tuple[float, float]:
        """Prefill seconds and decode seconds per token, divided by the copies."""
        whole, scenario, batch = isinstance(model, DeciLMForCausalLM), load.scenario, load.batch
        cache: Any = with_own_layers(DynamicCache(config=model.config), model.config)
        step = self._whole_step if whole else self._stack_step
        started = self._now()
        step(model, batch, scenario.prompt_tokens, 0, cache)
        prefilled = self._now()
        grow = tokens_before(scenario.generated_tokens, self.measure.decode_steps)
        if grow:
            step(model, batch, grow, scenario.prompt_tokens, cache)
        halfway = self._now()
        for offset in range(self.measure.decode_steps):
            step(model, batch, 1, scenario.prompt_tokens + grow + offset, cache)
        ended = self._now()
        return (prefilled - started) / copies, (ended - halfway) / copies / self.measure.decode_steps

    def _whole_step(self, model: Any, batch: int, tokens: int, position: int, cache: DynamicCache) -> None:
        ids = torch.full((batch, tokens), 7 % self.reader.config.vocab_size, device=self.device)
        model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1)

    def _stack_step(self, model: Any, batch: int, tokens: int, position: int, cache: DynamicCache) -> None:
        hidden = self._hidden(batch, tokens)
        positions = torch.arange(position, position + tokens, device=self.device).unsqueeze(0)
        contexts = self._contexts(model, hidden, positions, cache)
        for layer, kind in zip(model.layers, model.config.parent_layer_types, strict=False):
            hidden = layer(hidden, position_ids=positions, **{CACHE: cache}, **contexts[kind])

    def _contexts(self, model: Any, hidden: Tensor, positions: Tensor, cache: DynamicCache) -> dict[str, Any]:
        return layer_contexts(model.config, model.rotary_emb, hidden, positions, None, cache)

    def _hidden(self, batch: int, tokens: int) -> Tensor:
        shape = (batch, tokens, self.reader.config.hidden_size)
        return torch.ones(shape, device=self.device, dtype=self.dtype).mul_(0.1)

    def _time_non_block(self, load: Load) -> tuple[float, float]:
        """Embedding of all tokens, final norm, head of the last token; then the same for one token at a time."""
        model: Any = self.parent
        norm: nn.Module = model.model.norm
        ids = torch.full(
            (load.batch, load.scenario.prompt_tokens), 7 % self.reader.config.vocab_size, device=self.device
        )
        started = self._now()
        model.lm_head(norm(model.model.entering(ids))[:, -1:])
        prefilled = self._now()
        for _ in range(self.measure.decode_steps):
            model.lm_head(norm(model.model.entering(ids[:, :1])))
        return prefilled - started, (self._now() - prefilled) / self.measure.decode_steps

    def _now(self) -> float:
        wait_for(torch.device(self.device))
        return self.clock()


def _at_one_speed(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(prefill, decode) seconds of every part in every round. Where several processes measured, each one's seconds are
    divided by its parent's and multiplied by the parent's of all.
    """
    sittings = sorted({row["sitting"] for row in rows})

    def factor(sitting: int, phase: str) -> float:
        parents = [row for row in rows if row["what"] == PARENT]
        own = statistics.median([row[phase] for row in parents if row["sitting"] == sitting] or [0.0])
        every = statistics.median(row[phase] for row in parents)
        return every / own if len(sittings) > 1 and own else 1.0

    factors = {sitting: [factor(sitting, phase) for phase in ("prefill", "decode")] for sitting in sittings}
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["round"]:
            prefill, decode = factors[row["sitting"]]
            found.setdefault(row["what"], []).append((prefill * row["prefill"], decode * row["decode"]))
    return found


def summary(figures: list[tuple[float, float]]) -> Timing:
    """The timing of (prefill, decode) seconds that were measured in several rounds."""
    return Timing.of(*(median_metric([figure[phase] for figure in figures]) for phase in (0, 1)))
