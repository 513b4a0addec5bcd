"""The choices of a problem in numbers, at one combination of batch sizes: for the searches that do without the MIP.

A slot is one subblock of a layer; where coupled blocks were scored, or when asked, it is the whole layer, and its
options are pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blocks.records import SUBBLOCKS, LayerChoice, Subblock
from profiles.schema import Scenario
from tasks.search.constraints import Named, permitted
from tasks.search.program import Floats, Integers, Program
from tasks.search.totals import Batches, Limit, Problem, cost_of, limits_of

# N = options, S = slots, R = rows of the budget
Places = Sequence[tuple[Scenario, int]]  # scenarios at a batch size each
_COLUMNS = {"prefill": 0, "runtime": 1, "memory": 2, "parameters": 3, "layer_parameters": 3}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice of one slot: an attention, an ffn, or both of them."""

    layer: int
    attention: str | None = None
    ffn: str | None = None
    coupled: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Options, scores and what they take.

    options: N of them, slot after slot. starts: (S,) index of the first option of every slot. scores: (N,).
    usage: (R, N) what an option takes of every limit, `fixed`: (R,) what the non-block part takes; a whole limit is 1.
    parameters: (N,).
    """

    batches: Batches
    limits: tuple[Limit, ...]
    options: tuple[Option, ...]
    starts: Integers
    scores: Floats
    usage: Floats
    fixed: Floats
    parameters: Floats

    @property
    def program(self) -> Program:
        """The same as numbers only."""
        return Program(scores=self.scores, starts=self.starts, usage=self.usage, room=1 - self.fixed)

    def choice(self, selection: Integers) -> tuple[LayerChoice, ...]:
        """The choice per layer behind the selected option indices, (S,)."""
        chosen: dict[int, dict[str, Any]] = {}
        for option in (self.options[index] for index in selection):
            parts = {"attention": option.attention, "ffn": option.ffn, "coupled": option.coupled}
            chosen.setdefault(option.layer, {}).update({name: value for name, value in parts.items() if value})
        return tuple(LayerChoice(**chosen[layer]) for layer in sorted(chosen))

    def selection(self, layers: Sequence[LayerChoice]) -> Integers | None:
        """The option indices, (S,), of a choice per layer; None when a slot does not have what it asks for."""
        places = {(o.layer, o.attention, o.ffn, o.coupled): index for index, o in enumerate(self.options)}
        found = []
        for option in (self.options[start] for start in self.starts):
            choice = layers[option.layer]
            pair = (option.attention and choice.attention, option.ffn and choice.ffn)
            found.append(places.get((option.layer, *pair, choice.coupled)))
        return None if None in found else np.array(found, dtype=np.int64)


def make_grid(problem: Problem, batches: Batches, joint: bool = False) -> Grid:
    """The choices of every layer with a score and a cost at these batch sizes. `joint`: a slot is always a layer."""
    depth = problem.costs.num_hidden_layers
    places = list(zip(problem.scenarios, batches, strict=True))
    slots = [slot for layer in range(depth) for slot in slots_of(problem, layer, places, joint)]
    options = tuple(option for slot in slots for option in slot)
    limits = limits_of(problem, batches)
    usage, fixed = _usage(problem, batches, limits, options)
    return Grid(
        batches=batches,
        limits=limits,
        options=options,
        starts=np.cumsum([0, *(len(slot) for slot in slots[:-1])]),
        scores=np.array([_score(problem, option) for option in options]),
        usage=usage,
        fixed=fixed,
        parameters=_resources(problem, problem.scenarios[0], batches[0], options)[:, _COLUMNS["parameters"]],
    )


def slots_of(problem: Problem, layer: int, places: Places, joint: bool) -> list[list[Option]]:
    """The slots of a layer, attention and ffn or both as one; choices that are scored, and measured at all places, and
    not ruled out by the profile's search.
    """
    attentions = _labels(problem, layer, "attention", places)
    ffns = _labels(problem, layer, "ffn", places)
    coupled = _coupled(problem, layer, places)
    if not joint and not coupled:
        return [
            [Option(layer=layer, attention=label) for label in attentions],
            [Option(layer=layer, ffn=label) for label in ffns],
        ]
    return [[Option(layer=layer, attention=a, ffn=f) for a in attentions for f in ffns] + coupled]


def _labels(problem: Problem, layer: int, subblock: Subblock, places: Places) -> list[str]:
    scored = problem.score_table.get((layer, subblock), {})
    names = dict.fromkeys(["parent", *scored])
    return [n for n in names if _permitted(problem, layer, subblock, n) and _measured(problem, subblock, n, places)]


def _permitted(problem: Problem, layer: int, subblock: Subblock, label: str) -> bool:
    """False for what the profile's search forbids in every architecture."""
    width, kind = label.removeprefix("ffn"), f"{subblock}={label}"
    variant = Named(
        names=frozenset({label, kind}),
        kinds=frozenset({kind}),
        is_parent=label == "parent",
        width=int(width) if width.isdigit() else 0,
        other_heads=label.removeprefix("kv").isdigit(),
    )
    return permitted(problem.search, layer, variant)


def _coupled(problem: Problem, layer: int, places: Places) -> list[Option]:
    pairs = [label.split("+", 1) for label in problem.score_table.get((layer, "block"), {})]
    return [
        Option(layer=layer, attention=attention, ffn=ffn, coupled=True)
        for attention, ffn in pairs
        if _permitted(problem, layer, "attention", attention)
        and _permitted(problem, layer, "ffn", ffn)
        and _measured(problem, "attention", attention, places)
        and _measured(problem, "ffn", ffn, places)
    ]


def _measured(problem: Problem, subblock: Subblock, label: str, places: Places) -> bool:
    return all((subblock, label, scenario.name, size) in problem.cost_table for scenario, size in places)


def _score(problem: Problem, option: Option) -> float:
    if option.coupled:
        score = problem.score_table[option.layer, "block"][f"{option.attention}+{option.ffn}"]
        return float(getattr(score, problem.metric))
    parts = [(part, getattr(option, part)) for part in SUBBLOCKS]
    found = [problem.score_table.get((option.layer, part), {}).get(label) for part, label in parts]
    return math.fsum(getattr(score, problem.metric) for score in found if score is not None)


def _usage(
    problem: Problem, batches: Batches, limits: Sequence[Limit], options: Sequence[Option]
) -> tuple[Floats, Floats]:
    """What options and the non-block part take of every limit, (R, N) and (R,), as fractions of the limit."""
    places = list(zip(problem.scenarios, batches, strict=True))
    resources = np.array([_resources(problem, scenario, size, options) for scenario, size in places])  # (S, N, 4)
    outside = np.array([_outside(problem, scenario, size) for scenario, size in places])  # (S, 4)
    weights = np.array([limit.weights for limit in limits])  # (R, S)
    columns = [_COLUMNS[limit.quantity] for limit in limits]
    most = np.array([limit.most for limit in limits])
    usage = np.stack([w @ resources[:, :, c] for w, c in zip(weights, columns, strict=True)])
    fixed = np.stack([w @ outside[:, c] for w, c in zip(weights, columns, strict=True)])
    in_layers = np.array([limit.quantity == "layer_parameters" for limit in limits])
    return usage / most[:, None], np.where(in_layers, 0.0, fixed / most)


def _resources(problem: Problem, scenario: Scenario, batch_size: int, options: Sequence[Option]) -> Floats:
    """(N, 4): seconds of the prefill and in all, bytes with KV cache, parameters of every option."""
    tokens = batch_size * (scenario.prompt_tokens + scenario.generated_tokens)

    def vector(subblock: Subblock, label: str) -> Floats:
        cost = cost_of(problem, subblock, label, scenario, batch_size)
        seconds = cost.prefill_seconds + scenario.generated_tokens * cost.decode_seconds_per_token
        size = cost.weight_bytes + tokens * cost.kv_bytes_per_token
        return np.array([cost.prefill_seconds, seconds, size, cost.parameters])

    parts = {(part, getattr(option, part)) for option in options for part in SUBBLOCKS}
    known = {(part, label): vector(part, label) if label else np.zeros(4) for part, label in parts}
    return np.array([known["attention", option.attention] + known["ffn", option.ffn] for option in options])


def _outside(problem: Problem, scenario: Scenario, batch_size: int) -> tuple[float, float, float, float]:
    cost = problem.non_block_table[scenario.name, batch_size]
    seconds = cost.prefill_seconds + scenario.generated_tokens * cost.decode_seconds_per_token
    return cost.prefill_seconds, seconds, cost.weight_bytes, cost.parameters
