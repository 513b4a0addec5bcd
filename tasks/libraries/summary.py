"""What a block library holds, on one page: `puzzle library show`."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blocks.estimates import mean
from blocks.records import Value
from tasks.libraries.interchange import StoredLibrary, joint_at, joint_view, read_source
from tasks.libraries.options import BLOCK, COSTS, OptionLibrary, crossed
from tasks.search.joint import QUANTITIES, JointLibrary, JointOption, LibraryFileError, at


class Span(Value):
    """Least, median and largest of a figure; se: the largest standard error, None where it is not known."""

    least: float
    median: float
    largest: float
    se: float | None = None
    sequences: int = 0


class Share(Value):
    """What a library says of one cost at one scenario and batch size; None where it does not."""

    unit: str
    parent: float | None
    cheapest_child: float
    outside_blocks: float | None


class Summary(Value):
    """A library on one page. costs: by scenario and batch size, then by name. missing: what the library does not know,
    in sentences.
    """

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

    @property
    def per_layer(self) -> str:
        """How many variants the block of a layer has: `9`, or `5 to 9`."""
        least, most = self.options_per_layer
        return str(least) if least == most else f"{least} to {most}"

    @property
    def measured_on(self) -> str:
        """The hardware in words."""
        return ", ".join(f"{name} {value}" for name, value in self.hardware.items()) or "not named"


def summarise(path: Path) -> Summary:
    """What a library holds: layers, variants, scores, costs wherever they were measured, and what it does not know."""
    found = read_source(path)
    described = found.description
    joints, unusable = _joints(found)
    first = joints[0]
    per_layer = Counter(option.layer for option in first.options)
    return Summary(
        path=str(path),
        source=f"puzzle, profile {found.description.profile}"
        if isinstance(found, StoredLibrary)
        else found.description.source,
        parent=described.parent,
        layers=len(first.layers),
        options=len(first.options),
        options_per_layer=(min(per_layer.values()), max(per_layer.values())),
        labels=len({option.label for option in first.options}),
        scores={metric: _span(first.options, metric) for metric in first.metrics},
        costs={str(joint.places[0]): _shares(joint) for joint in joints},
        hardware=described.hardware,
        missing=(*unusable, *_missing(found, first)),
    )


def _joints(library: StoredLibrary | OptionLibrary) -> tuple[list[JointLibrary], list[str]]:
    """The library wherever it was measured and can be used, and why it cannot elsewhere."""
    found, unusable = [], []
    for place in library.description.places if isinstance(library, OptionLibrary) else joint_view(library).places:
        try:
            found.append(joint_at(library, place.scenario, place.batch_size))
        except LibraryFileError as error:
            unusable.append(f"{place}: {error}")
    if not found:
        raise LibraryFileError(unusable[0])
    return found, unusable


def _span(options: Sequence[JointOption], metric: str) -> Span:
    values = [option.metrics[metric] for option in options]
    samples = [np.asarray(option.samples.get(metric, ())) for option in options]
    known = min(map(len, samples)) > 1
    return Span(
        least=min(values),
        median=statistics.median(values),
        largest=max(values),
        se=max(mean(one).error for one in samples) if known else None,
        sequences=len(samples[0]) if known else 0,
    )


def _shares(library: JointLibrary) -> dict[str, Share]:
    """Costs that every option has, of a library at one scenario and batch size."""
    found = {}
    for name in (cost for cost, _ in COSTS.values() if library.knows(cost)):
        by_layer: dict[str, list[float]] = {}
        for option in library.options:
            by_layer.setdefault(option.layer, []).append(at(option.costs[name], 0))
        found[name] = Share(
            unit=QUANTITIES[name].unit,
            parent=library.of_parent(name) if set(library.parents) == set(library.layers) else None,
            cheapest_child=library.outside(name, 0) + math.fsum(map(min, by_layer.values())),
            outside_blocks=library.outside(name, 0) if name in library.fixed else None,
        )
    return found


def _missing(library: StoredLibrary | OptionLibrary, joint: JointLibrary) -> list[str]:
    shares = _shares(joint)
    unknown = [name for name, _ in COSTS.values() if name not in shares]
    found = [f"{name}: not known of every variant, so it cannot be budgeted" for name in unknown]
    found += [
        f"{name} outside the blocks (embedding, head): take it off your budget first"
        for name, share in shares.items()
        if share.outside_blocks is None
    ]
    if set(joint.parents) != set(joint.layers):
        found.append("the parent's own block in every layer: budgets cannot be shares of the parent")
    if not all(any(map(len, option.samples.values())) for option in joint.options):
        found.append("scores per sequence: no errors, no confidence, no --robust")
    if not library.description.hardware:
        found.append("the hardware that costs were measured on")
    if isinstance(library, StoredLibrary):
        failed = [variant for variant in library.variants if variant.status == "failed"]
        found += [f"layer {v.layer} {v.subblock} {v.variant}: {v.reason or 'failed'}" for v in failed]
    elif len({v.part for v in library.variants} - {BLOCK}) and len(crossed(library)) < len(library.variants):
        found.append("some combinations of subblocks")
    return found
