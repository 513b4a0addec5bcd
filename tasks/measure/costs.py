"""Measured costs of every variant on this machine: seconds of a prefill and of a decode step, for every scenario.

A variant costs the same in every layer, so each is measured once, over several rounds; the median is kept, with its
standard error. How a variant is timed depends on the engine (torch_costs.py, whole_model_costs.py). Each round also
times the whole parent, so that the sum of the costs can be compared with it.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blocks.compute import HOST
from blocks.engine_limits import runnable
from blocks.kinds import parse_labels
from blocks.library import digest_of, keep, remember
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Cost, CostTable, LayerChoice, NonBlockCost, ParentInfo
from blocks.resources import BYTES, non_block_parameters, resources, weight_bytes
from blocks.variant import Variant
from profiles.schema import Hardware, Measure, Profile, Scenario, SearchSpace
from tasks.distill.record import open_parent
from tasks.engines.timing_in_turns import ClockTooCoarse
from tasks.inputs.precision import is_named, served_precision
from tasks.inputs.space import measured_space
from tasks.measure.calibration import calibrated, drift, parent_bias
from tasks.measure.cost_sums import PHASES
from tasks.measure.hardware_description import entry, hardware_description
from tasks.measure.llama_cpp_costs import LlamaCppTimer
from tasks.measure.torch_costs import TorchTimer
from tasks.measure.variant_timing import Timing, VariantTimer
from tasks.measure.vllm_costs import VllmTimer
from tasks.running.progress import Progress, no_progress, part_of
from tasks.running.usage import Others

VERSION = 3


def costs_path(
    parent: ParentInfo,
    space: SearchSpace,
    scenarios: Sequence[Scenario],
    hardware: Hardware,
    measure: Measure,
    workspace: Path,
) -> Path:
    """The file of these costs, whether they have been measured or not."""
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
    """The table in a file of `costs_path`. None where there is none, or where it is older than the profile allows."""
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
    progress: Progress = no_progress,
) -> CostTable:
    """Costs of every variant of the search space; the stored table when nothing it depends on has changed."""
    path = costs_path(parent, space, scenarios, hardware, measure, workspace)
    stored = stored_costs(path, measure, workspace)
    if stored is not None:
        return stored
    table = _measured(open_parent(workspace / parent.folder, HOST), space, scenarios, hardware, measure, progress)
    keep(path, table, [], workspace)
    return table


def measure_again(
    parent: ParentInfo,
    space: SearchSpace,
    scenarios: Sequence[Scenario],
    hardware: Hardware,
    measure: Measure,
    workspace: Path,
    progress: Progress = no_progress,
) -> list[str]:
    """Measure costs even where they are stored, and return what has changed, in words.

    A new table replaces the stored one only when something has changed. The stored one stays until the new one is
    whole.
    """
    path = costs_path(parent, space, scenarios, hardware, measure, workspace)
    before = stored_costs(path, measure, workspace)
    now = _measured(open_parent(workspace / parent.folder, HOST), space, scenarios, hardware, measure, progress)
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
    progress: Progress,
) -> CostTable:
    names = {subblock: parse_labels(subblock, getattr(space, subblock), reader.config) for subblock in SUBBLOCKS}
    variants = [
        variant for subblock in SUBBLOCKS for variant in names[subblock] if _runs(hardware.engine, reader, variant)
    ]
    costs: list[Cost] = []
    non_block: list[NonBlockCost] = []
    whole: list[NonBlockCost] = []
    shapes = [(scenario, batch) for scenario in scenarios for batch in scenario.batch_sizes]
    timer, others = _timer(reader, variants, hardware, measure), Others()
    for index, (scenario, batch) in enumerate(shapes):
        timings = timer.run(scenario, batch, part_of(progress, index, len(shapes)))
        costs += [
            _cost(reader, variant, scenario, batch, timings[variant.subblock, variant.label], hardware)
            for variant in variants
        ]
        non_block.append(_non_block(reader, scenario, batch, timings["non_block", ""], hardware))
        whole.append(_non_block(reader, scenario, batch, timings["parent", ""], hardware))
    described, served = hardware_description(hardware), served_precision(hardware, reader)
    busy = others.crowd(int(described["threads"])) if described["clock"] == "wall" and hardware.device == "cpu" else ""
    table = CostTable(
        hardware=described | entry("busy", busy) | entry("weights", None if served == hardware.precision else served),
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
    """Whether the engine can run a variant in the last layer. A variant that it cannot run has no cost."""
    alone = LayerChoice.only(variant.subblock, variant.label)
    return runnable(engine, reader.config, reader.depth - 1, alone.attention, alone.ffn) is None


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
        **timing.as_cost(),
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
        **timing.as_cost(),
        parameters=parameters,
        weight_bytes=math.ceil((parameters - norm) * weight_bytes(served) + norm * vector),
    )


def _timer(reader: Parent, variants: Sequence[Variant], hardware: Hardware, measure: Measure) -> VariantTimer:
    """What times variants in the profile's engine."""
    if hardware.engine == "torch":
        return TorchTimer(reader, variants, hardware, measure)
    if hardware.engine == "vllm":
        return VllmTimer(reader, variants, hardware, measure)
    return LlamaCppTimer(reader, variants, hardware, measure)
