"""A joint block library: one score and the costs of every variant of every layer, whoever measured them.

A library in NVlabs' format has such scores (tasks/libraries/nvlabs.py). In one of our own, every pair of an attention
and an FFN is a variant of its layer (tasks/search/view.py). tasks/search/request.py says what may be asked of a
library, tasks/search/solve.py answers it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from blocks.errors import PuzzleError
from blocks.records import Value
from blocks.typed_labels import bare, type_in
from tasks.search.program import Floats

# N = options, S = scenarios
Cost = float | tuple[float, ...]  # the same everywhere, or one value per place of the library


HEAD = "head"  # the slot of embedding and head, where their type of number is searched


class LibraryFileError(PuzzleError):
    """A block library file that cannot be read, or does not hold what is asked of it."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something a budget can limit.

    title: its name in words. cost: the figure of the library behind it. floor: the budget is the least, not the most.
    per_place: it differs between scenarios and batch sizes. time: over several scenarios it is that of the mean
    request. whole: it is a whole number.
    """

    title: str
    unit: str
    cost: str
    floor: bool = False
    per_place: bool = True
    time: bool = False
    whole: bool = False


# names and units are those of a profile's budget; docs/explanation/glossary.md explains each
QUANTITIES = {
    "memory_gib": Quantity(title="memory", unit="GiB", cost="memory_gib"),
    "latency_seconds": Quantity(title="latency", unit="s", cost="latency_seconds", time=True),
    "time_to_first_token_seconds": Quantity(
        title="time to first token", unit="s", cost="time_to_first_token_seconds", time=True
    ),
    "tokens_per_second": Quantity(
        title="tokens per second", unit="tokens/s", cost="latency_seconds", floor=True, time=True
    ),
    "parameters": Quantity(title="parameters", unit="parameters", cost="parameters", per_place=False, whole=True),
    "layer_parameters": Quantity(
        title="parameters of the layers", unit="parameters", cost="layer_parameters", per_place=False, whole=True
    ),
    "score": Quantity(title="score", unit="of the metric", cost="", per_place=False),
}


KL_OF = "kl_of_"  # and a capability's name: the KL on it, as a quantity that may be limited or minimised


def known_quantity(name: str) -> Quantity:
    """What a name in a budget stands for, which was checked when it was asked."""
    if name.startswith(KL_OF):
        return Quantity(title=f"KL on {name.removeprefix(KL_OF)}", unit="nats per token", cost=name, per_place=False)
    return QUANTITIES[name]


def flag(name: object) -> str:
    """A field as the command line writes it."""
    return f"--{str(name).replace('_', '-')}"


class MeasuredAt(Value):
    """A scenario at one batch size, at which costs were measured. Tokens are those of one request; 0: not known."""

    scenario: str = ""
    batch_size: int = Field(default=1, ge=1)
    prompt_tokens: int = Field(default=0, ge=0)
    generated_tokens: int = Field(default=0, ge=0)

    def __str__(self) -> str:
        return f"{self.scenario or 'measured'}, batch {self.batch_size}"

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens of one batch."""
        return self.batch_size * (self.prompt_tokens + self.generated_tokens)


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a variant is in our own words: an attention, an FFN, or both of them, of one layer.

    head: the type of number of embedding and head, for an option of that slot; its layer is one after the last.
    """

    layer: int
    attention: str | None = None
    ffn: str | None = None
    coupled: bool = False
    head: str | None = None

    @property
    def choice(self) -> dict[str, Any]:
        """The fields of a LayerChoice that it decides."""
        named = {"attention": self.attention, "ffn": self.ffn, "coupled": self.coupled}
        return {name: value for name, value in named.items() if value}


@dataclass(frozen=True, kw_only=True)
class JointOption:
    """One variant of one layer: its label, scores by metric, costs by the names in QUANTITIES.

    samples: scores by metric again, one per scored sequence, the same sequences for every option; empty when unknown.
    sizes: num_key_value_heads and intermediate_size where the variant has them. own: the same in our own words.
    """

    layer: str
    label: str
    metrics: dict[str, float]
    costs: dict[str, Cost]
    is_parent: bool = False
    samples: dict[str, Floats] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    own: Option | None = None

    @property
    def names(self) -> set[str]:
        """What `forbid` may call it: its label, or a subblock's kind ("no_op", "attention=no_op", "ffn=linear")."""
        return {self.label, *kinds_in(self.label)}


@dataclass(frozen=True, kw_only=True)
class JointLibrary:
    """Options slot after slot; what the non-block part costs, where known; where it was measured.

    layers: names of the slots. A slot is a layer, or one subblock of it where scores of subblocks are added, or the
    head where its type is searched. documents: the document of each scored sequence; sequences of one document are not
    independent. Empty where nobody knows. reference: whose parent shares are taken of, where it is not this one's.
    disturbed: why the measured times are not reliable (blocks/disturbance.py), "" where they are.
    """

    layers: tuple[str, ...]
    options: tuple[JointOption, ...]
    fixed: dict[str, Cost] = field(default_factory=dict)
    places: tuple[MeasuredAt, ...] = (MeasuredAt(),)
    documents: tuple[int, ...] = ()
    reference: "JointLibrary | None" = None
    disturbed: str = ""

    @property
    def warning(self) -> str:
        """A sentence for people where the times are not reliable, "" where they are."""
        again = (
            "What follows for time is as unreliable; measure again when it is quiet (puzzle reoptimize --remeasure)."
        )
        return self.disturbed and f"costs: {self.disturbed}. {again}"

    @property
    def metrics(self) -> list[str]:
        """Metrics that every option has."""
        return sorted(set.intersection(*(set(option.metrics) for option in self.options)))

    @property
    def quantities(self) -> list[str]:
        """Names of what can be limited or minimised, the KL on each capability among them."""
        every = list(dict.fromkeys(name for option in self.options for name in option.costs if name.startswith(KL_OF)))
        return [*QUANTITIES, *filter(self.knows, every)]

    @property
    def scenarios(self) -> list[str]:
        """Names of the scenarios, in the library's order."""
        return list(dict.fromkeys(place.scenario for place in self.places))

    @cached_property
    def parents(self) -> dict[str, JointOption]:
        """The parent's own option of every layer that has one."""
        return {option.layer: option for option in self.options if option.is_parent}

    def place_at(self, scenario: str, batch_size: int) -> int:
        """Index of the place of a scenario at a batch size; ValueError when nothing was measured there."""
        return [(place.scenario, place.batch_size) for place in self.places].index((scenario, batch_size))

    def index_of(self, option: JointOption) -> int:
        """Which layer of the model an option belongs to."""
        return self.layers.index(option.layer) if option.own is None else option.own.layer

    def knows(self, cost: str) -> bool:
        """True when every option has this cost."""
        return all(cost in option.costs for option in self.options)

    def column(self, cost: str, place: int) -> Floats:
        """(N,) cost of every option at a place."""
        return np.array([at(option.costs[cost], place) for option in self.options])

    def outside(self, cost: str, place: int) -> float:
        """What the non-block part takes; 0 where the library does not know."""
        return at(self.fixed.get(cost, 0.0), place)

    def of_parent(self, cost: str, place: int = 0) -> float:
        """What the parent takes, non-block part included; LibraryFileError where its blocks are missing."""
        if self.reference is not None:
            return self.reference.of_parent(cost, place)
        missing = [layer for layer in self.layers if layer not in self.parents]
        if missing:
            raise LibraryFileError(
                f"{missing[0]} has no variant marked as the parent's, so a share of the parent cannot be taken: give "
                f"{cost} in its own unit."
            )
        return self.outside(cost, place) + math.fsum(at(o.costs[cost], place) for o in self.parents.values())

    def combinations(self) -> list[tuple[int, ...]]:
        """Every combination of one place per scenario, (S,) indices, larger batches first."""
        per_scenario = [[i for i, p in enumerate(self.places) if p.scenario == name] for name in self.scenarios]

        def batches(places: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
            sizes = tuple(self.places[index].batch_size for index in places)
            return sum(sizes), sizes

        return sorted(itertools.product(*per_scenario), key=batches, reverse=True)

    def measured_at(self, scenario: str | None, batch_size: int | None) -> "JointLibrary":
        """The library at one scenario or batch size alone; LibraryFileError when it was not measured there."""
        if scenario is not None and scenario not in self.scenarios:
            known = ", ".join(filter(None, self.scenarios)) or "one, without a name"
            raise LibraryFileError(f"the library has no scenario {scenario!r}; it has {known}.")
        left = [i for i, place in enumerate(self.places) if scenario in (None, place.scenario)]
        kept = [i for i in left if batch_size in (None, self.places[i].batch_size)]
        if not kept or len({self.places[i].scenario for i in kept}) < len({self.places[i].scenario for i in left}):
            sizes = ", ".join(map(str, sorted({self.places[i].batch_size for i in left})))
            raise LibraryFileError(f"the library was not measured at batch size {batch_size}, but at {sizes}.")
        return self if len(kept) == len(self.places) else self._at(kept)

    def _at(self, kept: list[int]) -> "JointLibrary":
        def only(costs: dict[str, Cost]) -> dict[str, Cost]:
            return {name: c if isinstance(c, int | float) else tuple(c[i] for i in kept) for name, c in costs.items()}

        options = tuple(replace(option, costs=only(option.costs)) for option in self.options)
        places = tuple(self.places[i] for i in kept)
        return replace(self, options=options, fixed=only(self.fixed), places=places)


def at(cost: Cost, place: int) -> float:
    """The cost at a place."""
    return cost if isinstance(cost, int | float) else cost[place]


def kinds_in(label: str) -> Iterator[str]:
    """`attention = no_op (...) && ffn = linear (...)` -> no_op, attention=no_op, linear, ffn=linear.

    A label with a type of number (`ffn768@iq4_nl`) is also called by its variant and by its type.
    """
    for part in label.split("&&"):
        subblock, equals, rest = part.partition("=")
        kind = rest.partition("(")[0].strip()
        if equals and kind:
            names = dict.fromkeys([kind, bare(kind), *filter(None, [type_in(kind)])])
            yield from (name for one in names for name in (one, f"{subblock.strip()}={one}"))


def samples_of(
    options: "tuple[JointOption, ...] | list[JointOption]", metric: str, documents: Sequence[int] = ()
) -> Floats:
    """(N, T) scores per sequence; LibraryFileError where the library keeps none, or all are of one document."""
    if len(set(documents)) == 1:
        raise LibraryFileError(
            "all scored sequences are of one document, so nobody can say how sure a choice is: score more of them."
        )
    lengths = {len(option.samples.get(metric, ())) for option in options}
    if len(lengths) != 1 or lengths <= {0, 1}:
        raise LibraryFileError(
            f"this library keeps no {metric} per sequence for every variant, so nobody can say how sure a choice is."
        )
    return np.array([option.samples[metric] for option in options])
