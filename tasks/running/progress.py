"""Progress and ETA of a stage: a live bar on a terminal, a line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich import progress as rich_progress
from rich.console import Console

LINE_EVERY_SECONDS = 10.0


class Progress(Protocol):
    """Whoever does a long piece of work calls this after each step. `text` says what was done last."""

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` steps are finished."""


def no_progress(done: int, total: int, text: str = "") -> None:
    """The `Progress` of work that nobody watches."""


def part_of(progress: Progress, part: int, parts: int) -> Progress:
    """The `Progress` of one of several equal parts: its steps are reported as steps of the whole."""

    def report(done: int, total: int, text: str = "") -> None:
        progress(part * total + done, parts * total, text)

    return report


def in_percent(progress: Progress, what: str) -> Progress:
    """The `Progress` of a piece of work that has far more steps than the others of a stage: they count 100 in all."""

    def report(done: int, total: int, text: str = "") -> None:
        progress(100 * done // total, 100, f"{what}: {text}")

    return report


class Stage:
    """One stage on the console. Use as a context manager; call with (done, total, text)."""

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.console = name, console
        self.started = self.last = time.monotonic()
        self.live: rich_progress.Progress | None = None
        self.done = 0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = rich_progress.Progress(
                rich_progress.TextColumn("{task.description:<12}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("ETA"),
                rich_progress.TimeRemainingColumn(),
                rich_progress.TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.live.start()
            self.bar = self.live.add_task(self.name, total=None, text="")
        return self

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """See `Progress`."""
        self.done = done
        now = time.monotonic()
        if self.live is not None:
            self.live.update(self.bar, completed=done, total=total, text=text)
        elif done < total and now - self.last >= LINE_EVERY_SECONDS:
            left = (now - self.started) / max(done, 1) * (total - done)
            self.console.print(f"{self.name:<12} {done}/{total}  ETA {clock(left)}  {text}".rstrip(), highlight=False)
            self.last = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        if kind is None:
            took = clock(time.monotonic() - self.started)
            self.console.print(f"{self.name:<12} done in {took}", highlight=False)


def clock(seconds: float) -> str:
    """1:05, or 2:01:05 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for the table."""
    return Console(soft_wrap=True) if sys.stdout.isatty() else Console(soft_wrap=True, width=160)


def say(text: str) -> None:
    """A line for the person at the console, and for the log: a served run has no console that anybody sees."""
    wide_console().print(text, highlight=False, markup=False)
    logging.getLogger("puzzle").info(text)


class _QuietHandler(logging.FileHandler):
    """A log file that prints no traceback when a line cannot be written, as on a full disk.

    flows/in_workspace.py says in a sentence that the disk is full.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


@contextmanager
def without_tracebacks() -> Iterator[None]:
    """Failures that Prefect and MLflow log keep their sentence on the console; the traceback is written to the log."""
    loggers = [logging.getLogger(name) for name in ("prefect.task_runs", "prefect.flow_runs", "mlflow.store.db.utils")]
    for logger in loggers:
        logger.addFilter(_without_traceback)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_without_traceback)


@contextmanager
def logged(folder: Path) -> Iterator[Path]:
    """Whatever is logged within the block goes to `puzzle.log` of a workspace too."""
    log = folder / "puzzle.log"
    handler = _QuietHandler(log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield log
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


@contextmanager
def shown(name: str, beside: bool = False) -> Iterator[Stage]:
    """Show a stage on standard output; `beside`: on standard error, where the output is an answer."""
    with Stage(name, Console(file=sys.stderr if beside else sys.stdout, soft_wrap=True)) as bar:
        yield bar
