"""Why nothing fits: which limits are out of reach, which of them clash, how far each must be eased alone."""

import math
from collections.abc import Sequence
from dataclasses import replace

from profiles.schema import Search
from tasks.search.cases import Case
from tasks.search.mip import fewest_types, least_usage, minimise
from tasks.search.request import Limit, Request

TOLERANCE = 1e-9  # relative; a sum of floats in another order may differ by so much


def why_infeasible(cases: Sequence[Case], request: Request) -> str:
    """In words; every value that is named can be reached."""
    shape = _shape(cases, request.search)
    if shape:
        return shape
    plain = [replace(case, program=replace(case.program, max_types=None)) for case in cases]
    limits = list(dict.fromkeys(row for case in plain for row in case.rows))
    alone = {limit.name: _nearest(plain, limit, [limit], request.search) for limit in limits}
    beyond = [limit.name for limit in limits if alone[limit.name] > 1 + TOLERANCE]
    if beyond:
        each = "; ".join(_in_words(limit, alone[limit.name], "by the cheapest child") for limit in limits)
        return (
            f"No architecture keeps the budget: {each}. "
            f"Ask no more of {' and '.join(beyond)} than is reachable, or add cheaper variants."
        )
    clash = _conflict(plain, limits, request.search)
    names = " and ".join(limit.name for limit in clash)
    eased = "; ".join(
        _in_words(limit, _nearest(plain, limit, limits, request.search), "while the others are kept")
        for limit in limits
    )
    return (
        f"No architecture keeps {names} together, though each alone is reachable. {eased}. "
        "Relax one of them that far, or several a little, or add cheaper variants."
    )


def _shape(cases: Sequence[Case], search: Search) -> str:
    """What is said when the limits can be kept, but not with so few block types; else nothing."""
    if search.max_block_types is None:
        return ""
    loose = [replace(case.program, max_types=None) for case in cases]
    feasible = [program for program in loose if minimise(program, search) is not None]
    if not feasible:
        return ""
    least = min(fewest_types(program, search) for program in feasible)
    return (
        f"No architecture keeps the budget with at most {search.max_block_types} block types: at least {least} are "
        "needed. Raise max_block_types, or ease a budget."
    )


def _rows(case: Case, limits: Sequence[Limit]) -> list[int]:
    return [row for row, limit in enumerate(case.rows) if limit in limits]


def _nearest(cases: Sequence[Case], limit: Limit, kept: Sequence[Limit], search: Search) -> float:
    """Least usage of one limit, as a share of it, while the others of `kept` hold; inf when those clash already."""
    others = [other for other in kept if other != limit]
    overruns = [least_usage(case.program, _rows(case, [limit]), _rows(case, others), search) for case in cases]
    return 1 + min((overrun for overrun in overruns if overrun is not None), default=math.inf)


def _conflict(cases: Sequence[Case], limits: Sequence[Limit], search: Search) -> list[Limit]:
    """A smallest set of limits that clash: leave out one after the other while the rest still does."""
    clash = list(limits)
    for limit in limits:
        rest = [other for other in clash if other != limit]
        if len(rest) > 1 and not _feasible(cases, rest, search):
            clash = rest
    return clash


def _feasible(cases: Sequence[Case], limits: Sequence[Limit], search: Search) -> bool:
    first, *others = limits
    return _nearest(cases, first, [first, *others], search) <= 1 + TOLERANCE


def _in_words(limit: Limit, usage: float, where: str) -> str:
    """One limit in words, rounded so that the value named can be reached."""
    factor, unit = (100.0, "%") if limit.percent else (1.0, "")
    asked = f"{limit.name}: {limit.asked * factor:.10g}{unit} asked"
    if math.isinf(usage):
        return f"{asked}, no value helps {where}"
    if usage <= 1 + TOLERANCE:
        return f"{asked}, reachable {where}"
    if limit.kind.floor:
        return f"{asked}, at most {_rounded(limit.asked * factor / usage, up=False)}{unit} reachable {where}"
    return f"{asked}, at least {_rounded(limit.asked * factor * usage, up=True)}{unit} needed {where}"


def _rounded(value: float, up: bool) -> str:
    """Six significant digits (whole numbers above), rounded to the side that can be reached."""
    step = 10.0 ** min(math.floor(math.log10(value)) - 5, 0) if value > 0 else 1.0
    # a hair inside the step, so that a value which is a whole number of steps stays one
    steps = math.ceil(value / step - 1e-6) if up else math.floor(value / step + 1e-6)
    return f"{steps * step:.10g}"
