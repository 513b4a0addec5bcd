"""Choose from a joint library: one score and one cost per layer and variant, whoever measured them.

Puzzle's MIP (arXiv 2411.19146, appendix B) with a slot per layer: tasks/mip.py solves, what it answers is summed again
here. A library in NVlabs' format is joint by nature (tasks/nvlabs.py); one of our own is viewed so at one scenario and
batch size (tasks/interchange.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.records import Value
from profiles.schema import Search, Section
from tasks.mip import Answer, Floats, Program, fewest_types, least_usage, minimise, possible, relaxation
from tasks.totals import gap_between

BUDGETS = {"memory_mib": "MiB", "runtime_ms": "ms", "num_params": "parameters"}
TOLERANCE = 1e-9  # relative; a sum of floats in another order may differ by so much


class LibraryFileError(PuzzleError):
    """A block library file that cannot be read, or does not hold what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class JointOption:
    """One variant of one layer: its label, scores by metric, costs by budget field.

    samples: scores by metric again, one per scored sequence, the same sequences for every option; empty when unknown.
    """

    layer: str
    label: str
    metrics: dict[str, float]
    costs: dict[str, float]
    is_parent: bool = False
    samples: dict[str, Floats] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """What `forbid` may call it: its label, or a subblock's kind ("no_op", "attention=no_op", "ffn=linear")."""
        return {self.label, *_kinds(self.label)}


@dataclass(frozen=True, kw_only=True)
class JointLibrary:
    """Options layer after layer; what the non-block part costs, where known; how it was measured."""

    layers: tuple[str, ...]
    options: tuple[JointOption, ...]
    fixed: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Metrics that every option has."""
        return sorted(set.intersection(*(set(option.metrics) for option in self.options)))

    def of_parent(self, budget: str) -> float:
        """What the parent takes of a budget, non-block part included; LibraryFileError where its blocks are missing."""
        parents = {option.layer: option for option in self.options if option.is_parent}
        missing = [layer for layer in self.layers if layer not in parents]
        if missing:
            raise LibraryFileError(
                f"{missing[0]} has no variant marked as the parent's, so a share of the parent cannot be taken: give "
                f"{budget} in {BUDGETS[budget]}."
            )
        if any(budget not in option.costs for option in parents.values()):
            raise LibraryFileError(f"the library does not say {budget} for every variant: budget something else.")
        return self.fixed.get(budget, 0.0) + math.fsum(option.costs[budget] for option in parents.values())


Positive = Annotated[float, Field(gt=0)]


class Request(Section):
    """What is asked of a joint library. At least one budget, over the blocks and the non-block part where it is known.

    robust: the objective is sum of (mean + robust x standard error), what one pays for not knowing a score well.
    """

    metric: str = "kl_div"
    memory_mib: Positive | None = None
    runtime_ms: Positive | None = None
    num_params: Positive | None = None
    robust: float = Field(default=0.0, ge=0)
    diverse: int = Field(default=1, ge=1, description="how many architectures")
    min_different: int = Field(default=1, ge=1, description="layers in which any two of them differ, at least")
    max_block_types: int | None = Field(default=None, ge=1, description="distinct variants in one architecture")
    forbid: tuple[str, ...] = Field(default=(), description="labels, or kinds such as no_op or attention=no_op")
    search: Search = Search()

    @property
    def budgets(self) -> dict[str, float]:
        """The limits that were given."""
        return {name: limit for name in BUDGETS if (limit := getattr(self, name)) is not None}


class JointChoice(Value):
    """One architecture: sums with the non-block part, the solver's certificate, the label chosen in every layer.

    objective: what was minimised. score, score_se: sum of the plain scores and its standard error over sequences, None
    where the library keeps no scores per sequence. num_params: None where the library does not know.
    """

    objective: float
    score: float
    score_se: float | None
    memory_mib: float
    runtime_ms: float
    num_params: float | None
    status: str
    bound: float
    gap: float
    layers: dict[str, str]


class Price(Value):
    """What a budget is worth: the LP's marginal objective per unit, and the objective re-solved at other limits."""

    budget: str
    limit: float
    used: float
    per_unit: float
    resolved: dict[str, float | None]


def _kinds(label: str) -> Iterator[str]:
    """`attention = no_op (...) && ffn = linear (...)` -> no_op, attention=no_op, linear, ffn=linear."""
    for part in label.split("&&"):
        subblock, equals, rest = part.partition("=")
        kind = rest.partition("(")[0].strip()
        if equals and kind:
            yield from (kind, f"{subblock.strip()}={kind}")


def choose_joint(library: JointLibrary, request: Request) -> list[JointChoice]:
    """The best architecture, then the best that differ enough from all before; fewer than asked when no more exist.

    Raises InfeasibleBudget with what is reachable when there is none, LibraryFileError when the library lacks what the
    request names.
    """
    options, program = program_of(library, request)
    found: list[JointChoice] = []
    rest = program
    while len(found) < request.diverse:
        answer = minimise(rest, request.search)
        if answer is None:
            break
        found.append(_verified(library, options, request, answer))
        same = np.zeros(len(options))
        same[answer.selection] = 1 / len(library.layers)
        rest = rest.with_row(same, 1 - request.min_different / len(library.layers))
    if not found:
        raise InfeasibleBudget(_infeasible(program, request))
    return found


def prices(library: JointLibrary, request: Request, steps: Sequence[float] = (-0.05, 0.05)) -> list[Price]:
    """What each budget costs or buys: the LP's marginal, and the best objective with the budget moved by `steps`."""
    options, program = program_of(library, request)
    (best,) = choose_joint(library, request.model_copy(update={"diverse": 1}))
    relaxed = relaxation(program.only(possible(program)), request.search)
    assert relaxed is not None
    found = []
    for row, (name, limit) in enumerate(request.budgets.items()):
        resolved: dict[str, float | None] = {}
        for step in steps:
            room = program.room.copy()
            room[row] += step
            answer = minimise(replace(program, room=room), request.search)
            resolved[f"{step:+.0%}"] = None if answer is None else answer.objective
        marginal = 0.0 - float(relaxed.prices[row]) / limit
        used = getattr(best, name)
        found.append(Price(budget=name, limit=limit, used=used, per_unit=marginal, resolved=resolved))
    return found


def sweep(
    library: JointLibrary,
    request: Request,
    over: str,
    limits: Sequence[float],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[JointChoice | None]:
    """The best architecture at every limit of one budget, the others kept; None where nothing fits."""
    request = request.model_copy(update={over: limits[0]})
    options, program = program_of(library, request)
    row = list(request.budgets).index(over)
    found: list[JointChoice | None] = []
    for limit in limits:
        room = program.room.copy()
        room[row] += limit / limits[0] - 1
        answer = minimise(replace(program, room=room), request.search)
        at = request.model_copy(update={over: limit})
        found.append(None if answer is None else _verified(library, options, at, answer))
        tell(len(found), len(limits))
    return found


def program_of(library: JointLibrary, request: Request) -> tuple[list[JointOption], Program]:
    """The options that are not forbidden, (N,), and the program over them; rows are shares of the limits."""
    _check(library, request)
    forbidden = set(request.forbid)
    options = [option for option in library.options if not option.names & forbidden]
    left = {option.layer for option in options}
    emptied = [layer for layer in library.layers if layer not in left]
    if emptied:
        raise InfeasibleBudget(
            f"{' and '.join(request.forbid)} forbids every variant of {', '.join(emptied[:5])}"
            f"{' and more' if len(emptied) > 5 else ''}: forbid less, or add variants there."
        )
    place = {layer: index for index, layer in enumerate(library.layers)}
    slots = np.array([place[option.layer] for option in options])
    usage = np.array([[option.costs[name] / limit for option in options] for name, limit in request.budgets.items()])
    program = Program(
        scores=np.array([_objective(option, request) for option in options]),
        starts=np.searchsorted(slots, np.arange(len(library.layers))),
        usage=usage,
        room=np.array([1 - library.fixed.get(name, 0.0) / limit for name, limit in request.budgets.items()]),
        types=np.unique([option.label for option in options], return_inverse=True)[1],
        max_types=request.max_block_types,
    )
    return options, program


def _objective(option: JointOption, request: Request) -> float:
    score = option.metrics[request.metric]
    return score + request.robust * standard_error(option.samples[request.metric]) if request.robust else score


def standard_error(samples: Floats) -> float:
    """Of the mean of (T,) scores, one per sequence; 0 below two."""
    return float(samples.std(ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else 0.0


def samples_of(options: Sequence[JointOption], metric: str) -> Floats:
    """(N, T) scores per sequence; LibraryFileError where the library keeps none."""
    lengths = {len(option.samples.get(metric, ())) for option in options}
    if len(lengths) != 1 or lengths <= {0, 1}:
        raise LibraryFileError(
            f"this library keeps no {metric} per sequence for every variant, so how sure a choice is cannot be told."
        )
    return np.array([option.samples[metric] for option in options])


def _check(library: JointLibrary, request: Request) -> None:
    if not request.budgets:
        raise LibraryFileError(f"a budget is needed, at least one of {', '.join(BUDGETS)}.")
    if request.metric not in library.metrics:
        raise LibraryFileError(
            f"the library has no metric {request.metric!r} for every variant; it has {', '.join(library.metrics)}."
        )
    unpriced = [name for name in request.budgets if any(name not in option.costs for option in library.options)]
    if unpriced:
        raise LibraryFileError(f"the library does not say {unpriced[0]} for every variant: budget something else.")
    if request.robust:
        samples_of(library.options, request.metric)
    if request.min_different > len(library.layers):
        raise LibraryFileError(
            f"min_different is {request.min_different}, but there are {len(library.layers)} layers to differ in."
        )
    known = set[str]().union(*(option.names for option in library.options))
    unknown = [name for name in request.forbid if name not in known]
    if unknown:
        kinds = sorted({kind for option in library.options for kind in _kinds(option.label)})
        raise LibraryFileError(
            f"nothing in the library is called {unknown[0]!r}; kinds there: {', '.join(kinds[:12])}"
            f"{' ...' if len(kinds) > 12 else ''}; or give a whole label."
        )


def _verified(library: JointLibrary, options: Sequence[JointOption], request: Request, answer: Answer) -> JointChoice:
    """The answer summed again from the library's own numbers."""
    chosen = [options[index] for index in answer.selection]
    objective = math.fsum(_objective(option, request) for option in chosen)
    costs = {name: _total(library, chosen, name) for name in BUDGETS}
    layers = {option.layer: option.label for option in chosen}
    broken = [name for name, limit in request.budgets.items() if (costs[name] or 0.0) > limit * (1 + TOLERANCE)]
    if request.max_block_types is not None and len(set(layers.values())) > request.max_block_types:
        broken.append("max_block_types")
    if broken or len(layers) != len(library.layers) or not math.isclose(objective, answer.objective, abs_tol=1e-9):
        raise AssertionError(f"the solver's answer fails its own check ({broken}), a bug of puzzle")
    bound = min(answer.bound, objective)
    samples = [option.samples.get(request.metric, np.empty(0)) for option in chosen]
    known = min(map(len, samples)) > 1
    return JointChoice(
        objective=objective,
        score=math.fsum(option.metrics[request.metric] for option in chosen),
        # all scores are over the same sequences: the error is that of the sums, not the root of the sum of squares
        score_se=standard_error(np.sum(samples, axis=0)) if known else None,
        memory_mib=costs["memory_mib"] or 0.0,
        runtime_ms=costs["runtime_ms"] or 0.0,
        num_params=costs["num_params"],
        status=answer.status,
        bound=bound,
        gap=gap_between(objective, bound),
        layers=layers,
    )


def _total(library: JointLibrary, chosen: Sequence[JointOption], name: str) -> float | None:
    if any(name not in option.costs for option in chosen):
        return None
    return library.fixed.get(name, 0.0) + math.fsum(option.costs[name] for option in chosen)


# --- when nothing fits


def _infeasible(program: Program, request: Request) -> str:
    """Which budgets clash, how far each must be eased alone, and what the cheapest child takes."""
    budgets = list(request.budgets.items())
    untyped = replace(program, max_types=None)
    if request.max_block_types is not None and minimise(untyped, request.search) is not None:
        fewest = fewest_types(program, request.search)
        return (
            f"No architecture keeps the budget with at most {request.max_block_types} block types: at least {fewest} "
            "are needed. Allow more types, or ease a budget."
        )
    alone = [least_usage(program, [row], [], request.search) for row in range(len(budgets))]
    least = [(1 + (overrun or 0.0)) * limit for overrun, (_, limit) in zip(alone, budgets, strict=True)]
    told = [
        f"{name}: {limit:g} asked, the cheapest child takes {_up(value)} {BUDGETS[name]}"
        for (name, limit), value in zip(budgets, least, strict=True)
    ]
    beyond = [name for (name, limit), value in zip(budgets, least, strict=True) if value > limit * (1 + TOLERANCE)]
    if beyond:
        return (
            f"No architecture of this library keeps the budget: {'; '.join(told)}. "
            f"Raise {' and '.join(beyond)} at least that far, or add cheaper variants."
        )
    eased = []
    for row, (name, limit) in enumerate(budgets):
        overrun = least_usage(program, [row], [r for r in range(len(budgets)) if r != row], request.search)
        assert overrun is not None, "each budget alone is reachable, so one can always be given up"
        eased.append(f"{name} to {_up((1 + overrun) * limit)} {BUDGETS[name]}")
    return (
        f"No architecture keeps {' and '.join(name for name, _ in budgets)} together, though each alone is reachable "
        f"({'; '.join(told)}). Raise one alone: {', or '.join(eased)}."
    )


def _up(value: float) -> str:
    """Rounded up, so that the value named can be reached."""
    step = 10.0 ** (math.floor(math.log10(value)) - 5) if value > 0 else 1.0
    return f"{math.ceil(value / step - 1e-9) * step:.10g}"
