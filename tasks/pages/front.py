"""The Pareto front of a joint library over one budget, and the simple searches that a picture shows beside it.

uniform   one variant in every layer
depth     whole blocks removed, the cheapest in score first
stepwise  from the best-scored variants, the step with the least score per saved cost, again and again
"""

import numpy as np

from tasks.pages.library_pictures import Front, cells_of
from tasks.running.progress import Progress, no_progress
from tasks.search.cases import cases_of
from tasks.search.joint import JointLibrary, JointOption, LibraryFileError, known_quantity
from tasks.search.program import ROOM, Floats, Integers, Program
from tasks.search.request import Limit, Request
from tasks.search.solve import JointChoice, case_of, front, front_values, reached, totals

Points = tuple[tuple[float, float], ...]


def front_of(
    library: JointLibrary,
    request: Request,
    choice: JointChoice,
    over: str,
    points: int = 20,
    progress: Progress = no_progress,
) -> Front:
    """Solve at `points` limits of the quantity `over`, the other budgets kept; less of it must be better.

    The simple searches stand there only where they keep the other budgets.
    """
    if over not in library.quantities or over == "score" or known_quantity(over).floor:
        names = [name for name in library.quantities if name != "score" and not known_quantity(name).floor]
        raise LibraryFileError(f"a front is drawn over one of {', '.join(names)}, not {over!r}.")
    values = front_values(library, request, over, points)
    if not values[-1]:
        raise LibraryFileError(f"nothing in the library takes any {over}: there is no front over it.")
    found = [one for one in front(library, request, over, values, progress) if one is not None]
    plane = _Plane(library, request, over, values[-1], choice)
    return Front(
        over=over,
        unit=known_quantity(over).unit,
        metric=request.metric,
        parent=plane.parent,
        chosen=(plane.of(choice), choice.objective),
        front=tuple((plane.of(one), one.objective) for one in found),
        baselines=plane.baselines(),
    )


class _Plane:
    """Architectures as points of what they use of a quantity and their objective, at the choice's batch sizes."""

    def __init__(self, library: JointLibrary, request: Request, over: str, most: float, choice: JointChoice) -> None:
        self.library, self.limit = library, Limit(quantity=over, asked=most, name=over)
        others = tuple(limit for limit in request.limits if limit.quantity != over)
        self.request = request.model_copy(update={"limits": (*others, self.limit)})
        self.options, cases = cases_of(library, self.request)
        self.case = case_of(library, cases, choice)
        self.by_name = {(option.layer, option.label): option for option in library.options}

    def of(self, choice: JointChoice) -> float:
        """What a choice uses."""
        chosen = [self.by_name[name] for name in choice.layers.items()]
        return reached(self.library, self.request, self.limit, chosen, choice.scenarios)

    @property
    def parent(self) -> float | None:
        """What the parent uses, None where the library lacks its blocks."""
        parents = [self.library.parents[layer] for layer in self.library.layers if layer in self.library.parents]
        return self._used(parents) if len(parents) == len(self.library.layers) else None

    def _used(self, chosen: list[JointOption]) -> float:
        scenarios = [totals(self.library, chosen, index) for index in self.case.combination]
        return reached(self.library, self.request, self.limit, chosen, scenarios)

    def baselines(self) -> dict[str, Points]:
        """The simple searches by name."""
        program, row = self.case.program, self.case.rows.index(self.limit)
        empty = np.array([all(c.kind == "no_op" for c in cells_of(option.label).values()) for option in self.options])
        return {
            "uniform": self._kept(_uniform(program)),
            "depth": self._kept(_depth(program, empty)),
            "stepwise": self._kept(_stepwise(program, program.usage[row])),
        }

    def _kept(self, selections: list[Integers]) -> Points:
        """Points of the selections that keep every other budget."""
        program = self.case.program
        others = np.array([limit is not self.limit for limit in self.case.rows])
        found = []
        for selection in selections:
            used = program.usage[:, selection].sum(axis=1) + 1 - program.room
            if np.all(used[others] <= 1 + ROOM):
                chosen = [self.options[index] for index in selection]
                found.append((self._used(chosen), float(program.scores[selection].sum())))
        return tuple(found)


def _uniform(program: Program) -> list[Integers]:
    """Every label that stands in every slot."""
    assert program.types is not None, "a joint program knows the types of its options"
    slots = len(program.starts)
    same = (np.flatnonzero(program.types == kind) for kind in range(int(program.types.max()) + 1))
    return [selection for selection in same if len(selection) == slots]


def _best(program: Program) -> Integers:
    """The lowest score of every slot."""
    return np.array([slot[np.argmin(program.scores[slot])] for slot in program.slots])


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


def _stepwise(program: Program, costs: Floats) -> list[Integers]:
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
