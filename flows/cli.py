"""The command line, `puzzle`: every command and what it says when something is wrong.

Exit code 0: done. 2: the input is wrong, one sentence, no traceback. 1: something failed; what, where the log is, how
to go on. Heavy imports happen inside commands, after the process is configured.
"""

import errno
import os
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.runtime import configure
from flows import init, library, page, plan, probe, search, serving, truth
from flows.doctor import doctor_command
from flows.in_workspace import prepare_workspace, run_logged
from flows.options import Overrides, ProfileOptions, ProfilePath, takes
from flows.serve import serve_command
from profiles.errors import ProfileError
from profiles.load import load_profile
from tasks.running.recording import begin_own_server

# what is wrong with a path that somebody named, wherever it is first looked at
PATH_FAULTS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"puzzle {version_of('puzzle')}")
        raise typer.Exit


@app.callback()
def puzzle(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="print it")] = False,
) -> None:
    """puzzle makes a faster child of a pretrained language model: for every layer it trains cheaper variants of
    attention and FFN, and measures what each costs and what each hurts. A solver then chooses one per layer under your
    budget, and the result is distilled as a whole.
    """


@app.command()
@takes(ProfileOptions)
def optimize(given: ProfileOptions) -> None:
    """Make a faster child of the profile's parent. Run again after a crash: finished work is kept."""
    wanted, folder = given.load()
    prepare_workspace(folder)

    def run() -> str:
        begin_own_server()
        from flows.optimize import run_optimize

        return str(folder / run_optimize(wanted, folder).child_folder)

    typer.echo(f"child: {run_logged(folder, run)}")


@app.command()
@takes(ProfileOptions)
def reoptimize(
    given: ProfileOptions,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="measure the costs again first")] = False,
) -> None:
    """Make a challenger if anything changed, compare it with the champion, move the alias if it is better."""
    wanted, folder = given.load()
    prepare_workspace(folder)

    def run() -> str:
        begin_own_server()
        from flows.reoptimize import run_reoptimize

        return run_reoptimize(wanted, folder, remeasure).outcome

    typer.echo(f"outcome: {run_logged(folder, run)}")


@app.command()
@takes(ProfileOptions)
def rollback(given: ProfileOptions) -> None:
    """Give the alias `champion` back to the version that had it before."""
    from tasks.operating import registry
    from tasks.operating.experiment import open_experiment
    from tasks.operating.reach import check_servers

    wanted, folder = given.load()
    prepare_workspace(folder)
    check_servers()
    left, now = registry.rollback(open_experiment(wanted, folder), registry.model_name(wanted.name))
    typer.echo(f"champion of {now.name}: version {now.version} again, instead of {left.version}")


@app.command()
def validate(
    profile: ProfilePath,
    set_: Overrides = None,
) -> None:
    """Check a profile, and that this machine has what it needs, without downloading or computing anything."""
    configure()
    from tasks.operating.requirements import check_profile

    wanted = load_profile(profile, set_ or [])
    for line in check_profile(wanted)[0]:
        typer.echo(line, err=True)
    typer.echo(f"{profile}: a valid profile named {wanted.name!r}")


app.command("show")(page.show_command)
for room in (init, search, truth, plan, serving, probe):
    for name, command in room.commands():
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
        shortened = name if len(name) < 200 else f"{name[:80]}...{name[-20:]}"
        typer.echo(f"puzzle: {shortened}: {error.strerror}; name another path", err=True)
        raise SystemExit(2) from None
