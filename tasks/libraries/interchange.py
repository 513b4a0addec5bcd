"""The open format of a block library: what was trained, scored and measured, as a folder that any tool can read.

    library.json     format, version, parent, corpus, scenarios, hardware, sha256 of each table
    variants.parquet BLD of every variant: losses, steps, seconds; no weights
    scores.parquet   replace-1-block KL and rise of the LM loss, with errors and per sequence
    costs.parquet    per subblock variant, scenario and batch size
    non_block.parquet  embedding, final norm and head: scenario, batch size, costs

Columns are the fields of the contracts in blocks/records.py. Every run writes one.
`docs/how-to/exchange-libraries.md` lists the columns.
"""

import json
from pathlib import Path
from typing import Any, Literal

from blocks.library import write_value
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
from tasks.libraries.nvlabs import options_from_nvlabs
from tasks.libraries.options import SIZES, OptionLibrary, joint_of
from tasks.libraries.puzzletron import is_puzzletron, options_from_puzzletron
from tasks.libraries.reading import LARGEST
from tasks.libraries.tables import read_description, read_table, validated, write_tables
from tasks.search.capabilities import Capabilities, InconsistentTables
from tasks.search.joint import JointLibrary, LibraryFileError
from tasks.search.totals import make_problem
from tasks.search.view import library_of

COST_LIMIT = 1e18  # bytes, seconds, parameters


class Description(Value):
    """library.json: everything that is not a table.

    parent_sizes: num_key_value_heads and intermediate_size of the parent, where its config has them. windows: as in a
    CostTable. capabilities: the share of each in the score that the search minimises; empty where the score on the
    corpus is all there is.
    """

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
    parent_sizes: dict[str, int] = {}
    windows: tuple[int | None, ...] = ()
    capabilities: dict[str, float] = {}
    tables: dict[str, str] = {}


class StoredLibrary(Value):
    """A library as it was read: the description and the contracts of its tables."""

    description: Description
    variants: tuple[BlockRecord, ...]
    scores: tuple[Score, ...]
    costs: CostTable


def describe(
    profile: Profile, parent: ParentInfo, corpus: CorpusInfo, costs: CostTable, parent_sizes: dict[str, int]
) -> Description:
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
        parent_sizes=parent_sizes,
        windows=costs.windows,
        capabilities=profile.capability_weights,
    )


def sizes_of(config: Path) -> dict[str, int]:
    """Sizes that labels tell shares of, from a parent's config.json; those that it has."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    return {name: fields[name] for name in SIZES.values() if isinstance(fields.get(name), int)}


def write_library(folder: Path, library: StoredLibrary) -> None:
    """Write or replace the folder's files; library.json comes last, with the digests of what it goes with."""
    digests = write_tables(
        folder,
        {
            "variants": library.variants,
            "scores": library.scores,
            "costs": library.costs.costs,
            "non_block": library.costs.non_block,
        },
    )
    write_value(folder / "library.json", library.description.model_copy(update={"tables": digests}))


def read_library(folder: Path) -> StoredLibrary:
    """Read and check a folder; LibraryFileError says what is missing, damaged or of another format."""
    described = validated(Description, read_description(folder), folder / "library.json")
    library = StoredLibrary(
        description=described,
        variants=read_table(folder, described.tables, "variants", BlockRecord),
        scores=read_table(folder, described.tables, "scores", Score),
        costs=CostTable(
            hardware=described.hardware,
            costs=read_table(folder, described.tables, "costs", Cost),
            non_block=read_table(folder, described.tables, "non_block", NonBlockCost),
            num_hidden_layers=described.num_hidden_layers,
            measured_at=described.measured_at,
            windows=described.windows,
        ),
    )
    _check(folder, library)
    return library


def _check(folder: Path, library: StoredLibrary) -> None:
    """What no contract says of one row: nothing twice, no cost below 0, no score that sums cannot keep."""
    costs: list[Cost | NonBlockCost] = [*library.costs.costs, *library.costs.non_block]
    keys: dict[str, list[tuple[Any, ...]]] = {
        "scores.parquet": [(score.layer, score.subblock, score.variant) for score in library.scores],
        "costs.parquet": [(c.subblock, c.variant, c.scenario, c.batch_size) for c in library.costs.costs],
        "non_block.parquet": [(c.scenario, c.batch_size, c.head) for c in library.costs.non_block],
    }
    for table, names in keys.items():
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise LibraryFileError(f"{folder / table}: {' '.join(map(str, twice))} stands there twice.")
    for cost in costs:
        figures = [value for value in cost.model_dump().values() if isinstance(value, int | float)]
        if not all(0 <= value < COST_LIMIT for value in figures):
            raise LibraryFileError(
                f"{folder}: a cost at {cost.scenario}, batch {cost.batch_size} is below 0 or absurd."
            )
    for score in library.scores:
        if not all(abs(value) < LARGEST for value in (score.kl, score.lm_loss, *score.kl_per_sequence)):
            raise LibraryFileError(f"{folder}/scores.parquet: a score of layer {score.layer} is not below {LARGEST:g}.")
        if score.subblock == "block" and score.variant.count("+") != 1:
            raise LibraryFileError(
                f"{folder}/scores.parquet: layer {score.layer}: a block is called ATTENTION+FFN, not {score.variant!r}."
            )
    if library.costs.windows and len(library.costs.windows) != library.description.num_hidden_layers:
        raise LibraryFileError(f"{folder}/library.json: windows are of other layers than num_hidden_layers says.")
    if library.description.num_hidden_layers < 1 or not library.description.scenarios:
        raise LibraryFileError(f"{folder}/library.json: names no layer, or no scenario that costs were taken at.")


def joint_view(library: StoredLibrary) -> JointLibrary:
    """The library as one search sees it: a slot per layer, every pair of an attention and an FFN.

    Raises LibraryFileError when the tables do not belong together.
    """
    described = library.description
    try:
        # the search's own limits come with what is asked; this one is never looked at
        kept = Capabilities(weights=described.capabilities)
        tables = (library.scores, library.costs)
        problem = make_problem(*tables, Budget(parameters=1), described.scenarios, capabilities=kept)
        return library_of(problem)
    except InconsistentTables as error:
        raise LibraryFileError(f"the tables of this library do not belong together: {error}") from error


def open_library(path: Path, scenario: str | None = None, batch_size: int | None = None) -> JointLibrary:
    """A joint library from any source that `read_source` reads.

    scenario, batch_size: only what was measured there; everything when not given.
    """
    return joint_at(read_source(path), scenario, batch_size)


def joint_at(
    found: StoredLibrary | OptionLibrary, scenario: str | None = None, batch_size: int | None = None
) -> JointLibrary:
    """A library that was read, for the search; at one scenario or batch size where they are named."""
    if isinstance(found, OptionLibrary):
        return joint_of(found, scenario, batch_size)
    return joint_view(found).measured_at(scenario, batch_size)


def read_source(path: Path) -> StoredLibrary | OptionLibrary:
    """A workspace, a folder in the open format, NVlabs' file, or a puzzletron folder or its subblock_stats.json."""
    if is_puzzletron(path):
        return options_from_puzzletron(path)
    if path.is_file() and path.name != "library.json":
        return options_from_nvlabs(path)
    folder = kept_library(path.parent if path.is_file() else path)
    version = read_description(folder).get("version")
    if version != 1:
        raise LibraryFileError(
            f"{folder}/library.json: version {version!r} of the format; this puzzle reads version 1. "
            "Version 2 was a copy of NVlabs' or puzzletron's files: name those."
        )
    return read_library(folder)


def kept_library(folder: Path) -> Path:
    """The library that a workspace keeps under tables/; the folder itself where it is none."""
    kept = sorted(found.parent for found in (folder / "tables").glob("*/library.json"))
    if len(kept) > 1:
        raise LibraryFileError(f"{folder} keeps several libraries, name one: {', '.join(map(str, kept))}.")
    return kept[0] if kept else folder
