"""Between formats of block libraries, and what one holds in a page: `puzzle library export | import | show`."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from blocks.errors import PuzzleError
from blocks.records import Value
from tasks.libraries.interchange import StoredLibrary, joint_at, joint_view, read_source, write_library
from tasks.libraries.labels import run_labels
from tasks.libraries.nvlabs import write_nvlabs
from tasks.libraries.option_tables import write_options
from tasks.libraries.options import (
    BETWEEN,
    BLOCK,
    COSTS,
    OptionLibrary,
    OptionsDescription,
    Place,
    ScoredVariant,
    crossed,
    named_places,
    options_of,
    outside_of,
)
from tasks.search.joint import QUANTITIES, JointLibrary, LibraryFileError, standard_error

COUPLED = " (coupled)"


class Span(Value):
    """Least, median and largest of a figure; se: the largest standard error, None where it is not known."""

    least: float
    median: float
    largest: float
    se: float | None = None
    sequences: int = 0


class Share(Value):
    """What a library says of one cost at one place; None where it does not."""

    unit: str
    parent: float | None
    cheapest_child: float
    outside_blocks: float | None


class Summary(Value):
    """A library in a page. costs: by place, then by name. missing: what it does not know, in sentences."""

    path: str
    source: str
    parent: str
    layers: int
    options: int
    options_per_layer: tuple[int, int]
    labels: int
    scores: dict[str, Span]
    costs: dict[str, dict[str, Share]]
    hardware: dict[str, str]
    missing: tuple[str, ...]


def export_library(source: Path, target: Path, scenario: str | None = None, batch_size: int | None = None) -> None:
    """Write a library in the format that `target` names: a folder in the open format, a .json file in NVlabs'."""
    found = read_source(source)
    if target.suffix == ".json":
        options = as_options(found) if isinstance(found, StoredLibrary) else found
        _writing(target, lambda: write_nvlabs(target, options, scenario, batch_size))
        return
    if scenario or batch_size:
        raise LibraryFileError("the open format holds every scenario: name one only for NVlabs' format (a .json file).")
    store(target, found)


def import_library(source: Path, target: Path, scores: Path | None = None) -> None:
    """Write what others measured into a folder in the open format."""
    if target.suffix == ".json":
        raise LibraryFileError(f"{target}: the open format is a folder; `puzzle library export` writes NVlabs' file.")
    store(target, read_source(source, scores))


def store(folder: Path, library: StoredLibrary | OptionLibrary) -> None:
    """Write a folder in the open format: version 1 of what a run measured, version 2 of anything else."""
    if isinstance(library, StoredLibrary):
        _writing(folder, lambda: write_library(folder, library))
    else:
        _writing(folder, lambda: write_options(folder, library))


def _writing(target: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise PuzzleError(f"cannot write {target}: {error.strerror}. Choose another place.") from error


def as_options(library: StoredLibrary) -> OptionLibrary:
    """What a run measured as whole blocks, labels with sizes in NVlabs' manner."""
    view = joint_view(library)
    variants = options_of(view)
    parts = [_parts(variant.label) for variant in variants]
    named = run_labels(
        (attention for attention, _, _ in parts), (ffn for _, ffn, _ in parts), library.description.parent_sizes
    )
    described = library.description
    return OptionLibrary(
        description=OptionsDescription(
            source=f"puzzle, profile {described.profile}",
            parent=described.parent,
            hardware=described.hardware,
            layers=view.layers,
            places=tuple(named_places(view)),
        ),
        variants=tuple(
            replace(variant, label=_label(named["attention", attention], named["ffn", ffn], coupled))
            for variant, (attention, ffn, coupled) in zip(variants, parts, strict=True)
        ),
        outside=outside_of(view),
    )


def _parts(label: str) -> tuple[str, str, bool]:
    """`attention = kv1 && ffn = ffn96 (coupled)` -> kv1, ffn96, True."""
    attention, _, ffn = label.removesuffix(COUPLED).partition(BETWEEN)
    return attention.partition(" = ")[2], ffn.partition(" = ")[2], label.endswith(COUPLED)


def _label(attention: str, ffn: str, coupled: bool) -> str:
    return f"attention = {attention}{BETWEEN}ffn = {ffn}{COUPLED if coupled else ''}"


# --- in a page


def summarise(path: Path) -> Summary:
    """What a library holds: layers, variants, scores, costs at every place, and what it does not know."""
    found = read_source(path)
    joints, unusable = _joints(found)
    first = joints[0]
    options = options_of(first)
    described = found.description
    per_layer = Counter(option.layer for option in options)
    return Summary(
        path=str(path),
        source=described.source
        if isinstance(described, OptionsDescription)
        else f"puzzle, profile {described.profile}",
        parent=described.parent,
        layers=len(first.layers),
        options=len(options),
        options_per_layer=(min(per_layer.values()), max(per_layer.values())),
        labels=len({option.label for option in options}),
        scores={metric: _span(options, metric) for metric in first.metrics},
        costs={str(named_places(joint)[0]): _shares(joint) for joint in joints},
        hardware=described.hardware,
        missing=(*unusable, *_missing(found, first)),
    )


def _joints(library: StoredLibrary | OptionLibrary) -> tuple[list[JointLibrary], list[str]]:
    """The library at every place where it can be used, and why it cannot elsewhere."""
    found, unusable = [], []
    for place in _places(library):
        try:
            found.append(joint_at(library, place.scenario, place.batch_size))
        except LibraryFileError as error:
            unusable.append(f"{place}: {error}")
    if not found:
        raise LibraryFileError(unusable[0])
    return found, unusable


def _places(library: StoredLibrary | OptionLibrary) -> list[Place]:
    return list(library.description.places) if isinstance(library, OptionLibrary) else named_places(joint_view(library))


def _span(options: Sequence[ScoredVariant], metric: str) -> Span:
    values = [option.metrics[metric] for option in options]
    samples = [option.samples.get(metric, ()) for option in options]
    known = min(map(len, samples)) > 1
    return Span(
        least=min(values),
        median=statistics.median(values),
        largest=max(values),
        se=max(standard_error(np.array(own)) for own in samples) if known else None,
        sequences=len(samples[0]) if known else 0,
    )


def _shares(library: JointLibrary) -> dict[str, Share]:
    """Costs that every option has, of a library at one place."""
    options = options_of(library)
    outside = next(iter(outside_of(library).values()), {})
    found = {}
    for name in (cost for cost in COSTS if library.knows(cost)):
        by_layer: dict[str, list[float]] = {}
        for option in options:
            by_layer.setdefault(option.layer, []).extend(costs[name] for costs in option.costs.values())
        found[name] = Share(
            unit=QUANTITIES[name].unit,
            parent=library.of_parent(name) if set(library.parents) == set(library.layers) else None,
            cheapest_child=outside.get(name, 0.0) + math.fsum(map(min, by_layer.values())),
            outside_blocks=outside.get(name),
        )
    return found


def _missing(library: StoredLibrary | OptionLibrary, joint: JointLibrary) -> list[str]:
    options = options_of(joint)
    shares = _shares(joint)
    found = [f"{name}: not known of every variant, so it cannot be budgeted" for name in COSTS if name not in shares]
    found += [
        f"{name} outside the blocks (embedding, head): take it off your budget first"
        for name, share in shares.items()
        if share.outside_blocks is None
    ]
    if set(joint.parents) != set(joint.layers):
        found.append("the parent's own block in every layer: budgets cannot be shares of the parent")
    if any(not option.samples for option in options):
        found.append("scores per sequence: no errors, no confidence, no --robust")
    if not library.description.hardware:
        found.append("the hardware that costs were measured on")
    if isinstance(library, StoredLibrary):
        failed = [variant for variant in library.variants if variant.status == "failed"]
        found += [f"layer {v.layer} {v.subblock} {v.variant}: {v.reason or 'failed'}" for v in failed]
    elif len({v.part for v in library.variants} - {BLOCK}) and len(crossed(library)) < len(library.variants):
        found.append("some combinations of subblocks")
    return found
