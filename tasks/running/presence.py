"""Who is at work in a workspace. Each run has a place of its own there, numbered; the first free one is taken.

A place is a lock of the operating system, given back when its process dies. It also names the folder of the Prefect
server that a run starts for itself: two servers on one SQLite file would fight over it.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout


@dataclass
class _Place:
    """A place of this process, and how many of its blocks are within it; `kept` beyond them."""

    number: int
    lock: FileLock
    blocks: int = 0
    kept: bool = False


ENTRANCE = ".lock-entrance"
_HELD: dict[Path, _Place] = {}
_CHANGING = threading.RLock()


def _entrance(workspace: Path) -> FileLock:
    return FileLock(workspace / ENTRANCE)


def _lock(workspace: Path, number: int) -> FileLock:
    return FileLock(workspace / (".lock" if number == 1 else f".lock-{number}"), thread_local=False)


def place_in(workspace: Path) -> int:
    """The number of this process's place, 1 for the first run at work; held until `leave` or the end of the process.

    The first to come clears what killed runs left half-written, before anybody else may enter.
    """
    with _CHANGING:
        place = _entered(workspace.resolve())
        place.kept = True
    return place.number


def _entered(workspace: Path) -> _Place:
    if workspace in _HELD:
        return _HELD[workspace]
    with _entrance(workspace):
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
    _HELD[workspace] = _Place(number, lock)
    return _HELD[workspace]


def leave(workspace: Path) -> None:
    """Give back the place of `place_in`; blocks of `at_work_in` that are not at their end keep it as long."""
    with _CHANGING:
        place = _HELD.get(workspace.resolve())
        if place is not None:
            place.kept = False
            _give_back(workspace.resolve(), place)


def _give_back(workspace: Path, place: _Place) -> None:
    if not place.kept and not place.blocks:
        del _HELD[workspace]
        place.lock.release()


@contextmanager
def at_work_in(workspace: Path) -> Iterator[int]:
    """A place in the workspace for the length of the block; within another block of this process, the same one."""
    workspace = workspace.resolve()
    with _CHANGING:
        place = _entered(workspace)
        place.blocks += 1
    try:
        yield place.number
    finally:
        with _CHANGING:
            place.blocks -= 1
            _give_back(workspace, place)


def others_at_work(workspace: Path) -> bool:
    """True when some process, this one included, has a place there."""
    return any(_is_held(path) for path in _places(workspace))


def _places(workspace: Path) -> list[Path]:
    return [path for path in sorted(workspace.glob(".lock*")) if path.name != ENTRANCE]


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def clear_leftovers(workspace: Path) -> None:
    """Half-written files and folders of killed runs."""
    for leftover in (*workspace.rglob(".*.part"), *workspace.glob("parent/.making-*")):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def prefect_home(workspace: Path, number: int) -> Path:
    """Where the Prefect server that a run starts for itself keeps its state."""
    return workspace / ("prefect" if number == 1 else f"prefect-{number}")
