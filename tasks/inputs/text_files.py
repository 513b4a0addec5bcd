"""Read texts from text, jsonl and parquet files, one after another, never a whole file in memory.

The package `datasets` is not used, because it fails on many real files: its jsonl reader takes the types of all columns
from the first 10 MiB and fails when any of them changes later; its text reader holds a whole file; its parquet reader
converts every file to the types of the first. Here only the wanted field is read. Lines, rows and documents that cannot
be used are counted and reported; a file is refused when most of it cannot be used.
"""

import bz2
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from blocks.errors import CorpusError, first_line
from profiles.schema import TextSource
from tasks.inputs.chats import FIELDS, Chat, Unusable, messages_of

FileKind = Literal["text", "jsonl", "parquet"]
CHUNK = 1 << 20  # characters read at a time
LONGEST_LINE = 1 << 26  # characters of a jsonl line; a longer one is of no use
PATIENCE = 10_000  # so many lines of no use, more than half of all, and the rest of a file is not read
ROWS = 256  # rows of parquet read at a time
SUFFIXES: dict[FileKind, tuple[str, ...]] = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
NOT_TEXT = {  # first bytes -> what the file is, what to do
    b"PAR1": ("a parquet file", "set kind to parquet"),
    b"PK\x03\x04": ("a zip archive", "unpack it"),
    b"\xff\xfe": ("UTF-16 or UTF-32", "rewrite it in UTF-8: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "rewrite it in UTF-8: iconv -f UTF-16 -t UTF-8"),
}
IDS = "input_ids"  # where token ids stand, when no field is named
Document = str | bytes  # text, or token ids as int32
UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of bytes that are not UTF-8
JSON_ARRAY = re.compile(rb'(\xef\xbb\xbf)?\s*\[\s*[\[{"]')


@dataclass
class Tally:
    """How many lines, rows or documents of a file were read, how many could not be used, and the first of those."""

    name: str
    unit: str
    patience: int = PATIENCE
    read: int = 0
    bad: int = 0
    first: str = ""

    def skip(self, number: int, reason: str) -> None:
        """Count one that cannot be used. Raises CorpusError when so many cannot that reading on makes no sense."""
        self.bad += 1
        self.first = self.first or f"{self.unit} {number} {reason}"
        if self.bad >= self.patience:
            self.judge()

    def judge(self) -> None:
        """Raise CorpusError when most cannot be used."""
        if 2 * self.bad > self.read:
            raise CorpusError(
                f"{self.name} cannot be read: {self.bad:,} of {self.read:,} {self.unit}s are of no use, the first: "
                f"{self.first}."
            )


def texts(rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Document | None], tally: Tally) -> Iterator[Document]:
    """The document of every row that has one. Rows for which `parse` raises Unusable are counted."""
    for number, row in rows:
        tally.read += 1
        try:
            text = parse(row)
        except Unusable as reason:
            tally.skip(number, str(reason))
        else:
            if text:
                yield text
    tally.judge()


def skipped(tallies: Iterable[Tally], origin: str) -> list[str]:
    """A sentence about what was left out of a source, for lines, questions and so on; none when nothing was."""
    units: dict[str, list[Tally]] = {}
    for tally in tallies:
        units.setdefault(tally.unit, []).append(tally)
    return [told for there in units.values() for told in _skipped(there, origin)]


def _skipped(there: Sequence[Tally], origin: str) -> list[str]:
    bad = [tally for tally in there if tally.bad]
    if not bad:
        return []
    place = "" if len(there) == 1 else f"{Path(bad[0].name).name}, "
    total, read = sum(tally.bad for tally in there), sum(tally.read for tally in there)
    return [f"{total:,} of {read:,} {bad[0].unit}s of {origin} were skipped: first at {place}{bad[0].first}"]


def value_of(row: Any, field: str, chat: Chat) -> Document | None:
    """The text of a row, its chat as text, or its token ids; None when the field is null. Raises Unusable."""
    if not isinstance(row, Mapping):
        raise Unusable(f"is not an object with fields, but {_kind(row)}")
    name = _named(row, field)
    value = row[name]
    if isinstance(value, str) and name != field:  # a chat written as JSON would be read as text
        raise Unusable(f"holds text in field `{name}`, not a list of messages. Name it as text_field if it is text")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return chat(messages_of(value))
    if isinstance(value, list) and type(value[0]) is int:
        return _ids(value, name)
    raise Unusable(f"holds {_kind(value)} in field `{name}`, not text. Choose another")


def _ids(value: list[Any], name: str) -> bytes:
    try:
        ids = np.array(value)
    except (ValueError, OverflowError):
        ids = np.array("")
    if ids.dtype != np.int64 or ids.ndim != 1 or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise Unusable(
            f"holds a list in field `{name}` that begins like token ids, but is no list of whole numbers from 0"
        )
    return ids.astype(np.int32).tobytes()


def _named(names: Iterable[str], field: str) -> str:
    """The field to read: the one asked for; where none was, and there is no text, a field of chats or of token ids."""
    there = list(names)
    chats = (
        [name for name in (*FIELDS, IDS) if name in there]
        if field == TextSource.model_fields["text_field"].default
        else []
    )
    found = [field] if field in there else chats
    if not found:
        more = ", ..." if len(there) > 12 else ""
        raise Unusable(f"has no field `{field}`. Set text_field to one of {', '.join(there[:12])}{more}")
    return found[0]


def field_of(path: Path, source: TextSource) -> str:
    """The field of a jsonl or parquet file to read, by its first row: the usual ones, or else the longest text there.
    Raises CorpusError.
    """
    if source.kind == "parquet":
        from pyarrow import ArrowException, parquet

        try:
            row = next(parquet.ParquetFile(path).iter_batches(batch_size=1)).to_pylist()[0]
        except (ArrowException, OSError, StopIteration, IndexError) as error:
            raise CorpusError(
                f"{path} cannot be read ({first_line(error, 200)}). Is it parquet, and has it rows?"
            ) from error
    else:
        with _opened(path, source.kind) as file:
            number, line = next(_lines(file, path), (0, Part("{}")))
        try:
            row = _json(line)
        except Unusable as reason:
            raise CorpusError(f"{path}: line {number} {reason}.") from reason
    fields = row if isinstance(row, Mapping) else {}
    if any(name in fields for name in (source.text_field, *FIELDS, IDS)):
        return source.text_field
    found = {name: len(value) for name, value in fields.items() if isinstance(value, str)}
    if not found:
        raise CorpusError(
            f"{path} has no field with text in its first {'row' if source.kind == 'parquet' else 'line'}."
        )
    return max(found, key=found.__getitem__)


def kind_of(name: str, named: bool = True) -> FileKind | None:
    """The kind of a file by its ending, packed or not; None where the ending tells none.

    named: by somebody, and not found in a folder, where a .json file is one of settings more often than of lines.
    """
    name = name.lower()
    name = next((name.removesuffix(packed) for packed in PACKED if name.endswith(packed)), name)
    if named and name.endswith(".json"):
        return "jsonl"
    return next((kind for kind, endings in SUFFIXES.items() if name.endswith(endings)), None)


def _kind(value: Any) -> str:
    return f"a list of {type(value[0]).__name__}" if isinstance(value, list) and value else type(value).__name__


def files_of(source: TextSource) -> list[Path]:
    """The file with the source's path, or the files of its kind in that folder, or else what the path matches as a
    glob.
    """
    try:
        path = Path(source.path).expanduser()
        if path.is_file():  # before a glob is thought of: [, ? and * are letters of a name too
            return [path]
        if path.is_dir():
            return _in_folder(path, source)
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        files = [path for path in map(Path, names) if path.is_file()]
    except (OSError, RuntimeError, ValueError, re.error) as error:
        raise CorpusError(f"{source.path} cannot be looked up ({error}). Give a file, a folder or a glob.") from error
    if not files:
        raise CorpusError(
            f"no file matches {source.path} (current folder: {Path.cwd()}). Give a file, a folder or a glob."
        )
    return files


def _in_folder(folder: Path, source: TextSource) -> list[Path]:
    """Files that lie deeper are not read; a glob with ** names them."""
    names = sorted(path for path in folder.iterdir() if kind_of(path.name, named=False) == source.kind)
    files = [path for path in names if path.is_file() and not path.name.startswith(".")]
    if not files:
        raise CorpusError(
            f"the folder {source.path} holds no file of kind {source.kind} ({', '.join(SUFFIXES[source.kind])}; also "
            f"packed: {', '.join(PACKED)}). For other names or deeper folders give a glob, such as {source.path}/**/*."
        )
    return files


def read_file(path: Path, source: TextSource, chat: Chat, tally: Tally, longest: int) -> Iterator[Document]:
    """The documents of a file in their order, those of a text file cut to `longest` characters. Raises CorpusError."""
    tally.unit = {"text": "document", "jsonl": "line", "parquet": "row"}[source.kind]
    if source.kind == "parquet":
        yield from texts(
            _parquet_rows(path, source.text_field), lambda row: value_of(row, source.text_field, chat), tally
        )
        return
    try:
        with _opened(path, source.kind) as file:
            if source.kind == "text":
                yield from texts(_documents(file, _unix(source.separator), longest), _decoded, tally)
            else:
                lines = _lines(file, path)
                yield from texts(lines, lambda line: value_of(_json(line), source.text_field, chat), tally)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        said = str(error).replace(str(path), path.name) or type(error).__name__
        raise CorpusError(f"{path} cannot be read ({said}). Is it whole, and may you read it?") from error


def _opened(path: Path, kind: str) -> io.TextIOWrapper:
    """A text stream, unpacked; Unix line ends, no byte order mark, bytes that are not UTF-8 as lone surrogates."""
    stream = _unpacked(path)
    head = bytes(stream.peek(4096)[:4096])
    known = next((hint for start, hint in NOT_TEXT.items() if head.startswith(start)), None)
    if known is None and 4 * head.count(0) > len(head):
        known = ("binary, or UTF-16 without a byte order mark", "give text in UTF-8")
    if known is None and kind == "jsonl" and JSON_ARRAY.match(head):
        known = ("one JSON array", "write one object a line: jq -c '.[]' FILE")
    if known is not None:
        stream.close()
        raise CorpusError(f"{path} is not read as {kind}: it is {known[0]}. Instead {known[1]}.")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=None)


def _unpacked(path: Path) -> Any:
    """A stream of the file's bytes, decompressed. The format is known by the first bytes, not by the name."""
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow  # reads zst, which Python 3.11 does not

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    for first, unpack in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open)):
        if start.startswith(first):
            return unpack(path, "rb")
    return path.open("rb")


@dataclass(frozen=True)
class Part:
    """The text between two separators. cut: it was longer. ended: a separator follows."""

    text: str
    cut: bool = False
    ended: bool = True


def split_stream(file: IO[str], separator: str, longest: int) -> Iterator[Part]:
    """The parts of a stream between separators. Of a part longer than `longest` characters the beginning is kept."""
    rest, kept = "", ""  # kept: the beginning of a part that is too long, whose rest is passed over
    while chunk := file.read(max(CHUNK, len(rest))):  # more at a time for long parts, else the search is quadratic
        *parts, rest = (rest + chunk).split(separator)
        for part in parts:
            yield _part(kept or part, longest, bool(kept))
            kept = ""
        if len(rest) > longest + len(separator):
            kept = kept or rest[:longest]
            rest = rest[len(rest) - len(separator) + 1 :]  # a separator may begin in it
    yield replace(_part(kept or rest, longest, bool(kept)), ended=False)


def _part(text: str, longest: int, cut: bool) -> Part:
    return Part(text[:longest], cut or len(text) > longest)


def _documents(file: IO[str], separator: str, longest: int) -> Iterator[tuple[int, Part]]:
    found = (part for part in split_stream(file, separator, longest) if part.text.strip())
    return enumerate(found, 1)


def _decoded(part: Part) -> str:
    if UNDECODED.search(part.text):
        raise Unusable("is not in UTF-8 (iconv rewrites a file)")
    return part.text


def _lines(file: IO[str], path: Path) -> Iterator[tuple[int, Part]]:
    """The lines of a jsonl file that are not blank. Raises CorpusError when the file ends within one.

    A bad line among others is only counted. But a last line that stops in the middle means that the file is an
    incomplete copy, and that nobody knows how much is missing.
    """
    for number, line in enumerate(split_stream(file, "\n", LONGEST_LINE), 1):
        if not line.text.strip():
            continue
        if not line.ended and _stops_within(line.text):
            raise CorpusError(
                f"{path} ends in the middle of line {number:,}: it is an incomplete copy. Get it again, or delete "
                "that line if the rest is all there is."
            )
        yield number, line


def _stops_within(text: str) -> bool:
    """Whether a text is the beginning of a JSON object that ends too early."""
    text = text.strip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        # the last letters may be part of an escape or of a word such as `false`
        return text.startswith("{") and (
            error.msg.startswith("Unterminated") or error.pos >= len(text) - len("\\u1234")
        )
    except (ValueError, RecursionError):
        return False
    return False


def _json(line: Part) -> Any:
    if line.cut:
        raise Unusable(f"is longer than {LONGEST_LINE:,} characters")
    _decoded(line)
    try:
        return json.loads(line.text)
    except json.JSONDecodeError as error:
        raise Unusable(f"is not JSON ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise Unusable(f"is not JSON that can be read ({type(error).__name__})") from error


def _parquet_rows(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """The values of the wanted column, read some rows at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=CHUNK) as file:
            name = _named(file.schema_arrow.names, field)
            batches = file.iter_batches(batch_size=ROWS, columns=[name])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except Unusable as reason:
        raise CorpusError(f"{path} {reason}.") from reason
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read ({first_line(error, 200)}). Is it parquet?") from error


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
