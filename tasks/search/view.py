"""Our own tables as a joint library, and a profile's budget as what is asked of it: so there is one search for all.

Every pair of an attention and an FFN is a choice of a layer; its score is the sum of the two, unless both were
distilled as one block. Labels read as NVlabs writes them. Where only sums are wanted (tasks/search/grid.py), the two
subblocks of a layer may be slots of their own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blocks.records import SUBBLOCKS, Cost, LayerChoice, NonBlockCost, Score, Subblock
from blocks.typed_labels import bare, typed
from profiles.schema import Profile, Scenario, ScenarioBudget
from tasks.search import joint
from tasks.search.capabilities import METRICS
from tasks.search.joint import HEAD, KL_OF, JointLibrary, JointOption, MeasuredAt, Option
from tasks.search.program import Floats
from tasks.search.request import Limit, Request
from tasks.search.totals import Problem, bytes_of, cost_of, scores_behind

Places = Sequence[tuple[Scenario, int]]  # scenarios at a batch size each
# budget field -> quantity, and whether the field is a share of the parent's
_FIELDS: dict[str, tuple[str, bool]] = {
    "speedup": ("tokens_per_second", True),
    "min_tokens_per_second": ("tokens_per_second", False),
    "memory_fraction": ("memory_gib", True),
    "memory_gib": ("memory_gib", False),
    "max_latency_seconds": ("latency_seconds", False),
    "max_time_to_first_token_seconds": ("time_to_first_token_seconds", False),
    "time_to_first_token_fraction": ("time_to_first_token_seconds", True),
    "parameters": ("parameters", False),
    "parameters_fraction": ("parameters", True),
    "layer_parameters_fraction": ("layer_parameters", True),
}


def library_of(problem: Problem, additive: bool = False) -> JointLibrary:
    """All choices that are scored, and measured at every scenario and batch size of the problem.

    additive: where no coupled pair was scored, attention and ffn of a layer are slots of their own.
    """
    places = [(scenario, size) for scenario in problem.scenarios for size in sorted(set(scenario.batch_sizes))]
    depth = problem.costs.num_hidden_layers
    slots = [slot for layer in range(depth) for slot in _slots_of(problem, layer, places, additive)]
    options = tuple(_option(problem, option, places) for slot in slots for option in slot)
    searched = len(problem.heads) > 1
    options += tuple(_head(problem, kind, places) for kind in problem.heads) if searched else ()
    outside = [problem.non_block_table[scenario.name, size] for scenario, size in places]
    whose = problem.reference
    return JointLibrary(
        layers=tuple(dict.fromkeys(option.layer for option in options)),
        options=options,
        # where the head is searched, all that lies outside the blocks is its slot's
        fixed=_costs(
            [[] if searched else [part] for part in outside],
            places,
            [0 if searched else part.weight_bytes for part in outside],
            {"layer_parameters": 0.0},
        ),
        reference=None if whose is None else library_of(replace(whose, scores=())),
        documents=problem.documents,
        disturbed=problem.costs.disturbed,
        places=tuple(
            MeasuredAt(
                scenario=scenario.name,
                batch_size=size,
                prompt_tokens=scenario.prompt_tokens,
                generated_tokens=scenario.generated_tokens,
            )
            for scenario, size in places
        ),
    )


def _slots_of(problem: Problem, layer: int, places: Places, additive: bool) -> list[list[Option]]:
    """The slots of a layer, attention and ffn or both as one: choices that are scored, and measured at all places."""
    attentions = _labels(problem, layer, "attention", places)
    ffns = _labels(problem, layer, "ffn", places)
    coupled = _coupled(problem, layer, places)
    if additive and not coupled:
        return [
            [Option(layer=layer, attention=label) for label in attentions],
            [Option(layer=layer, ffn=label) for label in ffns],
        ]
    return [[Option(layer=layer, attention=a, ffn=f) for a in attentions for f in ffns] + coupled]


def _labels(problem: Problem, layer: int, subblock: Subblock, places: Places) -> list[str]:
    scored = problem.score_table.get((layer, subblock), {})
    names = dict.fromkeys(["parent", *scored])
    return [name for name in names if _measured(problem, subblock, name, places)]


def _coupled(problem: Problem, layer: int, places: Places) -> list[Option]:
    pairs = [label.split("+", 1) for label in problem.score_table.get((layer, "block"), {})]
    return [
        Option(layer=layer, attention=attention, ffn=ffn, coupled=True)
        for attention, ffn in pairs
        if _measured(problem, "attention", attention, places) and _measured(problem, "ffn", ffn, places)
    ]


def _measured(problem: Problem, subblock: Subblock, label: str, places: Places) -> bool:
    return all((subblock, label, scenario.name, size) in problem.cost_table for scenario, size in places)


def _option(problem: Problem, option: Option, places: Places) -> JointOption:
    labels = {part: label for part in SUBBLOCKS if (label := getattr(option, part)) is not None}
    chosen = LayerChoice(**option.choice)
    scores = [score for score in scores_behind(problem, option.layer, chosen) if score.subblock in {"block", *labels}]
    parts = [
        [cost_of(problem, part, label, scenario, size) for part, label in labels.items()] for scenario, size in places
    ]
    memory = [
        sum(bytes_of(problem, option.layer, cost, scenario) for cost in one)
        for one, (scenario, _) in zip(parts, places, strict=True)
    ]
    named = {
        "num_key_value_heads": bare(labels.get("attention", "")).partition("kv")[2],
        "intermediate_size": bare(labels.get("ffn", "")).removeprefix("ffn"),
    }
    label = " && ".join(f"{part} = {label}" for part, label in labels.items())
    return JointOption(
        layer=f"layer_{option.layer}" + ("" if len(labels) > 1 else f" {next(iter(labels))}"),
        label=f"{label}{' (coupled)' if option.coupled else ''}",
        metrics={name: math.fsum(getattr(score, name) for score in scores) for name in METRICS},
        costs=_costs(parts, places, memory, _kl_on_each(problem, scores)),
        is_parent=chosen == LayerChoice(),
        samples={
            name: _summed(problem, [getattr(score, f"{name}_per_sequence") for score in scores]) for name in METRICS
        },
        sizes={name: int(size) for name, size in named.items() if size.isdigit()},
        own=option,
    )


def _kl_on_each(problem: Problem, scores: Sequence[Score]) -> dict[str, float]:
    """The KL on every capability; the parent's own blocks have no scores, and 0 on each."""
    found = {f"{KL_OF}{name}": 0.0 for name in problem.capabilities.weights}
    for one in (one for score in scores for one in score.capabilities):
        found[f"{KL_OF}{one.name}"] += one.kl
    return found


def _head(problem: Problem, kind: str, places: Places) -> JointOption:
    """Embedding, final norm and head as an option of their own slot, in one type of number."""
    scores = [score] if (score := problem.heads[kind]) else []
    parts = [[problem.head_table[kind, scenario.name, size]] for scenario, size in places]
    return JointOption(
        layer=HEAD,
        label=f"{HEAD} = {typed('parent', kind)}",
        metrics={name: math.fsum(getattr(score, name) for score in scores) for name in METRICS},
        costs=_costs(
            parts,
            places,
            [one.weight_bytes for (one,) in parts],
            {"layer_parameters": 0.0, **_kl_on_each(problem, scores)},
        ),
        is_parent=not kind,
        samples={
            name: _summed(problem, [getattr(score, f"{name}_per_sequence") for score in scores]) for name in METRICS
        },
        own=Option(layer=problem.costs.num_hidden_layers, head=kind),
    )


def _costs(
    parts: Sequence[Sequence[Cost | NonBlockCost]], places: Places, memory: Sequence[int], known: dict[str, float]
) -> dict[str, joint.Cost]:
    """Costs of what stands together, per place. memory: its bytes there."""
    prefill = [math.fsum(part.prefill_seconds for part in one) for one in parts]
    decode = [math.fsum(part.decode_seconds_per_token for part in one) for one in parts]
    parameters = float(sum(part.parameters for part in parts[0]))
    runtime = [p + scenario.generated_tokens * d for p, d, (scenario, _) in zip(prefill, decode, places, strict=True)]
    return {
        "memory_gib": tuple(value / 2**30 for value in memory),
        "latency_seconds": tuple(runtime),
        "time_to_first_token_seconds": tuple(prefill),
        "parameters": parameters,
        "layer_parameters": parameters,
        **known,
    }


def _summed(problem: Problem, per_sequence: Sequence[tuple[float, ...]]) -> Floats:
    """(T,) sum over the scores; the parent's own blocks score 0 on every sequence."""
    return np.array([*per_sequence, np.zeros(problem.sequences)]).sum(axis=0)


def request_of(problem: Problem | Profile, **changes: Any) -> Request:
    """The budget of a problem or a profile, its scenarios' own limits, its traffic and its solver's settings."""
    most = problem.capability_limits if isinstance(problem, Profile) else problem.capabilities.most
    limits = [*_limits(problem.budget, None)]
    limits += [Limit(quantity=f"{KL_OF}{name}", asked=asked, name=f"max_kl of {name}") for name, asked in most.items()]
    for scenario in problem.scenarios:
        limits += _limits(scenario.budget, scenario.name)
    traffic = {scenario.name: scenario.weight for scenario in problem.scenarios if scenario.weight is not None}
    metric = problem.scoring.metric if isinstance(problem, Profile) else problem.metric
    asked = {"limits": tuple(limits), "metric": metric, "traffic": traffic, "search": problem.search}
    return Request(**{**asked, **changes})


def _limits(budget: ScenarioBudget, scenario: str | None) -> Iterator[Limit]:
    for field, asked in budget.model_dump(exclude_none=True).items():
        quantity, share = _FIELDS[field]
        name = field if scenario is None else f"{field} of {scenario}"
        yield Limit(quantity=quantity, asked=asked, share=share, scenario=scenario, name=name)
