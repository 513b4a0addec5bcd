"""Version 2 of the open format: a library of options, whoever measured it (tasks/libraries/options.py), as a folder.

library.json     format, version 2, source, parent, hardware, layers, places, sha256 of each table
options.parquet  layer, part, label, is_parent; part is "block", or the subblock's name
metrics.parquet  layer, part, label, metric, value, se, per_sequence
usage.parquet    layer, part, label, scenario, batch_size, cost, value
outside.parquet  scenario, batch_size, cost, value: the non-block part
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from blocks.estimates import mean
from blocks.library import write_value
from blocks.records import Value
from tasks.libraries.options import OptionLibrary, OptionsDescription, ScoredVariant, checked
from tasks.libraries.tables import read_description, read_table, validated, write_tables
from tasks.search.joint import LibraryFileError, MeasuredAt

Name = tuple[str, str, str]
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class _Named(Value):
    layer: str
    part: str
    label: str

    @property
    def name(self) -> Name:
        return self.layer, self.part, self.label


class OptionRow(_Named):
    """A variant of a block or of a subblock."""

    is_parent: bool


class MetricRow(_Named):
    """One score of a variant; se over sequences, None where the scores per sequence are not known."""

    metric: str
    value: float
    se: float | None
    per_sequence: tuple[float, ...]


class OutsideRow(Value):
    """One cost of the non-block part at one scenario and batch size."""

    scenario: str
    batch_size: int
    cost: str
    value: float


class UsageRow(OutsideRow, _Named):
    """One cost of a variant at one scenario and batch size."""


def write_options(folder: Path, library: OptionLibrary) -> None:
    """Write or replace the folder's files; library.json comes last, with the digests of what it goes with."""
    digests = write_tables(
        folder,
        {
            "options": [OptionRow(**_name(v), is_parent=v.is_parent) for v in library.variants],
            "metrics": [row for variant in library.variants for row in _metric_rows(variant)],
            "usage": [
                UsageRow(**_name(v), scenario=place.scenario, batch_size=place.batch_size, cost=cost, value=value)
                for v in library.variants
                for place, costs in v.costs.items()
                for cost, value in costs.items()
            ],
            "outside": [
                OutsideRow(scenario=place.scenario, batch_size=place.batch_size, cost=cost, value=value)
                for place, costs in library.outside.items()
                for cost, value in costs.items()
            ],
        },
    )
    write_value(folder / "library.json", library.description.model_copy(update={"tables": digests}))


def _name(variant: ScoredVariant) -> dict[str, str]:
    return {"layer": variant.layer, "part": variant.part, "label": variant.label}


def _metric_rows(variant: ScoredVariant) -> Iterable[MetricRow]:
    for metric, value in variant.metrics.items():
        samples = variant.samples.get(metric, ())
        se = mean(samples).error if len(samples) > 1 else None
        yield MetricRow(**_name(variant), metric=metric, value=value, se=se, per_sequence=samples)


def read_options(folder: Path) -> OptionLibrary:
    """Read and check a folder; LibraryFileError says what is missing, damaged or does not hold together."""
    described = validated(OptionsDescription, read_description(folder), folder / "library.json")
    places = {(place.scenario, place.batch_size): place for place in described.places}
    variants: dict[Name, ScoredVariant] = {}
    for row in read_table(folder, described.tables, "options", OptionRow):
        variant = ScoredVariant(layer=row.layer, part=row.part, label=row.label, is_parent=row.is_parent)
        _put(variants, row.name, variant, f"{folder}/options.parquet")
    for score in read_table(folder, described.tables, "metrics", MetricRow):
        where = f"{folder}/metrics.parquet: {' '.join(score.name)}"
        variant = _known(variants, score.name, f"{where}: options.parquet has no such variant.")
        _put(variant.metrics, score.metric, score.value, where)
        if score.per_sequence:
            variant.samples[score.metric] = score.per_sequence
    outside: dict[MeasuredAt, dict[str, float]] = {}
    for name, kind in (("usage", UsageRow), ("outside", OutsideRow)):
        for usage in read_table(folder, described.tables, name, kind):
            at, where = (usage.scenario, usage.batch_size), f"{folder}/{name}.parquet"
            place = _known(
                places, at, f"{where}: {at[0]}, batch {at[1]} is none of the places that library.json names."
            )
            costs = outside
            if isinstance(usage, UsageRow):
                where = f"{where}: {' '.join(usage.name)}"
                costs = _known(variants, usage.name, f"{where}: options.parquet has no such variant.").costs
            _put(costs.setdefault(place, {}), usage.cost, usage.value, f"{where}: {place}")
    library = OptionLibrary(
        description=described.model_copy(update={"tables": {}}), variants=tuple(variants.values()), outside=outside
    )
    return checked(library, str(folder))


def _known(table: Mapping[KeyT, ValueT], key: KeyT, otherwise: str) -> ValueT:
    if key not in table:
        raise LibraryFileError(otherwise)
    return table[key]


def _put(table: dict[KeyT, ValueT], key: KeyT, value: ValueT, where: str) -> None:
    if key in table:
        raise LibraryFileError(f"{where}: {key!r} stands there twice.")
    table[key] = value
