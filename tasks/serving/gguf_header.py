"""What stands before the weights in a GGUF file: its metadata and its table of tensors, read in a tenth of a second.

gguf.GGUFReader makes an array of every token and merge; SmolLM2's 147,000 take it seconds, transformers reads them
again for the config and again for the weights. `without_vocabulary` leaves a file that both get through at once.
Source of the format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.errors import PuzzleError

VERSIONS = (2, 3)
ALIGNMENT = 32  # of the weights, unless general.alignment says otherwise
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9


class GgufError(PuzzleError):
    """A file that is no GGUF, or none that can be read as a child."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tensor in the file. shape: as ggml counts, innermost first; offset: in bytes from where weights start."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """fields: metadata by key. spans: where each lies in the file, key included. entries: single values, those of
    arrays too. table: where the table of tensors lies. weights_at: where weights start.
    """

    fields: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, Place]
    table: tuple[int, int]
    weights_at: int

    @property
    def entries(self) -> int:
        """What a reader goes through one by one."""
        return sum(len(value) if isinstance(value, list) else 1 for value in self.fields.values())

    @property
    def vocabulary(self) -> list[str]:
        """Keys of the tokenizer's lists."""
        return [key for key, value in self.fields.items() if key.startswith("tokenizer.") and isinstance(value, list)]


def read_header(path: Path) -> Header:
    """Raises GgufError for what is no whole header of a GGUF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Cursor(data))
    except (OSError, ValueError, OverflowError, MemoryError, struct.error) as error:
        raise GgufError(f"{path} cannot be read as GGUF: {error}. Name a file that ends in .gguf.") from error


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        """One number, by its letter in `struct`."""
        (value,) = self.numbers(kind, 1)
        return value

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        """So many of a kind; struct.error beyond the end of the file."""
        form = f"<{count}{kind}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def text(self) -> str:
        """A string, its length before it."""
        length = self.number("Q")
        found = self.data[self.at : self.at + length]
        if len(found) < length:
            raise ValueError("it ends within a string")
        self.at += length
        return found.decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value of the type with this number."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        inner, count = self.numbers("I", 1)[0], self.number("Q")
        return list(self.numbers(_SCALARS[inner], count) if inner in _SCALARS else self._values(inner, count))

    def _values(self, kind: int, count: int) -> Iterator[Any]:
        for _ in range(count):
            yield self.value(kind)


def _header(cursor: _Cursor) -> Header:
    if cursor.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    cursor.at = 4
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}, versions {VERSIONS[0]} and {VERSIONS[1]} are known")
    tensors, count = cursor.numbers("Q", 2)
    fields: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        start = cursor.at
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
        spans[key] = start, cursor.at
    start = cursor.at
    places = dict(_place(cursor) for _ in range(tensors))
    alignment = int(fields.get("general.alignment", ALIGNMENT))
    return Header(
        fields=fields,
        spans=spans,
        tensors=places,
        table=(start, cursor.at),
        weights_at=-(-cursor.at // alignment) * alignment,
    )


def _place(cursor: _Cursor) -> tuple[str, Place]:
    name = cursor.text()
    shape = cursor.numbers("Q", cursor.number("I"))
    return name, Place(shape=shape, type_id=cursor.number("I"), offset=cursor.number("Q"))


def without_vocabulary(path: Path, target: Path, weights: bool) -> Header:
    """A copy of the file without its tokenizer's lists, their length kept as the vocabulary's size; the whole header.

    weights: copy them too; otherwise the file ends in a hole of their size, which takes no disk.
    """
    header = read_header(path)
    left_out = header.vocabulary
    added = _size_of_vocabulary(header)
    count = len(header.fields) - len(left_out) + (1 if added else 0)
    alignment = int(header.fields.get("general.alignment", ALIGNMENT))
    with path.open("rb") as source, target.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", VERSIONS[-1], len(header.tensors), count))
        for key, span in header.spans.items():
            if key not in left_out:
                file.write(_bytes(source, span))
        file.write(added + _bytes(source, header.table))
        file.write(b"\0" * (-file.tell() % alignment))
        if weights:
            source.seek(header.weights_at)
            shutil.copyfileobj(source, file, 16 << 20)
        else:
            file.truncate(file.tell() + path.stat().st_size - header.weights_at)
    return header


def _bytes(source: Any, span: tuple[int, int]) -> bytes:
    source.seek(span[0])
    found: bytes = source.read(span[1] - span[0])
    return found


def _size_of_vocabulary(header: Header) -> bytes:
    """The field ARCHITECTURE.vocab_size, as bytes, where only the list of tokens says it; else b""."""
    key = f"{header.fields.get('general.architecture')}.vocab_size"
    tokens = header.fields.get("tokenizer.ggml.tokens")
    if tokens is None or key in header.fields:
        return b""
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<II", _UINT32, len(tokens))
