"""Content-addressed files of a workspace: safetensors with digests, small JSON manifests, atomic writes.

Every key is a digest of what went in; every tensor file is checked against its digest before it is used. A file is
written under another name in the same folder and moved into place, so a killed run leaves a whole file or none.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blocks.errors import DamagedBlock
from blocks.records import BlockRecord, Ref, Value
from blocks.runtime import current_device

ValueT = TypeVar("ValueT", bound=Value)


def digest_of(**parts: Any) -> str:
    """First 32 hex digits of the sha256 of the canonical JSON of `parts`. Raises TypeError for tensors or sets."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _as_json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} has no stable digest: pass a string, number, list or frozen value")


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; moved there when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def write_value(path: Path, value: Value) -> Path:
    """Write a contract as JSON, atomically."""
    return write_text(path, value.model_dump_json(indent=1))


def read_value(path: Path, kind: type[ValueT]) -> ValueT:
    """Read a contract; DamagedBlock names the file when it does not hold one."""
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
    """True when the referenced file exists and has its digest. A file is hashed once per process and change."""
    path = workspace / ref.path
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return _digest_at(str(path), stat.st_size, stat.st_mtime_ns) == ref.sha256


def checked_path(workspace: Path, ref: Ref) -> Path:
    """Absolute path of a reference whose digest was checked; DamagedBlock otherwise."""
    if not is_whole(workspace, ref):
        raise DamagedBlock(
            f"{workspace / ref.path} is missing or differs from its digest {ref.sha256[:12]}: "
            "delete it and run again, it will be made anew."
        )
    return workspace / ref.path


def read_tensors(workspace: Path, ref: Ref, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Load tensors of a checked reference to the current device; all of them, or `names`."""
    with safe_open(checked_path(workspace, ref), framework="pt", device=current_device()) as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def remember(path: Path, kind: type[ValueT], refs: Callable[[ValueT], list[Ref]], workspace: Path) -> ValueT | None:
    """The stored value at `path` if all files it refers to are whole, else None (the caller makes it again)."""
    if not path.exists():
        return None
    try:
        value = read_value(path, kind)
    except DamagedBlock:
        return None
    return value if all(is_whole(workspace, ref) for ref in refs(value)) else None


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
        write_value(self.folder / f"{record.key}.json", record)
        return record
