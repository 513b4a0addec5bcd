"""What happens when a task fails: it is tried again after a while, or the run ends with a sentence. Its time limit."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.task_engine import TaskRunTimeoutError

from blocks.errors import PuzzleFailure
from tasks.running.memory import out_of_memory
from tasks.running.progress import say

# asking again finds the same: a wrong path stays wrong
_SETTLED = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class TookTooLong(PuzzleFailure):
    """A task that ran into the profile's time limit."""


def worth_retrying(_task: Any, _run: Any, state: Any) -> bool:
    """Retry what may pass (disk, memory, network); a user's mistake, a bug or a time limit fails at once.

    Out of memory has been tried in smaller parts by then (tasks/running/memory.py): other processes may give some
    back.
    """
    try:
        state.result()
    except (TaskRunTimeoutError, *_SETTLED):
        return False
    except Exception as error:
        return isinstance(error, OSError | TimeoutError) or out_of_memory(error)
    except BaseException:
        return False
    return False


class _Away(logging.Filter):
    """Prefect's events that reach nobody, as one sentence instead of a page for each."""

    def __init__(self) -> None:
        super().__init__()
        self.reported = False

    def filter(self, record: logging.LogRecord) -> bool:
        """False for what the sentence stands for."""
        if record.levelno < logging.WARNING:
            return True
        if not self.reported:
            self.reported = True
            say("Prefect's server does not answer: the run goes on, what its UI shows of this run will have gaps")
        return False


@contextmanager
def one_line_when_prefect_is_away() -> Iterator[None]:
    """Within the block, a Prefect server that does not answer is reported once, in one line."""
    away = _Away()
    names = ("prefect.events.clients", "prefect._internal.concurrency", "websockets.client")
    for name in names:
        logging.getLogger(name).addFilter(away)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(away)


@contextmanager
def time_limit_in_words(stage: str) -> Iterator[None]:
    """A task's time limit as a sentence that says what to do. Prefect's own names neither the stage nor the setting."""
    try:
        yield
    except TaskRunTimeoutError as error:
        seconds = str(error).removeprefix("Scope timed out after ").partition(" second")[0]
        raise TookTooLong(
            f"a task of the stage {stage!r} took longer than orchestration.task_timeout allows ({seconds} s): "
            "raise it, or make the task smaller (fewer steps or sequences); what is finished is kept"
        ) from error
