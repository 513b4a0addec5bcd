"""Costs of variants in torch: each variant is a stack of copies of its subblock, and the stacks are timed in turns.

Every copy has weights of its own. A processor's cache then cannot hold them all, as it cannot hold those of a real
model. Embedding, final norm and head are timed in the same way, and each round ends with the whole parent.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights

from blocks.export_code.modeling_decilm import CACHE, DeciLMForCausalLM, DeciLMModel, layer_contexts
from blocks.parent import Parent
from blocks.records import LayerChoice
from blocks.variant import Variant
from profiles.schema import Hardware, Measure, Scenario
from tasks.engines.timing_in_turns import cpu_clock, median_metric, wait_for
from tasks.measure.hardware_description import clock_for
from tasks.measure.variant_timing import Timed, Timing
from tasks.running.progress import Progress


class TorchTimer:
    """Stacks of every variant, in memory at once, and the parent; runs rounds over them in turn."""

    def __init__(self, reader: Parent, variants: Sequence[Variant], hardware: Hardware, measure: Measure) -> None:
        self.reader, self.measure = reader, measure
        self.device, self.dtype = hardware.device, getattr(torch, hardware.precision)
        self.clock = cpu_clock(1) if clock_for(hardware) == "CPU" else time.perf_counter
        self.copies = min(measure.stack, reader.depth)
        generator = torch.Generator().manual_seed(0)
        self.stacks = {
            (variant.subblock, variant.label): self._stack(variant, generator)
            for variant in variants
            if variant.kind != "no_op"
        }
        self.free = [(variant.subblock, variant.label) for variant in variants if variant.kind == "no_op"]
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

    @torch.inference_mode()
    def run(self, scenario: Scenario, batch: int, progress: Progress) -> dict[Timed, Timing]:
        """Rounds over all stacks, non-block parts and the whole parent, in turns."""
        rounds: dict[Timed, list[tuple[float, float]]] = {}
        total = (self.measure.rounds + 1) * (len(self.stacks) + 2)
        done = 0
        for number in range(self.measure.rounds + 1):
            jobs: list[tuple[Timed, Callable[[], tuple[float, float]]]] = [
                (name, partial(self._time, stack, scenario, batch, self.copies)) for name, stack in self.stacks.items()
            ]
            jobs.append((("non_block", ""), lambda: self._time_non_block(scenario, batch)))
            jobs.append((("parent", ""), lambda: self._time(self.parent, scenario, batch, 1)))
            for name, job in jobs if number % 2 else reversed(jobs):
                figures = job()
                if number:  # the first round warms up
                    rounds.setdefault(name, []).append(figures)
                done += 1
                progress(done, total)
        free = Timing(prefill=0.0, decode=0.0)
        return {name: summary(figures) for name, figures in rounds.items()} | dict.fromkeys(self.free, free)

    def _time(
        self, model: DeciLMModel | DeciLMForCausalLM, scenario: Scenario, batch: int, copies: int
    ) -> tuple[float, float]:
        """Prefill seconds and decode seconds per token, divided by the copies."""
        whole = isinstance(model, DeciLMForCausalLM)
        cache = DynamicCache(config=model.config)
        step = self._whole_step if whole else self._stack_step
        started = self._now()
        step(model, batch, scenario.prompt_tokens, 0, cache)
        prefilled = self._now()
        # a token of the middle of the generation is the average one: the cache grows to there untimed
        middle = scenario.prompt_tokens + max(0, (scenario.generated_tokens - self.measure.decode_steps) // 2)
        if middle > scenario.prompt_tokens:
            step(model, batch, middle - scenario.prompt_tokens, scenario.prompt_tokens, cache)
        halfway = self._now()
        for offset in range(self.measure.decode_steps):
            step(model, batch, 1, middle + offset, cache)
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
        return layer_contexts(model.config, model.rotary_emb, hidden, positions, None, cache, model.family)

    def _hidden(self, batch: int, tokens: int) -> Tensor:
        shape = (batch, tokens, self.reader.config.hidden_size)
        return torch.ones(shape, device=self.device, dtype=self.dtype).mul_(0.1)

    def _time_non_block(self, scenario: Scenario, batch: int) -> tuple[float, float]:
        """Embedding of all tokens, final norm, head of the last token; then the same for one token at a time."""
        model: Any = self.parent
        norm: nn.Module = model.model.norm
        ids = torch.full((batch, scenario.prompt_tokens), 7 % self.reader.config.vocab_size, device=self.device)
        started = self._now()
        model.lm_head(norm(model.model.embed_tokens(ids))[:, -1:])
        prefilled = self._now()
        for _ in range(self.measure.decode_steps):
            model.lm_head(norm(model.model.embed_tokens(ids[:, :1])))
        return prefilled - started, (self._now() - prefilled) / self.measure.decode_steps

    def _now(self) -> float:
        wait_for(torch.device(self.device))
        return self.clock()


def summary(figures: list[tuple[float, float]]) -> Timing:
    """The timing of (prefill, decode) seconds that were measured in several rounds."""
    return Timing.of(*(median_metric([figure[phase] for figure in figures]) for phase in (0, 1)))
