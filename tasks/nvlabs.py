"""Reads block libraries in the format of NVlabs/puzzle.

The file is JSON: layer -> variant label -> {"stats": {memory_mib, runtime_ms, ...}, "metrics": {kl_div, lm_loss,
...}}; `measurement_info.json` beside it names hardware and scenario. Scores and costs are joint, one per layer and
variant, for the one scenario that was measured, and stand for the blocks alone: take the non-block part off your
budgets first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.joint import JointLibrary, JointOption, LibraryFileError, Place

_COSTS = ("memory_mib", "runtime_ms", "num_params")
_SIZES = {"num_kv_heads": "num_key_value_heads", "ffn_intermediate_size": "intermediate_size"}
_LARGEST = 1e12  # larger ones are no MiB, ms or nats, and leave nothing of the others in a sum


def read_nvlabs(path: Path) -> JointLibrary:
    """Read and check a library file; LibraryFileError says where it is not what it should be."""
    layers = _mapping(_json(path), f"{path}: the library")
    options = [option for layer in _ordered(layers) for option in _options(path, layer, layers[layer])]
    beside = path.with_name("measurement_info.json")
    measured = _mapping(_json(beside), str(beside)) if beside.exists() else {}
    place = Place(
        batch_size=_whole(measured, "batch_size") or 1,
        prompt_tokens=_whole(measured, "sequence_length"),  # the file does not say how many of them are generated
    )
    return JointLibrary(layers=tuple(_ordered(layers)), options=tuple(options), measured=measured, places=(place,))


def _whole(values: dict[str, Any], name: str) -> int:
    """A count; 0 where the file does not say."""
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST else 0


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise LibraryFileError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise LibraryFileError(f"{path} is not the JSON of a block library: {error}.") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} stands there twice")
    return found


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise LibraryFileError(f"{what} must be a JSON object with entries, not {_short(value)}.")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _ordered(layers: dict[str, Any]) -> list[str]:
    """layer_2 before layer_10; names without a number stay in the file's order."""
    numbers = {name: name.rpartition("_")[2] for name in layers}
    if all(number.isascii() and number.isdigit() for number in numbers.values()):
        return sorted(layers, key=lambda name: int(numbers[name]))
    return list(layers)


def _options(path: Path, layer: str, variants: Any) -> Iterator[JointOption]:
    for label, variant in _mapping(variants, f"{path}: {layer}").items():
        where = f"{path}: {layer}, {label!r}"
        parts = _mapping(variant, where)
        stats, metrics = (_mapping(parts.get(name), f"{where}: {name}") for name in ("stats", "metrics"))
        # memory and runtime stand in every such file; parameters may
        names = [name for name in _COSTS if name in stats or name != "num_params"]
        costs = {name: _number(stats, name, where) for name in names}
        if "num_params" in costs:
            costs |= {name: costs["num_params"] for name in ("active_params", "layer_params")}  # dense blocks alone
        negative = [name for name, cost in costs.items() if cost < 0]
        if negative:
            raise LibraryFileError(f"{where}: {negative[0]} is {costs[negative[0]]}, it cannot be below 0.")
        scores = {name: _number(metrics, name, where) for name in metrics}
        parts_kept = label.count("parent * 100%")
        yield JointOption(
            layer=layer,
            label=label,
            metrics=scores,
            costs=dict(costs),
            sizes={ours: size for name, ours in _SIZES.items() if (size := _whole(stats, name))},
            is_parent=parts_kept > 0 and parts_kept == label.count("&&") + 1,
        )


def _number(values: dict[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise LibraryFileError(f"{where}: {name} must be a number below {_LARGEST:g}, not {_short(value)}.")
    return float(value)
