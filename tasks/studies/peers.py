"""Every search of an architecture behind one interface: a name, a problem, an architecture of that method.

    mip              the exact minimum of the summed scores, with its certificate (tasks/search/choose.py)
    uniform, depth, greedy, random, no_op_only, max_params      tasks/studies/baselines.py
    evolutionary     a genetic algorithm                        tasks/studies/black_box.py
    policy_gradient  REINFORCE                                  tasks/studies/black_box.py

The last two may be given another objective than the summed scores, such as a measured KL. Every search is tried at
every combination of batch sizes and the lowest sum is kept; random keeps the first that works.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.records import Architecture, LayerChoice
from tasks.search.choose import choose
from tasks.search.grid import Grid, grids_of, make_grid
from tasks.search.mip import minimise
from tasks.search.program import Floats, Integers
from tasks.search.totals import Batches, Problem, predicted
from tasks.studies import baselines
from tasks.studies.baselines import Ask, Picked
from tasks.studies.black_box import BlackBox, evolve, reinforce

EVALUATIONS = 20_000  # summed scores that evolutionary and policy_gradient may look at
_NEEDS = {"depth": " (it drops layers that have no_op as attention and as ffn, nothing else)"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Aim:
    """What a black-box search minimises instead of the summed scores, at fixed batch sizes.

    measure: a choice per layer -> objective, less is better. starts: choices to begin with.
    """

    name: str
    measure: Callable[[tuple[LayerChoice, ...]], float]
    evaluations: int
    batches: Batches
    starts: tuple[tuple[LayerChoice, ...], ...] = ()
    tell: Callable[[int, int], None] = lambda done, total: None


@dataclass(frozen=True, kw_only=True, eq=False)
class Peer:
    """One search. whole_layers: its slots are layers, not subblocks. search: set for those that take any objective."""

    method: Callable[[Grid, Ask], Picked]
    whole_layers: bool = True
    search: Callable[[BlackBox], Integers | None] | None = None


def _black_box(search: Callable[[BlackBox], Integers | None]) -> Peer:
    def method(grid: Grid, ask: Ask) -> Picked:
        box = BlackBox(
            program=grid.program,
            objective=lambda selections: _sums(grid, selections),
            evaluations=ask.evaluations,
            generator=ask.generator,
        )
        selection = search(box)
        return None if selection is None else (selection, len(box.known))

    return Peer(method=method, whole_layers=False, search=search)


def _sums(grid: Grid, selections: Integers) -> Floats:
    return np.asarray(grid.scores[selections].sum(axis=1))


PEERS: dict[str, Peer] = {
    "uniform": Peer(method=baselines.uniform),
    "depth": Peer(method=baselines.depth),
    "greedy": Peer(method=baselines.greedy),
    "random": Peer(method=baselines.random),
    "no_op_only": Peer(method=baselines.no_op_only),
    "max_params": Peer(method=baselines.max_params),
    "evolutionary": _black_box(evolve),
    "policy_gradient": _black_box(reinforce),
}
NAMES = ("mip", *PEERS)


def find(
    name: str, problem: Problem, seed: int = 0, evaluations: int = EVALUATIONS, aim: Aim | None = None
) -> Architecture:
    """The architecture that one search finds within the budget; `seed` and `evaluations` matter to those that draw.

    Raises InfeasibleBudget when the method finds none, even where the MIP does, and PuzzleError for an unknown name or
    an aim given to a search that cannot take one.
    """
    if name not in NAMES:
        raise PuzzleError(f"unknown search {name!r}: it is one of {', '.join(NAMES)}.")
    if aim is not None:
        return _aimed(name, problem, seed, aim)
    if name == "mip":
        return choose(problem)
    started = time.perf_counter()
    grids = grids_of(problem, joint=PEERS[name].whole_layers)
    best: tuple[float, Grid, Integers] | None = None
    evaluated = 0
    for grid in grids:
        share = max(evaluations // len(grids), 1)
        ask = Ask(generator=np.random.default_rng(seed), search=problem.search, evaluations=share)
        picked = PEERS[name].method(grid, ask)
        if picked is None:
            continue
        selection, count = picked
        evaluated += count
        score = float(grid.scores[selection].sum())
        if best is None or score < best[0]:
            best = score, grid, selection
        if name == "random":
            break
    if best is None:
        raise _refused(name)
    _, grid, selection = best
    found = predicted(problem, grid.choice(selection), name, grid.batches)
    return found.model_copy(update={"evaluations": evaluated, "solve_seconds": time.perf_counter() - started})


def _aimed(name: str, problem: Problem, seed: int, aim: Aim) -> Architecture:
    search = PEERS[name].search if name in PEERS else None
    if search is None:
        able = ", ".join(key for key, peer in PEERS.items() if peer.search)
        raise PuzzleError(f"{name} minimises summed scores and nothing else: {aim.name} can be given to {able}.")
    started = time.perf_counter()
    grid = make_grid(problem, aim.batches)
    starts = [grid.selection(layers) for layers in aim.starts]
    known = [start for start in starts if start is not None]
    box = BlackBox(
        program=grid.program,
        objective=lambda selections: np.array([aim.measure(grid.choice(one)) for one in selections]),
        evaluations=aim.evaluations,
        generator=np.random.default_rng(seed),
        starts=np.array(known) if known else None,
        tell=aim.tell,
    )
    selection = search(box)
    if selection is None:
        raise _refused(name)
    found = predicted(problem, grid.choice(selection), f"{name} on {aim.name}", grid.batches)
    return found.model_copy(update={"evaluations": len(box.known), "solve_seconds": time.perf_counter() - started})


def _refused(name: str) -> InfeasibleBudget:
    return InfeasibleBudget(
        f"The {name} baseline finds no architecture within the budget{_NEEDS.get(name, '')}: ease the budget, add "
        f"variants to search_space, or take {name} out of evaluate.baselines."
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
