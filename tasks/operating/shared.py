"""The store that a run shares with other machines: opened before it works, what moved told at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocks.files import sha256_of
from blocks.library import keep
from blocks.records import Ref, Value
from blocks.store import StoreError, store_named, store_of, use_store
from tasks.running.presence import another_at_work
from tasks.running.progress import say

FILES = "files.json"


class RunFiles(Value):
    """Everything that a finished run left in its folder, the child first of all."""

    files: tuple[Ref, ...]


@contextmanager
def store_used(workspace: Path, url: str | None) -> Iterator[None]:
    """The workspace has this store within the block, and keeps it until a run names another or none.

    A workspace has one store: beside a run of another process, its store stands. Raises StoreError, StoreAway.
    """
    theirs = store_named(workspace)
    if theirs not in (None, url) and another_at_work(workspace):
        if url is not None:
            raise StoreError(
                f"another run at work in {workspace} uses the store {theirs}, this one names {url}, and a workspace "
                "has one store: wait for its end, name the same store, or another workspace."
            )
        say(f"another run at work in {workspace} uses the store {theirs}: what both make goes there")
        url = theirs
    store = use_store(workspace, url)
    if store is None:
        yield
        return
    store.report = say
    try:
        yield
    finally:
        say(store.traffic())


def keep_run(folder: Path, workspace: Path) -> None:
    """Put the folder of a finished run, its child and report, into the store of its workspace, if it has one."""
    if store_of(workspace) is None:
        return  # nothing reads it here
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILES)
    refs = [Ref(path=path.relative_to(workspace).as_posix(), sha256=sha256_of(path)) for path in found]
    keep(folder / FILES, RunFiles(files=tuple(refs)), refs, workspace)
