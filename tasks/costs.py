"""Measured costs of every variant on this machine: prefill seconds and decode seconds per token, per scenario.

A variant costs the same in every layer, so each is measured once: a stack of copies with weights of their own (so that
a cache does not hold what a real model streams) runs prefill, then decode steps on a KV cache of the scenario's
length. All stacks are measured in turn in every round; the median over rounds is kept, with its spread. Embedding,
final norm and head are measured the same way, apart. The parent end to end closes each round: sum against whole.
"""

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.initialization import no_init_weights

from blocks.export_code.modeling_decilm import CACHE, DeciLMForCausalLM, DeciLMModel, layer_contexts
from blocks.library import digest_of, keep, remember
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Cost, CostTable, LayerChoice, NonBlockCost, ParentInfo
from blocks.resources import BYTES, non_block_parameters, resources, weight_bytes
from blocks.variant import Variant, parse_labels
from profiles.schema import Hardware, Measure, Profile, Scenario, SearchSpace
from tasks.calibration import calibrated, drift, parent_bias
from tasks.engines.limits import runnable
from tasks.precision import is_named, served_precision
from tasks.progress import part_of
from tasks.record import open_parent
from tasks.space import measured_space
from tasks.sums import PHASES
from tasks.throughput import ClockTooCoarse, cpu_clock, median_metric, relative_error, wait_for
from tasks.usage import Others

VERSION = 3
Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over rounds and their standard errors over them."""

    prefill: float
    decode: float
    prefill_spread: float
    decode_spread: float


def hardware_description(hardware: Hardware) -> dict[str, str]:
    """What the figures hold for: machine, engine, versions, precision, threads."""
    return {
        "name": hardware.name,
        "machine": platform.machine(),
        "processor": processor(),
        **_engine_description(hardware),
        "device": hardware.device,
        **_noted("accelerator", accelerator(hardware.device)),
        "precision": hardware.precision,
        "threads": str(hardware.threads or torch.get_num_threads()),
        "clock": clock_for(hardware),
    }


def _weights_of(hardware: Hardware, reader: Parent) -> dict[str, str]:
    """What bytes are told of, where that is not what was timed."""
    served = served_precision(hardware, reader)
    return {} if served == hardware.precision else {"weights": served}


def accelerator(device: str) -> str | None:
    """A GPU's name, None for a CPU: machines with the same processor may hold different ones."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None


def _noted(name: str, told: str | None) -> dict[str, str]:
    return {name: told} if told else {}


def clock_for(hardware: Hardware) -> str:
    """What the seconds of costs are. On one thread of a CPU: CPU time, which a busy machine does not stretch."""
    threads = hardware.threads or torch.get_num_threads()
    here = hardware.engine != "roofline" and hardware.device == "cpu"
    return "CPU" if here and threads == 1 else "wall"


def _engine_description(hardware: Hardware) -> dict[str, str]:
    if hardware.engine == "torch":
        return {"engine": f"torch {torch.__version__}", "transformers": transformers.__version__}
    from tasks.engines.registry import installed_engine

    return {"engine": installed_engine(hardware.engine).version()}


def processor() -> str:
    """The CPU's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def costs_path(
    parent: ParentInfo,
    space: SearchSpace,
    scenarios: Sequence[Scenario],
    hardware: Hardware,
    measure: Measure,
    workspace: Path,
) -> Path:
    """Where the table of these costs lies, measured or not."""
    key = digest_of(
        parent=parent.fingerprint,
        space=[space.attention, space.ffn],
        scenarios=scenarios,
        hardware=hardware_description(hardware),
        named=is_named(hardware),
        measure=measure.model_dump(exclude={"max_age_days"}),
        version=VERSION,
    )
    return workspace / "costs" / f"{key}.json"


def stored_costs(path: Path, measure: Measure, workspace: Path) -> CostTable | None:
    """The table at a place of `costs_path`, None where there is none or it is older than the profile allows."""
    table = remember(path, CostTable, lambda _: [], workspace)
    if table is None:
        return None
    age = datetime.now(UTC) - datetime.fromisoformat(table.measured_at)
    return table if age <= timedelta(days=measure.max_age_days) else None


def costs_of(profile: Profile, parent: ParentInfo, workspace: Path) -> CostTable | None:
    """The stored costs of a profile that a run would not measure again, None where there are none."""
    asked = measured_space(profile), profile.scenarios, profile.hardware, profile.measure
    return stored_costs(costs_path(parent, *asked, workspace), profile.measure, workspace)


def measure_costs(
    parent: ParentInfo,
    space: SearchSpace,
    scenarios: Sequence[Scenario],
    hardware: Hardware,
    measure: Measure,
    workspace: Path,
    tell: Tell = lambda done, total: None,
) -> CostTable:
    """Costs of every variant of the search space; the stored table when nothing it depends on has changed."""
    path = costs_path(parent, space, scenarios, hardware, measure, workspace)
    stored = stored_costs(path, measure, workspace)
    if stored is not None:
        return stored
    table = _measured(open_parent(workspace / parent.folder), space, scenarios, hardware, measure, tell)
    keep(path, table, [], workspace)
    return table


def measure_again(
    parent: ParentInfo,
    space: SearchSpace,
    scenarios: Sequence[Scenario],
    hardware: Hardware,
    measure: Measure,
    workspace: Path,
    tell: Tell = lambda done, total: None,
) -> list[str]:
    """Measure costs whether they are stored or not. What has moved, in words; only then, or where there were none, is
    a new table kept. The old one stands until the new one is whole.
    """
    path = costs_path(parent, space, scenarios, hardware, measure, workspace)
    before = stored_costs(path, measure, workspace)
    now = _measured(open_parent(workspace / parent.folder), space, scenarios, hardware, measure, tell)
    moved = drift(before, now) if before else []
    if moved or before is None:
        keep(path, now, [], workspace)
    return moved


def _measured(
    reader: Parent,
    space: SearchSpace,
    scenarios: Sequence[Scenario],
    hardware: Hardware,
    measure: Measure,
    tell: Tell,
) -> CostTable:
    names = {subblock: parse_labels(subblock, getattr(space, subblock), reader.config) for subblock in SUBBLOCKS}
    variants = [
        variant for subblock in SUBBLOCKS for variant in names[subblock] if _runs(hardware.engine, reader, variant)
    ]
    costs: list[Cost] = []
    non_block: list[NonBlockCost] = []
    whole: list[NonBlockCost] = []
    shapes = [(scenario, batch) for scenario in scenarios for batch in scenario.batch_sizes]
    bench, others = _bench(reader, variants, hardware, measure), Others()
    for index, (scenario, batch) in enumerate(shapes):
        timings = bench.run(scenario, batch, part_of(tell, index, len(shapes)))
        costs += [
            _cost(reader, variant, scenario, batch, timings[variant.subblock, variant.label], hardware)
            for variant in variants
        ]
        non_block.append(_non_block(reader, scenario, batch, timings["non_block", ""], hardware))
        whole.append(_non_block(reader, scenario, batch, timings["parent", ""], hardware))
    described = hardware_description(hardware)
    busy = others.crowd(int(described["threads"])) if described["clock"] == "wall" and hardware.device == "cpu" else ""
    table = CostTable(
        hardware=described | _noted("busy", busy) | _weights_of(hardware, reader),
        costs=tuple(costs),
        non_block=tuple(non_block),
        num_hidden_layers=reader.depth,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        parent_measured=tuple(whole),
    )
    if any(parent_bias(table, one, phase) is None for one in whole for phase in PHASES):
        raise ClockTooCoarse(
            "the clock shows no time for the parent: it is too coarse for so little work. Give the scenarios more "
            "prompt_tokens, and `measure` more decode_steps."
        )
    return calibrated(table)


def _runs(engine: str, reader: Parent, variant: Variant) -> bool:
    """Whether the engine can run a variant at all, judged in the last layer: what it cannot has no cost there."""
    alone = LayerChoice.alone(variant.subblock, variant.label)
    return runnable(engine, reader.config, reader.depth - 1, alone.attention, alone.ffn) is None


def _bench(reader: Parent, variants: Sequence[Variant], hardware: Hardware, measure: Measure) -> Any:
    """What times variants in the profile's engine: `run(scenario, batch, tell)`."""
    if hardware.engine == "torch":
        return _Bench(reader, variants, hardware, measure)
    if hardware.engine == "vllm":
        from tasks.vllm_costs import VllmBench

        return VllmBench(reader, variants, hardware, measure)
    from tasks.engine_costs import EngineBench

    return EngineBench(reader, variants, hardware, measure)


def _cost(reader: Parent, variant: Variant, scenario: Scenario, batch: int, timing: Timing, hardware: Hardware) -> Cost:
    in_gguf, served = hardware.engine == "llama.cpp", served_precision(hardware, reader)
    vector = BYTES["float32"] if in_gguf else weight_bytes(served)  # GGUF keeps norms and biases so
    needs = resources(reader, variant, scenario.prompt_tokens, weight_bytes(served), vector)
    kv_precision = "float16" if in_gguf else served  # llama.cpp's default for any weights
    cache = resources(reader, variant, scenario.prompt_tokens, BYTES[kv_precision]).kv_bytes_per_token
    return Cost(
        subblock=variant.subblock,
        variant=variant.label,
        scenario=scenario.name,
        batch_size=batch,
        prefill_seconds=timing.prefill,
        decode_seconds_per_token=timing.decode,
        prefill_spread=timing.prefill_spread,
        decode_spread=timing.decode_spread,
        parameters=needs.parameters,
        weight_bytes=needs.weight_bytes,
        kv_bytes_per_token=cache,
    )


def _non_block(reader: Parent, scenario: Scenario, batch: int, timing: Timing, hardware: Hardware) -> NonBlockCost:
    parameters, norm = non_block_parameters(reader.config), reader.config.hidden_size
    served = served_precision(hardware, reader)
    vector = BYTES["float32"] if hardware.engine == "llama.cpp" else weight_bytes(served)
    return NonBlockCost(
        scenario=scenario.name,
        batch_size=batch,
        prefill_seconds=timing.prefill,
        decode_seconds_per_token=timing.decode,
        parameters=parameters,
        weight_bytes=math.ceil((parameters - norm) * weight_bytes(served) + norm * vector),
        prefill_spread=timing.prefill_spread,
        decode_spread=timing.decode_spread,
    )


class _Bench:
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
        alone = LayerChoice.alone(variant.subblock, variant.label)
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
    def run(self, scenario: Scenario, batch: int, tell: Tell) -> dict[tuple[str, str], Timing]:
        """Rounds over all stacks, non-block parts and the whole parent, in turns."""
        rounds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        total = (self.measure.rounds + 1) * (len(self.stacks) + 2)
        done = 0
        for number in range(self.measure.rounds + 1):
            jobs: list[tuple[tuple[str, str], Callable[[], tuple[float, float]]]] = [
                (name, partial(self._time, stack, scenario, batch, self.copies)) for name, stack in self.stacks.items()
            ]
            jobs.append((("non_block", ""), lambda: self._time_non_block(scenario, batch)))
            jobs.append((("parent", ""), lambda: self._time(self.parent, scenario, batch, 1)))
            for name, job in jobs if number % 2 else reversed(jobs):
                figures = job()
                if number:  # the first round warms up
                    rounds.setdefault(name, []).append(figures)
                done += 1
                tell(done, total)
        free = Timing(prefill=0.0, decode=0.0, prefill_spread=0.0, decode_spread=0.0)
        return {name: _summary(figures) for name, figures in rounds.items()} | dict.fromkeys(self.free, free)

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


def _summary(figures: list[tuple[float, float]]) -> Timing:
    prefill, decode = (median_metric([figure[phase] for figure in figures]) for phase in (0, 1))
    return Timing(
        prefill=prefill.value,
        decode=decode.value,
        prefill_spread=relative_error(prefill),
        decode_spread=relative_error(decode),
    )
