"""Reads block libraries in the format of NVlabs/puzzle (examples/data/*/block_library.json there).

The file is JSON: layer -> variant label -> {"stats": {memory_mib, runtime_ms, ...}, "metrics": {kl_div, lm_loss,
...}}; `measurement_info.json` beside it names hardware and scenario. Scores and costs are joint, one per layer and
variant, for the one scenario that was measured, and stand for the blocks alone. Files that puzzle wrote until
November 2026 also have "non_block" in `measurement_info.json`: costs of embedding and head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.libraries.options import BLOCK, COSTS, OptionLibrary, OptionsDescription, ScoredVariant, checked
from tasks.libraries.reading import LARGEST, cost, is_number, mapping, number, read_json
from tasks.search.joint import MeasuredAt

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
            source="NVlabs/puzzle block_library.json",
            parent=path.resolve().parent.name,
            hardware={name: value for name, value in measured.items() if isinstance(value, str) and name != "scenario"},
            layers=tuple(_ordered(layers)),
            places=(place,),
        ),
        variants=variants,
        outside={place: _stats(mapping(outside, f"{beside}: non_block"), str(beside), ())} if outside else {},
    )
    return checked(library, str(path))


def _place(measured: dict[str, Any]) -> MeasuredAt:
    """Batch size and sequence length as `measurement_info.json` tells them; 1 and no name where it does not.

    How many of the tokens are generated it does not say.
    """
    length = _count(measured, "sequence_length")
    scenario = measured.get("scenario")
    return MeasuredAt(
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


def _variants(path: Path, layer: str, variants: Any, place: MeasuredAt) -> Iterator[ScoredVariant]:
    for label, variant in mapping(variants, f"{path}: {layer}").items():
        where = f"{path}: {layer}, {label!r}"
        parts = mapping(variant, where)
        stats, metrics = (mapping(parts.get(name), f"{where}: {name}") for name in ("stats", "metrics"))
        kept = label.count("parent * 100%")
        yield ScoredVariant(
            layer=layer,
            part=BLOCK,
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
