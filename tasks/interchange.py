"""The open format of a block library: what was trained, scored and measured, as a folder that any tool can read.

    library.json     format, version, parent, corpus, scenarios, hardware, sha256 of each table
    variants.parquet BLD of every variant: losses, steps, seconds; no weights
    scores.parquet   replace-1-block KL and rise of the LM loss, with errors and per sequence
    costs.parquet    per subblock variant, scenario and batch size
    non_block.parquet  embedding, final norm and head: scenario, batch size, costs

Columns are the fields of the contracts in blocks/records.py. Every run writes one; `docs/search.md` lists the columns.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from pydantic import ValidationError

from blocks.library import atomic_path, sha256_of, write_value
from blocks.records import (
    BlockRecord,
    CorpusInfo,
    Cost,
    CostTable,
    NonBlockCost,
    ParentInfo,
    Score,
    Value,
)
from profiles.schema import Budget, Profile, Scenario
from tasks.joint import JointLibrary, LibraryFileError
from tasks.nvlabs import read_nvlabs
from tasks.totals import make_problem
from tasks.view import library_of

TABLES = ("variants", "scores", "costs", "non_block")
ValueT = TypeVar("ValueT", bound=Value)


class Description(Value):
    """library.json: everything that is not a table."""

    format: Literal["puzzle-block-library"] = "puzzle-block-library"
    version: Literal[1] = 1
    profile: str
    parent: str
    parent_fingerprint: str
    corpus: str
    num_hidden_layers: int
    hardware: dict[str, str]
    measured_at: str
    scenarios: tuple[Scenario, ...]
    tables: dict[str, str] = {}


class StoredLibrary(Value):
    """A library as it was read: the description and the contracts of its tables."""

    description: Description
    variants: tuple[BlockRecord, ...]
    scores: tuple[Score, ...]
    costs: CostTable


def describe(profile: Profile, parent: ParentInfo, corpus: CorpusInfo, costs: CostTable) -> Description:
    """What library.json says of a run's library."""
    return Description(
        profile=profile.name,
        parent=parent.name,
        parent_fingerprint=parent.fingerprint,
        corpus=corpus.description,
        num_hidden_layers=costs.num_hidden_layers,
        hardware=costs.hardware,
        measured_at=costs.measured_at,
        scenarios=profile.scenarios,
    )


def write_library(folder: Path, library: StoredLibrary) -> None:
    """Write or replace the folder's files; library.json comes last, with the digests of what it goes with."""
    rows: dict[str, Sequence[Value]] = {
        "variants": library.variants,
        "scores": library.scores,
        "costs": library.costs.costs,
        "non_block": library.costs.non_block,
    }
    digests = {}
    for name, values in rows.items():
        with atomic_path(folder / f"{name}.parquet") as path:
            pd.DataFrame([_row(value) for value in values]).to_parquet(path, index=False)
        digests[name] = sha256_of(folder / f"{name}.parquet")
    write_value(folder / "library.json", library.description.model_copy(update={"tables": digests}))


def _row(value: Value) -> dict[str, Any]:
    """Fields of one value; weights stay in the block library, they mean nothing elsewhere."""
    return {name: field for name, field in value.model_dump().items() if name != "weights"}


def read_library(folder: Path) -> StoredLibrary:
    """Read and check a folder; LibraryFileError says what is missing, damaged or of another format."""
    try:
        described = Description.model_validate(json.loads((folder / "library.json").read_text(encoding="utf-8")))
    except OSError as error:
        raise LibraryFileError(f"{folder} is no block library: library.json: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LibraryFileError(f"{folder}/library.json: {where}: {first['msg']}.") from error
    except ValueError as error:
        raise LibraryFileError(f"{folder}/library.json is not JSON: {error}.") from error
    return StoredLibrary(
        description=described,
        variants=_table(folder, described, "variants", BlockRecord),
        scores=_table(folder, described, "scores", Score),
        costs=CostTable(
            hardware=described.hardware,
            costs=_table(folder, described, "costs", Cost),
            non_block=_table(folder, described, "non_block", NonBlockCost),
            num_hidden_layers=described.num_hidden_layers,
            measured_at=described.measured_at,
        ),
    )


def _table(folder: Path, described: Description, name: str, kind: type[ValueT]) -> tuple[ValueT, ...]:
    path = folder / f"{name}.parquet"
    if not path.is_file():
        raise LibraryFileError(f"{path} is missing: fetch the whole folder.")
    if sha256_of(path) != described.tables.get(name):
        raise LibraryFileError(f"{path} is not the table that library.json names (sha256): fetch the folder again.")
    rows = pd.read_parquet(path).to_dict("records")
    try:
        return tuple(kind.model_validate({str(key): _plain(value) for key, value in row.items()}) for row in rows)
    except ValidationError as error:
        first = error.errors()[0]
        raise LibraryFileError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error


def _plain(value: Any) -> Any:
    """As the contracts have it: lists for arrays, None for what a table shows as nan."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def joint_view(library: StoredLibrary) -> JointLibrary:
    """The library as one search sees it: a slot per layer, every pair of an attention and an FFN."""
    described = library.description
    # the search's own limits come with what is asked; this one is never looked at
    problem = make_problem(library.scores, library.costs, Budget(parameters=1), described.scenarios)
    return library_of(problem)


def open_library(path: Path, scenario: str | None = None, batch_size: int | None = None) -> JointLibrary:
    """A joint library from NVlabs' file, a folder in the open format, or a workspace that keeps one.

    scenario, batch_size: only what was measured there; everything when not given.
    """
    if path.is_file() and path.name != "library.json":
        return read_nvlabs(path).measured_at(scenario, batch_size)
    folder = path.parent if path.is_file() else path
    kept = sorted(found.parent for found in (folder / "tables").glob("*/library.json"))
    if len(kept) > 1:
        raise LibraryFileError(f"{folder} keeps several libraries, name one: {', '.join(map(str, kept))}.")
    return joint_view(read_library(kept[0] if kept else folder)).measured_at(scenario, batch_size)
