"""What can be asked of a joint library: limits, the traffic they hold for, which variants may stand where.

A limit is absolute or a share of the parent's figure at the same scenario and batch size; it holds in every scenario,
in one, or, for times and throughput, on the mean over a weighted mix of scenarios.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from blocks.engine_limits import refused_label
from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.estimates import mean
from profiles.schema import EngineName, Search, Section, read_share
from tasks.search.joint import (
    KL_OF,
    QUANTITIES,
    JointLibrary,
    JointOption,
    LibraryFileError,
    Quantity,
    flag,
    kinds_in,
    known_quantity,
    samples_of,
)

Positive = Annotated[float, Field(gt=0)]


class Limit(Section):
    """One budget. share: `asked` is a share of the parent's figure. name: what the person who set it calls it."""

    quantity: str
    asked: Positive
    share: bool = False
    scenario: str | None = None
    name: str

    @property
    def kind(self) -> Quantity:
        """What is limited."""
        return known_quantity(self.quantity)

    @property
    def percent(self) -> bool:
        """True when the person gave a percentage."""
        return self.share and self.name == self.label

    @property
    def label(self) -> str:
        """Quantity, and the scenario where it is not all of them."""
        return self.quantity if self.scenario is None else f"{self.quantity} of {self.scenario}"

    def scaled(self, factor: float) -> "Limit":
        """The same limit at `factor` times the value."""
        return self.model_copy(update={"asked": self.asked * factor})


class Request(Section):
    """What is asked: limits, what is minimised ("score" or a quantity of the library), how many answers.

    metric: which scores are summed. traffic: weights of scenarios; times and throughput without a scenario of their own
    then hold for the mean request. search: the solver's limits and the constraints on the architecture. must_run:
    engines that have to run the child; what one of them cannot run is not chosen.
    """

    limits: tuple[Limit, ...] = ()
    metric: str = "kl"
    minimise: str = "score"
    traffic: dict[str, Positive] = {}
    diverse: int = Field(default=1, ge=1, description="how many architectures")
    min_different: int = Field(default=1, ge=1, description="layers in which any two of them differ, at least")
    search: Search = Search()
    must_run: tuple[EngineName, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [limit.label for limit in self.limits]
        if len(set(names)) < len(names):
            raise ValueError(f"{max(names, key=names.count)} is limited twice")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The traffic as shares that sum to 1."""
        total = math.fsum(self.traffic.values())
        return {name: weight / total for name, weight in self.traffic.items()}


def limits(**budgets: float | str) -> tuple[Limit, ...]:
    """limits(memory_gib=4, latency_seconds="75%", time_to_first_token_seconds="chat=.09"): a limit each."""
    return tuple(limit_of(quantity, str(asked)) for quantity, asked in budgets.items())


def limit_of(quantity: str, text: str) -> Limit:
    """`4`, `75%` of the parent's, or `chat=4` for one scenario; PuzzleError for anything else.

    Parameters are whole numbers, so .75 of them is a share too.
    """
    scenario, equals, amount = text.rpartition("=")
    try:
        value = float(read_share(amount))  # type: ignore[arg-type]  # what is no number is refused here
    except ValueError:
        raise PuzzleError(f"{flag(quantity)}: a number, or one with % of the parent's, not {text!r}.") from None
    if not 0 < value < math.inf:
        raise PuzzleError(f"{flag(quantity)}: a finite number greater than 0, not {text}.")
    share = amount.strip().endswith("%") or (known_quantity(quantity).whole and value <= 1)
    if share and (quantity == "score" or quantity.startswith(KL_OF)):
        what = "score" if quantity == "score" else "KL from itself"
        raise PuzzleError(f"{flag(quantity)}: the parent's {what} is 0, so no share of it can be taken; give a number.")
    return Limit(
        quantity=quantity,
        asked=value,
        share=share,
        scenario=scenario.strip() if equals else None,
        name=f"{quantity} of {scenario.strip()}" if equals else quantity,
    )


def check(library: JointLibrary, request: Request) -> None:
    """LibraryFileError when the library lacks what the request names."""
    if not request.limits:
        raise LibraryFileError(f"a budget is needed, at least one of {', '.join(library.quantities)}.")
    if request.metric not in library.metrics:
        raise LibraryFileError(
            f"the library has no metric {request.metric!r} for every variant; it has {', '.join(library.metrics)}."
        )
    for quantity in [*(limit.quantity for limit in request.limits), request.minimise]:
        _check_known(library, quantity)
    absolute = [limit for limit in request.limits if limit.quantity == "tokens_per_second" and not limit.share]
    if absolute and not all(place.tokens for place in library.places):
        raise LibraryFileError(
            "the library does not say how many tokens its runtime is for (sequence_length in measurement_info.json): "
            "budget latency_seconds, or a share of the parent's tokens_per_second."
        )
    _check_scenarios(library, request)
    if request.search.robust:
        samples_of(library.options, request.metric, library.documents)
    if request.diverse > 1 and request.min_different > len(library.layers):
        raise LibraryFileError(
            f"min_different is {request.min_different}, but there are {len(library.layers)} layers to differ in."
        )


def _check_known(library: JointLibrary, quantity: str) -> None:
    if quantity not in library.quantities and (quantity.startswith(KL_OF) or quantity not in QUANTITIES):
        raise LibraryFileError(
            f"there is no {quantity!r} to limit or minimise; there are {', '.join(library.quantities)}."
        )
    cost = known_quantity(quantity).cost
    if cost and not library.knows(cost):
        raise LibraryFileError(f"the library does not say {cost} for every variant: budget something else.")


def is_one_number(library: JointLibrary, request: Request, quantity: str) -> bool:
    """True for a quantity that an architecture has once: not one per scenario, unless the traffic weighs them."""
    kind = known_quantity(quantity)
    return not kind.per_place or len(library.scenarios) < 2 or bool(kind.time and request.traffic)


def _check_scenarios(library: JointLibrary, request: Request) -> None:
    named = [*(limit.scenario for limit in request.limits if limit.scenario is not None), *request.traffic]
    unknown = [name for name in named if name not in library.scenarios]
    if unknown:
        known = ", ".join(filter(None, library.scenarios)) or "one, without a name"
        raise LibraryFileError(f"the library has no scenario {unknown[0]!r}; it has {known}.")
    for limit in request.limits:
        if limit.scenario is not None and not limit.kind.per_place:
            raise LibraryFileError(f"{limit.quantity} is the same in every scenario: limit it without one.")
    target = known_quantity(request.minimise)
    if not is_one_number(library, request, request.minimise):
        raise LibraryFileError(
            f"{request.minimise} differs between the scenarios {', '.join(library.scenarios)}: name one of them"
            f"{', or give the traffic' if target.time else ''}."
        )


def allowed(library: JointLibrary, request: Request) -> list[int]:
    """Indices of the options that no constraint forbids; InfeasibleBudget when a layer is left without any."""
    search = request.search
    _check_names(library, search)
    left = [index for index, option in enumerate(library.options) if _permitted(library, request, option)]
    filled = {library.options[index].layer for index in left}
    emptied = [layer for layer in library.layers if layer not in filled]
    if emptied:
        why = [*search.forbid, *(["keep_layers"] if search.keep_layers else [])]
        why += ["width_multiple"] if search.width_multiple > 1 else []
        why += [f"what {' and '.join(request.must_run)} can run"] if request.must_run else []
        raise InfeasibleBudget(
            f"{' and '.join(why)} forbids every variant of {', '.join(emptied[:5])}"
            f"{' and more' if len(emptied) > 5 else ''}: forbid less, or add variants there."
        )
    return left


def _permitted(library: JointLibrary, request: Request, option: JointOption) -> bool:
    """False for an option that the constraints forbid in every architecture, as far as its label and sizes tell."""
    search, layer = request.search, library.index_of(option)
    if search.forbid and option.names & set(search.forbid):
        return False
    width, other_heads = 0, False
    if not option.is_parent:
        width, heads = option.sizes.get("intermediate_size", 0), option.sizes.get("num_key_value_heads", 0)
        # our own labels tell a variant's heads, not the parent's: it would be the parent if they were the same
        parent = library.parents.get(option.layer, option)
        other_heads = bool(heads) and heads != parent.sizes.get("num_key_value_heads")
        if layer in search.keep_layers or width % search.width_multiple:
            return False
    kinds = frozenset(kinds_in(option.label)) if request.must_run else frozenset()
    return all(refused_label(engine, layer, kinds, width, other_heads) is None for engine in request.must_run)


def _check_names(library: JointLibrary, search: Search) -> None:
    known = set[str]().union(*(option.names for option in library.options)) if search.forbid else set()
    unknown = [name for name in search.forbid if name not in known]
    if unknown:
        kinds = sorted({kind for option in library.options for kind in kinds_in(option.label)})
        raise LibraryFileError(
            f"nothing in the library is called {unknown[0]!r}; kinds there: {', '.join(kinds[:12])}"
            f"{' ...' if len(kinds) > 12 else ''}; or give a whole label."
        )
    last = max(library.index_of(option) for option in library.options) if search.keep_layers else 0
    beyond = [layer for layer in search.keep_layers if layer > last]
    if beyond:
        raise LibraryFileError(f"there is no layer {beyond[0]} to keep: they are 0 to {last}.")


def objective_of(option: JointOption, request: Request, documents: Sequence[int]) -> float:
    """What one option adds to the score: its mean, and `robust` standard errors of it."""
    score, robust = option.metrics[request.metric], request.search.robust
    return score + robust * mean(option.samples[request.metric], documents).error if robust else score
