"""Read the header of a GGUF file: its metadata and its table of tensors. This takes a tenth of a second.

gguf.GGUFReader makes an array of every token and merge, which takes seconds for SmolLM2's 147,000 of them, and
transformers reads them twice more, for the config and for the weights. `without_vocabulary` writes a copy without them,
which both read at once. The format is described in ggml's docs/gguf.md; versions 2 and 3, little-endian, are read.
"""

import mmap
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blocks.errors import ParentError

VERSIONS = (2, 3)
ALIGNMENT = 32  # of the weights, unless general.alignment says otherwise
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9


_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufError(ParentError):
    """A file that is not GGUF, or a GGUF file that cannot be read as a parent or a child."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies in a file. shape: innermost first, as in ggml. offset: bytes from the start of weights."""

    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """What stands before the weights.

    fields: metadata by key. spans: from where to where each field reaches in the file, with its key. table: the same of
    the table of tensors. weights_at: where the weights start.
    """

    fields: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    tensors: dict[str, TensorInfo]
    table: tuple[int, int]
    weights_at: int

    @property
    def alignment(self) -> int:
        """Alignment of the weights, in bytes."""
        return int(self.fields.get("general.alignment", ALIGNMENT))

    @property
    def vocabulary(self) -> list[str]:
        """Keys of the tokenizer's lists of tokens, merges, scores and types."""
        return [key for key, value in self.fields.items() if key.startswith("tokenizer.") and isinstance(value, list)]


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises GgufError for a file that has none, or not a whole one."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _header(_Cursor(data))
    except struct.error as error:
        raise GgufError(f"{path} cannot be read as GGUF: it ends within its header. Fetch it again.") from error
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise GgufError(f"{path} cannot be read as GGUF: {error}. Name a file that ends in .gguf.") from error


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        """One number, by its letter in `struct`."""
        (value,) = self.numbers(kind, 1)
        return value

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        """`count` numbers of one kind. Raises struct.error beyond the end of the file."""
        form = f"<{count}{kind}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def text(self) -> str:
        """A string, its length before it."""
        length = self.number("Q")
        found = self.data[self.at : self.at + length]
        if len(found) < length:
            raise struct.error("it ends within a string")
        self.at += length
        return found.decode("utf-8")

    def value(self, kind: int) -> Any:
        """A value whose type has this number in the format."""
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
    infos = dict(_tensor_info(cursor) for _ in range(tensors))
    alignment = int(fields.get("general.alignment", ALIGNMENT))
    return Header(
        fields=fields,
        spans=spans,
        tensors=infos,
        table=(start, cursor.at),
        weights_at=-(-cursor.at // alignment) * alignment,
    )


def _tensor_info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    name = cursor.text()
    shape = cursor.numbers("Q", cursor.number("I"))
    return name, TensorInfo(shape=shape, type_id=cursor.number("I"), offset=cursor.number("Q"))


def without_vocabulary(path: Path, target: Path, weights: bool, further: Sequence[Path] = ()) -> Header:
    """Write a copy of a file without its tokenizer's lists; the size of the vocabulary is kept. Returns the whole
    header.

    weights: copy them too; otherwise the file ends in a hole of their size, which takes no room on the disk. further:
    the other parts of a split file, whose tensors are added.
    """
    header, starts, size = _joined([path, *further])
    left_out = [*header.vocabulary, *(key for key in header.fields if key.startswith("split."))]
    added = _size_of_vocabulary(header)
    count = len(header.fields) - len(left_out) + (1 if added else 0)
    with path.open("rb") as source, target.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", VERSIONS[-1], len(header.tensors), count))
        for key, span in header.spans.items():
            if key not in left_out:
                file.write(_bytes(source, span))
        file.write(added + b"".join(_table_entry(name, place) for name, place in header.tensors.items()))
        file.write(b"\0" * (-file.tell() % header.alignment))
        begin = file.tell()
        for part, (own, start) in starts.items() if weights else ():
            file.seek(begin + start)
            with part.open("rb") as copied:
                copied.seek(own)
                shutil.copyfileobj(copied, file, 16 << 20)
        file.truncate(begin + size)
    return header


def _joined(parts: Sequence[Path]) -> tuple[Header, dict[Path, tuple[int, int]], int]:
    """The parts of a split file as one: the first part's header with the tensors of all parts; for each part, where its
    weights start in it and in the whole; the size of all weights.
    """
    whole = read_header(parts[0])
    tensors: dict[str, TensorInfo] = {}
    starts, size = {}, 0
    for part in parts:
        header = whole if part == parts[0] else read_header(part)
        twice = sorted(set(tensors) & set(header.tensors))
        if twice:
            raise GgufError(f"{part.name} holds {twice[0]}, which an earlier part holds too: fetch the parts again.")
        size += -size % whole.alignment
        for name, place in header.tensors.items():
            tensors[name] = TensorInfo(shape=place.shape, type_id=place.type_id, offset=place.offset + size)
        starts[part] = header.weights_at, size
        size += max(0, part.stat().st_size - header.weights_at)
    return replace(whole, tensors=tensors), starts, size


def _table_entry(name: str, info: TensorInfo) -> bytes:
    text = name.encode()
    return (
        struct.pack("<Q", len(text))
        + text
        + struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape)
        + struct.pack("<IQ", info.type_id, info.offset)
    )


def _bytes(source: Any, span: tuple[int, int]) -> bytes:
    source.seek(span[0])
    found: bytes = source.read(span[1] - span[0])
    return found


def _size_of_vocabulary(header: Header) -> bytes:
    """The field ARCHITECTURE.vocab_size as bytes; b"" where the file has that field, or no tokens."""
    key = f"{header.fields.get('general.architecture')}.vocab_size"
    tokens = header.fields.get("tokenizer.ggml.tokens")
    if tokens is None or key in header.fields:
        return b""
    name = key.encode()
    return struct.pack("<Q", len(name)) + name + struct.pack("<II", _UINT32, len(tokens))


def stem_of(path: Path) -> str:
    """The name of a model from its file's name, without the number of a part."""
    part = _PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def named_parts(path: Path) -> list[Path]:
    """All parts of a split file, from its name. Whether they exist is not checked."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    count = part["count"]
    return [path.with_name(f"{part['stem']}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1)]
