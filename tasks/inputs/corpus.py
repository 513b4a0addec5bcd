"""Turn text into sequences of token ids, divided into train, validation and test.

Documents are normalised, exact duplicates are dropped, and the rest is ordered by the sha256 of the text. The first
fill the test split, the next ones validation, the others train. So the division depends on the text alone, no document
is in two splits, and a new document moves few others.

A document gives at most a fixed share of a split, from its middle; only train takes more of one, when there is too
little text. After each document comes the tokenizer's eos token (and before it the bos token, if the tokenizer writes
one).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blocks.errors import CorpusError, first_line
from blocks.files import sha256_of
from blocks.library import digest_of, keep, remember, write_tensors
from blocks.records import CorpusInfo
from profiles.schema import Corpus, HubSource, TextSource
from tasks.inputs.chats import Chat, Message, contents_alone, template_of
from tasks.inputs.companions import TOKENIZER_FILES
from tasks.inputs.corpus_sources import check_sources, content_of, iterate_documents, pinned
from tasks.inputs.text_files import SUFFIXES
from tasks.running.progress import say

VERSION = 1  # raise it when the same sources would give other tokens
PART = 1 << 20  # characters tokenised at once: a tokenizer takes about 150 bytes for each
TRIED_TOKENS = 1 << 19  # tokenised in a second or two
COUNTED_BYTES = 1 << 26  # read in a second or two
BYTES_PER_TOKEN = 4
# split -> the largest share of its sequences that one document may give is 1 / this; only train may exceed it
SHARES = {"test": 8, "validation": 8, "train": 32}
CHAT_TEMPLATE = "chat_template.jinja"  # says nothing about other sources than those that may hold chats


def prepare_corpus(corpus: Corpus, tokenizer_folder: Path, parent_fingerprint: str, workspace: Path) -> CorpusInfo:
    """Tokenise and pack a corpus to `corpus/<fingerprint>.safetensors`: int32 `train`, `validation`, `test` (S, T).

    The fingerprint covers the content of the sources, the settings and the tokenizer; what is there is used again.
    Raises CorpusError when a source cannot be read or the documents do not fill the splits.
    """
    check_sources(corpus)
    at_commits = corpus.model_copy(update={"sources": tuple(pinned(source) for source in corpus.sources)})
    fingerprint = _fingerprint(at_commits, tokenizer_folder, parent_fingerprint)
    manifest = workspace / "corpus" / f"{fingerprint}.json"
    known = remember(manifest, CorpusInfo, lambda info: [info.tokens], workspace)
    if known is not None:
        return known
    tokenizer = load_tokenizer(tokenizer_folder)
    notes: list[str] = []
    documents = ordered_documents(iterate_documents(at_commits, tokenizer.chat, notes))
    for note in notes:
        say(f"corpus: {note}")
    packed, used = pack_splits(documents, tokenizer, splits_of(corpus), corpus.sequence_length)
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


def check_enough(corpus: Corpus, tokenizer_folder: Path | None) -> str:
    """Whether the text fills the splits, before a run. Raises CorpusError; returns a sentence of doubt, or "".

    With the tokenizer, a corpus of up to half a million tokens is packed for a try. Otherwise bytes are counted: no
    token is less than one.
    """
    splits = splits_of(corpus)
    needed = sum(splits.values()) * corpus.sequence_length
    if tokenizer_folder is not None and needed <= TRIED_TOKENS:
        tokenizer = load_tokenizer(tokenizer_folder)
        documents = ordered_documents(iterate_documents(corpus, tokenizer.chat))
        packed, _ = pack_splits(documents, tokenizer, splits, corpus.sequence_length)
        _check_ids(packed, tokenizer_folder / "config.json")
        return ""
    there, enough = 0, min(BYTES_PER_TOKEN * needed, COUNTED_BYTES)
    for document in iterate_documents(corpus):
        there += len(document.encode()) + 2  # a document may get bos and eos
        if there >= enough:
            return ""
    told = f"{needed:,} tokens are asked for, and the documents hold {there:,} bytes"
    ways = "add text, or lower corpus.train_sequences"
    if there < needed:
        raise CorpusError(f"the corpus is too small: {told}: {ways}.")
    return f"corpus: {told}. A token is about {BYTES_PER_TOKEN} bytes of English, so that may be too little: {ways}."


def splits_of(corpus: Corpus) -> dict[str, int]:
    """Number of sequences of each split, in the order in which documents fill them."""
    return {
        "test": corpus.test_sequences,
        "validation": corpus.validation_sequences,
        "train": corpus.train_sequences,
    }


def tokens_of_file(path: Path, tokenizer: Any, sequences: int, length: int) -> torch.Tensor:
    """A text, jsonl or parquet file as a transformers tokenizer's ids (sequences, length). Raises CorpusError where it
    is too short.
    """
    kind: Any = next((kind for kind, ends in SUFFIXES.items() if path.suffix.lower() in ends), "text")
    source = TextSource(kind=kind, path=str(path))
    asked = Corpus(sources=(source,), sequence_length=length, train_sequences=sequences)
    reads = document_tokenizer(tokenizer)
    documents = ordered_documents(iterate_documents(asked, reads.chat))
    there = _fill(documents, reads, sequences * length, max(1, sequences // SHARES["train"]) * length, stretch=True)
    if sum(map(len, there)) < sequences * length:
        raise CorpusError(
            f"{path} is too short: {sequences} sequences x {length} = {sequences * length:,} tokens are needed, and it "
            f"gives {sum(map(len, there)):,}. Name a longer text."
        )
    return torch.from_numpy(np.concatenate(there)[: sequences * length]).view(sequences, length).long()


def _check_ids(packed: Mapping[str, torch.Tensor], config: Path) -> None:
    """Raise CorpusError for token ids that the model has no embedding for: the tokenizer is another model's."""
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
        """At most `limit` tokens from the middle of a document: the beginnings of documents are too much alike."""
        room = max(0, limit - len(self.start) - len(self.end))
        cut = max(0, (len(ids) - room) // 2)
        return np.array([*self.start, *ids[cut : cut + room], *self.end], dtype=np.int32)


@dataclass
class _Document:
    """A document that is tokenised only as far as its tokens are needed, from its middle outwards."""

    text: str
    ids: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def middle(self, tokenizer: DocumentTokenizer, limit: int) -> NDArray[np.int32]:
        """At most `limit` tokens, with what stands before and after a document."""
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
    """(start, end) of parts of at most PART characters, each cut before white space if there is some near its end."""
    spans, start = [], 0
    while len(text) - start > PART:
        end = start + PART
        space = re.search(r"\s\S*$", text[end - PART // 16 : end])
        end -= PART // 16 - space.start() if space else 0
        spans.append((start, end))
        start = end
    return [*spans, (start, len(text))]


def load_tokenizer(folder: Path) -> DocumentTokenizer:
    """The parent's tokenizer. Raises CorpusError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CorpusError(
            f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): check the parent."
        ) from error
    return document_tokenizer(tokenizer)


def document_tokenizer(tokenizer: Any) -> DocumentTokenizer:
    """How a tokenizer of transformers reads documents: bos before each if it writes one by itself, and eos after it."""
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
    """Fill the splits of `wanted` (name -> number of sequences) with documents, one split after another.

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
    """Tokens of the first documents until there are `needed` tokens, at most `share` from each document.

    stretch: while there are too few, double the share, until every document is used whole.
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
    """A digest of content, settings and tokenizer. Paths of this machine are not part of it."""
    chats = any(isinstance(source, TextSource | HubSource) for source in corpus.sources)
    names = (*TOKENIZER_FILES, CHAT_TEMPLATE) if chats else TOKENIZER_FILES
    tokenizer = {name: sha256_of(tokenizer_folder / name) for name in names if (tokenizer_folder / name).is_file()}
    settings = corpus.model_dump(mode="json", exclude={"sources"})
    sources = [
        {"settings": source.model_dump(mode="json", exclude={"path", "file"}), "content": content_of(source)}
        for source in corpus.sources
    ]
    return digest_of(
        version=VERSION, settings=settings, sources=sources, tokenizer=tokenizer, parent=parent_fingerprint
    )
