"""What the costs of single blocks add up to, compared with whole models that were measured in the same run.

All copies of a variant in a model share one measurement, so the variant's standard error counts once for each copy.
Errors of different variants are taken to be independent.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from blocks.records import (
    PARENT,
    SUBBLOCKS,
    Architecture,
    Cost,
    CostTable,
    LayerChoice,
    Metric,
    NonBlockCost,
    SpeedReport,
    SumCheck,
    Throughput,
    Totals,
)

Phase = Literal["prefill", "decode"]
ScenarioBatch = tuple[str, int]  # a scenario's name and a batch size
PHASES: tuple[Phase, ...] = ("prefill", "decode")
SECONDS: dict[Phase, str] = {"prefill": "prefill_seconds", "decode": "decode_seconds_per_token"}
MEASURED = {
    ("prefill", "wall"): "first_token_seconds",
    ("decode", "wall"): "output_token_seconds",
    ("prefill", "CPU"): "prefill_cpu_seconds",
    ("decode", "CPU"): "step_cpu_seconds",
}
GAINS = {
    ("prefill", "wall"): "prefill",
    ("decode", "wall"): "decode",
    ("prefill", "CPU"): "prefill_cpu",
    ("decode", "CPU"): "decode_cpu",
}
TOLERANCE = 0.05  # when the median scenario is off by more, a sentence says so


def clock_of(costs: CostTable) -> str:
    """What the seconds of a table are: "CPU" or "wall"."""
    return costs.hardware.get("clock", "wall")


def check_sums(
    architectures: Mapping[str, Architecture], speed: Mapping[str, Sequence[Throughput]], costs: CostTable
) -> tuple[SumCheck, ...]:
    """A check for every model, scenario and phase, except where the clock shows no time."""
    clock, found = clock_of(costs), []
    for name, measured in speed.items():
        for own in measured:
            for phase in PHASES:
                totals = {
                    which: _totals(architectures[which], own.scenario, own.batch_size) for which in {PARENT, name}
                }
                at = (own.scenario, own.batch_size)
                spread = error_of_sum(costs, architectures[name].layers, at, phase, architectures[name].head)
                check = _check(name, phase, clock, totals, spread, own)
                found += [check] if check else []
    return tuple(found)


def _totals(architecture: Architecture, scenario: str, batch_size: int) -> Totals:
    return next(own for own in architecture.totals if (own.scenario, own.batch_size) == (scenario, batch_size))


def _check(
    name: str, phase: Phase, clock: str, totals: Mapping[str, Totals], spread: float, own: Throughput
) -> SumCheck | None:
    predicted = float(getattr(totals[name], SECONDS[phase]))
    measured: Metric = getattr(own, MEASURED[phase, clock])
    if not predicted or not measured.value:
        return None
    relative = math.hypot(spread / predicted, measured.se / measured.value)
    gain_off = None
    if own.gains is not None:
        gain: Metric = getattr(own.gains, GAINS[phase, clock])
        promised = getattr(totals[PARENT], SECONDS[phase]) / predicted
        gain_off = _off(promised / gain.value, math.hypot(spread / predicted, gain.se / gain.value), gain.n)
    return SumCheck(
        model=name,
        scenario=own.scenario,
        batch_size=own.batch_size,
        phase=phase,
        predicted_seconds=predicted,
        measured_seconds=measured,
        off=_off(predicted / measured.value, relative, measured.n),
        gain_off=gain_off,
    )


def _off(ratio: float, relative_error: float, n: int) -> Metric:
    return Metric(value=ratio - 1, se=ratio * relative_error, n=n)


def sum_of(costs: CostTable, layers: Sequence[LayerChoice], at: ScenarioBatch, phase: Phase) -> float:
    """Predicted seconds of these layers and the non-block part at a scenario and batch size."""
    return math.fsum(seconds for seconds, _ in _parts(costs, layers, at, phase))


def error_of_sum(
    costs: CostTable, layers: Sequence[LayerChoice], at: ScenarioBatch, phase: Phase, head: str = ""
) -> float:
    """Standard error of that sum, in seconds. head: the type of number of embedding and head."""
    return math.hypot(*(error for _, error in _parts(costs, layers, at, phase, head)))


def _parts(
    costs: CostTable, layers: Sequence[LayerChoice], at: ScenarioBatch, phase: Phase, head: str = ""
) -> Iterator[tuple[float, float]]:
    """Seconds and standard error of every variant with all its copies, and of the non-block part."""
    counts = Counter((part, getattr(choice, part)) for choice in layers for part in SUBBLOCKS)
    every: list[tuple[int, Cost | NonBlockCost]] = [(1, cost) for cost in costs.non_block if cost.head == head]
    every += [(counts[cost.subblock, cost.variant], cost) for cost in costs.costs]
    for copies, cost in every:
        if (cost.scenario, cost.batch_size) == at:
            seconds = copies * float(getattr(cost, SECONDS[phase]))
            yield seconds, seconds * getattr(cost, f"{phase}_spread")


def warnings_of(speed: SpeedReport) -> list[str]:
    """A sentence where the speeds are not reliable. Where they are, one for each phase in which the child's sum of
    costs is off by more than TOLERANCE in the median scenario.
    """
    if speed.disturbed:
        return [f"speeds: {speed.disturbed}. Give the same command when it is quiet, and they are measured again"]
    lines = []
    for phase in PHASES:
        own = [check for check in speed.sums if (check.model, check.phase) == ("child", phase)]
        if not own:
            continue
        median = statistics.median_low(abs(check.off.value) for check in own)
        worst = next(check for check in own if abs(check.off.value) == median)
        if median > TOLERANCE:
            lines.append(
                f"the sum of the child's blocks is off by {percent(worst.off)} from the child end to end in "
                f"{speed.engine} ({phase}, median scenario {worst.scenario}; more than {TOLERANCE:.0%}); its gain over "
                f"the parent by {percent(worst.gain_off)}"
            )
    return lines


def percent(metric: Metric | None) -> str:
    """`+4.2 ±1.1 %`."""
    return "–" if metric is None else f"{100 * metric.value:+.1f} ±{100 * metric.se:.1f} %"
