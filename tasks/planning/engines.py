"""What measuring takes in the engine of a profile: costs of variants before the choice, whole models after it.

Seconds of models come from the roofline, of the machine that the run is planned on. In every engine a request is a
prefill, the tokens to the middle of the generation at once and untimed, then decode steps; each model has one request
that warms up and one per round. In torch, costs are of stacks of copies, all in memory at once. llama.cpp gets whole
models, written and loaded one after another, each in turns with the parent (measure/whole_model_costs.py), and at the
end an export of every model in a process of its own. How long vLLM starts and compiles is not known before it was seen.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blocks.records import SUBBLOCKS, CostTable, LayerChoice
from profiles.schema import Scenario
from tasks.engines.timing_in_turns import LONGEST, timed_steps, tokens_before
from tasks.inputs.space import measured_space
from tasks.measure.roofline import Setting, modelled_costs
from tasks.planning import effort
from tasks.planning.effort import FLOAT, Shape, Work

UNKNOWN = dict.fromkeys(
    ("vllm", "vllm-plugin"), "how long vLLM takes to start and to compile a model is not known before it was seen"
)
WORKER_SECONDS = 1.9  # CPU seconds of an engine's process before its first word; all start at once
PARENT = LayerChoice()


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """Seconds of models at one scenario and batch size, from the modelled costs."""

    table: CostTable
    scenario: Scenario
    batch: int

    def seconds(self, layers: Sequence[tuple[LayerChoice, float]], outside: float, steps: int) -> float:
        """One request of a model with so many layers of each choice and so many non-block parts."""
        prefill, step = self._non_block()
        total = [outside * prefill, outside * step]
        for choice, count in layers:
            for part in SUBBLOCKS:
                prefill, step = self._cost(part, getattr(choice, part))
                total[0] += count * prefill
                total[1] += count * step
        grown = tokens_before(self.scenario.generated_tokens, steps)
        return total[0] * (1 + grown / self.scenario.prompt_tokens) + steps * total[1]

    def _here(self, cost: object) -> bool:
        return (getattr(cost, "scenario", ""), getattr(cost, "batch_size", 0)) == (self.scenario.name, self.batch)

    def _cost(self, part: str, label: str) -> tuple[float, float]:
        found = [c for c in self.table.costs if self._here(c) and (c.subblock, c.variant) == (part, label)]
        return (found[0].prefill_seconds, found[0].decode_seconds_per_token) if found else (0.0, 0.0)

    def _non_block(self) -> tuple[float, float]:
        found = next(c for c in self.table.non_block if self._here(c))
        return found.prefill_seconds, found.decode_seconds_per_token


def request_times_of(shape: Shape, setting: Setting, largest_only: bool = False) -> list[RequestTimes]:
    """Every scenario at every batch size, or at its largest."""
    table = modelled_costs(shape.parent, measured_space(shape.profile), shape.profile.scenarios, setting)
    return [
        RequestTimes(table=table, scenario=scenario, batch=batch)
        for scenario in shape.profile.scenarios
        for batch in ([max(scenario.batch_sizes)] if largest_only else scenario.batch_sizes)
    ]


def measure_work(shape: Shape, setting: Setting | None) -> Work | None:
    """Costs of all variants; nothing where they are modelled, None where the engine's time is not known."""
    engine = shape.profile.hardware.engine
    if setting is None:
        return Work()
    if engine in UNKNOWN:
        return None
    places = request_times_of(shape, setting)
    tasks = len(places) * (2 + sum(map(len, shape.variants.values())))
    each = Work(fixed=tasks * effort.TASK_SECONDS)
    if engine == "torch":
        return _stacks(shape, places) + each
    work = _whole_models(shape, places) + each
    for kind in shape.profile.search_space.precision:
        own = request_times_of(shape, replace(setting, kind=kind))
        work += _whole_models(shape, own) + each + _ratio(shape, places, own)
    return work


def _stacks(shape: Shape, places: Sequence[RequestTimes]) -> Work:
    """Stacks of every variant, non-block part and parent, in rounds."""
    measure, copies = shape.profile.measure, min(shape.profile.measure.stack, shape.depth)
    seconds = 0.0
    for place in places:
        for part in SUBBLOCKS:
            for label in dict.fromkeys(cost.variant for cost in place.table.costs if cost.subblock == part):
                single = LayerChoice.only(part, label)
                seconds += place.seconds([(single, copies)], 0, measure.decode_steps)
        seconds += place.seconds([(PARENT, shape.depth)], 1, measure.decode_steps)  # takes its turn as well
        seconds += place.seconds([], 1, measure.decode_steps)
    noise = copies * FLOAT * sum(shape.parameters(v) for variants in shape.variants.values() for v in variants)
    build = (noise + effort.model_bytes(shape)) / effort.BUILD_BYTES_PER_SECOND
    return Work(fixed=seconds * (measure.rounds + 1) + build)


def _whole_models(shape: Shape, places: Sequence[RequestTimes]) -> Work:
    """Parent and other in turns, for every other model; both are noise, written to a file and loaded."""
    from tasks.measure.whole_model_costs import models_to_time

    measure = shape.profile.measure
    variants = [variant for variants in shape.variants.values() for variant in variants]
    work = Work()
    for place in places:
        parent = [(PARENT, float(shape.depth))]
        work += _written(shape, parent)
        for whole in models_to_time(shape.parent, variants):
            layers = [(PARENT, 1.0)]
            if whole.repeated is not None:
                layers.append((whole.repeated, float(shape.depth - 1)))
            turns = place.seconds(parent, 1, measure.decode_steps) + place.seconds(layers, 1, measure.decode_steps)
            work += _written(shape, layers) + Work(fixed=turns * (measure.rounds + 1))
    return work


def _ratio(shape: Shape, places: Sequence[RequestTimes], own: Sequence[RequestTimes]) -> Work:
    """The parent in a type in turns with the parent in the profile's precision, in many rounds."""
    from tasks.measure.whole_model_costs import RATIO_ROUNDS

    measure, parent = shape.profile.measure, [(PARENT, float(shape.depth))]
    turns = sum(place.seconds(parent, 1, measure.decode_steps) for place in (*places, *own))
    return _written(shape, parent) * (2 * len(places)) + Work(fixed=turns * (RATIO_ROUNDS * measure.rounds + 1))


def _written(shape: Shape, layers: Sequence[tuple[LayerChoice, float]]) -> Work:
    """A model of noise made, exported and loaded."""
    options = {(v.subblock, v.label): shape.parameters(v) for variants in shape.variants.values() for v in variants}
    own = sum(count * options.get((part, getattr(choice, part)), 0) for choice, count in layers for part in SUBBLOCKS)
    size = FLOAT * (own + shape.outside_parameters)
    return Work(fixed=size / effort.BUILD_BYTES_PER_SECOND, disk=2.0 * size)


def throughput_work(shape: Shape, setting: Setting | None, models: Sequence[tuple[float, str]]) -> Work | None:
    """Models in turns, at every scenario: the share of the layers that each keeps, and its type of number. None where
    the engine's time is not known, nothing where costs are modelled.
    """
    engine = shape.profile.hardware.engine
    if setting is None:
        return Work()
    if engine in UNKNOWN:
        return None
    rounds = LONGEST * shape.profile.evaluate.throughput_rounds  # small models are seldom known sooner
    places_of = {kind: request_times_of(shape, replace(setting, kind=kind), largest_only=True) for _, kind in models}
    work = Work(fixed=effort.TASK_SECONDS)
    if engine != "torch":
        work += Work(fixed=WORKER_SECONDS * max(1.0, len(models) / (os.cpu_count() or 1)))
    for share, kind in models:
        size = effort.model_bytes(shape, share)
        work += Work(fixed=size / effort.BUILD_BYTES_PER_SECOND)
        if engine != "torch":
            work += Work(disk=2.0 * size)
        for place in places_of[kind]:
            layers = [(PARENT, share * shape.depth)]
            steps = timed_steps(place.scenario.generated_tokens)
            warm = place.seconds(layers, 1, min(steps, 2))
            work += Work(fixed=rounds * place.seconds(layers, 1, steps) + warm)
    return work
