"""Who is at work in a workspace. Every process that works there has a number, the lowest that is free.

A number is a lock of the operating system, given back when its process dies. It also names the folder of the Prefect
server that a run starts for itself, because two servers on one SQLite file would disturb each other.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout


@dataclass
class _Holder:
    """The number of this process, its lock, how many blocks of `at_work_in` are inside, and whether it stays after."""

    number: int
    lock: FileLock
    blocks: int = 0
    stays: bool = False


ENTRANCE = ".lock-entrance"
_HELD: dict[Path, _Holder] = {}
_CHANGING = threading.RLock()


def _entrance(workspace: Path) -> FileLock:
    return FileLock(workspace / ENTRANCE)


def _lock(workspace: Path, number: int) -> FileLock:
    return FileLock(workspace / (".lock" if number == 1 else f".lock-{number}"), thread_local=False)


def enter(workspace: Path) -> int:
    """The number of this process, 1 for the first one at work; held until `leave` or the end of the process.

    The first to come clears what killed runs left half-written, before anybody else may enter.
    """
    with _CHANGING:
        holder = _entered(workspace.resolve())
        holder.stays = True
    return holder.number


def _entered(workspace: Path) -> _Holder:
    if workspace in _HELD:
        return _HELD[workspace]
    with _entrance(workspace):
        first, number = not others_at_work(workspace), 1
        while True:
            lock = _lock(workspace, number)
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                number += 1
        if first:
            clear_leftovers(workspace)
    _HELD[workspace] = _Holder(number, lock)
    return _HELD[workspace]


def leave(workspace: Path) -> None:
    """Give back the number of `enter`; blocks of `at_work_in` that have not ended keep it until they do."""
    with _CHANGING:
        holder = _HELD.get(workspace.resolve())
        if holder is not None:
            holder.stays = False
            _give_back(workspace.resolve(), holder)


def _give_back(workspace: Path, holder: _Holder) -> None:
    if not holder.stays and not holder.blocks:
        del _HELD[workspace]
        holder.lock.release()


@contextmanager
def at_work_in(workspace: Path) -> Iterator[int]:
    """The number of this process, for the length of the block; a block within another one gets the same number."""
    workspace = workspace.resolve()
    with _CHANGING:
        holder = _entered(workspace)
        holder.blocks += 1
    try:
        yield holder.number
    finally:
        with _CHANGING:
            holder.blocks -= 1
            _give_back(workspace, holder)


def others_at_work(workspace: Path) -> bool:
    """True when some process, this one included, is at work there."""
    return any(_is_held(path) for path in _lock_files(workspace))


def _lock_files(workspace: Path) -> list[Path]:
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


def number_in(workspace: Path) -> int:
    """The number of this process there; 1 for one that has none."""
    holder = _HELD.get(workspace.resolve())
    return holder.number if holder else 1


def prefect_home(workspace: Path, number: int) -> Path:
    """Where the Prefect server that a run starts for itself keeps its state."""
    return workspace / ("prefect" if number == 1 else f"prefect-{number}")
