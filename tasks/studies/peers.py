"""Every search of an architecture behind one function: a name and a problem in, an architecture of that method out.

    mip              the exact minimum of the summed scores, with its certificate (tasks/search/choose.py)
    uniform, depth, greedy, random, no_op_only, max_params, minitron      tasks/studies/baselines.py
    evolutionary     a genetic algorithm                        tasks/studies/black_box.py

Every search is tried at every combination of batch sizes and the lowest sum is kept; random keeps the first that works.
"""

import time

import numpy as np

from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.records import Architecture, LayerChoice
from profiles.schema import MINITRON, Search
from tasks.search.choose import choose
from tasks.search.grid import Grid, grids_of, make_grid
from tasks.search.mip import minimise
from tasks.search.one_type import back, in_one_type, types_of
from tasks.search.program import Integers
from tasks.search.totals import Batches, Problem, predicted
from tasks.studies import baselines
from tasks.studies.black_box import BlackBox, evolve

EVALUATIONS = 20_000  # summed scores that evolutionary may look at
_NEEDS = {"depth": " (it drops layers that have no_op as attention and as ffn, nothing else)"}

BASELINES: dict[str, baselines.Baseline] = {
    "uniform": baselines.uniform,
    "depth": baselines.depth,
    "greedy": baselines.greedy,
    "random": baselines.random,
    "no_op_only": baselines.no_op_only,
    "max_params": baselines.max_params,
    MINITRON: baselines.minitron,
}
EVOLUTIONARY = "evolutionary"
NAMES = ("mip", *BASELINES, EVOLUTIONARY)
JUDGED = tuple(name for name in NAMES if name != MINITRON)  # by the blocks of the library, which minitron has none of


def find(name: str, problem: Problem, seed: int = 0, evaluations: int = EVALUATIONS) -> Architecture:
    """The architecture that one search finds within the budget; `seed` and `evaluations` matter to those that draw.

    Of a library in several types of number every other search takes one type for all blocks and one for the head; the
    best of these is kept. Raises InfeasibleBudget when the method finds none, even where the MIP does, and PuzzleError
    for an unknown name.
    """
    if name not in NAMES:
        raise PuzzleError(f"unknown search {name!r}: it is one of {', '.join(NAMES)}.")
    if name == "mip":
        return choose(problem)
    if len(types_of(problem)) == 1:
        return _found_by(name, problem, seed, evaluations)
    best: Architecture | None = None
    for kind, head, alone in in_one_type(problem):
        try:
            found = back(problem, _found_by(name, alone, seed, evaluations), kind, head)
        except InfeasibleBudget as error:
            refused = error
            continue
        best = found if best is None or found.score < best.score else best
    if best is None:
        raise refused
    return best


def _found_by(name: str, problem: Problem, seed: int, evaluations: int) -> Architecture:
    """The architecture that a search finds among variants without types."""
    started = time.perf_counter()
    grids = grids_of(problem, joint=name in BASELINES)
    best: tuple[float, Grid, Integers] | None = None
    evaluated = 0
    for grid in grids:
        found = _found(name, grid, problem.search, np.random.default_rng(seed), max(evaluations // len(grids), 1))
        if found is None:
            continue
        selection, count = found
        evaluated += count
        value = float(grid.scores[selection].sum())
        if best is None or value < best[0]:
            best = value, grid, selection
        if name == "random":
            break
    if best is None:
        raise InfeasibleBudget(
            f"The {name} baseline finds no architecture within the budget{_NEEDS.get(name, '')}: ease the budget, add "
            f"variants to search_space, or take {name} out of evaluate.baselines."
        )
    _, grid, selection = best
    architecture = predicted(problem, grid.choice(selection), name, grid.batches)
    return architecture.model_copy(update={"evaluations": evaluated, "solve_seconds": time.perf_counter() - started})


def _found(name: str, grid: Grid, search: Search, generator: np.random.Generator, evaluations: int) -> baselines.Picked:
    """What one search finds in a grid, and how many architectures it looked at."""
    if name in BASELINES:
        return BASELINES[name](grid, search, generator)
    box = BlackBox(
        program=grid.program,
        objective=lambda selections: np.asarray(grid.scores[selections].sum(axis=1)),
        evaluations=evaluations,
        generator=generator,
    )
    selection = evolve(box)
    return None if selection is None else (selection, len(box.known))


def top(problem: Problem, count: int, min_different: int, batches: Batches) -> list[tuple[LayerChoice, ...]]:
    """Up to `count` architectures, best summed score first, any two of them different in `min_different` slots."""
    grid = make_grid(problem, batches)
    program, found = grid.program, list[tuple[LayerChoice, ...]]()
    same = max(len(grid.starts) - min_different, 0)
    while len(found) < count:
        answer = minimise(program, problem.search)
        if answer is None:
            break
        found.append(grid.choice(answer.selection))
        chosen = np.zeros(len(grid.options))
        chosen[answer.selection] = 1 / max(same, 1)
        program = program.with_row(chosen, same / max(same, 1))
    return found
