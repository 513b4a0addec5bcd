"""What every command does before and around its work: the workspace is made ready, a failure is one sentence."""

import contextlib
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import typer

from blocks.errors import PuzzleError, PuzzleFailure, disk_is_full
from blocks.runtime import configure
from tasks.running.at_work import enter
from tasks.running.progress import logged, without_tracebacks


def prepare_workspace(folder: Path) -> None:
    """Make the folder, and see where Prefect records the run: no server to start by hand."""
    try:
        str(folder).encode()
        folder.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        raise PuzzleError(
            f"{str(folder)!r} is not UTF-8, as databases want it: choose another with --workspace."
        ) from None
    except OSError as error:
        raise PuzzleError(f"cannot write to {folder}: {error.strerror}. Choose another with --workspace.") from error
    configure()
    from tasks.running.recording import record

    if elsewhere := record(folder, enter(folder)):
        typer.echo(elsewhere, err=True)


def run_logged(folder: Path, work: Callable[[], str]) -> str:
    """Run with a log file in the workspace; a failure is one sentence, the traceback goes to the log."""
    with logged(folder) as log, without_tracebacks():
        try:
            return work()
        except KeyboardInterrupt:
            typer.echo("stopped; run the same command again to go on where it stopped", err=True)
            raise SystemExit(130) from None
        except PuzzleError as error:
            if not isinstance(error, PuzzleFailure):
                raise
            raise _failed(log, error) from error
        except Exception as error:
            raise _failed(log, error) from error


def kept_in_mlflow(log: Callable[[], str | None]) -> None:
    """Keep printed figures in MLflow, and say where. They are printed already, so it is no failure if that fails."""
    from tasks.operating.experiment import mlflow_error

    try:
        page = log()
    except (PuzzleError, mlflow_error()) as error:
        page = f"not kept, MLflow did not take it: {error}"
    if page:
        typer.echo(f"in MLflow: {page}", err=True)


def _failed(log: Path, error: Exception) -> SystemExit:
    """Traceback to the log, a sentence to the console."""
    with contextlib.suppress(OSError), log.open("a") as file:  # the disk may be full
        file.write("".join(traceback.format_exception(error)))
    again = shlex.join(["puzzle", *sys.argv[1:]])
    told = f"{type(error).__name__}: {error}"
    if disk_is_full(error):
        told = f"no space left on the disk of {log.parent}: free some, or move the workspace to a larger one"
    typer.echo(f"puzzle failed: {told}", err=True)
    typer.echo(f"The log is {log}. Finished work is kept; to go on: {again}", err=True)
    return SystemExit(1)
