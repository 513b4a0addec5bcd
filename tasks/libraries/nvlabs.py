"""Reads and writes block libraries in the format of NVlabs/puzzle (examples/data/*/block_library.json there).

The file is JSON: layer -> variant label -> {"stats": {memory_mib, runtime_ms, ...}, "metrics": {kl_div, lm_loss,
...}}; `measurement_info.json` beside it names hardware and scenario, `parent_block_stats.json` repeats the parent's
block. Scores and costs are joint, one per layer and variant, for the one scenario that was measured, and stand for the
blocks alone. What we write keeps the non-block part in `measurement_info.json` under "non_block", which we read again
and others ignore: for them it has to be taken off the budgets.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blocks.files import write_text
from tasks.libraries.options import (
    COSTS,
    OptionLibrary,
    OptionsDescription,
    Place,
    ScoredVariant,
    checked,
    crossed,
    places_of,
)
from tasks.libraries.reading import LARGEST, cost, is_number, mapping, number, read_json
from tasks.search.joint import LibraryFileError

SOURCE = "NVlabs/puzzle block_library.json"
_NEEDED = ("memory_mib", "runtime_ms")  # stand in every such file; parameters may


def options_from_nvlabs(path: Path) -> OptionLibrary:
    """Read and check a library file, all that it keeps; LibraryFileError says where it is not what it should be."""
    layers = mapping(read_json(path), f"{path}: the library")
    beside = path.with_name("measurement_info.json")
    measured = mapping(read_json(beside), str(beside)) if beside.exists() else {}
    place = _place(measured)
    variants = tuple(variant for layer in _ordered(layers) for variant in _variants(path, layer, layers[layer], place))
    outside = measured.get("non_block")
    library = OptionLibrary(
        description=OptionsDescription(
            source=SOURCE,
            parent=path.resolve().parent.name,
            hardware={name: value for name, value in measured.items() if isinstance(value, str) and name != "scenario"},
            layers=tuple(_ordered(layers)),
            places=(place,),
            measured=measured,
        ),
        variants=variants,
        outside={place: _stats(mapping(outside, f"{beside}: non_block"), str(beside), ())} if outside else {},
    )
    return checked(library, str(path))


def _place(measured: dict[str, Any]) -> Place:
    """Batch size and sequence length as `measurement_info.json` tells them; 1 and no name where it does not.

    How many of the tokens are generated it does not say.
    """
    length = _count(measured, "sequence_length")
    scenario = measured.get("scenario")
    return Place(
        scenario=scenario if isinstance(scenario, str) and scenario else f"{length} tokens" if length else "measured",
        batch_size=_count(measured, "batch_size") or 1,
        prompt_tokens=_count(measured, "prompt_tokens") or length,
        generated_tokens=_count(measured, "generated_tokens"),
    )


def _count(values: dict[str, Any], name: str) -> int:
    """A count; 0 where the file does not say."""
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST else 0


def _ordered(layers: dict[str, Any]) -> list[str]:
    """layer_2 before layer_10; names without a number stay in the file's order."""
    numbers = {name: name.rpartition("_")[2] for name in layers}
    if all(number.isascii() and number.isdigit() for number in numbers.values()):
        return sorted(layers, key=lambda name: int(numbers[name]))
    return list(layers)


def _variants(path: Path, layer: str, variants: Any, place: Place) -> Iterator[ScoredVariant]:
    for label, variant in mapping(variants, f"{path}: {layer}").items():
        where = f"{path}: {layer}, {label!r}"
        parts = mapping(variant, where)
        stats, metrics = (mapping(parts.get(name), f"{where}: {name}") for name in ("stats", "metrics"))
        kept = label.count("parent * 100%")
        yield ScoredVariant(
            layer=layer,
            part="block",
            label=label,
            is_parent=kept > 0 and kept == label.count("&&") + 1,
            metrics={name: number(metrics, name, where) for name in metrics},
            costs={place: _stats(stats, where, _NEEDED)},
        )


def _stats(stats: dict[str, Any], where: str, needed: tuple[str, ...]) -> dict[str, float]:
    """Budgets are checked; other figures are kept where they are figures."""
    found = {name: cost(stats, name, where) for name in COSTS if name in stats or name in needed}
    others = {name: float(value) for name, value in stats.items() if name not in found and is_number(value)}
    return found | {name: value for name, value in others.items() if value >= 0}


def write_nvlabs(
    path: Path, library: OptionLibrary, scenario: str | None = None, batch_size: int | None = None
) -> None:
    """Write the library at one place in NVlabs' format, `measurement_info.json` and the parent's block beside it.

    Errors and scores per sequence have no place there. Raises LibraryFileError when memory or runtime is not known.
    """
    place = places_of(library.description.places, scenario, batch_size)[0]
    layers: dict[str, dict[str, Any]] = {layer: {} for layer in library.description.layers}
    for variant in crossed(library):
        stats = variant.costs.get(place, {})
        lacking = [name for name in _NEEDED if name not in stats]
        if lacking:
            raise LibraryFileError(
                f"NVlabs' format needs {lacking[0]} of every variant, and {variant.layer} {variant.label!r} has none "
                f"at {place}: name another place with --scenario and --batch-size, or measure it."
            )
        label = variant.label if "\t" in variant.label else variant.label.replace(" && ", "\t&&\t")
        layers[variant.layer][label] = {"stats": _plain(stats), "metrics": variant.metrics}
    write_text(path, json.dumps(layers, indent=2))
    write_text(path.with_name("measurement_info.json"), json.dumps(_measured(library, place), indent=4))
    parents = [variant for variant in crossed(library) if variant.is_parent]
    if parents:
        block = {"stats": _plain(parents[0].costs[place]), "metrics": parents[0].metrics}
        write_text(path.with_name("parent_block_stats.json"), json.dumps(block, indent=2))


def _plain(stats: dict[str, float]) -> dict[str, float]:
    """Whole numbers without a point, as heads and parameters are written there."""
    return {name: int(value) if value.is_integer() else value for name, value in stats.items()}


def _measured(library: OptionLibrary, place: Place) -> dict[str, Any]:
    described = library.description
    noted: dict[str, Any] = {**place.model_dump(), **described.hardware}
    if described.source == SOURCE:
        noted = dict(described.measured)
    outside = library.outside.get(place)
    return {**noted, "non_block": outside} if outside else noted
