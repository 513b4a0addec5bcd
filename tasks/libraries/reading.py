"""Reads JSON that others wrote: every number and every object is checked, and what is wrong is named by its place."""

import json
from pathlib import Path
from typing import Any, TypeGuard

from tasks.search.joint import LibraryFileError

LARGEST = 1e12  # larger ones are no MiB, ms, parameters or nats, and leave nothing of the others in a sum


def read_json(path: Path) -> Any:
    """The JSON of a file; LibraryFileError when it cannot be read, is none, or names a key twice."""
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


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value` if it is an object with entries; LibraryFileError names `what` otherwise."""
    if not isinstance(value, dict) or not value:
        raise LibraryFileError(f"{what} must be a JSON object with entries, not {short(value)}.")
    return value


def sequence(value: Any, what: str) -> list[Any]:
    """`value` if it is a list with entries; LibraryFileError names `what` otherwise."""
    if not isinstance(value, list) or not value:
        raise LibraryFileError(f"{what} must be a JSON list with entries, not {short(value)}.")
    return value


def number(values: dict[str, Any], name: str, where: str) -> float:
    """A number below LARGEST in size; LibraryFileError names the place otherwise."""
    value = values.get(name)
    if not is_number(value):
        raise LibraryFileError(f"{where}: {name} must be a number below {LARGEST:g}, not {short(value)}.")
    return float(value)


def whole(values: dict[str, Any], name: str, where: str) -> int:
    """A whole number of at least 0; LibraryFileError names the place otherwise."""
    value = number(values, name, where)
    if value < 0 or not value.is_integer():
        raise LibraryFileError(f"{where}: {name} must be a whole number of at least 0, not {short(values[name])}.")
    return int(value)


def cost(values: dict[str, Any], name: str, where: str) -> float:
    """A number that is not negative; LibraryFileError names the place otherwise."""
    value = number(values, name, where)
    if value < 0:
        raise LibraryFileError(f"{where}: {name} is {value}, it cannot be below 0.")
    return value


def is_number(value: Any) -> TypeGuard[int | float]:
    """True for a finite number of a size that sums keep; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def short(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) < 60 else f"{text[:57]}..."
