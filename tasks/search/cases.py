"""The formulation: what is asked of a joint library, as programs in numbers (Puzzle, arXiv 2411.19146, appendix B).

    min  sum_ij score_ij x_ij    s.t.  sum_j x_ij = 1 for every slot i,   usage x <= room for every limit,  x in {0, 1}

A limit becomes one row per scenario that it holds in, divided by the limit, so that a whole limit is 1; what lies
outside the blocks is taken off its room. There is a program per combination of one batch size per scenario. Whoever
needs the program takes it from here: the search (tasks/search/solve.py) and the studies (tasks/search/grid.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.search.joint import JointLibrary, JointOption, known_quantity
from tasks.search.program import Floats, Program
from tasks.search.request import Limit, Request, allowed, check, objective_of

Span = list[tuple[int, float]]  # places and their weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """The program at one combination of places; `rows` says which limit each row belongs to, `constant` is what the
    non-block part adds to the objective.
    """

    combination: tuple[int, ...]
    program: Program
    rows: tuple[Limit, ...]
    constant: float


def cases_of(library: JointLibrary, request: Request) -> tuple[list[JointOption], list[Case]]:
    """The options that are allowed, (N,), and a program over them per combination of batch sizes."""
    check(library, request)
    kept = allowed(library, request)
    wanted = [limit.kind for limit in request.limits] + [known_quantity(request.minimise)]
    combinations = library.combinations()
    if not any(kind.per_place for kind in wanted):
        combinations = combinations[:1]  # nothing depends on the batch
    cases = [case_at(library, request, kept, combination) for combination in combinations]
    return [library.options[index] for index in kept], cases


def case_at(library: JointLibrary, request: Request, kept: list[int], combination: tuple[int, ...]) -> Case:
    """The program over the options at the indices `kept`, at one combination of places."""
    options = [library.options[index] for index in kept]
    place = {layer: index for index, layer in enumerate(library.layers)}
    slots = np.array([place[option.layer] for option in options])
    scores = np.array([objective_of(option, request, library.documents) for option in options])
    usage, room, rows = [], [], []
    for limit in request.limits:
        for span in spans(library, request, limit, combination):
            taken, outside = (
                (scores, 0.0) if limit.quantity == "score" else _taken(library, limit.kind.cost, span, kept)
            )
            most = limit.asked if limit.quantity == "score" else _most(library, limit, span)
            usage.append(taken / most)
            room.append(1 - outside / most)
            rows.append(limit)
    constant = 0.0
    if request.minimise != "score":
        target = Limit(quantity=request.minimise, asked=1, name=request.minimise)
        (span,) = spans(library, request, target, combination)
        scores, constant = _taken(library, target.kind.cost, span, kept)
        if target.kind.floor:  # seconds of one token: those of a batch would say that the smallest serves most
            each = _tokens(library, span)
            scores, constant = scores / each, constant / each
    program = Program(
        scores=scores,
        starts=np.searchsorted(slots, np.arange(len(library.layers))),
        usage=np.array(usage),
        room=np.array(room),
        types=np.unique([option.label for option in options], return_inverse=True)[1],
        max_types=request.search.max_block_types,
    )
    return Case(combination=combination, program=program, rows=tuple(rows), constant=constant)


def spans(library: JointLibrary, request: Request, limit: Limit, combination: Sequence[int]) -> list[Span]:
    """The rows of a limit: places whose costs are added, with weights.

    Over the traffic a time is the mean of a request's; throughput counts what one request takes of its batch.
    """
    if not limit.kind.per_place:
        return [[(combination[0], 1.0)]]
    at_places = {library.places[index].scenario: index for index in combination}
    if limit.scenario is not None:
        return [[(at_places[limit.scenario], 1.0)]]
    if request.traffic and limit.kind.time:
        weights = [(at_places[name], weight) for name, weight in request.weights.items()]
        if limit.kind.floor:
            weights = [(index, weight / library.places[index].batch_size) for index, weight in weights]
        return [weights]
    return [[(index, 1.0)] for index in combination]


def _taken(library: JointLibrary, cost: str, span: Span, kept: list[int]) -> tuple[Floats, float]:
    """What options (N,) and the non-block part take of a cost over a span."""
    columns = [weight * library.column(cost, place)[kept] for place, weight in span]
    return np.sum(columns, axis=0), math.fsum(weight * library.outside(cost, place) for place, weight in span)


def _most(library: JointLibrary, limit: Limit, span: Span) -> float:
    """The most of the cost behind a limit that may be taken over a span."""
    if limit.share:
        parent = math.fsum(weight * library.of_parent(limit.kind.cost, place) for place, weight in span)
        most = parent / limit.asked if limit.kind.floor else parent * limit.asked
        return most or math.ulp(0.0)  # a parent that takes nothing leaves no room for anything
    return _tokens(library, span) / limit.asked if limit.kind.floor else limit.asked


def _tokens(library: JointLibrary, span: Span) -> float:
    """Tokens of all batches of a span; requests where the library does not say how many tokens they have."""
    batches = [(weight, library.places[place]) for place, weight in span]
    return math.fsum(weight * (place.tokens or place.batch_size) for weight, place in batches)
