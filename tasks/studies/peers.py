"""Every search of an architecture behind one function: a name and a problem in, an architecture of that method out.

    mip              the exact minimum of the summed scores, with its certificate (tasks/search/choose.py)
    uniform, depth, greedy, random, no_op_only, max_params      tasks/studies/baselines.py
    evolutionary     a genetic algorithm                        tasks/studies/black_box.py

The last may be given another objective than the summed scores, such as a measured KL. Every search is tried at
every combination of batch sizes and the lowest sum is kept; random keeps the first that works.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.records import Architecture, LayerChoice
from profiles.schema import Search
from tasks.running.progress import Progress, no_progress
from tasks.search.choose import choose
from tasks.search.grid import Grid, grids_of, make_grid
from tasks.search.mip import minimise
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
}
EVOLUTIONARY = "evolutionary"
NAMES = ("mip", *BASELINES, EVOLUTIONARY)


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """What the evolutionary search minimises instead of the summed scores, at fixed batch sizes.

    measure: a choice per layer -> objective, less is better. starts: choices to begin with.
    """

    name: str
    measure: Callable[[tuple[LayerChoice, ...]], float]
    evaluations: int
    batches: Batches
    starts: tuple[tuple[LayerChoice, ...], ...] = ()
    progress: Progress = no_progress


def find(
    name: str, problem: Problem, seed: int = 0, evaluations: int = EVALUATIONS, objective: Objective | None = None
) -> Architecture:
    """The architecture that one search finds within the budget; `seed` and `evaluations` matter to those that draw.

    Raises InfeasibleBudget when the method finds none, even where the MIP does, and PuzzleError for an unknown name or
    an objective given to a search that minimises summed scores alone.
    """
    if name not in NAMES:
        raise PuzzleError(f"unknown search {name!r}: it is one of {', '.join(NAMES)}.")
    if objective is not None and name != EVOLUTIONARY:
        raise PuzzleError(
            f"{name} minimises summed scores and nothing else: {objective.name} can be given to {EVOLUTIONARY} alone."
        )
    if name == "mip":
        return choose(problem)
    started = time.perf_counter()
    if objective is None:
        grids = grids_of(problem, joint=name in BASELINES)
    else:
        grids, evaluations = [make_grid(problem, objective.batches)], objective.evaluations
    best: tuple[float, Grid, Integers] | None = None
    evaluated = 0
    for grid in grids:
        found = _found(name, grid, problem.search, seed, max(evaluations // len(grids), 1), objective)
        if found is None:
            continue
        value, selection, count = found
        evaluated += count
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
    method = name if objective is None else f"{name} on {objective.name}"
    architecture = predicted(problem, grid.choice(selection), method, grid.batches)
    return architecture.model_copy(update={"evaluations": evaluated, "solve_seconds": time.perf_counter() - started})


def _found(
    name: str, grid: Grid, search: Search, seed: int, evaluations: int, objective: Objective | None
) -> tuple[float, Integers, int] | None:
    """The objective of what one search finds in a grid, its selection, and how many architectures it looked at."""
    generator = np.random.default_rng(seed)
    if name in BASELINES:
        picked = BASELINES[name](grid, search, generator)
        return picked and (float(grid.scores[picked[0]].sum()), *picked)
    box = _box(grid, generator, evaluations, objective)
    selection = evolve(box)
    return None if selection is None else (box.value, selection, len(box.known))


def _box(grid: Grid, generator: np.random.Generator, evaluations: int, objective: Objective | None) -> BlackBox:
    if objective is None:
        return BlackBox(
            program=grid.program,
            objective=lambda selections: np.asarray(grid.scores[selections].sum(axis=1)),
            evaluations=evaluations,
            generator=generator,
        )
    measure = objective.measure
    known = [start for layers in objective.starts if (start := grid.selection(layers)) is not None]
    return BlackBox(
        program=grid.program,
        objective=lambda selections: np.array([measure(grid.choice(one)) for one in selections]),
        evaluations=evaluations,
        generator=generator,
        starts=np.array(known) if known else None,
        progress=objective.progress,
    )


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
