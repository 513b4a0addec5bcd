"""The command line: `puzzle optimize | validate | show | choose | explain | sweep | confidence | peers | check`.

Exit code 0: done. 2: the input is wrong, one sentence, no traceback. 1: something failed; what, where the log is, how
to go on. Heavy imports happen inside commands, after the process is configured.
"""

import errno
import os
from pathlib import Path
from typing import Annotated

import typer

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.runtime import configure
from flows import library, page, plan, search, serving, truth
from flows.doctor import doctor_command
from flows.in_workspace import prepare_workspace, run_logged
from flows.serve import serve_command
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import Profile

# what is wrong with a path that somebody named, wherever it is first looked at
PATH_FAULTS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
ProfileFile = Annotated[Path, typer.Argument(metavar="PROFILE", help="a profile (YAML), e.g. profiles/tiny.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH.TO.KEY=VALUE", help="override a field of the profile")
]
WorkspaceOption = Annotated[
    Path | None, typer.Option("--workspace", metavar="DIR", help="where everything is kept [workspace/<profile name>]")
]


@app.command()
def optimize(profile: ProfileFile, workspace: WorkspaceOption = None, set_: Overrides = None) -> None:
    """Make a faster child of the profile's parent. Run again after a crash: finished work is kept."""
    wanted = load_profile(profile, set_ or [])
    folder = (workspace or Path("workspace") / wanted.name).resolve()
    prepare_workspace(folder)
    report = run_logged(folder, lambda: _optimize(wanted, folder))
    typer.echo(f"child: {report}")


def _optimize(profile: Profile, folder: Path) -> str:
    from flows.optimize import run_optimize

    return str(folder / run_optimize(profile, folder).child_folder)


@app.command()
def reoptimize(
    profile: ProfileFile,
    workspace: WorkspaceOption = None,
    set_: Overrides = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="measure the costs again first")] = False,
) -> None:
    """Make a challenger if anything changed, compare it with the champion, move the alias if it is better."""
    wanted = load_profile(profile, set_ or [])
    folder = (workspace or Path("workspace") / wanted.name).resolve()
    prepare_workspace(folder)
    typer.echo(run_logged(folder, lambda: _reoptimize(wanted, folder, remeasure)))


def _reoptimize(profile: Profile, folder: Path, remeasure: bool) -> str:
    from flows.reoptimize import run_reoptimize

    return run_reoptimize(profile, folder, remeasure).outcome


@app.command()
def rollback(profile: ProfileFile, workspace: WorkspaceOption = None, set_: Overrides = None) -> None:
    """Give the alias `champion` back to the version that had it before."""
    from tasks.operating import registry
    from tasks.operating.experiment import open_experiment
    from tasks.operating.reach import check_servers

    wanted = load_profile(profile, set_ or [])
    folder = (workspace or Path("workspace") / wanted.name).resolve()
    prepare_workspace(folder)
    check_servers()
    left, now = registry.rollback(open_experiment(wanted, folder), registry.model_name(wanted.name))
    typer.echo(f"champion of {now.name}: version {now.version} again, instead of {left.version}")


@app.command()
def validate(profile: ProfileFile, set_: Overrides = None) -> None:
    """Check a profile, and that this machine has what it needs, without downloading or computing anything."""
    from tasks.operating.requirements import advice, check_machine

    wanted = load_profile(profile, set_ or [])
    check_machine(wanted)
    for line in advice(wanted):
        typer.echo(line, err=True)
    typer.echo(f"{profile}: a valid profile named {wanted.name!r}")


@app.command()
def show(workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="the folder of a run")]) -> None:
    """Print the table of the last finished run of a workspace."""
    configure()
    report = page.finished_run(workspace)
    if report is None:
        raise PuzzleError(
            f"{workspace} holds no finished run; start one with `puzzle optimize PROFILE --workspace {workspace}`"
        )
    from tasks.pages.report import print_report
    from tasks.running.progress import wide_console

    print_report(report, wide_console())
    typer.echo(f"child: {workspace.resolve() / report.child_folder}")


for name, command in (*search.commands(), *truth.commands(), *plan.commands(), *serving.commands()):
    app.command(name)(command)
app.command("doctor")(doctor_command)
app.command("serve")(serve_command)
app.command("report")(page.report_command)
app.add_typer(library.app, name="library")


def main() -> None:
    """Entry point of the `puzzle` command."""
    try:
        app()
    except (ProfileError, PuzzleError) as error:
        typer.echo(f"puzzle: {error}", err=True)
        raise SystemExit(1 if isinstance(error, PuzzleFailure) else 2) from None
    except OSError as error:
        if error.errno not in PATH_FAULTS or not error.filename:
            raise
        name = os.fsdecode(error.filename)
        told = name if len(name) < 200 else f"{name[:80]}...{name[-20:]}"
        typer.echo(f"puzzle: {told}: {error.strerror}; name another path", err=True)
        raise SystemExit(2) from None
