"""Measured costs of every variant on this machine: seconds of a prefill and of a decode step, for every scenario.

A variant costs the same in every layer, so each is measured once, over several rounds; the median is kept, with its
standard error. How a variant is timed depends on the engine (torch_costs.py, whole_model_costs.py). Each round also
times the whole parent, so that the sum of the costs can be compared with it.
"""

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from blocks.compute import HOST
from blocks.disturbance import is_better
from blocks.engine_limits import runnable
from blocks.families import windows_of
from blocks.kinds import kind_of, parse_labels
from blocks.library import digest_of, keep, remember
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, Cost, CostTable, LayerChoice, NonBlockCost, ParentInfo, Value
from blocks.resources import BYTES, non_block_parameters, norm_parameters, resources, weight_bytes
from blocks.variant import Variant
from profiles.hardware import load_target
from profiles.schema import Hardware, Measure, Profile, Scenario, SearchSpace
from tasks.distill.record import open_parent
from tasks.engines.timing_in_turns import ClockTooCoarse
from tasks.inputs.precision import cache_precision, is_named, served_precision
from tasks.inputs.space import measured_space
from tasks.measure.calibration import calibrated, drift, parent_bias
from tasks.measure.cost_sums import PHASES
from tasks.measure.hardware_description import entry, hardware_description
from tasks.measure.llama_cpp_costs import LlamaCppTimer
from tasks.measure.roofline import modelled_costs, setting_of
from tasks.measure.torch_costs import TorchTimer, stacks_to_time
from tasks.measure.variant_timing import NON_BLOCK, PARENT, KeptFigures, Load, Timing, VariantTimer, name_of
from tasks.measure.vllm_costs import VllmTimer
from tasks.measure.whole_model_costs import models_to_time
from tasks.running.progress import Progress, no_progress, part_of, say
from tasks.running.usage import Others, crowd

VERSION = 3
STEPS = {"ssd": 2, "gdn": 2}  # versions of a child's code for one token, of kinds where it is not the first


class CostRequest(Value):
    """What costs are asked for: of which parent and variants, under which loads, on what, and how they are measured."""

    parent: ParentInfo
    space: SearchSpace
    scenarios: tuple[Scenario, ...]
    hardware: Hardware
    measure: Measure

    @classmethod
    def of(cls, profile: Profile, parent: ParentInfo) -> "CostRequest":
        """The costs that a run of a profile needs."""
        return cls(
            parent=parent,
            space=measured_space(profile),
            scenarios=profile.scenarios,
            hardware=profile.hardware,
            measure=profile.measure,
        )

    @property
    def key(self) -> str:
        """Digest of all that the costs depend on."""
        return digest_of(
            parent=self.parent.fingerprint,
            space=[self.space.attention, self.space.ffn],
            scenarios=self.scenarios,
            hardware=hardware_description(self.hardware),
            named=is_named(self.hardware),
            measure=self.measure.model_dump(exclude={"max_age_days"}),
            version=VERSION,
            **{kind: version for kind, version in STEPS.items() if kind in self.space.attention},
        )

    def in_type(self, kind: str) -> "CostRequest":
        """The same costs with every matrix in a type of number of GGUF."""
        return self.model_copy(update={"hardware": self.hardware.model_copy(update={"precision": kind})})

    @property
    def loads(self) -> list[Load]:
        """Every scenario at every batch size."""
        return [Load(scenario=scenario, batch=batch) for scenario in self.scenarios for batch in scenario.batch_sizes]

    def path(self, workspace: Path) -> Path:
        """The file of these costs, whether they have been measured or not."""
        return workspace / "costs" / f"{self.key}.json"

    def stored(self, workspace: Path) -> CostTable | None:
        """The stored costs. None where there are none, or where they are older than the profile allows."""
        table = remember(self.path(workspace), CostTable, lambda _: [], workspace)
        if table is None:
            return None
        age = datetime.now(UTC) - datetime.fromisoformat(table.measured_at)
        if age > timedelta(days=self.measure.max_age_days):
            return None
        if not table.windows:  # of an older version
            config = open_parent(workspace / self.parent.folder).config
            return table.model_copy(update={"windows": windows_of(config)})
        return table

    def variants(self, reader: Parent) -> list[Variant]:
        """Those that the engine can run in the last layer. A variant that it cannot run has no cost."""
        config, layer, found = reader.config, reader.depth - 1, []
        for subblock in SUBBLOCKS:
            for variant in parse_labels(subblock, getattr(self.space, subblock), config):
                alone = LayerChoice.only(subblock, variant.label)
                if runnable(self.hardware.engine, config, layer, alone.attention, alone.ffn) is None:
                    found.append(variant)
        return found

    def parts(self, reader: Parent) -> list["Part"]:
        """All that is measured, one after another, each a task of its own."""
        variants, key, in_torch = self.variants(reader), self.key, self.hardware.engine == "torch"
        names = stacks_to_time(variants) if in_torch else [one.name for one in models_to_time(reader, variants)]
        return [Part(of=key, what=name, load=load) for load in self.loads for name in names]


class Part(Value):
    """What is measured at once: a variant, or what its cost is told from, under one load."""

    of: str
    what: str
    load: Load

    @property
    def key(self) -> str:
        """Digest of all that its figures depend on."""
        return digest_of(of=self.of, what=self.what, load=self.load)

    @property
    def label(self) -> str:
        """`ffn ffn768 chat x4`."""
        return f"{self.what} {self.load.label}"


def costs_of(profile: Profile, parent: ParentInfo, workspace: Path) -> CostTable | None:
    """The costs of a profile that a run would not measure: those that are stored, None where there are none; or those
    that are modelled, where the profile says so.
    """
    if profile.hardware.engine == "roofline":
        return modelled_for(profile, parent, workspace)
    return CostRequest.of(profile, parent).stored(workspace)


def modelled_for(profile: Profile, parent: ParentInfo, workspace: Path) -> CostTable:
    """The costs of every variant on the hardware target that a profile names, modelled."""
    reader = open_parent(workspace / parent.folder)
    setting = setting_of(profile.hardware, load_target(profile.hardware.name), reader)
    return modelled_costs(reader, measured_space(profile), profile.scenarios, setting)


Handed = Callable[[Part, Callable[[], None]], object]  # gets what has to be measured, and the function that does it


def measure_costs(
    asked: CostRequest,
    workspace: Path,
    progress: Progress = no_progress,
    again: bool = False,
    hand: Handed = lambda _, measure: measure(),
) -> CostTable:
    """Costs of every variant of the search space; the stored table when nothing it depends on has changed.

    Whatever has been measured of a part is kept at once, so a process that is killed measures no other part again.

    Args:
        asked: the costs.
        workspace: folder that keeps them.
        progress: told how far it is.
        again: measure them even where they are stored. The stored table stays until the new one is whole; the new one
            takes its place if a cost has moved, or if only the new one is reliable.
        hand: calls the function that measures a part; a run makes a task of each.
    """
    before = asked.stored(workspace)
    if before is not None and not again:
        return before
    now = _measured(asked, workspace, progress, hand)
    if before is not None and not _takes_over(now, before):
        return before
    keep(asked.path(workspace), now, [], workspace)
    return now


def _takes_over(now: CostTable, before: CostTable) -> bool:
    """Two reliable tables differ where a cost has moved; a disturbed one does not tell."""
    if not (now.disturbed or before.disturbed):
        return bool(drift(before, now))
    if not is_better(now, before):
        say(f"costs: {now.disturbed}. Those that are stored stay")
        return False
    return True


def _measured(asked: CostRequest, workspace: Path, progress: Progress, hand: Handed) -> CostTable:
    reader = open_parent(workspace / asked.parent.folder, HOST)
    kept = KeptFigures(asked.path(workspace).with_suffix(".unfinished"))
    timer, others = _timer(reader, asked), Others()
    try:
        for part in asked.parts(reader):
            report = part_of(progress, asked.loads.index(part.load), len(asked.loads))
            hand(part, partial(timer.time, part.what, part.load, kept, report))
        timings = {at.label: timer.timings(at, kept) for at in asked.loads}
    finally:
        timer.close()
        kept.close()
    table = _table(asked, reader, timings, others)
    kept.discard()
    if any(parent_bias(table, one, phase) is None for one in table.parent_measured for phase in PHASES):
        raise ClockTooCoarse(
            "the clock shows no time for the parent: it is too coarse for so little work. Give the scenarios more "
            "prompt_tokens, and `measure` more decode_steps."
        )
    return calibrated(table)


def _table(
    asked: CostRequest, reader: Parent, timings: Mapping[str, Mapping[str, Timing]], others: Others
) -> CostTable:
    hardware = asked.hardware
    described, served, load = hardware_description(hardware), served_precision(hardware, reader), others.load()
    others_count = described["clock"] == "wall" and hardware.device == "cpu"
    busy = crowd(load, int(described["threads"])) if others_count else ""
    variants = asked.variants(reader)

    def rest(what: str) -> tuple[NonBlockCost, ...]:
        return tuple(_non_block(reader, at.scenario, at.batch, timings[at.label][what], hardware) for at in asked.loads)

    return CostTable(
        hardware=described | entry("busy", busy) | entry("weights", None if served == hardware.precision else served),
        costs=tuple(
            _cost(reader, one, at.scenario, at.batch, timings[at.label][name_of(one)], hardware)
            for at in asked.loads
            for one in variants
        ),
        non_block=rest(NON_BLOCK),
        num_hidden_layers=reader.depth,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        parent_measured=rest(PARENT),
        load=load,
        windows=windows_of(reader.config),
    )


def _cost(reader: Parent, variant: Variant, scenario: Scenario, batch: int, timing: Timing, hardware: Hardware) -> Cost:
    in_gguf, served = hardware.engine == "llama.cpp", served_precision(hardware, reader)
    vector = BYTES["float32"] if in_gguf else weight_bytes(served)  # GGUF keeps norms and biases so
    needs = resources(reader, variant, scenario.prompt_tokens, weight_bytes(served), vector)
    kept = weight_bytes(cache_precision(hardware, served))
    cache = resources(reader, variant, scenario.prompt_tokens, kept)
    return Cost(
        subblock=variant.subblock,
        variant=variant.label,
        scenario=scenario.name,
        batch_size=batch,
        **timing.as_cost(),
        parameters=needs.parameters,
        weight_bytes=needs.weight_bytes,
        kv_bytes_per_token=cache.kv_bytes_per_token,
        kv_tokens=kind_of(variant).kv_tokens(variant),
        state_bytes=cache.state_bytes,
    )


def _non_block(reader: Parent, scenario: Scenario, batch: int, timing: Timing, hardware: Hardware) -> NonBlockCost:
    parameters, norm = non_block_parameters(reader.config), norm_parameters(reader.config)
    served = served_precision(hardware, reader)
    vector = BYTES["float32"] if hardware.engine == "llama.cpp" else weight_bytes(served)
    return NonBlockCost(
        scenario=scenario.name,
        batch_size=batch,
        prefill_seconds=timing.prefill,
        decode_seconds_per_token=timing.decode,
        prefill_spread=timing.prefill_spread,
        decode_spread=timing.decode_spread,
        parameters=parameters,
        weight_bytes=math.ceil((parameters - norm) * weight_bytes(served) + norm * vector),
    )


def _timer(reader: Parent, asked: CostRequest) -> VariantTimer:
    """What times variants in the profile's engine."""
    timers = {"torch": TorchTimer, "vllm": VllmTimer, "vllm-plugin": VllmTimer, "llama.cpp": LlamaCppTimer}
    found: VariantTimer = timers[asked.hardware.engine](reader, asked.variants(reader), asked.hardware, asked.measure)
    return found
