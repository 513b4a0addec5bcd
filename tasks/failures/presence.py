"""Who is at work in a workspace. Each run has a place of its own there, numbered; the first free one is taken.

A place is a lock of the operating system, given back when its process dies. It also names the folder of the Prefect
server that a run starts for itself: two servers on one SQLite file would fight over it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_HELD: dict[Path, tuple[int, FileLock]] = {}


def _lock(workspace: Path, number: int) -> FileLock:
    return FileLock(workspace / (".lock" if number == 1 else f".lock-{number}"), thread_local=False)


def place_in(workspace: Path) -> int:
    """The number of this process's place, 1 for the first run at work; held until `leave` or the end of the process.

    The first to come clears what killed runs left half-written, before anybody else may enter.
    """
    workspace = workspace.resolve()
    if workspace in _HELD:
        return _HELD[workspace][0]
    with FileLock(workspace / ".lock-entrance"):
        alone, number = not others_at_work(workspace), 1
        while True:
            lock = _lock(workspace, number)
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                number += 1
        if alone:
            clear_leftovers(workspace)
    _HELD[workspace] = number, lock
    return number


def leave(workspace: Path) -> None:
    """Give the place back."""
    _, lock = _HELD.pop(workspace.resolve(), (0, None))
    if lock is not None:
        lock.release()


@contextmanager
def at_work_in(workspace: Path) -> Iterator[int]:
    """A place in the workspace for the length of the block."""
    try:
        yield place_in(workspace)
    finally:
        leave(workspace)


def others_at_work(workspace: Path) -> bool:
    """True when some process, this one included, has a place there."""
    for path in sorted(workspace.glob(".lock*")):
        if path.name != ".lock-entrance":
            try:
                with FileLock(path, timeout=0):
                    pass
            except Timeout:
                return True
    return False


def clear_leftovers(workspace: Path) -> None:
    """Half-written files and folders of killed runs."""
    for leftover in (*workspace.rglob(".*.part"), *workspace.glob("parent/.making-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def prefect_home(workspace: Path, number: int) -> Path:
    """Where the Prefect server that a run starts for itself keeps its state."""
    return workspace / ("prefect" if number == 1 else f"prefect-{number}")
