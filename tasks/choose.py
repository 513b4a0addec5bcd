"""The MIP: one variant per subblock per layer, the lowest summed score within the whole budget (Puzzle, appendix B).

    min  sum_ij score_ij x_ij    s.t.  sum_j x_ij = 1 for every slot i,   usage x <= 1 - non-block share,   x in {0, 1}

A slot is one subblock of a layer; where coupled blocks were scored it is the whole layer, and its options are pairs.
The batch sizes are an outer loop; tasks/mip.py solves. What it answers is checked again by sums that share no code with
it.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blocks.errors import InfeasibleBudget
from blocks.records import SUBBLOCKS, Architecture, LayerChoice, Subblock
from profiles.schema import Scenario, Search
from tasks.mip import ROOM, Answer, Floats, Integers, Program, least_usage, minimise
from tasks.totals import (
    Batches,
    Limit,
    Problem,
    batch_choices,
    broken_limits,
    cost_of,
    gap_between,
    limits_of,
    predicted,
)

# N = options, S = slots, R = rows of the budget
_COLUMNS = {"runtime": 0, "memory": 1, "parameters": 2, "layer_parameters": 2}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice of one slot: an attention, an ffn, or both of them."""

    layer: int
    attention: str | None = None
    ffn: str | None = None
    coupled: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The MIP in numbers at one combination of batch sizes.

    options: N of them, slot after slot. starts: (S,) index of the first option of every slot. scores: (N,).
    usage: (R, N) what an option takes of every limit, `fixed`: (R,) what the non-block part takes; a whole limit is 1.
    parameters: (N,).
    """

    batches: Batches
    limits: tuple[Limit, ...]
    options: tuple[Option, ...]
    starts: Integers
    scores: Floats
    usage: Floats
    fixed: Floats
    parameters: Floats

    @property
    def program(self) -> Program:
        """The same as numbers only."""
        return Program(scores=self.scores, starts=self.starts, usage=self.usage, room=1 - self.fixed)

    def choice(self, selection: Integers) -> tuple[LayerChoice, ...]:
        """The choice per layer behind the selected option indices, (S,)."""
        chosen: dict[int, dict[str, Any]] = {}
        for option in (self.options[index] for index in selection):
            parts = {"attention": option.attention, "ffn": option.ffn, "coupled": option.coupled}
            chosen.setdefault(option.layer, {}).update({name: value for name, value in parts.items() if value})
        return tuple(LayerChoice(**chosen[layer]) for layer in sorted(chosen))

    def selection(self, layers: Sequence[LayerChoice]) -> Integers | None:
        """The option indices, (S,), of a choice per layer; None when a slot does not have what it asks for."""
        places = {(o.layer, o.attention, o.ffn, o.coupled): index for index, o in enumerate(self.options)}
        found = []
        for option in (self.options[start] for start in self.starts):
            choice = layers[option.layer]
            pair = (option.attention and choice.attention, option.ffn and choice.ffn)
            found.append(places.get((option.layer, *pair, choice.coupled)))
        return None if None in found else np.array(found, dtype=np.int64)


def make_grid(problem: Problem, batches: Batches, joint: bool = False) -> Grid:
    """The choices of every layer with a score and a cost at these batch sizes. `joint`: a slot is always a layer."""
    slots = [
        slot for layer in range(problem.costs.num_hidden_layers) for slot in _slots(problem, layer, batches, joint)
    ]
    options = tuple(option for slot in slots for option in slot)
    limits = limits_of(problem, batches)
    usage, fixed = _usage(problem, batches, limits, options)
    return Grid(
        batches=batches,
        limits=limits,
        options=options,
        starts=np.cumsum([0, *(len(slot) for slot in slots[:-1])]),
        scores=np.array([_score(problem, option) for option in options]),
        usage=usage,
        fixed=fixed,
        parameters=_resources(problem, problem.scenarios[0], batches[0], options)[:, _COLUMNS["parameters"]],
    )


def _slots(problem: Problem, layer: int, batches: Batches, joint: bool) -> list[list[Option]]:
    attentions = _labels(problem, layer, "attention", batches)
    ffns = _labels(problem, layer, "ffn", batches)
    coupled = _coupled(problem, layer, batches)
    if not joint and not coupled:
        return [
            [Option(layer=layer, attention=label) for label in attentions],
            [Option(layer=layer, ffn=label) for label in ffns],
        ]
    return [[Option(layer=layer, attention=a, ffn=f) for a in attentions for f in ffns] + coupled]


def _labels(problem: Problem, layer: int, subblock: Subblock, batches: Batches) -> list[str]:
    scored = problem.score_table.get((layer, subblock), {})
    return [name for name in dict.fromkeys(["parent", *scored]) if _measured(problem, subblock, name, batches)]


def _coupled(problem: Problem, layer: int, batches: Batches) -> list[Option]:
    pairs = [label.split("+", 1) for label in problem.score_table.get((layer, "block"), {})]
    return [
        Option(layer=layer, attention=attention, ffn=ffn, coupled=True)
        for attention, ffn in pairs
        if _measured(problem, "attention", attention, batches) and _measured(problem, "ffn", ffn, batches)
    ]


def _measured(problem: Problem, subblock: Subblock, label: str, batches: Batches) -> bool:
    places = zip(problem.scenarios, batches, strict=True)
    return all((subblock, label, scenario.name, size) in problem.cost_table for scenario, size in places)


def _score(problem: Problem, option: Option) -> float:
    if option.coupled:
        score = problem.score_table[option.layer, "block"][f"{option.attention}+{option.ffn}"]
        return float(getattr(score, problem.metric))
    parts = [(part, getattr(option, part)) for part in SUBBLOCKS]
    found = [problem.score_table.get((option.layer, part), {}).get(label) for part, label in parts]
    return math.fsum(getattr(score, problem.metric) for score in found if score is not None)


def _usage(
    problem: Problem, batches: Batches, limits: Sequence[Limit], options: Sequence[Option]
) -> tuple[Floats, Floats]:
    """What options and the non-block part take of every limit, (R, N) and (R,), as fractions of the limit."""
    places = list(zip(problem.scenarios, batches, strict=True))
    resources = [_resources(problem, scenario, size, options) for scenario, size in places]
    outside = [_outside(problem, scenario, size) for scenario, size in places]
    usage = [resources[limit.scenario][:, _COLUMNS[limit.quantity]] / limit.most for limit in limits]
    fixed = [
        0.0 if limit.quantity == "layer_parameters" else outside[limit.scenario][_COLUMNS[limit.quantity]] / limit.most
        for limit in limits
    ]
    return np.array(usage), np.array(fixed)


def _resources(problem: Problem, scenario: Scenario, batch_size: int, options: Sequence[Option]) -> Floats:
    """(N, 3): seconds, bytes with KV cache, parameters of every option."""
    tokens = batch_size * (scenario.prompt_tokens + scenario.generated_tokens)

    def vector(subblock: Subblock, label: str) -> Floats:
        cost = cost_of(problem, subblock, label, scenario, batch_size)
        seconds = cost.prefill_seconds + scenario.generated_tokens * cost.decode_seconds_per_token
        return np.array([seconds, cost.weight_bytes + tokens * cost.kv_bytes_per_token, cost.parameters])

    parts = {(part, getattr(option, part)) for option in options for part in SUBBLOCKS}
    known = {(part, label): vector(part, label) if label else np.zeros(3) for part, label in parts}
    return np.array([known["attention", option.attention] + known["ffn", option.ffn] for option in options])


def _outside(problem: Problem, scenario: Scenario, batch_size: int) -> tuple[float, float, float]:
    cost = problem.non_block_table[scenario.name, batch_size]
    seconds = cost.prefill_seconds + scenario.generated_tokens * cost.decode_seconds_per_token
    return seconds, cost.weight_bytes, cost.parameters


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """What the solver found at one combination of batch sizes."""

    grid: Grid
    answer: Answer


def choose(problem: Problem) -> Architecture:
    """The best architecture of the library within the budget, over all combinations of batch sizes.

    Equal scores go to the larger batch. The time limit holds for each combination; at the limit the best architecture
    so far comes back with status "user_limit" and its gap. `bound` holds for all combinations together.

    Raises InfeasibleBudget with the nearest reachable values, SolverStopped when time ran out without any answer.
    """
    started = time.perf_counter()
    solved = [minimise_score(make_grid(problem, batches), problem.search) for batches in batch_choices(problem)]
    solutions = [solution for solution in solved if solution is not None]
    if not solutions:
        raise InfeasibleBudget(explain_infeasible(problem))
    best = solutions[0]
    for solution in solutions[1:]:
        if solution.answer.objective < best.answer.objective - _tie(best.answer.objective, problem.search):
            best = solution
    bound = min(solution.answer.bound for solution in solutions)
    return _verified(problem, best, bound, time.perf_counter() - started)


def _tie(objective: float, search: Search) -> float:
    """Two optima closer than the solver's own gap are equal."""
    return max(search.gap * abs(objective), 1e-12)


def _verified(problem: Problem, best: Solution, bound: float, seconds: float) -> Architecture:
    """The architecture of a solution, its limits and score summed again without the matrices of the MIP."""
    layers = best.grid.choice(best.answer.selection)
    architecture = predicted(problem, layers, "mip", best.grid.batches)
    broken = broken_limits(problem, layers, best.grid.batches)
    problems = [f"{limit.field} is broken" for limit in broken]
    if len(layers) != problem.costs.num_hidden_layers:
        problems.append(f"{len(layers)} of {problem.costs.num_hidden_layers} layers have a choice")
    if not math.isclose(architecture.score, best.answer.objective, rel_tol=1e-6, abs_tol=1e-9):
        problems.append(f"the score is {architecture.score}, not {best.answer.objective}")
    if problems:
        raise AssertionError(f"the solver's answer fails its own check, a bug of puzzle: {'; '.join(problems)}")
    proven = min(bound, architecture.score)
    certificate = {"status": best.answer.status, "bound": proven, "gap": gap_between(architecture.score, proven)}
    return architecture.model_copy(update={**certificate, "solve_seconds": seconds})


def minimise_score(grid: Grid, search: Search) -> Solution | None:
    """Lowest summed score within every limit of the grid; None when it is proven that nothing fits."""
    answer = minimise(grid.program, search)
    return None if answer is None else Solution(grid=grid, answer=answer)


def explain_infeasible(problem: Problem) -> str:
    """Which limits the library cannot reach, or which of them clash, with the nearest values it can reach."""
    grids = [make_grid(problem, batches) for batches in batch_choices(problem)]
    limits = list({limit.field: limit for limit in grids[0].limits}.values())
    alone = {limit.field: _nearest(grids, limit, problem.search, keep_others=False) for limit in limits}
    beyond = [limit.field for limit in limits if alone[limit.field] > 1 + ROOM]
    told = "; ".join(_told(limit, alone[limit.field], "with this library") for limit in limits)
    if beyond:
        return (
            f"No architecture of this library keeps the budget: {told}. "
            f"Ask no more of {' and '.join(beyond)} than is reachable, or add cheaper variants to search_space."
        )
    nearest = {limit.field: _nearest(grids, limit, problem.search, keep_others=True) for limit in limits}
    clash = "; ".join(_told(limit, nearest[limit.field], "while the others are kept") for limit in limits)
    return (
        "No architecture of this library keeps all limits of the budget together, though each alone is reachable. "
        f"{clash}. Relax one of them that far, or several a little, or add cheaper variants to search_space."
    )


def _nearest(grids: Iterable[Grid], limit: Limit, search: Search, keep_others: bool) -> float:
    """Least usage of one field over all batch sizes, alone or with the other fields kept; inf when those clash."""
    least = math.inf
    for grid in grids:
        rows = [row for row, other in enumerate(grid.limits) if other.field == limit.field]
        others = [row for row in range(len(grid.limits)) if row not in rows] if keep_others else []
        overrun = least_usage(grid.program, rows, others, search)
        least = least if overrun is None else min(least, 1 + overrun)
    return least


def _told(limit: Limit, usage: float, where: str) -> str:
    """One field in words, rounded so that the value named can be reached."""
    asked = f"{limit.field}: {limit.asked:.10g} asked"
    if math.isinf(usage):
        return f"{asked}, no value helps {where}"
    value = limit.reached(usage)
    if usage <= 1 + ROOM:
        return f"{asked}, reachable {where}"
    if limit.at_least:
        return f"{asked}, at most {_rounded(value, up=False)} reachable {where}"
    return f"{asked}, at least {_rounded(value, up=True)} needed {where}"


def _rounded(value: float, up: bool) -> str:
    """Four significant digits (whole numbers above), rounded to the side that can be reached."""
    step = 10.0 ** min(math.floor(math.log10(value)) - 3, 0) if value > 0 else 1.0
    # A hair inside the step, so that a value which is a whole number of steps stays one.
    steps = math.ceil(value / step - 1e-6) if up else math.floor(value / step + 1e-6)
    return f"{steps * step:.10g}"
