"""`puzzle report`: one self-contained HTML page of a choice from a library, and of the run behind it."""

from pathlib import Path
from typing import Annotated

import typer

from blocks.errors import PuzzleError
from blocks.library import read_value
from blocks.records import ChildReport
from flows.search import (
    BatchSize,
    Forbid,
    Memory,
    Metric,
    Params,
    Robust,
    Runtime,
    ScenarioName,
    Types,
    _request,
)
from tasks.interchange import open_library
from tasks.joint import JointLibrary, Request
from tasks.page import Extent, Study, read_truth, truth_of, write_page
from tasks.run_page import budget_of_run, study_of, totals_of_run


def report_command(
    workspace: Annotated[
        Path | None, typer.Argument(metavar="[WORKSPACE]", help="a run: its library, budget, children")
    ] = None,
    library: Annotated[
        Path | None, typer.Option("--library", metavar="PATH", help="as in choose [the workspace's]")
    ] = None,
    memory_mib: Memory = None,
    runtime_ms: Runtime = None,
    num_params: Params = None,
    metric: Metric = "kl_div",
    robust: Robust = 0.0,
    max_block_types: Types = None,
    forbid: Forbid = None,
    scenario: ScenarioName = None,
    batch_size: BatchSize = None,
    over: Annotated[str | None, typer.Option("--over", help="the budget on the front's axis [the first given]")] = None,
    points: Annotated[int, typer.Option(min=2, max=1000, help="limits on the front")] = 20,
    draws: Annotated[int, typer.Option(min=2, max=100_000, help="bootstrap draws")] = 200,
    study: Annotated[
        Path | None, typer.Option("--study", metavar="FILE", help="JSON list of {name, predicted, true, true_se}")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="the page")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="every picture as PNG too")] = None,
) -> None:
    """One HTML page: the choice, its certificate, architecture, Pareto front, confidence, prices, the run's table."""
    source = library or workspace
    if source is None:
        raise PuzzleError("name a workspace, or a library with --library PATH.")
    report = finished_run(workspace) if workspace else None
    budgets = {"memory_mib": memory_mib, "runtime_ms": runtime_ms, "num_params": num_params}
    fields = {"metric": metric, "robust": robust, "max_block_types": max_block_types, "forbid": tuple(forbid or ())}
    if report is not None and not any(budgets.values()):
        chosen = totals_of_run(report, scenario, batch_size)
        opened = open_library(source, chosen.scenario, chosen.batch_size)
        request = budget_of_run(chosen, fields)
    else:
        opened = open_library(source, scenario, batch_size)
        request = _request(opened, budgets, **fields)
    extent = Extent(over=over and over.replace("-", "_"), points=points, draws=draws)
    made = _study(source, opened, request, extent, report, study)
    for file in write_page(made, out, png):
        typer.echo(f"wrote {file}")


def _study(
    source: Path,
    opened: JointLibrary,
    request: Request,
    extent: Extent,
    report: ChildReport | None,
    truth: Path | None,
) -> Study:
    points = read_truth(truth) if truth else truth_of(source if source.is_dir() else source.parent)
    return study_of(source, opened, request, extent, truth=points, report=report)


def finished_run(workspace: Path) -> ChildReport | None:
    """The report of the last finished run of a workspace."""
    reports = sorted(workspace.glob("runs/*/report.json"), key=lambda path: path.stat().st_mtime)
    return read_value(reports[-1], ChildReport) if reports else None
