"""The page of a finished run: the choice from its own library within what its own architecture takes."""

from pathlib import Path
from typing import Any

from blocks.errors import PuzzleError
from blocks.records import ChildReport, Totals
from tasks.exchange import Summary, summarise
from tasks.interchange import open_library
from tasks.joint import JointLibrary, Request
from tasks.page import Extent, Study, study_choice, truth_of, write_page

IN_A_RUN = Extent(points=12, draws=40)  # seconds, not minutes, at 30 layers


def write_run_page(workspace: Path, report: ChildReport, target: Path) -> list[Path]:
    """Write the page at the end of a run; its library is the one of the report's profile."""
    tables = workspace / "tables" / report.profile
    totals = totals_of_run(report)
    opened = open_library(tables, totals.scenario, totals.batch_size)
    request = budget_of_run(totals, {})
    study = study_of(tables, opened, request, IN_A_RUN, truth=truth_of(workspace), report=report)
    return write_page(study, target)


def study_of(source: Path, opened: JointLibrary, request: Request, extent: Extent, **parts: Any) -> Study:
    """A choice from the library at `source`, which is open at one place, with what the page says of the library."""
    described = summarise(source)
    report: ChildReport | None = parts.get("report")
    title = f"{report.profile}: a child of {report.parent.name}" if report else f"A choice from {source.name}"
    facts = facts_of(described, opened)
    return study_choice(title, opened, request, extent, facts=facts, missing=described.missing, **parts)


def facts_of(described: Summary, opened: JointLibrary) -> tuple[tuple[str, str], ...]:
    """What the page says of the library, by name."""
    least, most = described.options_per_layer
    per_layer = str(least) if least == most else f"{least} to {most}"
    at = [
        f"{name.replace('_', ' ')} {opened.measured[name]}"
        for name in ("scenario", "batch_size")
        if name in opened.measured
    ]
    hardware = ", ".join(f"{name} {value}" for name, value in described.hardware.items())
    return (
        ("source", described.source),
        ("parent", described.parent or "not named"),
        ("layers", f"{described.layers}, each with {per_layer} variants of its block"),
        ("costs at", ", ".join(at) or "one scenario"),
        ("hardware", hardware or "not named"),
    )


def totals_of_run(report: ChildReport, scenario: str | None = None, batch_size: int | None = None) -> Totals:
    """What the run's architecture was predicted to take, at the scenario named or its first."""
    every = report.architecture.totals
    fitting = [t for t in every if scenario in (None, t.scenario) and batch_size in (None, t.batch_size)]
    if not fitting:
        places = ", ".join(f"{totals.scenario} at batch size {totals.batch_size}" for totals in every)
        raise PuzzleError(f"the run chose its architecture at {places}: name one of these, or budgets of your own.")
    return fitting[0]


def budget_of_run(totals: Totals, fields: dict[str, Any]) -> Request:
    """No more memory, runtime and parameters than the architecture that the run chose."""
    slack = 1 + 1e-6  # the same sums in another order
    limits = {
        "memory_mib": totals.memory_bytes / 2**20,
        "runtime_ms": 1000 * totals.runtime_seconds,
        "num_params": float(totals.parameters),
    }
    return Request.model_validate({**fields, **{name: limit * slack for name, limit in limits.items()}})
