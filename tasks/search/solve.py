"""Answers what is asked of a joint library: the best architecture, fronts, prices.

tasks/search/cases.py makes a program of it per combination of batch sizes, tasks/search/mip.py solves each with CVXPY
and HiGHS. The best answer is kept; equal ones go to the larger batches. Before it is shown it is checked: every layer
once, all sums taken again from the library's own numbers, every limit kept, the objective the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from blocks.errors import InfeasibleBudget
from blocks.estimates import mean
from blocks.records import Value
from profiles.schema import Search
from tasks.running.progress import Progress, no_progress
from tasks.search.cases import Case, cases_of
from tasks.search.infeasible import TOLERANCE, why_infeasible
from tasks.search.joint import KL_OF, JointLibrary, JointOption, at, known_quantity
from tasks.search.mip import Answer, SolverStopped, lower_bound, minimise, relaxation, solved_by
from tasks.search.program import possible
from tasks.search.request import Limit, Request, is_one_number, objective_of
from tasks.search.totals import gap_between


class PlaceTotals(Value):
    """An architecture at one scenario and batch size, non-block part included; None where the library cannot say."""

    scenario: str
    batch_size: int
    memory_gib: float | None
    latency_seconds: float | None
    time_to_first_token_seconds: float | None
    tokens_per_second: float | None


class Certificate(Value):
    """What one solve proved: its status, a lower bound of every answer's objective, how far the answer may lie above it
    (relative), and by what it was solved.
    """

    status: str
    bound: float
    gap: float
    solved_by: str


class JointChoice(Value):
    """One architecture: sums with the non-block part, the solver's certificate, the label chosen in every layer.

    objective: what was minimised; where most tokens per second were sought, the seconds of one token. score, score_se:
    sum of the plain scores and its standard error over sequences, None where the library keeps no scores per sequence.
    memory_gib: the largest over the scenarios. latency_seconds: the mean over the traffic, else the largest. None where
    the library does not know.
    """

    objective: float
    score: float
    score_se: float | None
    memory_gib: float | None
    latency_seconds: float | None
    parameters: float | None
    status: str
    bound: float
    gap: float
    solved_by: str
    scenarios: tuple[PlaceTotals, ...]
    layers: dict[str, str]


class Price(Value):
    """What a budget is worth: the LP's marginal objective per unit of it, and the objective solved again at others.

    share: limit, used and per_unit are shares of the parent's figure. without, speed: of a limit on the KL of a
    capability, the objective without it, and how many more tokens a second could be had without it at the choice's own
    objective, as a share of those with it; None where that is not known.
    """

    budget: str
    unit: str
    share: bool
    limit: float
    used: float
    per_unit: float
    resolved: dict[str, float | None]
    without: float | None = None
    speed: float | None = None


def choose_joint(library: JointLibrary, request: Request) -> list[JointChoice]:
    """The best architecture, then the best that differ enough from all before; fewer than asked when no more exist.

    Raises InfeasibleBudget with what is reachable when there is none, LibraryFileError when the library lacks what the
    request names.
    """
    options, cases = cases_of(library, request)
    found: list[JointChoice] = []
    while len(found) < request.diverse:
        answered = best_of(cases, request.search)
        if answered is None:
            break
        case, answer = answered
        found.append(verified(library, options, request, case, answer))
        same = np.zeros(len(options))
        same[answer.selection] = 1 / len(library.layers)
        room = 1 - request.min_different / len(library.layers)
        cases = [replace(case, program=case.program.with_row(same, room)) for case in cases]
    if not found:
        raise InfeasibleBudget(why_infeasible(cases, request))
    return found


def best_of(cases: Sequence[Case], search: Search) -> tuple[Case, Answer] | None:
    """The best answer over all combinations, its bound valid for all; None when nothing fits any of them.

    Of several combinations those with the lowest LP bound are solved first; one whose LP bound shows that it cannot
    win is not solved.
    """
    alone = len(cases) == 1
    bounds = [-math.inf if alone else lower_bound(case.program, search) + case.constant for case in cases]
    best: tuple[int, Answer] | None = None
    lowest, stopped, unanswered = math.inf, False, list[SolverStopped]()
    # a combination of which not even the LP has an answer is left out
    for place in sorted(np.flatnonzero(np.array(bounds) < math.inf).tolist(), key=bounds.__getitem__):
        case = cases[place]
        if best is not None and bounds[place] > _to_beat(cases, best, place, search):
            lowest = min(lowest, bounds[place])
            continue
        try:
            answer = minimise(case.program, search)
        except SolverStopped as error:  # another combination may have an answer; the bound of this one counts
            unanswered.append(error)
            lowest = min(lowest, bounds[place])
            continue
        if answer is None:
            continue
        lowest, stopped = min(lowest, answer.bound + case.constant), stopped or answer.status != "optimal"
        if best is None or answer.objective + case.constant <= _to_beat(cases, best, place, search):
            best = place, answer
    if best is None:
        if unanswered:
            raise unanswered[0]
        return None
    case, answer = cases[best[0]], best[1]
    # "optimal" is said of all combinations or not at all
    proven = gap_between(answer.objective + case.constant, lowest) <= search.gap or not (stopped or unanswered)
    return case, replace(
        answer, bound=min(lowest - case.constant, answer.objective), status="optimal" if proven else "time_limit"
    )


def _to_beat(cases: Sequence[Case], best: tuple[int, Answer], place: int, search: Search) -> float:
    """The objective at most with which the combination at `place` replaces the best so far.

    Two optima closer than the solver's own gap are equal. Larger batches come first among the cases, and win then.
    """
    objective = best[1].objective + cases[best[0]].constant
    tie = max(search.gap * abs(best[1].objective), 1e-12)
    return objective + tie if place < best[0] else objective - tie


def prices(
    library: JointLibrary, request: Request, choice: JointChoice, steps: Sequence[float] = (-0.05, 0.05)
) -> list[Price]:
    """What each budget costs or buys: the LP's marginal, and the best objective with the budget moved by `steps`."""
    options, cases = cases_of(library, request)
    case = case_of(library, cases, choice)
    relaxed = relaxation(case.program.only(possible(case.program)), request.search)
    assert relaxed is not None, "an architecture is one of the relaxation's answers"
    by_name = {(option.layer, option.label): option for option in options}
    chosen = [by_name[name] for name in choice.layers.items()]
    found = []
    for index, limit in enumerate(request.limits):
        price = math.fsum(p for p, row in zip(relaxed.prices, case.rows, strict=True) if row is limit)
        marginal = price / limit.asked if limit.kind.floor else 0.0 - price / limit.asked
        resolved: dict[str, float | None] = {}
        for step in steps:
            moved = (*request.limits[:index], limit.scaled(1 + step), *request.limits[index + 1 :])
            resolved[f"{step:+.0%}"] = _least(library, request, moved)
        used = reached(library, request, limit, chosen, choice.scenarios)
        found.append(
            Price(
                budget=limit.name,
                unit=limit.kind.unit,
                share=limit.share,
                limit=limit.asked,
                used=used,
                per_unit=marginal,
                resolved=resolved,
                **(_given_up(library, request, limit, choice) if limit.quantity.startswith(KL_OF) else {}),
            )
        )
    return found


def _given_up(library: JointLibrary, request: Request, limit: Limit, choice: JointChoice) -> dict[str, float]:
    """What a limit costs: the objective, and the tokens a second at the choice's objective, solved without it."""
    others = tuple(other for other in request.limits if other is not limit)
    found, free = dict[str, float](), _least(library, request, others) if others else None
    found |= {} if free is None else {"without": free}
    timed = library.knows("latency_seconds") and is_one_number(library, request, "tokens_per_second")
    if request.minimise == "score" and timed and choice.objective > 0:
        as_good = Limit(quantity="score", asked=choice.objective * (1 + TOLERANCE), name="score")
        fastest = request.model_copy(update={"minimise": "tokens_per_second"})
        unlike = [tuple(one for one in some if one.quantity != "score") for some in (request.limits, others)]
        kept, free = (_least(library, fastest, (*some, as_good)) for some in unlike)  # seconds of a token
        found |= {"speed": kept / free - 1} if kept and free else {}
    return found


def _least(library: JointLibrary, request: Request, limits: tuple[Limit, ...]) -> float | None:
    """The best objective under other limits; None where nothing fits."""
    found = best_of(cases_of(library, request.model_copy(update={"limits": limits}))[1], request.search)
    return None if found is None else found[1].objective + found[0].constant


def case_of(library: JointLibrary, cases: Sequence[Case], choice: JointChoice) -> Case:
    """The program at the batch sizes of a choice; the only one there is where no limit depends on them."""
    places = tuple(library.place_at(found.scenario, found.batch_size) for found in choice.scenarios)
    return next((case for case in cases if case.combination == places), cases[0])


def front(
    library: JointLibrary,
    request: Request,
    over: str,
    values: Sequence[float],
    progress: Progress = no_progress,
) -> list[JointChoice | None]:
    """The best architecture at every value of one quantity, the other limits kept; None where nothing fits."""
    others = tuple(limit for limit in request.limits if limit.quantity != over)
    found: list[JointChoice | None] = []
    for value in values:
        moved = request.model_copy(update={"limits": (*others, Limit(quantity=over, asked=value, name=over))})
        options, cases = cases_of(library, moved)
        answered = best_of(cases, request.search)
        found.append(None if answered is None else verified(library, options, moved, *answered))
        progress(len(found), len(values))
    return found


def front_values(library: JointLibrary, request: Request, over: str, points: int) -> list[float]:
    """Evenly spaced limits of a quantity, from the least the library reaches to where it no longer binds."""
    others = tuple(limit for limit in request.limits if limit.quantity != over)
    open_limits = others or (Limit(quantity="score", asked=1e12, name="score"),)
    ends = []
    for target in (over, request.minimise):
        asked = request.model_copy(update={"limits": open_limits, "minimise": target, "diverse": 1})
        options, cases = cases_of(library, asked)
        answered = best_of(cases, request.search)
        if answered is None:
            choose_joint(library, asked)  # raises, and says why
        assert answered is not None
        choice = verified(library, options, asked, *answered)
        chosen = [options[index] for index in answered[1].selection]
        limit = Limit(quantity=over, asked=1, name=over)
        ends.append(reached(library, request, limit, chosen, choice.scenarios))
    low, high = sorted(ends)
    return [float(value) for value in np.linspace(max(low, high * 1e-6), high, points)]


def verified(
    library: JointLibrary, options: Sequence[JointOption], request: Request, case: Case, answer: Answer
) -> JointChoice:
    """The answer summed again from the library's own numbers; AssertionError when it breaks what was asked."""
    chosen = [options[index] for index in answer.selection]
    scenarios = tuple(totals(library, chosen, index) for index in case.combination)
    labels = [option.label for option in chosen]
    broken = list(_broken(library, request, chosen, scenarios))
    if request.search.max_block_types is not None and len(set(labels)) > request.search.max_block_types:
        broken.append("max_block_types")
    claimed = answer.objective + case.constant
    objective = _objective(library, request, chosen, scenarios, claimed)
    if not math.isclose(objective, claimed, rel_tol=TOLERANCE, abs_tol=1e-9):
        broken.append(f"objective {objective}, not {claimed}")
    if broken or [option.layer for option in chosen] != list(library.layers):
        raise AssertionError(f"the solver's answer fails its own check ({broken}), a bug of puzzle")
    bound = min(answer.bound + case.constant, objective)
    certificate = Certificate(
        status=answer.status, bound=bound, gap=gap_between(objective, bound), solved_by=solved_by()
    )
    return described(library, request, chosen, scenarios, objective, certificate)


def described(
    library: JointLibrary,
    request: Request,
    chosen: Sequence[JointOption],
    scenarios: tuple[PlaceTotals, ...],
    objective: float,
    certificate: Certificate,
) -> JointChoice:
    """An architecture with its sums, in the words of its library."""
    samples = [option.samples.get(request.metric, np.empty(0)) for option in chosen]
    return JointChoice(
        objective=objective,
        score=math.fsum(option.metrics[request.metric] for option in chosen),
        # all scores are over the same sequences: the error is that of the sums, not the root of the sum of squares
        score_se=mean(np.sum(samples, axis=0), library.documents).error if min(map(len, samples)) > 1 else None,
        memory_gib=_over_scenarios(request, scenarios, "memory_gib"),
        latency_seconds=_over_scenarios(request, scenarios, "latency_seconds"),
        parameters=total(library, chosen, "parameters", 0),
        **certificate.model_dump(),
        scenarios=scenarios,
        layers={option.layer: option.label for option in chosen},
    )


def total(library: JointLibrary, chosen: Sequence[JointOption], cost: str, place: int) -> float | None:
    """Sum of a cost with the non-block part, None where the library does not know it."""
    if any(cost not in option.costs for option in chosen):
        return None
    return library.outside(cost, place) + math.fsum(at(option.costs[cost], place) for option in chosen)


def totals(library: JointLibrary, chosen: Sequence[JointOption], index: int) -> PlaceTotals:
    """The sums of an architecture at one place."""
    place = library.places[index]
    runtime = total(library, chosen, "latency_seconds", index)
    return PlaceTotals(
        scenario=place.scenario,
        batch_size=place.batch_size,
        memory_gib=total(library, chosen, "memory_gib", index),
        latency_seconds=runtime,
        time_to_first_token_seconds=total(library, chosen, "time_to_first_token_seconds", index),
        tokens_per_second=place.tokens / runtime if runtime and place.tokens else None,
    )


def _over_scenarios(request: Request, scenarios: Sequence[PlaceTotals], cost: str) -> float | None:
    values = {found.scenario: getattr(found, cost) for found in scenarios}
    if None in values.values():
        return None
    if request.traffic and known_quantity(cost).time:
        return math.fsum(weight * values[name] for name, weight in request.weights.items())
    return max(values.values())


def _objective(
    library: JointLibrary,
    request: Request,
    chosen: Sequence[JointOption],
    scenarios: Sequence[PlaceTotals],
    claimed: float,
) -> float:
    kind = known_quantity(request.minimise)
    if request.minimise == "score":
        return math.fsum(objective_of(option, request, library.documents) for option in chosen)
    if kind.floor:
        target = Limit(quantity=request.minimise, asked=1, name=request.minimise)
        (tokens,) = _values(library, request, target, chosen, scenarios)
        known = all(place.tokens for place in library.places)
        return 1 / tokens if known else claimed  # no total shows the seconds of a request of unknown length
    value = _over_scenarios(request, scenarios, kind.cost) if kind.per_place else total(library, chosen, kind.cost, 0)
    assert value is not None, "checked when it was asked"
    return value


def reached(
    library: JointLibrary,
    request: Request,
    limit: Limit,
    chosen: Sequence[JointOption],
    scenarios: Sequence[PlaceTotals],
) -> float:
    """What an architecture takes, in the terms of a limit (a share of the parent's where the limit is one); the hardest
    scenario counts.
    """
    if limit.quantity == "score":
        return math.fsum(objective_of(option, request, library.documents) for option in chosen)
    kind = limit.kind
    values = list(_values(library, request, limit, chosen, scenarios))
    if limit.share:
        whose = library.reference or library
        parents = [whose.parents[layer] for layer in whose.layers]
        indices = [whose.place_at(found.scenario, found.batch_size) for found in scenarios]
        parent = [totals(whose, parents, index) for index in indices]
        own = list(_values(whose, request, limit, parents, parent))
        values = [_ratio(value, base) for value, base in zip(values, own, strict=True)]
    return min(values) if kind.floor else max(values)


def _ratio(value: float, base: float) -> float:
    if value == base:
        return 1.0
    return value / base if base else math.inf


def _values(
    library: JointLibrary,
    request: Request,
    limit: Limit,
    chosen: Sequence[JointOption],
    scenarios: Sequence[PlaceTotals],
) -> Iterator[float]:
    """The limited quantity itself, once per scenario it is limited in, or once over the traffic."""
    kind = limit.kind
    if not kind.per_place:
        yield total(library, chosen, kind.cost, 0) or 0.0
    elif limit.scenario is None and request.traffic and kind.time:
        by_name = {found.scenario: found for found in scenarios}
        mix = [(weight, by_name[name]) for name, weight in request.weights.items()]
        if not kind.floor:
            yield math.fsum(weight * getattr(found, kind.cost) for weight, found in mix)
        else:
            each = [(w, f, library.places[library.place_at(f.scenario, f.batch_size)]) for w, f in mix]
            tokens = math.fsum(w * (p.prompt_tokens + p.generated_tokens) for w, _, p in each)
            yield tokens / math.fsum(w * (f.latency_seconds or 0.0) / f.batch_size for w, f, _ in each)
    else:
        for found in scenarios:
            if limit.scenario in (None, found.scenario):
                # tokens cancel in a share, so throughput is 1 / runtime where their number is unknown
                value = getattr(found, limit.quantity)
                if value is None:  # or nothing is left that takes time
                    value = 1 / found.latency_seconds if found.latency_seconds else math.inf
                yield value


def _broken(
    library: JointLibrary, request: Request, chosen: Sequence[JointOption], scenarios: Sequence[PlaceTotals]
) -> Iterator[str]:
    for limit in request.limits:
        value = reached(library, request, limit, chosen, scenarios)
        slack = TOLERANCE * abs(limit.asked)
        if value < limit.asked - slack if limit.kind.floor else value > limit.asked + slack:
            yield f"{limit.name} is {value}, {limit.asked} asked"
