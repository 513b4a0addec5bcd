"""`puzzle report`: one self-contained HTML page of a choice from a library, and of the run behind it. `puzzle show`:
the table of a finished run.
"""

import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blocks.errors import PuzzleError
from blocks.runtime import configure
from flows.options import LibraryOptions, takes
from tasks.search.joint import QUANTITIES

if TYPE_CHECKING:
    from blocks.records import ChildReport


@takes(LibraryOptions)
def report_command(
    asked: LibraryOptions,
    folder: Annotated[Path | None, typer.Argument(metavar="[WORKSPACE]", help="the same as --workspace")] = None,
    over: Annotated[
        str | None,
        typer.Option("--over", help=f"what is on the front's axis: {', '.join(QUANTITIES)} [what binds most]"),
    ] = None,
    points: Annotated[int, typer.Option("--points", min=2, max=1000, help="limits on the front")] = 20,
    draws: Annotated[int, typer.Option("--draws", min=2, max=100_000, help="bootstrap draws, at most")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="time for the draws, at most")] = 60,
    study: Annotated[
        Path | None, typer.Option("--study", metavar="FILE", help="JSON list of {name, predicted, true, true_se}")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="the page")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="every picture as PNG too")] = None,
) -> None:
    """One HTML page: the choice, its certificate, architecture, Pareto front, confidence, prices, the run's table."""
    from tasks.pages.page import Extent, read_truth, truth_of, write_page
    from tasks.pages.run_page import clock, study_of, study_of_run
    from tasks.search.confidence import Draws

    asked = replace(asked, workspace=asked.workspace or folder)
    source = asked.source
    finished = finished_run(asked.workspace) if asked.workspace else None
    truth = read_truth(study) if study else truth_of(source if source.is_dir() else source.parent)
    drawing = Draws(most=draws, seconds=seconds)
    extent = Extent(over=over and over.replace("-", "_"), points=points, draws=drawing)
    opened, request = asked.open()
    if asked.workspace and finished is not None and not asked.library and asked.asks_nothing():
        made = study_of_run(asked.workspace, finished, extent, truth)
    else:
        made = study_of(source, opened, request, extent, truth=truth, made=(("library", str(source.resolve())),))
    now = clock(datetime.now(UTC).isoformat())
    told = (*made.made, ("this page", f"{now}, {shlex.join(['puzzle', *sys.argv[1:]])}"))
    for file in write_page(replace(made, made=told), out, png):
        typer.echo(f"wrote {file}")


def show_command(
    folder: Annotated[Path | None, typer.Argument(metavar="[WORKSPACE]", help="the same as --workspace")] = None,
    workspace: Annotated[Path | None, typer.Option("--workspace", metavar="DIR", help="the folder of a run")] = None,
) -> None:
    """Print the table of the last finished run of a workspace."""
    configure()
    place = workspace or folder
    if place is None:
        raise PuzzleError("name the folder of a run with --workspace DIR.")
    report = finished_run(place)
    if report is None:
        below = sorted({str(path.parents[2]) for path in place.glob("*/runs/*/report.json")})
        named = f"name one of the workspaces below it: {', '.join(below)}"
        start = f"start one: `puzzle optimize PROFILE --workspace {place}`"
        raise PuzzleError(f"{place} holds no finished run; {named if below else start}")
    from tasks.pages.report import print_report
    from tasks.running.progress import wide_console

    print_report(report, wide_console())
    typer.echo(f"child: {place.resolve() / report.child_folder}")


def finished_run(workspace: Path) -> "ChildReport | None":
    """The report of the last finished run of a workspace, None where there is none."""
    reports = sorted(workspace.glob("runs/*/report.json"), key=lambda path: path.stat().st_mtime)
    if not reports:
        return None
    from blocks.library import read_value
    from blocks.records import ChildReport

    return read_value(reports[-1], ChildReport)
