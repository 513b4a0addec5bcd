"""A block library as others hand it over: what every variant of every layer scores and costs, in plain units.

Every reader of a foreign format makes one (tasks/libraries/nvlabs.py, puzzletron.py). A variant is a whole block with a
joint score, as NVlabs has them, or one subblock whose score is added to those of the layer's other subblocks, as
Model-Optimizer's puzzletron has them. A library may hold both: a block that was scored whole takes the place of the
sum. `joint_of` turns the library into what is searched.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from blocks.records import Value
from tasks.libraries.reading import LARGEST
from tasks.search import joint
from tasks.search.joint import JointLibrary, JointOption, LibraryFileError, MeasuredAt

BLOCK = "block"
BETWEEN = " && "
# costs by the names that foreign files have, each with the search's name and how many of its units one is
COSTS = {
    "memory_mib": ("memory_gib", 1 / 1024),
    "runtime_ms": ("latency_seconds", 1e-3),
    "ttft_ms": ("time_to_first_token_seconds", 1e-3),
    "num_params": ("parameters", 1.0),
}
METRICS = {"kl_div": "kl"}  # the same of metrics; others keep their names
SIZES = {"num_kv_heads": "num_key_value_heads", "ffn_intermediate_size": "intermediate_size"}


class OptionsDescription(Value):
    """Where a library of options comes from, its layers in order, and where its costs were measured."""

    source: str
    parent: str = ""
    hardware: dict[str, str] = {}
    layers: tuple[str, ...]
    places: tuple[MeasuredAt, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredVariant:
    """One variant of a layer's block, or of one subblock of it.

    part: BLOCK, or the subblock's name. metrics: by name, less is better; of a subblock the rise over the parent's, so
    that they add up. samples: the same per scored sequence, empty where unknown. costs: per place by the names
    in COSTS; others are not used.
    """

    layer: str
    part: str
    label: str
    is_parent: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    samples: dict[str, tuple[float, ...]] = field(default_factory=dict)
    costs: dict[MeasuredAt, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class OptionLibrary:
    """Variants layer after layer; outside: costs of the non-block part per place, where they are known."""

    description: OptionsDescription
    variants: tuple[ScoredVariant, ...]
    outside: dict[MeasuredAt, dict[str, float]] = field(default_factory=dict)


def checked(library: OptionLibrary, where: str) -> OptionLibrary:
    """The library if its numbers and its layers hold together; LibraryFileError names what does not, and where."""
    if not library.description.places or not library.description.layers:
        raise LibraryFileError(f"{where}: names no layer, or no scenario that costs were taken at.")
    _check_layers(library, where)
    _check_names(library, where)
    lengths: dict[str, set[int]] = {}
    for variant in library.variants:
        _check_numbers(variant, f"{where}: {variant.layer}, {variant.part} {variant.label!r}")
        for metric, values in variant.samples.items():
            lengths.setdefault(metric, set()).add(len(values))
    uneven = [metric for metric, found in lengths.items() if len(found) > 1]
    if uneven:
        raise LibraryFileError(f"{where}: {uneven[0]} was taken over different numbers of sequences.")
    for place, costs in library.outside.items():
        _check_costs(costs, f"{where}: outside the blocks, {place}")
    own = {block.layer for block in crossed(library) if block.is_parent}
    lacking = [layer for layer in library.description.layers if layer not in own]
    if own and lacking:  # a library that marks the parent's block nowhere is whole
        raise LibraryFileError(
            f"{where}: {lacking[0]} lacks the parent's own block, which other layers have: no child could keep it."
        )
    return library


def _check_layers(library: OptionLibrary, where: str) -> None:
    """Every layer of the parent, first to last: one that is missing would cost nothing and hurt nothing."""
    layers = library.description.layers
    numbers = [int(found[0]) for name in layers if (found := re.findall(r"[0-9]+$", name))]
    if numbers and len(numbers) < len(layers):
        other = next(name for name in layers if not re.search(r"[0-9]$", name))
        raise LibraryFileError(f"{where}: {other!r} has no number, and other layers have: name them alike.")
    twice = next((name for name in layers if layers.count(name) > 1), None) or next(
        (name for name, number in zip(layers, numbers, strict=False) if numbers.count(number) > 1), None
    )
    if twice:
        raise LibraryFileError(f"{where}: {twice!r} stands there twice.")
    if numbers != list(range(len(numbers))):
        absent = sorted(set(range(max(numbers) + 1)) - set(numbers))
        what = f"there is no layer {absent[0]}" if absent else "the layers are not in their order"
        raise LibraryFileError(
            f"{where}: {what}, and its last is {layers[numbers.index(max(numbers))]!r}: a library holds every layer of "
            "the parent, from 0 on. Measure what is missing, or fetch the whole file."
        )


def _check_names(library: OptionLibrary, where: str) -> None:
    """Every variant stands there once, in a layer that the library names."""
    seen: set[tuple[str, str, str]] = set()
    for variant in library.variants:
        name = (variant.layer, variant.part, variant.label)
        if name in seen:
            raise LibraryFileError(f"{where}: {' '.join(name)!r} stands there twice.")
        if variant.layer not in library.description.layers:
            raise LibraryFileError(f"{where}: there are variants of {variant.layer!r}, which is none of its layers.")
        seen.add(name)


def _check_numbers(variant: ScoredVariant, where: str) -> None:
    for metric, value in variant.metrics.items():
        if not all(abs(one) < LARGEST for one in (value, *variant.samples.get(metric, ()))):
            raise LibraryFileError(f"{where}: {metric} must be numbers below {LARGEST:g}.")
    for costs in variant.costs.values():
        _check_costs(costs, where)


def _check_costs(costs: dict[str, float], where: str) -> None:
    wrong = [name for name, value in costs.items() if not 0 <= value < LARGEST]
    if wrong:
        raise LibraryFileError(f"{where}: {wrong[0]} is {costs[wrong[0]]}; costs are at least 0 and below {LARGEST:g}.")


def crossed(library: OptionLibrary) -> list[ScoredVariant]:
    """Whole blocks: those that were scored, and every combination of the subblocks of a layer that were not.

    Raises LibraryFileError for a layer without any.
    """
    found: list[ScoredVariant] = []
    for layer in library.description.layers:
        own = [variant for variant in library.variants if variant.layer == layer]
        whole = {variant.label: variant for variant in own if variant.part == BLOCK}
        parts: dict[str, list[ScoredVariant]] = {}
        for variant in own:
            if variant.part != BLOCK:
                parts.setdefault(variant.part, []).append(variant)
        sums = [_sum(choice) for choice in itertools.product(*parts.values())] if parts else []
        blocks = [whole.pop(block.label, block) for block in sums] + list(whole.values())
        if not blocks:
            raise LibraryFileError(f"{layer} has no variant, not even the parent's: every layer needs one.")
        found += blocks
    return found


def _sum(parts: Sequence[ScoredVariant]) -> ScoredVariant:
    """The block of these subblocks: scores and costs that all of them have, added up."""
    first = parts[0]
    metrics = [name for name in first.metrics if all(name in part.metrics for part in parts)]
    sampled = [name for name in first.samples if all(name in part.samples for part in parts)]
    places = [place for place in first.costs if all(place in part.costs for part in parts)]
    return ScoredVariant(
        layer=first.layer,
        part=BLOCK,
        label=BETWEEN.join(f"{part.part} = {part.label}" for part in parts),
        is_parent=all(part.is_parent for part in parts),
        metrics={name: math.fsum(part.metrics[name] for part in parts) for name in metrics},
        samples={
            name: tuple(map(math.fsum, zip(*(part.samples[name] for part in parts), strict=True))) for name in sampled
        },
        costs={place: _sum_costs([part.costs[place] for part in parts]) for place in places},
    )


def _sum_costs(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: math.fsum(own[name] for own in costs) for name in costs[0] if all(name in own for own in costs)}


def joint_of(library: OptionLibrary, scenario: str | None = None, batch_size: int | None = None) -> JointLibrary:
    """The library for the search, with costs at every place, or at those of one scenario or batch size.

    A cost that was not measured at all of these places is not known. LibraryFileError for a place that is not there.
    """
    described = library.description
    bare = JointLibrary(layers=described.layers, options=(), places=described.places)
    places = bare.measured_at(scenario, batch_size).places
    options = [
        JointOption(
            layer=variant.layer,
            label=variant.label,
            metrics={METRICS.get(name, name): value for name, value in variant.metrics.items()},
            costs=_joint_costs(variant.costs, places),
            is_parent=variant.is_parent,
            samples={METRICS.get(name, name): np.array(values) for name, values in variant.samples.items()},
            sizes=_sizes(variant),
        )
        for variant in crossed(library)
    ]
    outside = _joint_costs(library.outside, places)
    return JointLibrary(
        layers=described.layers,
        options=tuple(options),
        fixed={**outside, "layer_parameters": 0.0} if outside else {},
        places=places,
    )


def _joint_costs(costs: dict[MeasuredAt, dict[str, float]], places: Sequence[MeasuredAt]) -> dict[str, joint.Cost]:
    """Costs that are known at all places, in the search's units; one figure where it is the same everywhere."""
    found: dict[str, joint.Cost] = {}
    for theirs, (name, unit) in COSTS.items():
        values = tuple(unit * costs[place][theirs] for place in places if theirs in costs.get(place, {}))
        if len(values) == len(places):
            found[name] = values[0] if len(set(values)) == 1 else values
    if "parameters" in found:
        found["layer_parameters"] = found["parameters"]
    return found


def _sizes(variant: ScoredVariant) -> dict[str, int]:
    """KV heads and intermediate size where the library gives them, by their names in config.json."""
    figures = next(iter(variant.costs.values()), {})
    return {name: int(figures[theirs]) for theirs, name in SIZES.items() if figures.get(theirs)}
