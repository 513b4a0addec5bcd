"""The page of a finished run: the choice from its own library within what its own architecture takes."""

from pathlib import Path
from typing import Any

from blocks.records import ChildReport
from tasks.libraries.exchange import Summary, summarise
from tasks.libraries.interchange import open_library
from tasks.pages.page import Extent, Study, study_choice, truth_of, write_page
from tasks.search.joint import JointLibrary
from tasks.search.request import Limit, Request

IN_A_RUN = Extent(points=12, draws=40)  # seconds, not minutes, at 30 layers


def write_run_page(workspace: Path, report: ChildReport, target: Path) -> list[Path]:
    """Write the page at the end of a run; its library is the one of the report's profile."""
    tables = workspace / "tables" / report.profile
    opened = open_library(tables, batch_size=batch_of_run(report))
    request = Request(limits=limits_of_run(report))
    return write_page(study_of(tables, opened, request, IN_A_RUN, truth=truth_of(workspace), report=report), target)


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
    places = [f"{place.scenario or 'one scenario'}, batch {place.batch_size}" for place in opened.places]
    hardware = ", ".join(f"{name} {value}" for name, value in described.hardware.items())
    return (
        ("source", described.source),
        ("parent", described.parent or "not named"),
        ("layers", f"{described.layers}, each with {per_layer} variants of its block"),
        ("costs at", "; ".join(places)),
        ("hardware", hardware or "not named"),
    )


def batch_of_run(report: ChildReport) -> int | None:
    """The batch size that the run chose in all its scenarios, None where they differ."""
    sizes = {totals.batch_size for totals in report.architecture.totals}
    return sizes.pop() if len(sizes) == 1 else None


def limits_of_run(report: ChildReport) -> tuple[Limit, ...]:
    """No more memory and runtime in any scenario, and no more parameters, than the run's architecture takes."""
    slack = 1 + 1e-6  # the same sums in another order
    every = report.architecture.totals
    found = []
    for totals in every:
        scenario = totals.scenario if len(every) > 1 else None
        for quantity, value in (
            ("memory_mib", totals.memory_bytes / 2**20),
            ("runtime_ms", 1000 * totals.runtime_seconds),
        ):
            name = f"{quantity} of {scenario}" if scenario else quantity
            found.append(Limit(quantity=quantity, asked=value * slack, scenario=scenario, name=name))
    parameters = float(every[0].parameters) * slack
    return (*found, Limit(quantity="num_params", asked=parameters, name="num_params"))
