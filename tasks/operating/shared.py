"""The store that a run shares with other machines: opened before it works, what moved told at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocks.files import sha256_of
from blocks.library import keep
from blocks.records import Ref, Value
from blocks.store import store_of, use_store
from tasks.progress import say

FILES = "files.json"


class RunFiles(Value):
    """Everything that a finished run left in its folder, the child first of all."""

    files: tuple[Ref, ...]


@contextmanager
def store_used(workspace: Path, url: str | None) -> Iterator[None]:
    """The workspace has this store within the block, and keeps it until a run names another or none.

    Raises StoreError, StoreAway.
    """
    store = use_store(workspace, url)
    if store is None:
        yield
        return
    store.tell = say
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
