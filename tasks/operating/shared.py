"""The store that a run shares with other machines: opened before it works, what moved told at its end."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock

from blocks.files import sha256_of
from blocks.library import keep
from blocks.records import Ref, Value
from blocks.store import StoreError, store_named, store_of, use_store
from tasks.running.progress import say

FILES = "files.json"


class RunFiles(Value):
    """Everything that a finished run left in its folder, the child first of all."""

    files: tuple[Ref, ...]


@contextmanager
def store_used(workspace: Path, url: str | None) -> Iterator[None]:
    """The workspace has this store within the block, and keeps it until a run names another or none.

    A workspace has one store: beside another run, its store stands. Raises StoreError, StoreAway.
    """
    locks = workspace / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / "store-users").open("a") as users:  # held, shared, by every run within the block
        with FileLock(locks / "store.lock"):  # looked at and named by one run at a time
            store = use_store(workspace, _agreed(workspace, url, users))
            fcntl.flock(users, fcntl.LOCK_SH)
        if store is None:
            yield
            return
        store.report = say
        try:
            yield
        finally:
            say(store.traffic())


def _agreed(workspace: Path, url: str | None, users: IO[str]) -> str | None:
    """The store that a run uses: its own, or that of the runs that are at work already."""
    theirs = store_named(workspace)
    if theirs in (None, url) or _nobody_else(users):
        return url
    if url is not None:
        raise StoreError(
            f"another run at work in {workspace} uses the store {theirs}, this one names {url}, and a workspace "
            "has one store: wait for its end, name the same store, or another workspace."
        )
    say(f"another run at work in {workspace} uses the store {theirs}: what both make goes there")
    return theirs


def _nobody_else(users: IO[str]) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def keep_run(folder: Path, workspace: Path) -> None:
    """Put the folder of a finished run, its child and report, into the store of its workspace, if it has one."""
    if store_of(workspace) is None:
        return  # nothing reads it here
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILES)
    refs = [Ref(path=path.relative_to(workspace).as_posix(), sha256=sha256_of(path)) for path in found]
    keep(folder / FILES, RunFiles(files=tuple(refs)), refs, workspace)
