"""The mixed-integer program, in CVXPY, solved by HiGHS: pick one option of every slot, lowest sum of scores.

    min  scores @ x    s.t.  one option per slot,   usage @ x <= room,   x in {0, 1},
                             at most `max_types` types in use

Before HiGHS starts, reduced costs shrink the program. With the duals of the LP relaxation as prices, L is a lower bound
of any answer, and L + d_j one of any answer that uses option j, d_j being what j costs above its slot's cheapest at
those prices. A choice that is known already (tasks/search/incumbent.py) rules out every option with L + d_j above its
objective. HiGHS solves over the rest. The certificate covers all options: its bound is the lower of HiGHS's own and
the bound of those that were left out. Scores and rows may have any scale and sign.
"""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from blocks.errors import PuzzleError
from profiles.schema import Search
from tasks.search.incumbent import incumbent
from tasks.search.program import ROOM, Flags, Floats, Integers, Program, Relaxation, possible

_FEW_ROWS = 4  # a budget has seldom more; limits on the KL of capabilities come on top
# HiGHS's own searches for answers: where a good one is known, they take longer than they save. The one that is left, at
# the root and by reduced costs, is for choices that turn out not to be good.
_NO_SEARCH = {f"mip_heuristic_run_{name}": False for name in ("rins", "rens", "feasibility_jump")}
_ROUNDS = 12  # sets of types that are tried before the solver starts


class SolverStopped(PuzzleError):
    """The solver gave up before it had any answer."""


@cache
def solved_by() -> str:
    """What solves and proves, for whoever reads an answer."""
    return f"cvxpy/highs (cvxpy {version('cvxpy')}, highspy {version('highspy')})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """selection (S,) option indices; objective, a proven lower bound of it; status "optimal" or "time_limit"."""

    selection: Integers
    objective: float
    bound: float
    status: str

    def among(self, kept: Flags) -> "Answer":
        """The same answer of the program that this one's was the `only(kept)` of."""
        return replace(self, selection=np.flatnonzero(kept)[self.selection])


def minimise(program: Program, search: Search) -> Answer | None:
    """The best answer within gap and time of `search`; None when it is proven that nothing fits.

    Raises SolverStopped when time ran out without any answer.
    """
    ends = time.perf_counter() + search.time_limit_seconds
    useful = possible(program)
    if not useful.all():
        if not np.logical_or.reduceat(useful, program.starts).all():
            return None
        answer = minimise(program.only(useful), search)
        return answer and answer.among(useful)
    if program.max_types is not None and program.max_types >= len(_types(program)[0]):
        program = replace(program, max_types=None)  # no choice can break it
    relaxed = relaxation(program, search) if program.max_types is None else _typed_relaxation(program, search)
    if relaxed is None:
        return None
    known = _known(program, relaxed, search, ends)
    if known is None:
        return _solve(program, search, max(ends - time.perf_counter(), 1e-9))
    if known.objective - relaxed.bound <= search.gap * abs(known.objective):
        return replace(known, status="optimal")  # within the gap, by the relaxation alone
    kept = relaxed.bound + relaxed.distance <= known.objective
    kept[known.selection] = True
    try:
        answer = _solve(program.only(kept), search, max(ends - time.perf_counter(), 1e-9), known.objective)
    except SolverStopped:
        return known
    if answer is None:  # the known choice keeps a row by a rounding that HiGHS does not grant
        return _solve(program, search, max(ends - time.perf_counter(), 1e-9))
    answer = answer.among(kept)
    if known.objective < answer.objective:  # only where the solver stopped at the time limit, or within its gap
        answer = replace(known, bound=answer.bound, status=answer.status)
    outside = relaxed.bound + float(relaxed.distance[~kept].min(initial=math.inf))
    bound = max(min(answer.bound, outside), relaxed.bound)
    return replace(answer, bound=min(bound, answer.objective))


def _known(program: Program, relaxed: Relaxation, search: Search, ends: float) -> Answer | None:
    """A good choice, not proven to be the best; none when time is up."""
    if time.perf_counter() > ends:
        return None
    if program.max_types is not None:
        selection = _swap_types(program, relaxed, search, ends)
    else:
        selection = incumbent(program, relaxed, search.gap)
    if selection is None:
        return None
    objective = math.fsum(program.scores[selection])
    return Answer(selection=selection, objective=objective, bound=min(relaxed.bound, objective), status="time_limit")


def lower_bound(program: Program, search: Search) -> float:
    """A proven lower bound of any answer, by the LP relaxation; inf when not even that has one."""
    useful = possible(program)
    if not np.logical_or.reduceat(useful, program.starts).all():
        return math.inf
    relaxed = relaxation(program.only(useful), search)
    return math.inf if relaxed is None else relaxed.bound


def relaxation(program: Program, search: Search) -> Relaxation | None:
    """The LP relaxation without the limit on types; None when even that is infeasible."""
    import cvxpy as cp

    duals = _duals(program, cp.Variable(len(program.scores), nonneg=True), [], search)
    if duals is None:
        return None
    prices, _ = duals
    # Any prices >= 0 give a valid bound: nothing here rests on the solver's tolerances.
    reduced = program.scores + prices @ program.usage
    least = np.minimum.reduceat(reduced, program.starts)
    bound = math.fsum(least) - float(prices @ program.room)
    return Relaxation(bound=bound, prices=prices, distance=reduced - least[program.slot_of])


def _duals(program: Program, x: Any, rows: list[Any], search: Search) -> tuple[Floats, Floats | None] | None:
    """Solve the LP over x under `rows`: prices of the limits (R,) >= 0 and worths of the slots (S,).

    None when the LP is infeasible. Where the solver stopped early, the prices are 0 and there are no worths.
    """
    import cvxpy as cp

    scale = _scale(program.scores)
    constraints: list[Any] = [_one_per_slot(program) @ x == 1, *rows]
    if len(program.room):
        constraints.append(program.usage @ x <= program.room)
    model = cp.Problem(cp.Minimize((program.scores / scale) @ x), constraints)
    _run(model, search, search.time_limit_seconds)
    if model.status.startswith("infeasible"):
        return None
    if model.status != "optimal":
        return np.zeros(len(program.room)), None
    dual = constraints[-1].dual_value if len(program.room) else np.zeros(0)
    prices = np.zeros(len(program.room)) if dual is None else np.maximum(dual, 0.0) * scale
    return prices, -constraints[0].dual_value * scale


def _typed_relaxation(program: Program, search: Search) -> Relaxation | None:
    """The LP relaxation with the limit on types; `distance` is 0 for what the K best types use.

    With prices of the rows and a worth of every slot, a type in use gains the sum of what its options cost less than
    their slots' worth, and at best the K types of largest gain are in use (the Lagrangian of the K-median problem).
    """

    assert program.max_types is not None
    x, y, rows = _typed(program, boolean=False)
    duals = _duals(program, x, [*rows, y.sum() <= program.max_types], search)
    if duals is None:
        return None
    types, (prices, worth) = _types(program)[1], duals
    reduced = program.scores + prices @ program.usage
    if worth is None:
        worth = np.minimum.reduceat(reduced, program.starts)
    above = reduced - worth[program.slot_of]
    gains = np.bincount(types, weights=np.maximum(-above, 0.0), minlength=int(types.max()) + 1)
    last = np.sort(gains)[::-1][: program.max_types]
    bound = math.fsum(worth) - math.fsum(last) - float(prices @ program.room)
    distance = np.maximum(last[-1] - gains, 0.0)[types] + np.maximum(above, 0.0)
    return Relaxation(bound=bound, prices=prices, distance=distance)


def _swap_types(program: Program, relaxed: Relaxation, search: Search, ends: float) -> Integers | None:
    """A good choice: K types by swaps at prices of the rows, the program of those alone, its own prices, and again."""
    generator = np.random.default_rng(0)
    best, least = None, math.inf
    names, types = _types(program)
    prices, untyped, tried = relaxed.prices, replace(program, max_types=None), set[bytes]()
    for _ in range(_ROUNDS):
        kept = np.isin(types, _cheapest_types(program, prices, types, len(names)))
        if time.perf_counter() > ends:
            break
        again = kept.tobytes() in tried
        tried.add(kept.tobytes())
        if again or not np.logical_or.reduceat(kept, program.starts).all():
            prices = prices * generator.lognormal(0, 0.3, len(prices))
            continue
        part = relaxation(untyped.only(kept), search)
        if part is None:
            prices = prices * 1.5
            continue
        found = incumbent(untyped.only(kept), part, search.gap)
        prices = (prices + part.prices) / 2
        if found is not None:
            selection = np.flatnonzero(kept)[found]
            objective = math.fsum(program.scores[selection])
            if objective < least:
                best, least = selection, objective
    return best


def _cheapest_types(program: Program, prices: Floats, types: Integers, count: int) -> list[int]:
    """At most K types (K-median of the slots at these prices): added greedily, then swapped while that helps."""
    assert program.max_types is not None
    reduced = program.scores + prices @ program.usage
    costs = np.full((len(program.starts), count), 1e6 * _scale(reduced))
    np.minimum.at(costs, (program.slot_of, types), reduced)
    nothing = costs.max(axis=1, keepdims=True)

    def added(kept: list[int]) -> Floats:
        """(types,) the costs of `kept` and one more."""
        return np.minimum(costs, np.hstack([nothing, costs[:, kept]]).min(axis=1, keepdims=True)).sum(axis=0)

    chosen: list[int] = []
    for _ in range(min(program.max_types, count)):
        chosen.append(int(added(chosen).argmin()))
    total = math.inf
    while (now := float(added(chosen[1:])[chosen[0]])) < total - 1e-12 * abs(now):
        total = now
        for at in range(len(chosen)):
            others = chosen[:at] + chosen[at + 1 :]
            chosen[at] = int(added(others).argmin())
    return chosen


def least_usage(program: Program, rows: Sequence[int], kept: Sequence[int], search: Search) -> float | None:
    """Least possible overrun, max over `rows` of usage - room, while the `kept` rows hold; None when those cannot."""
    import cvxpy as cp

    if kept:
        useful = possible(replace(program, usage=program.usage[kept], room=program.room[kept]))
        if not np.logical_or.reduceat(useful, program.starts).all():
            return None
        program = program.only(useful)
    worst = cp.Variable()
    x, constraints = _variables(program)
    scale = max(float(np.abs(program.usage[rows]).max()), 1.0)
    constraints.append(program.usage[rows] / scale @ x - program.room[rows] / scale <= worst)
    if kept:
        constraints.append(program.usage[kept] @ x <= program.room[kept])
    model = cp.Problem(cp.Minimize(worst), constraints)
    if _certificate(model, search, search.time_limit_seconds) is None:
        return None
    selection = _selection(program, x.value)
    return float((program.usage[rows][:, selection].sum(axis=1) - program.room[rows]).max())


def fewest_types(program: Program, search: Search) -> int:
    """How many types an answer needs at least, by the proven bound; ValueError when the rows alone are infeasible."""
    import cvxpy as cp

    x, y, rows = _typed(program)
    rows += [_one_per_slot(program) @ x == 1, program.usage @ x <= program.room]
    model = cp.Problem(cp.Minimize(y.sum()), rows)
    found = _certificate(model, search, search.time_limit_seconds)
    if found is None:
        raise ValueError("nothing fits, whatever the number of types")
    return math.ceil(found[1] - 1e-6)


def _solve(program: Program, search: Search, seconds: float, known: float | None = None) -> Answer | None:
    """The solver on all options of the program. known: the objective of a choice that is there already."""
    import cvxpy as cp

    x, constraints = _variables(program)
    # Absolute tolerances of the solver are meant for values around 1, replace-1-block scores may be far smaller.
    scale = _scale(program.scores)
    if len(program.room):
        constraints.append(program.usage @ x <= program.room)
    narrowed: dict[str, float | bool] = {}
    if known is not None:  # what is dearer is cut off, and no time goes into looking for first answers
        narrowed = {"objective_bound": known / scale + 1e-7, "mip_heuristic_effort": 0.0}
        narrowed |= _NO_SEARCH if program.max_types is None else {}
    if program.max_types is None:  # with few rows, cuts in the tree cost more than nodes
        narrowed["mip_allow_cut_separation_at_nodes"] = False
    if len(program.room) > _FEW_ROWS:  # the gap at the root stays wide, and starting again costs more than it closes
        narrowed["mip_allow_restart"] = False
    model = cp.Problem(cp.Minimize((program.scores / scale) @ x), constraints)
    found = _certificate(model, search, seconds, narrowed)
    if found is None:
        return None
    status, bound = found
    selection = _selection(program, x.value)
    objective = math.fsum(program.scores[selection])
    return Answer(selection=selection, objective=objective, bound=min(bound * scale, objective), status=status)


def _scale(scores: Floats) -> float:
    return float(np.abs(scores).max()) or 1.0


def _types(program: Program) -> tuple[Integers, Integers]:
    """The types there are, and (N,) the place of every option's type among them."""
    assert program.types is not None, "a limit on types needs the options' types"
    names, place = np.unique(program.types, return_inverse=True)
    return names, place


def _typed(program: Program, boolean: bool = True) -> tuple[Any, Any, list[Any]]:
    """x (N,), y (types,) and x_j <= y_type(j)."""
    import cvxpy as cp
    from scipy.sparse import csr_array

    names, column = _types(program)
    count = len(column)
    of_option = csr_array((np.ones(count), (np.arange(count), column)), shape=(count, len(names)))
    if boolean:
        x, y = cp.Variable(count, boolean=True), cp.Variable(len(names), boolean=True)
        return x, y, [x <= of_option @ y]
    x, y = cp.Variable(count, nonneg=True), cp.Variable(len(names), nonneg=True)
    return x, y, [x <= of_option @ y, y <= 1]


def _variables(program: Program) -> tuple[Any, list[Any]]:
    """x (N,) and the constraints that every integer model has: one option per slot, few enough types."""
    import cvxpy as cp

    rows: list[Any] = []
    if program.max_types is None:
        x = cp.Variable(len(program.scores), boolean=True)
    else:
        x, y, rows = _typed(program)
        rows.append(y.sum() <= program.max_types)
    return x, [*rows, _one_per_slot(program) @ x == 1]


def _one_per_slot(program: Program) -> Any:
    """(S, N) sparse matrix that sums the options of every slot."""
    from scipy.sparse import csr_array

    count = len(program.scores)
    bounds = np.append(program.starts, count)
    return csr_array((np.ones(count), np.arange(count), bounds), shape=(len(program.starts), count))


def _run(model: Any, search: Search, seconds: float, narrowed: dict[str, float | bool] | None = None) -> None:
    import cvxpy as cp

    tolerances: dict[str, float | bool] = {"primal_feasibility_tolerance": ROOM, **(narrowed or {})}
    if model.is_mixed_integer():
        # Tighter than the check afterwards, since the errors of many options add up.
        tolerances |= {"mip_rel_gap": search.gap, "mip_abs_gap": 1e-9, "mip_feasibility_tolerance": ROOM}
    with warnings.catch_warnings():
        # cvxpy warns at every limit; here the status and the gap travel with the answer instead.
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        model.solve(solver=cp.HIGHS, time_limit=seconds, **tolerances)


def _certificate(
    model: Any, search: Search, seconds: float, narrowed: dict[str, float | bool] | None = None
) -> tuple[str, float] | None:
    """Solve; "optimal" or "time_limit" and the proven bound of the objective; None when infeasible.

    HiGHS through cvxpy answers x = 0 with status `user_limit` when time is up before a first solution, so at a limit
    only a finite gap counts as an answer (and sums of 1 per slot, which `_selection` checks).
    """
    _run(model, search, seconds, narrowed)
    if model.status.startswith("infeasible"):
        return None
    info = getattr(model.solver_stats, "extra_stats", None)
    gap, bound = getattr(info, "mip_gap", math.inf), getattr(info, "mip_dual_bound", math.nan)
    if model.value is None or (model.status != "optimal" and not math.isfinite(gap)):
        raise _stopped(search)
    if not math.isfinite(bound):
        bound = model.value - search.gap * abs(model.value) if model.status == "optimal" else -math.inf
    return "optimal" if model.status == "optimal" else "time_limit", float(bound)


def _stopped(search: Search) -> SolverStopped:
    return SolverStopped(
        f"the solver had no architecture after {search.time_limit_seconds:g} s: raise search.time_limit_seconds "
        "(--time-limit), search fewer variants, or ease the budget."
    )


def _selection(program: Program, x: Floats | None) -> Integers:
    """The chosen option of every slot, (S,); AssertionError when a slot has not exactly one."""
    if x is None or not np.allclose(np.add.reduceat(x, program.starts), 1, atol=1e-4):
        raise AssertionError("the solver's answer has slots without exactly one option, a bug of puzzle or HiGHS")
    return np.array([slot[np.argmax(x[slot])] for slot in program.slots], dtype=np.int64)
