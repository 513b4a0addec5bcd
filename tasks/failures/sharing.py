"""Several runs on one workspace: a thing is made by one of them, the others wait for it or go on with what is free.

Every lock is the operating system's (flock), so a process that dies, by kill -9 too, lets go of it at once: there is no
stale lock. The files stay, empty, under `locks/`. On NFS this holds for version 4 (and 3 with lockd), on Linux; two
machines that share the blocks through an object store have no lock between them: both may train the same variant, and
store the same block.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from filelock import FileLock, Timeout

from blocks.records import Value
from tasks.progress import say

POLL_SECONDS = 0.1


class Piece(Value):
    """Something that one run makes for all: the content key of it, and what it is in words."""

    key: str
    what: str


def _lock(workspace: Path, key: str) -> FileLock:
    folder = workspace / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{key}.lock", poll_interval=POLL_SECONDS)


@contextmanager
def made_once(workspace: Path, piece: Piece) -> Iterator[None]:
    """Only one process at a time is inside for a key; a second one says what it waits for. What is inside looks first
    whether the thing is there.
    """
    lock = _lock(workspace, piece.key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for {piece.what}: another run is making it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def alone(workspace: Path, key: str) -> Iterator[bool]:
    """True for the length of the block where no other run is inside for this key; False for the others, at once."""
    lock = _lock(workspace, key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def being_made(workspace: Path, piece: Piece) -> bool:
    """True while another task or run is inside `made_once` for this key."""
    lock = _lock(workspace, piece.key)
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def in_turn(
    pieces: Sequence[Piece], submit: Callable[[int], Any], workspace: Path, at_a_time: int
) -> Iterator[tuple[int, Any]]:
    """Submit every piece, so many at a time, first those that no other run is making; (index, future) as each is done.

    `submit` takes an index and gives a Prefect future, whose task is inside `made_once` while it works.
    """
    waiting, done = list(range(len(pieces))), SimpleQueue[int]()
    running: dict[int, Any] = {}
    told: set[int] = set()
    while waiting or running:
        free = (index for index in list(waiting) if not being_made(workspace, pieces[index]))
        while len(running) < at_a_time and (index := next(free, None)) is not None:
            waiting.remove(index)
            running[index] = submit(index)
            running[index].add_done_callback(lambda _, index=index: done.put(index))
        if not running and waiting[0] not in told:
            told.add(waiting[0])
            say(f"waiting for {pieces[waiting[0]].what}: another run is making it")
        try:
            index = done.get(timeout=2 * POLL_SECONDS if len(running) < at_a_time else None)
        except Empty:
            time.sleep(0)
            continue
        yield index, running.pop(index)
