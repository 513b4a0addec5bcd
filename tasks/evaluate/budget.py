"""The budget beside what a model takes of it: what was asked, what the model got, and whether it is kept.

Parameters and memory are counted. The KL on a capability is measured on its test text. Times are the sums of the
measured costs of the blocks; where the whole model was timed end to end, that measurement decides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from blocks.estimates import independent_ratio, is_clear, plain, rounded
from blocks.records import Architecture, Candidate, Gains, LimitKept, Metric, Throughput
from profiles.schema import GENERAL, MINITRON
from tasks.search.capabilities import InconsistentTables
from tasks.search.totals import TOLERANCE, BudgetRow, Problem, budget_rows, kl_on, used_of

Kept = Literal["kept", "not kept", "within the error", "only predicted", "not known"]
FLOORS = ("speedup", "min_tokens_per_second")
RELATIVE = ("speedup", "time_to_first_token_fraction")
TIMES = {"runtime": ("runtime_seconds", "request"), "prefill": ("first_token_seconds", "prefill")}


def limits_of(
    problem: Problem, architecture: Architecture, own: Sequence[Throughput], parents: Sequence[Throughput]
) -> tuple[LimitKept, ...]:
    """Every limit of the problem's budget. own, parents: speeds of the model and its parent by scenario, if any."""
    batches = architecture.batches
    return tuple(
        _limit(problem, row, used_of(problem, architecture.totals, row), own, parents)
        for row in budget_rows(problem, batches)
    )


def capability_limits(problem: Problem, architecture: Architecture, kl: Mapping[str, Metric]) -> tuple[LimitKept, ...]:
    """The highest KL on every capability that has one. kl: what was measured, `general` among it.

    What was predicted is the sum of scores, before GKD; the measured figure where the model's own blocks were not
    scored.
    """
    found = []
    for name, most in problem.capabilities.most.items():
        predicted = None if architecture.method == MINITRON else predicted_kl(problem, architecture, name)
        got = kl[name].value if predicted is None else predicted
        found.append(LimitKept(name=f"max_kl of {name}", asked=most, floor=False, got=got, measured=kl[name]))
    return tuple(found)


def with_predictions(model: Candidate, problem: Problem, architecture: Architecture) -> Candidate:
    """A candidate with the KL that was predicted on the corpus and on each capability, where one was predicted."""
    if model.predicted_kl is None or not problem.capabilities.weights:
        return model
    each = {
        name: one.model_copy(update={"predicted_kl": predicted_kl(problem, architecture, name)})
        for name, one in model.capabilities.items()
    }
    general = predicted_kl(problem, architecture, GENERAL)
    return model.model_copy(update={"predicted_kl": general, "capabilities": each})


def predicted_kl(problem: Problem, architecture: Architecture, capability: str) -> float | None:
    """The sum of an architecture's scores on a capability; None where there are none."""
    try:
        return kl_on(problem, architecture.layers, capability, architecture.head)
    except InconsistentTables:
        return None


def _limit(
    problem: Problem, row: BudgetRow, used: float, own: Sequence[Throughput], parents: Sequence[Throughput]
) -> LimitKept:
    field, _, scenario = row.field.partition(" of ")
    budgets = {one.name: one.budget for one in problem.scenarios}
    asked = float(getattr(budgets[scenario] if scenario else problem.budget, field))
    floor, name, weighed = field in FLOORS, row.field, [place for place, w in enumerate(row.weights) if w]
    if not scenario and len(problem.scenarios) > 1 and len(weighed) == 1 and "parameters" not in row.quantity:
        name = f"{field} of {problem.scenarios[weighed[0]].name}"
    return LimitKept(
        name=name,
        asked=asked,
        floor=floor,
        got=asked / max(used, 1e-9) if floor else asked * used,
        timed=row.quantity in TIMES,
        measured=_measured(row, asked, own, parents) if own and parents and row.quantity in TIMES else None,
    )


def _measured(row: BudgetRow, asked: float, own: Sequence[Throughput], parents: Sequence[Throughput]) -> Metric | None:
    """A limited time end to end, in the limit's own terms. A speed over the parent's is compared round by round."""
    field = row.field.partition(" of ")[0]
    seconds, gain = TIMES[row.quantity]
    relative, floor = field in RELATIVE, field in FLOORS
    weighed = [place for place, weight in enumerate(row.weights) if weight]
    gains = own[weighed[0]].gains if relative and len(weighed) == 1 else None
    if gains is not None:
        return _paired(gains, gain, floor)
    ours = _mean(own, seconds, row.weights)
    known = Metric(value=row.most * asked if floor else row.most / asked, se=0.0, n=ours.n)
    reference = _mean(parents, seconds, row.weights) if relative else known
    return independent_ratio(reference, ours) if floor else independent_ratio(ours, reference)


def _paired(gains: Gains, kind: str, floor: bool) -> Metric:
    gain: Metric = getattr(gains, kind)
    return gain if floor else Metric(value=1 / gain.value, se=gain.se / gain.value**2, n=gain.n)


def _mean(speeds: Sequence[Throughput], field: str, weights: Sequence[float]) -> Metric:
    parts: list[tuple[float, Metric]] = [
        (weight, getattr(speed, field)) for weight, speed in zip(weights, speeds, strict=True) if weight
    ]
    return Metric(
        value=math.fsum(weight * one.value for weight, one in parts),
        se=math.hypot(*(weight * one.se for weight, one in parts)),
        n=min(one.n for _, one in parts),
    )


def state_of(limit: LimitKept, disturbed: str) -> Kept:
    """Whether a limit is kept. A disturbed measurement decides nothing."""
    if limit.measured is None:
        over = (limit.asked - limit.got if limit.floor else limit.got - limit.asked) > TOLERANCE * limit.asked
        return "not kept" if over else "only predicted" if limit.timed else "kept"
    if disturbed and limit.timed:
        return "not known"
    room = limit.measured.value - limit.asked if limit.floor else limit.asked - limit.measured.value
    if not is_clear(limit.measured.model_copy(update={"value": room})):
        return "within the error"
    return "kept" if room > 0 else "not kept"


def budget_state(model: Candidate, disturbed: str) -> Kept | None:
    """The worst state of a model's limits; None where the budget is not known."""
    states = {state_of(limit, disturbed) for limit in model.limits}
    worst: tuple[Kept, ...] = ("not kept", "not known", "within the error", "only predicted", "kept")
    return next((state for state in worst if state in states), None)


def asked_words(limit: LimitKept) -> str:
    """`at most 0.7 of the parent's`, `at least 1.3 times the parent's`, `at most 24 GiB`."""
    return f"{'at least' if limit.floor else 'at most'} {figure_words(limit, limit.asked)}"


def figure_words(limit: LimitKept, figure: float | Metric) -> str:
    """A figure in the unit of a limit."""
    number = plain(figure) if isinstance(figure, float) else rounded(figure)
    field = limit.name.partition(" of ")[0]
    units = {
        "speedup": "times the parent's",
        "memory_gib": "GiB",
        "min_tokens_per_second": "tokens/s",
        "parameters": "parameters",
        "max_kl": "nats per token",
    }
    unit = "of the parent's" if field.endswith("_fraction") else "s" if field.endswith("_seconds") else units[field]
    return f"{number} {unit}"
