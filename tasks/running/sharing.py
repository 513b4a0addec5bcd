"""Several runs on one workspace: a thing is made by one of them, the others wait for it or go on with what is free.

Every lock is the operating system's (flock), so a process that dies, by kill -9 too, lets go of it at once: there is no
stale lock. The files stay, empty, under `locks/`; beside each lies who is at work, so that the next one can tell when
somebody died there. On NFS this holds for version 4 (and 3 with lockd), on Linux; two
machines that share the blocks through an object store have no lock between them: both may train the same variant, and
store the same block.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from filelock import FileLock, Timeout

from blocks.records import Value
from tasks.running.progress import say

POLL_SECONDS = 0.1
SIGNED = ".by"


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
    whether the thing is there. One who takes over from a process that died says so.
    """
    lock = _lock(workspace, piece.key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for {piece.what}: another process is at work on it")
        lock.acquire()
    try:
        with _signed(workspace, piece):
            yield
    finally:
        lock.release()


@contextmanager
def _signed(workspace: Path, piece: Piece) -> Iterator[None]:
    """A file that says who is at work on a piece. One that is there already is of a process that never left."""
    path = workspace / "locks" / f"{piece.key}{SIGNED}"
    with suppress(FileNotFoundError):
        say(f"{path.read_text() or 'a process'} died at work on {piece.what}: it is taken up again")
    with suppress(OSError):  # a full disk: whoever writes what matters will tell
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


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
            say(f"waiting for {pieces[waiting[0]].what}: another process is at work on it")
        try:
            index = done.get(timeout=2 * POLL_SECONDS if len(running) < at_a_time else None)
        except Empty:
            time.sleep(0)
            continue
        yield index, running.pop(index)
