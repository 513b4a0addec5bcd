"""Tables of frozen contracts as parquet, each checked against its digest before it is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from blocks.errors import first_line
from blocks.files import atomic_path, sha256_of
from blocks.records import Value
from tasks.libraries.reading import mapping, read_json
from tasks.search.joint import LibraryFileError

ValueT = TypeVar("ValueT", bound=Value)


def write_tables(folder: Path, tables: Mapping[str, Sequence[Value]]) -> dict[str, str]:
    """Write `<name>.parquet` for every table, a column per field; the sha256 of each file by name."""
    import pandas as pd  # a third of a second that most commands can do without

    digests = {}
    for name, values in tables.items():
        with atomic_path(folder / f"{name}.parquet") as path:
            pd.DataFrame([_row(value) for value in values]).to_parquet(path, index=False)
        digests[name] = sha256_of(folder / f"{name}.parquet")
    return digests


def _row(value: Value) -> dict[str, Any]:
    """Fields of one value; weights stay in the block library, they mean nothing elsewhere. Parquet has no column of
    lists that are all empty.
    """
    dumped = value.model_dump().items()
    return {name: field for name, field in dumped if name != "weights" and (name, field) != ("capabilities", ())}


def read_table(folder: Path, digests: Mapping[str, str], name: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    """The rows of a table; LibraryFileError when it is missing, is not the one that was written, or holds others."""
    import pandas as pd

    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise LibraryFileError(f"{path} is missing: fetch the whole folder.")
    if sha256_of(path) != digests.get(name):
        raise LibraryFileError(f"{path} is not the table that library.json names (sha256): fetch the folder again.")
    try:
        rows = pd.read_parquet(path).to_dict("records")
    except (OSError, ValueError, NotImplementedError) as error:
        raise LibraryFileError(f"{path} is no parquet table: {first_line(error).rstrip('.')}.") from error
    try:
        return tuple(kind.model_validate({str(key): _plain(value) for key, value in row.items()}) for row in rows)
    except ValidationError as error:
        raise LibraryFileError(f"{path}: {first_fault(error)}.") from error


def _plain(value: Any) -> Any:
    """As the contracts have it: lists for arrays, None for what a table shows as nan."""
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value] if value.dtype == object else value.tolist()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def read_description(folder: Path) -> dict[str, Any]:
    """library.json of a folder; LibraryFileError when there is none, or it is no JSON object."""
    path = folder / "library.json"
    if not path.is_file():
        lacks = "it has no library.json" if folder.is_dir() else "there is no such folder"
        raise LibraryFileError(
            f"{folder} is no block library: {lacks}. "
            "A workspace has one once `puzzle optimize` has made it: run that first, or name another folder."
        )
    return mapping(read_json(path), str(path))


def validated(kind: type[ValueT], found: Mapping[str, Any], where: Path) -> ValueT:
    """A contract from JSON that somebody else may have written; LibraryFileError names the first wrong field."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise LibraryFileError(f"{where}: {first_fault(error)}.") from error


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong, in a sentence."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
