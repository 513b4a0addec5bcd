"""`puzzle report`: one self-contained HTML page of a choice from a library, and of the run behind it."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blocks.errors import PuzzleError
from flows.search import asked

if TYPE_CHECKING:
    from blocks.records import ChildReport


def report(
    values: dict[str, Any],
    workspace: Annotated[
        Path | None, typer.Argument(metavar="[WORKSPACE]", help="a run: its library, budget, children")
    ] = None,
    over: Annotated[str | None, typer.Option("--over", help="what is on the front's axis [what binds most]")] = None,
    points: Annotated[int, typer.Option("--points", min=2, max=1000, help="limits on the front")] = 20,
    draws: Annotated[int, typer.Option("--draws", min=2, max=100_000, help="bootstrap draws, at most")] = 200,
    study: Annotated[
        Path | None, typer.Option("--study", metavar="FILE", help="JSON list of {name, predicted, true, true_se}")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="the page")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="every picture as PNG too")] = None,
) -> None:
    """One HTML page: the choice, its certificate, architecture, Pareto front, confidence, prices, the run's table."""
    from tasks.pages.page import Extent, read_truth, truth_of, write_page
    from tasks.pages.run_page import study_of, study_of_run
    from tasks.search.confidence import Draws

    source = values["library"] or workspace
    if source is None:
        raise PuzzleError("name a workspace, or a library with --library PATH.")
    finished = finished_run(workspace) if workspace else None
    opened, request = asked(**{**values, "library": source})
    truth = read_truth(study) if study else truth_of(source if source.is_dir() else source.parent)
    extent = Extent(over=over and over.replace("-", "_"), points=points, draws=Draws(most=draws))
    parts = {"truth": truth, "report": finished}
    if workspace and finished is not None and not values["library"] and _asks_nothing(values):
        made = study_of_run(workspace, finished, extent, truth)
    else:
        made = study_of(source, opened, request, extent, **parts)
    for file in write_page(made, out, png):
        typer.echo(f"wrote {file}")


def _asks_nothing(values: dict[str, Any]) -> bool:
    """True when no budget and no constraint was given: the page is then about the run's own choice."""
    defaults = inspect.signature(asked).parameters
    return all(value in (None, defaults[name].default) for name, value in values.items() if name != "library")


def finished_run(workspace: Path) -> "ChildReport | None":
    """The report of the last finished run of a workspace, None where there is none."""
    reports = sorted(workspace.glob("runs/*/report.json"), key=lambda path: path.stat().st_mtime)
    if not reports:
        return None
    from blocks.library import read_value
    from blocks.records import ChildReport

    return read_value(reports[-1], ChildReport)


def _command() -> Any:
    """`report` with the options of `asked`, where the library need not be named."""
    shared = list(inspect.signature(asked).parameters.values())
    own = list(inspect.signature(report).parameters.values())[1:]

    def report_command(**values: Any) -> None:
        report({one.name: values.pop(one.name) for one in shared}, **values)

    told: Any = report_command
    optional = [one.replace(default=None, annotation=_or_none(one)) if one.name == "library" else one for one in shared]
    told.__doc__ = report.__doc__
    told.__signature__ = inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own[:1], *optional, *own[1:]]]
    )
    told.__annotations__ = {one.name: one.annotation for one in [*own, *optional]}
    return told


def _or_none(library: inspect.Parameter) -> Any:
    (option,) = library.annotation.__metadata__
    return Annotated[Path | None, option]


report_command = _command()
