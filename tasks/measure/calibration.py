"""Calibration of a cost table: one factor per phase, if the sum of the parent's costs is off by more than its error.

The factors are fitted on the parent, which was measured end to end in the same rounds as the blocks. They are never
fitted on a child: a child's sum is compared with the child itself afterwards (cost_sums.py). They are stored with the
costs, so that a search which finds stored costs makes the same choice as the first one. On six unseen architectures of
SmolLM2 it took the mean error of absolute times in llama.cpp from 2.4 to 1.2 % and from 5.1 to 2.5 % (bfloat16, prefill
and decode), from 3.0 to 2.5 % and from 2.8 to 2.4 % (float32); a gain over the parent within one phase is not touched
by it.

The calibration is applied or not applied, so it may change between two measurements of the same machine. Whether costs
have changed is therefore decided on the seconds as measured (`drift`). A continuous rule would not help: over nine
settings of a simulation it raised up to 79 false alarms in 100 where the present rule raised up to 87, and seconds as
measured at most 1, for the same error of sums.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Any

from blocks.records import Calibration, Cost, CostTable, LayerChoice, NonBlockCost
from tasks.measure.cost_sums import SECONDS, Phase, error_of_sum, sum_of

BEYOND = 1.0  # standard errors of the bias
DRIFT, DRIFT_SPREADS = 0.1, 3.0  # a cost has moved when it differs by 10 % and by three times both spreads


def calibrated(table: CostTable) -> CostTable:
    """The table with its seconds multiplied by the factors that fit its parent, if any are needed."""
    prefill, decode = bias_of(table, "prefill"), bias_of(table, "decode")
    if prefill is None and decode is None:
        return table
    factors = {"prefill": 1 / (prefill or 1.0), "decode": 1 / (decode or 1.0)}
    words = ", ".join(f"{phase} x {factor:.3f}" for phase, factor in factors.items())
    origin = f"the parent end to end, {table.measured_at}"
    return table.model_copy(
        update={
            "hardware": table.hardware | {"calibrated": f"{words}, on {origin}"},
            "costs": tuple(_scaled(cost, factors) for cost in table.costs),
            "non_block": tuple(_scaled(cost, factors) for cost in table.non_block),
            "calibration": Calibration(**factors, origin=origin),
        }
    )


def _scaled(cost: Any, factors: dict[str, float]) -> Any:
    return cost.model_copy(
        update={field: factors[phase] * getattr(cost, field) for phase, field in SECONDS.items()},
    )


def bias_of(table: CostTable, phase: Phase) -> float | None:
    """The sum of the parent's costs over the parent's time, median over the scenarios; None where errors explain it."""
    found = [one for whole in table.parent_measured if (one := parent_bias(table, whole, phase))]
    if not found:
        return None
    bias = math.exp(statistics.median(math.log(value) for value, _ in found))
    error = statistics.median(error for _, error in found) / math.sqrt(len(found))
    return bias if abs(bias - 1) > BEYOND * error else None


def parent_bias(table: CostTable, whole: NonBlockCost, phase: Phase) -> tuple[float, float] | None:
    """The sum of the parent's costs over its measured time in one scenario, and the standard error of that ratio.

    None where the clock shows no time for one of them.
    """
    layers = (LayerChoice(),) * table.num_hidden_layers
    at = (whole.scenario, whole.batch_size)
    measured, summed = getattr(whole, SECONDS[phase]), sum_of(table, layers, at, phase)
    if not measured or not summed:
        return None
    relative = math.hypot(error_of_sum(table, layers, at, phase) / summed, getattr(whole, f"{phase}_spread"))
    return summed / measured, summed / measured * relative


def drift(before: CostTable, now: CostTable) -> list[str]:
    """What has changed by more than DRIFT and by more than its errors explain, in words: costs, and the whole parent.

    Costs are compared as they were measured, without calibration: a calibration follows the parent, so one noisy
    measurement of the parent would change every cost of a table.
    """
    old = dict(_as_measured(before))
    moved = []
    for key, now_at in _as_measured(now):
        (first, was), (second, spread) = old.get(key, (0.0, 0.0)), now_at
        if first > 0 and abs(second / first - 1) > max(DRIFT, DRIFT_SPREADS * (was + spread)):
            name, phase, scenario, batch = key
            moved.append(f"{name} {phase} ({scenario}, batch {batch}): {second / first - 1:+.0%}")
    return moved


def _as_measured(table: CostTable) -> Iterator[tuple[tuple[str, str, str, int], tuple[float, float]]]:
    """(what, phase, scenario, batch) and its seconds without calibration, with their relative spread."""
    named: list[tuple[str, bool, Cost | NonBlockCost]] = [
        (f"{cost.subblock} {cost.variant}", table.calibration is not None, cost) for cost in table.costs
    ]
    named += [("the parent end to end", False, whole) for whole in table.parent_measured]
    for name, is_calibrated, cost in named:
        for phase, field in SECONDS.items():
            factor = getattr(table.calibration, phase) if is_calibrated else 1.0
            figures = getattr(cost, field) / factor, getattr(cost, f"{phase}_spread")
            yield (name, phase, cost.scenario, cost.batch_size), figures
