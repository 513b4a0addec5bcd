"""The front over one quantity of a workspace's block library: what the deployment `sweep` runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from blocks.records import Value
from tasks.libraries.interchange import open_library
from tasks.running.progress import say
from tasks.search.request import Request, limit_of
from tasks.search.solve import JointChoice, front, front_values


class SweepPoint(Value):
    """The best child at one limit; figures are None where nothing fits, or where the library does not know."""

    limit: float
    status: str
    score: float | None = None
    memory_gib: float | None = None
    latency_seconds: float | None = None
    parameters: float | None = None


def sweep_library(folder: Path, over: str, points: int, budgets: Mapping[str, str | None]) -> list[SweepPoint]:
    """The front over one quantity on the library of a workspace, the other budgets kept."""
    library = open_library(folder)
    if library.warning:
        say(f"Warning: {library.warning}")
    kept = tuple(limit_of(name, text) for name, text in budgets.items() if text is not None and name != over)
    request = Request(limits=kept)
    values = front_values(library, request, over, points)
    return points_of(values, front(library, request, over, values))


def points_of(values: Sequence[float], found: Sequence[JointChoice | None]) -> list[SweepPoint]:
    """The answers at each limit of a front, without their layers."""
    fields = set(SweepPoint.model_fields) - {"limit"}
    return [
        SweepPoint(limit=value, **choice.model_dump(include=fields))
        if choice
        else SweepPoint(limit=value, status="infeasible")
        for value, choice in zip(values, found, strict=True)
    ]
