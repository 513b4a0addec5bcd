"""A search that sees of an architecture what an objective says of it, nothing of how it is made up.

Every selection is brought within the budget first (tasks/studies/repair.py), evaluated once, and counted.
B = selections, S = slots, N = options.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blocks.errors import PuzzleError
from tasks.search.program import Floats, Integers, Program
from tasks.studies.repair import draw, keeps, within

Objective = Callable[[Integers], Floats]  # (B, S) option indices that keep the budget -> (B,), less is better

POPULATION, STALE = 100, 60  # most selections of a generation; generations without a better one before it stops
_FILLED = 0.5  # share of the repaired selections that are filled up: dearer is often better, not always


@dataclass(kw_only=True, eq=False)
class BlackBox:
    """What such a search is given: the budget's rows, an objective, how many selections it may evaluate.

    program: scores are not looked at.
    """

    program: Program
    objective: Objective
    evaluations: int
    generator: np.random.Generator
    known: dict[bytes, float] = field(default_factory=dict)
    best: Integers | None = None
    value: float = np.inf

    @property
    def spent(self) -> bool:
        """True when no further selection may be evaluated."""
        return len(self.known) >= self.evaluations

    def begin(self, count: int) -> Integers:
        """Up to `count` random selections (B, S) within the budget; there may be none."""
        drawn, kept = within(self.program, draw(self.program, count, self.generator), self.generator, _FILLED)
        return drawn[kept]

    def __call__(self, selections: Integers) -> Floats:
        """(B,) objective; inf where rows are broken or nothing may be evaluated any more."""
        selections = np.ascontiguousarray(selections, dtype=np.int64)
        kept = keeps(self.program, selections)
        fresh: dict[bytes, Integers] = {}
        for one in selections[kept]:
            if one.tobytes() not in self.known and len(self.known) + len(fresh) < self.evaluations:
                fresh.setdefault(one.tobytes(), one)
        if fresh:
            values = self.objective(np.array(list(fresh.values())))
            self.known |= dict(zip(fresh, values.tolist(), strict=True))
            at = int(values.argmin())
            if values[at] < self.value:
                self.best, self.value = list(fresh.values())[at].copy(), float(values[at])
        found = [self.known.get(one.tobytes(), np.inf) for one in selections]
        return np.where(kept, found, np.inf)


def evolve(box: BlackBox) -> Integers | None:
    """A genetic algorithm over one option per slot (pymoo): uniform crossover, random resets, repair to the budget.

    Returns the best selection it met, None when no drawn one could be brought within the budget.
    """
    size = int(np.clip(box.evaluations // 6, 4, POPULATION))
    first = box.begin(size)
    if len(first) < 2 or box.evaluations < 2:
        return _only(box, first)
    algorithm = _genetic(box, first, size)
    stale, best = 0, np.inf
    while algorithm.has_next() and not box.spent and stale < STALE:
        algorithm.next()
        stale = 0 if box.value < best else stale + 1
        best = box.value
    return box.best


def _only(box: BlackBox, selections: Integers) -> Integers | None:
    if len(selections):
        box(selections)
    return box.best


def _genetic(box: BlackBox, first: Integers, size: int) -> Any:
    """pymoo's algorithm, set up on the box."""
    try:
        from pymoo.algorithms.soo.nonconvex.ga import GA
        from pymoo.core.mutation import Mutation
        from pymoo.core.problem import Problem
        from pymoo.core.repair import Repair
        from pymoo.core.termination import NoTermination
        from pymoo.operators.crossover.ux import UX
    except ImportError as error:
        raise PuzzleError(
            "the evolutionary search needs pymoo: pip install 'puzzle[search]', or leave it out."
        ) from error

    slots, last = len(box.program.starts), len(box.program.scores) - 1

    class Selections(Problem):
        def __init__(self) -> None:
            super().__init__(n_var=slots, n_obj=1, xl=0, xu=last, vtype=int)

        def _evaluate(self, x: Integers, out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"] = box(x)

    class Resets(Mutation):
        def _do(self, problem: Any, x: Integers, **_: Any) -> Integers:
            share = np.minimum(box.generator.geometric(0.5, (len(x), 1)) / slots, 1.0)
            drawn = draw(box.program, len(x), box.generator)
            return np.where(box.generator.random(x.shape) < share, drawn, x)

    class Within(Repair):
        def _do(self, problem: Any, x: Integers, **_: Any) -> Integers:
            return within(box.program, np.asarray(x, dtype=np.int64), box.generator, _FILLED)[0]

    algorithm = GA(
        pop_size=size,
        n_offsprings=size,
        sampling=first,
        crossover=UX(prob=0.6),
        mutation=Resets(),
        repair=Within(),
        eliminate_duplicates=True,
    )
    algorithm.mating.n_max_iterations = 8  # drawing until no child is a twin: in a small space there are no others
    algorithm.setup(Selections(), termination=NoTermination(), seed=int(box.generator.integers(2**31)), verbose=False)
    return algorithm
