"""The files of a workspace: tensors (safetensors) with digests, small JSON records, written atomically.

Every key is a digest of the inputs, and every tensor file is checked against its own digest before it is used. A
workspace may have a store that other machines share (blocks/store.py). Only three functions here use it: `remember`
looks there for what the workspace lacks, `keep` puts there what was finished, and `checked_path` fetches files that
`remember` left in the store until they are read.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blocks.errors import DamagedBlock
from blocks.files import atomic_path, sha256_of, write_text
from blocks.records import BlockRecord, Ref, Value
from blocks.store import Store, store_of

ValueT = TypeVar("ValueT", bound=Value)
# when the files that a stored record names are fetched: all at once, each when it is read, or never
Fetch = Literal["ahead", "when read", "never"]
# kinds of files that are fetched from a store: none that Python would run
FETCHED = (".safetensors", ".json", ".jinja", ".model", ".txt")


def digest_of(**parts: Any) -> str:
    """First 32 hex digits of the sha256 of the canonical JSON of `parts`. Raises TypeError for tensors or sets."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _as_json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no stable digest: pass a string, number, list or frozen value")


def write_value(path: Path, value: Value) -> Path:
    """Write a record as JSON, atomically."""
    return write_text(path, value.model_dump_json(indent=1))


def read_value(path: Path, kind: type[ValueT]) -> ValueT:
    """Read a record; DamagedBlock names the file when it does not hold one of this kind."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedBlock(f"{path} is not a {kind.__name__}: {error}. Delete it and run again.") from error


def write_tensors(workspace: Path, relative: str, tensors: Mapping[str, torch.Tensor]) -> Ref:
    """Save tensors under `workspace/relative` (safetensors) and return the reference."""
    target = workspace / relative
    with atomic_path(target) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, str(temporary))
        digest = sha256_of(temporary)
    return Ref(path=relative, sha256=digest)


@lru_cache(maxsize=65536)
def _digest_at(path: str, size: int, modified_ns: int) -> str:
    return sha256_of(Path(path))


def is_whole(workspace: Path, ref: Ref) -> bool:
    """True when the referenced file exists and has its digest. A process hashes a file again only when it changed."""
    path = workspace / ref.path
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return _digest_at(str(path), stat.st_size, stat.st_mtime_ns) == ref.sha256


def checked_path(workspace: Path, ref: Ref) -> Path:
    """Absolute path of a reference whose digest was checked; DamagedBlock otherwise."""
    if not is_whole(workspace, ref) and not _fetched(workspace, ref):
        raise DamagedBlock(
            f"{workspace / ref.path} is missing or differs from its digest {ref.sha256[:12]}: "
            "delete it and run again, and it is made anew."
        )
    return workspace / ref.path


def read_tensors(
    workspace: Path, ref: Ref, names: list[str] | None = None, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Load tensors of a checked reference to a device; all of them, or `names`."""
    with safe_open(checked_path(workspace, ref), framework="pt", device=device) as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def read_rows(workspace: Path, ref: Ref, name: str, first: int, last: int) -> torch.Tensor:
    """Some rows of a tensor of a checked reference, on the host; the others are not read."""
    with safe_open(checked_path(workspace, ref), framework="pt", device="cpu") as file:
        rows: torch.Tensor = file.get_slice(name)[first:last]
    return rows


def pick_rows(workspace: Path, ref: Ref, name: str, rows: Sequence[int]) -> torch.Tensor:
    """These rows of a tensor of a checked reference, on the host. The file is mapped: the others are not read."""
    with safe_open(checked_path(workspace, ref), framework="pt", device="cpu") as file:
        there = file.get_slice(name)
        return torch.stack([there[row] for row in rows])


def _fetched(workspace: Path, ref: Ref) -> bool:
    store = store_of(workspace)
    return store is not None and store.fetch(ref.sha256, workspace / ref.path)


def remember(
    path: Path,
    kind: type[ValueT],
    refs: Callable[[ValueT], list[Ref]],
    workspace: Path,
    fetch: Fetch = "ahead",
) -> ValueT | None:
    """The stored record at `path` if all files it refers to are whole, else None: the caller then makes it again.

    What the workspace lacks is fetched from its store, if it has one; what the store lacks is sent there.
    """
    found = _here(path, kind, refs, workspace)
    store = None if fetch == "never" else store_of(workspace)
    if store is None:
        return found
    if found is None:
        return _from_store(store, path, kind, refs, workspace, fetch)
    if not store.has_record(
        _name(path, workspace)
    ):  # it was finished while the workspace had no store, or could not reach it
        _send(store, path, refs(found), workspace)
    return found


def keep(path: Path, value: Value, refs: Sequence[Ref], workspace: Path, fetch: Fetch = "ahead") -> None:
    """Write a finished record as JSON, atomically, and send it and the files it refers to to the store, if any."""
    write_value(path, value)
    store = None if fetch == "never" else store_of(workspace)
    if store is not None:
        _send(store, path, refs, workspace)


def made_once(
    path: Path, kind: type[ValueT], workspace: Path, make: Callable[[], ValueT], fetch: Fetch = "ahead"
) -> ValueT:
    """The record at `path`, which refers to no other file: the stored one, else what `make` gives, which is kept."""
    found = remember(path, kind, lambda _: [], workspace, fetch)
    if found is None:
        found = make()
        keep(path, found, [], workspace, fetch)
    return found


def _name(path: Path, workspace: Path) -> str:
    return path.relative_to(workspace).as_posix()


def _here(path: Path, kind: type[ValueT], refs: Callable[[ValueT], list[Ref]], workspace: Path) -> ValueT | None:
    if not path.exists():
        return None
    try:
        value = read_value(path, kind)
    except DamagedBlock:
        return None
    return value if all(is_whole(workspace, ref) for ref in refs(value)) else None


def _send(store: Store, path: Path, refs: Sequence[Ref], workspace: Path) -> None:
    """The data first, the record last: a record makes its data count."""
    for ref in refs:
        if is_whole(workspace, ref):
            store.send(workspace / ref.path, ref.sha256)
        elif not store.has(ref.sha256):
            return  # it was never fetched and has since gone from the store: whoever needs it makes it again
    store.keep_record(_name(path, workspace), path.read_bytes())


def _from_store(
    store: Store, path: Path, kind: type[ValueT], refs: Callable[[ValueT], list[Ref]], workspace: Path, fetch: Fetch
) -> ValueT | None:
    """A record from the store. It is written here only once all its files were fetched, or are known to be there."""
    text = store.record(_name(path, workspace))
    if text is None:
        return None
    try:
        value = kind.model_validate_json(text)
    except ValueError:  # written by another version of this program
        return None
    for ref in refs(value):
        target = workspace / ref.path
        if not _belongs(path, target) or target.suffix not in FETCHED:
            store.report(
                f"store {store.url}: {path.name} names {ref.path}, which is not its own file. "
                "The record is not used, and made again."
            )
            return None
        if is_whole(workspace, ref):
            continue
        if not (store.fetch(ref.sha256, target) if fetch == "ahead" else store.has(ref.sha256)):
            return None
    write_text(path, text.decode())
    return value


def _belongs(record: Path, target: Path) -> bool:
    """True for a file below the folder of its record, symbolic links followed."""
    return target.resolve().is_relative_to(record.parent.resolve()) and ".." not in target.parts


class BlockLibrary:
    """Trained variants under `workspace/library`: `<key>.json` (BlockRecord) and `<key>.safetensors`."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.folder = workspace / "library"

    def find(self, key: str) -> BlockRecord | None:
        """The finished record of a key, or None when it is absent, damaged or its weights are."""

        def refs(record: BlockRecord) -> list[Ref]:
            return [record.weights] if record.weights else []

        return remember(self.folder / f"{key}.json", BlockRecord, refs, self.workspace)

    def weights_path(self, key: str) -> str:
        """Where the weights of a key lie, relative to the workspace."""
        return f"library/{key}.safetensors"

    def add(self, record: BlockRecord) -> BlockRecord:
        """Store a record; its weights must have been written before."""
        keep(self.folder / f"{record.key}.json", record, [record.weights] if record.weights else [], self.workspace)
        return record
