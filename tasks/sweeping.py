"""Budgets as a person gives them, and the front over one of them: what `puzzle sweep` and the deployment share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from blocks.errors import PuzzleError
from blocks.records import Value
from tasks.interchange import open_library
from tasks.joint import JointLibrary, LibraryFileError, Request, sweep


class Point(Value):
    """The best child at one limit; figures are None where nothing fits."""

    limit: float
    status: str
    objective: float | None = None
    memory_mib: float | None = None
    runtime_ms: float | None = None
    num_params: float | None = None


def sweep_library(
    folder: Path,
    over: str,
    points: int,
    budgets: Mapping[str, str | None],
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """The front over one budget on the library of a workspace, the other budgets kept."""
    library = open_library(folder)
    limits = limits_between(library, over, points)
    request = request_for(library, {**budgets, over: str(limits[0])})
    found = sweep(library, request, over, limits, tell)
    figures = ("status", "objective", "memory_mib", "runtime_ms", "num_params")
    return [
        Point(limit=limit, **{name: getattr(choice, name) for name in figures})
        if choice
        else Point(limit=limit, status="infeasible")
        for limit, choice in zip(limits, found, strict=True)
    ]


def limits_between(library: JointLibrary, name: str, points: int) -> list[float]:
    """Evenly spaced from the sum of every layer's cheapest to that of its dearest variant."""
    costs = {layer: [o.costs.get(name, 0.0) for o in library.options if o.layer == layer] for layer in library.layers}
    fixed = library.fixed.get(name, 0.0)
    low, high = fixed + sum(map(min, costs.values())), fixed + sum(map(max, costs.values()))
    low = max(low, high * 1e-6)
    if not high:
        raise LibraryFileError(f"nothing in the library takes any {name}: sweep over another budget.")
    return [low + (high - low) * i / (points - 1) for i in range(points)]


def request_for(library: JointLibrary, budgets: Mapping[str, str | None], **fields: Any) -> Request:
    """A request with budgets as text: a number, or a share of the parent such as 80%."""
    fields |= {name: _limit(library, name, text) for name, text in budgets.items() if text is not None}
    try:
        return Request(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise PuzzleError(f"{_flag(first['loc'][0])}: {first['msg'][0].lower()}{first['msg'][1:]}.") from None


def _limit(library: JointLibrary, name: str, text: str) -> float:
    share = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        raise PuzzleError(f"{_flag(name)}: a number, or one with % of the parent's, not {text!r}.") from None
    if not 0 < value < float("inf"):
        raise PuzzleError(f"{_flag(name)}: a finite number greater than 0, not {text}.")
    return value / 100 * library.of_parent(name) if share else value


def _flag(name: Any) -> str:
    return f"--{str(name).replace('_', '-')}"
