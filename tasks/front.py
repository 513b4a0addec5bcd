"""The Pareto front of a joint library over one budget, and the simple searches that a picture shows beside it.

uniform   one variant in every layer
depth     whole blocks removed, the cheapest in score first
greedy    from the best-scored variants, the step with the least score per saved cost, again and again
"""

from collections.abc import Callable

import numpy as np

from tasks.joint import BUDGETS, JointChoice, JointLibrary, LibraryFileError, Request, program_of, sweep
from tasks.library_pictures import Front, cells_of
from tasks.mip import ROOM, Floats, Integers, Program

Points = tuple[tuple[float, float], ...]


def front_of(
    library: JointLibrary,
    request: Request,
    choice: JointChoice,
    over: str,
    points: int = 20,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Front:
    """Solve at `points` limits of the budget `over` between the cheapest child and the dearest, the others kept.

    The simple searches stand there only where they keep the other budgets.
    """
    options, program = program_of(library, request)
    row, limit = list(request.budgets).index(over), request.budgets[over]
    costs, outside = program.usage[row] * limit, (1 - program.room[row]) * limit
    least, most = _ends(program, costs)
    if not outside + most:
        raise LibraryFileError(f"nothing in the library takes any {over}: there is no front over it.")
    low = max(outside + least, 1e-6 * (outside + most)) * (1 + 1e-9)
    found = sweep(library, request, over, [float(at) for at in np.linspace(low, outside + most, points)], tell)
    empty = np.array([all(cell.kind == "no_op" for cell in cells_of(option.label).values()) for option in options])
    plane = _Plane(program, row, limit)
    return Front(
        over=over,
        unit=BUDGETS[over],
        metric=request.metric,
        parent=_parent(library, over),
        chosen=(float(getattr(choice, over)), choice.objective),
        front=tuple((float(getattr(one, over)), one.objective) for one in found if one is not None),
        baselines={
            "uniform": plane.kept(_uniform(program)),
            "depth": plane.kept(_depth(program, empty)),
            "greedy": plane.kept(_greedy(program, costs)),
        },
    )


def _parent(library: JointLibrary, over: str) -> float | None:
    try:
        return library.of_parent(over)
    except LibraryFileError:
        return None


def _ends(program: Program, costs: Floats) -> tuple[float, float]:
    least, most = np.minimum.reduceat(costs, program.starts), np.maximum.reduceat(costs, program.starts)
    return float(least.sum()), float(most.sum())


class _Plane:
    """Selections as points of used budget and objective."""

    def __init__(self, program: Program, row: int, limit: float) -> None:
        self.program, self.row, self.limit = program, row, limit

    def kept(self, selections: list[Integers]) -> Points:
        """Points of the selections that keep every other budget."""
        found = []
        for selection in selections:
            used = self.program.usage[:, selection].sum(axis=1) + 1 - self.program.room
            if np.all(np.delete(used, self.row) <= 1 + ROOM):
                found.append((float(used[self.row] * self.limit), float(self.program.scores[selection].sum())))
        return tuple(found)


def _uniform(program: Program) -> list[Integers]:
    """Every label that stands in every slot."""
    assert program.types is not None, "a joint program knows the types of its options"
    slots = len(program.starts)
    same = (np.flatnonzero(program.types == kind) for kind in range(int(program.types.max()) + 1))
    return [selection for selection in same if len(selection) == slots]


def _best(program: Program) -> Integers:
    """The lowest score of every slot."""
    ends = np.append(program.starts[1:], len(program.scores))
    return np.array([a + np.argmin(program.scores[a:b]) for a, b in zip(program.starts, ends, strict=True)])


def _depth(program: Program, empty: np.ndarray) -> list[Integers]:
    """One block more removed in every selection; none where some slot cannot be emptied."""
    removed = np.flatnonzero(empty)
    if len(removed) != len(program.starts):
        return []
    current = _best(program)
    found = [current]
    for slot in np.argsort(program.scores[removed] - program.scores[current], kind="stable"):
        current = current.copy()
        current[slot] = removed[slot]
        found.append(current)
    return found


def _greedy(program: Program, costs: Floats) -> list[Integers]:
    """Steps down in cost; each takes the option with the least rise of the score per saved cost."""
    current, slots = _best(program), program.slot_of
    found = [current]
    while True:
        saved = costs[current][slots] - costs
        rise = program.scores - program.scores[current][slots]
        better = saved > 1e-12 * (1 + abs(costs))
        if not better.any():
            return found
        ratio = np.where(better, rise / np.where(better, saved, 1), np.inf)
        step = int(np.argmin(ratio))
        current = current.copy()
        current[slots[step]] = step
        found.append(current)
