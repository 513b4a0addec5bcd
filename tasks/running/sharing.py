"""Several runs on one workspace: each thing is made by one of them, and the others wait until it is there. What one
run uses, no other takes away.

Every lock is the operating system's (flock), so a process that dies, by kill -9 too, lets go of it at once: there is no
stale lock. The files stay, empty, under `locks/`. Beside each lies a file that says who is at work, so that the next
one can tell when somebody died there. On NFS this holds for version 4 (and 3 with lockd), on Linux. Two
machines that share the blocks through an object store have no lock between them: both may train the same variant, and
store the same block.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from blocks.records import Value
from tasks.running.progress import say

POLL_SECONDS = 0.1
SIGNED = ".by"


class TaskKey(Value):
    """What a task makes: the content key of it, and in words."""

    key: str
    what: str


def _folder(workspace: Path) -> Path:
    folder = workspace / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lock(workspace: Path, key: str) -> FileLock:
    return FileLock(_folder(workspace) / f"{key}.lock", poll_interval=POLL_SECONDS)


@contextmanager
def exclusive(workspace: Path, task: TaskKey) -> Iterator[None]:
    """Only one process at a time is inside for a key. A second one says what it waits for, and whoever takes over from
    a process that died says so. The code inside asks first whether the thing is there by now.
    """
    lock = _lock(workspace, task.key)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for {task.what}: another process is at work on it")
        lock.acquire()
    try:
        with _signed(workspace, task):
            yield
    finally:
        lock.release()


@contextmanager
def _signed(workspace: Path, task: TaskKey) -> Iterator[None]:
    """A file that says who is at work on it. One that is there already is of a process that died."""
    path = workspace / "locks" / f"{task.key}{SIGNED}"
    with suppress(FileNotFoundError):
        say(f"{path.read_text() or 'a process'} died at work on {task.what}: it is taken up again")
    with suppress(OSError):  # a full disk: whoever writes what matters will report it
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def try_exclusive(workspace: Path, key: str) -> Iterator[bool]:
    """True for the length of the block if no other run is inside for this key. The others get False at once."""
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


@contextmanager
def in_use(workspace: Path, key: str) -> Iterator[None]:
    """No run takes the thing away (`unused`) for the length of the block. Any number of runs may be inside."""
    with _users(workspace, key) as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        yield


@contextmanager
def unused(workspace: Path, key: str) -> Iterator[bool]:
    """True for the length of the block if no run uses the thing. One that is about to use it waits until the end."""
    with _users(workspace, key) as users:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _users(workspace: Path, key: str) -> IO[str]:
    return (_folder(workspace) / f"{key}.users").open("a+")  # on NFS: readable to share, writable to have it alone
