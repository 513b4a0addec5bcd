"""Turn text into sequences of token ids, divided into train, validation and test.

Documents are normalised, exact duplicates are dropped, and the rest is ordered by the sha256 of the text: first the
documents of the first 20 million characters of each source, then those behind them. The first fill the test split, the
next ones validation, the others train. So no document is in two splits, a new document moves few others, and when
train_sequences grow no document changes its split, although more is read. A document that is nearly the same as one of
test or validation is left out.

Where sources have weights, each gives its share of the tokens of every split: the next document is of the source that
is farthest behind.

A document with an image is whole within a sequence, as far as one holds it, and is told from others by the image; what
is left of a sequence is filled. Others are packed one behind the other. One of these gives at most a fixed share of a
split, from its middle; only train takes more of one, when there is too little text. After each document comes the
tokenizer's eos token (and before it the bos token, if the tokenizer writes one).
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from blocks.errors import CorpusError, TooLittleText, first_line
from blocks.files import sha256_of
from blocks.library import digest_of, keep, read_rows, read_tensors, remember, write_tensors
from blocks.records import CorpusInfo
from profiles.schema import Corpus, HubSource, ImagesSource, TextSource
from tasks.inputs.chats import (
    IMAGE,
    Chat,
    Conversation,
    Message,
    Span,
    Unusable,
    answers_in,
    contents_alone,
    normalise,
    template_of,
)
from tasks.inputs.companions import TOKENIZER_FILES
from tasks.inputs.corpus_sources import check_sources, content_of, iterate_batches, name_of, pinned, source_of_file
from tasks.inputs.image_questions import VERSION as IMAGES_VERSION
from tasks.inputs.image_questions import ImageIds, by_digest, check_words, image_ids_of, places_of, plain
from tasks.inputs.near_duplicates import NONE, KnownRuns, NearDuplicates
from tasks.inputs.text_files import Document
from tasks.inputs.vision import VERSION as SEEN_VERSION
from tasks.running.progress import say

VERSION = 2  # raise it when the same sources would give other tokens
DocumentT = TypeVar("DocumentT", str, Document)
PART = 1 << 20  # characters tokenised at once: a tokenizer takes about 150 bytes for each
TRIED_TOKENS = 1 << 19  # tokenised in a second or two
COUNTED_BYTES = 1 << 26  # read in a second or two
BYTES_PER_TOKEN = 4
# split -> the largest share of its sequences that one document may give is 1 / this; only train may exceed it
SHARES = {"test": 8, "validation": 8, "train": 32}
STARTS, WEIGHTS = "_starts", "_weights"
# questions about test images, one behind the other, each with its image alone: tokens, those before the answer as ~id;
# how many tokens come before each; and the document of the test split that each is of
SINGLY = ("singly", "singly_starts", "singly_documents")
PADDING = -(1 << 31)  # behind the last image that a sequence has room for: the end of text, which counts for nothing
CHAT_TEMPLATE = "chat_template.jinja"  # says nothing about other sources than those that may hold chats


def prepare_corpus(
    corpus: Corpus,
    tokenizer_folder: Path,
    parent_fingerprint: str,
    workspace: Path,
    others: Sequence[CorpusInfo] = (),
    foreseen: Iterable[str] = (),
) -> CorpusInfo:
    """Tokenise and pack a corpus to `corpus/<fingerprint>.safetensors`: int32 `train`, `validation`, `test` (S, T), and
    beside each of them, as `train_starts` and so on, where each of its documents begins.

    others: corpora whose text is left out of all splits of this one, by runs of tokens that occur in them: what is
    judged on this one's test split was not seen in theirs. foreseen: all images that the parent is to see, by their
    digests, where it has no table of them yet (tasks/inputs/image_questions.py): what they are packed into does not
    depend on what is seen.

    With `prompt_weight` there are weights as well (`weights_of`). The fingerprint covers the content of the sources,
    the settings and the tokenizer; what is there is used again.
    Raises CorpusError when a source cannot be read or the documents do not fill the splits.
    """
    check_sources(corpus)
    at_commits = corpus.model_copy(update={"sources": tuple(pinned(source) for source in corpus.sources)})
    foreseen = tuple(foreseen)
    fingerprint = _fingerprint(at_commits, tokenizer_folder, parent_fingerprint, others, foreseen)
    manifest = workspace / "corpus" / f"{fingerprint}.json"
    known = remember(manifest, CorpusInfo, lambda info: [info.tokens], workspace)
    if known is not None:
        return known
    tokenizer = load_tokenizer(tokenizer_folder, corpus.prompt_weight is not None, foreseen)
    notes: list[str] = []
    queues = queues_of(at_commits, tokenizer.chat, notes)
    near = NearDuplicates(corpus.near_duplicates)
    near.elsewhere = _elsewhere(corpus, others, workspace)
    packed, starts = pack_splits(queues, tokenizer, splits_of(corpus), corpus.sequence_length, near, _row(corpus))
    if near.elsewhere.found:
        notes.append(f"in the corpus or in an earlier capability, and left out: {near.elsewhere.found}")
    if near.found:
        notes.append(f"nearly the same as a document of test or validation, and left out: {near.found}")
    for note in notes:
        say(f"corpus: {note}")
    beside = {f"{split}{STARTS}": where for split, where in starts.items()}
    if corpus.prompt_weight is not None:
        beside |= _weights(packed, corpus.prompt_weight, tokenizer)
    _check_ids(packed, tokenizer_folder / "config.json", tokenizer.images)
    if corpus.images and tokenizer.images:
        beside |= _singly(queues, packed["test"], starts["test"].tolist(), tokenizer, tokenizer.images)
    info = CorpusInfo(
        tokens=write_tensors(workspace, f"corpus/{fingerprint}.safetensors", packed | beside),
        fingerprint=fingerprint,
        sequence_length=corpus.sequence_length,
        train_sequences=corpus.train_sequences,
        validation_sequences=corpus.validation_sequences,
        test_sequences=corpus.test_sequences,
        documents=sum(len(queue.documents) for queue in queues),
        description=_description(corpus, starts, notes),
        weighted=corpus.prompt_weight is not None,
        first_image=tokenizer.images.first if corpus.images and tokenizer.images else 0,
    )
    keep(manifest, info, [info.tokens], workspace)
    return info


def _elsewhere(corpus: Corpus, others: Sequence[CorpusInfo], workspace: Path) -> KnownRuns:
    """The runs of tokens in all splits of other corpora."""
    least = 1.0 if corpus.near_duplicates is None else corpus.near_duplicates
    tokens = [
        rows.flatten().numpy()
        for other in others
        for rows in read_tensors(workspace, other.tokens, ["train", "validation", "test"]).values()
    ]
    pairs = zip(np.repeat([other.first_image for other in others], 3), tokens, strict=True)
    images = np.unique(np.concatenate([np.zeros(0, np.int32), *(ids[ids >= first] for first, ids in pairs if first)]))
    return KnownRuns(tokens, least, min((other.sequence_length for other in others), default=sys.maxsize), images)


def check_enough(corpus: Corpus, tokenizer_folder: Path | None) -> str:
    """Whether the text fills the splits, before a run. Raises CorpusError; returns a sentence of doubt, or "".

    With the tokenizer, a corpus of up to half a million tokens is packed for a try. Otherwise bytes are counted: no
    token is less than one.
    """
    splits = splits_of(corpus)
    needed = sum(splits.values()) * corpus.sequence_length
    if tokenizer_folder is not None and needed <= TRIED_TOKENS:
        tokenizer = load_tokenizer(tokenizer_folder, corpus.prompt_weight is not None, by_digest(corpus.images))
        if corpus.images and tokenizer.images is None:  # which is refused elsewhere
            return ""
        queues = queues_of(corpus, tokenizer.chat)
        near = NearDuplicates(corpus.near_duplicates)
        packed, _ = pack_splits(queues, tokenizer, splits, corpus.sequence_length, near, _row(corpus))
        if corpus.prompt_weight is not None:
            _weights(packed, corpus.prompt_weight, tokenizer)
        _check_ids(packed, tokenizer_folder / "config.json", tokenizer.images)
        return ""
    if corpus.images:  # of which bytes tell nothing
        return ""
    there, enough = 0, min(BYTES_PER_TOKEN * needed, COUNTED_BYTES)
    for _, document in iterate_batches(corpus):
        there += len(_bytes_of(document)) + 2  # a document may get bos and eos
        if there >= enough:
            return ""
    told = f"{needed:,} tokens are asked for, and the documents hold {there:,} bytes"
    ways = "add text, or lower corpus.train_sequences"
    if there < needed:
        raise CorpusError(f"the corpus is too small: {told}: {ways}.")
    return f"corpus: {told}. A token is about {BYTES_PER_TOKEN} bytes of English, so that may be too little: {ways}."


def splits_of(corpus: Corpus | CorpusInfo) -> dict[str, int]:
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
    asked = Corpus(sources=(source_of_file(str(path)),), sequence_length=length, train_sequences=sequences)
    reads = document_tokenizer(tokenizer)
    queues = queues_of(asked, reads.chat)
    try:
        return pack_splits(queues, reads, {"train": sequences}, length)[0]["train"].long()
    except TooLittleText as error:
        needed = f"{sequences} sequences x {length} = {sequences * length:,} tokens are needed"
        raise CorpusError(f"{path} is too short: {needed}. Name a longer text.") from error


def documents_of(corpus: CorpusInfo, split: str, workspace: Path, length: int | None = None) -> tuple[int, ...]:
    """For each sequence of a split the document that most of its first `length` tokens are of; all of them when None.

    Sequences of one document are not independent of each other. Empty for a corpus of an older version, which does not
    say where documents begin.
    """
    starts = starts_of(corpus, split, workspace)
    total = splits_of(corpus)[split] * corpus.sequence_length
    return (
        main_documents(starts, total, corpus.sequence_length, length or corpus.sequence_length) if len(starts) else ()
    )


def starts_of(corpus: CorpusInfo, split: str, workspace: Path) -> NDArray[np.int64]:
    """How many tokens of a split come before each of its documents. Empty for a corpus of an older version."""
    try:
        found: NDArray[np.int64] = read_tensors(workspace, corpus.tokens, [f"{split}{STARTS}"])[
            f"{split}{STARTS}"
        ].numpy()
    except SafetensorError:
        return np.zeros(0, np.int64)
    return found


def weights_of(
    corpus: CorpusInfo, split: str, workspace: Path, rows: tuple[int, int] = (0, sys.maxsize)
) -> torch.Tensor | None:
    """How much the prediction at each token of some sequences counts, (S, T); None where all count alike.

    Their average over the split is 1. So a mean over tokens of weight x loss is the weighted mean of the loss.
    """
    if not corpus.weighted:
        return None
    first, last = rows
    return read_rows(workspace, corpus.tokens, f"{split}{WEIGHTS}", first, min(last, splits_of(corpus)[split]))


def refuse_images(corpus: CorpusInfo, what: str) -> None:
    """Raise CorpusError where words alone can be read and a corpus asks about images. what: begins the sentence."""
    if corpus.first_image:
        raise CorpusError(f"{what}, and the corpus of this run asks about images, which are no words.")


def words_alone(corpus: CorpusInfo, split: str, workspace: Path) -> torch.Tensor:
    """(S, T): whether a token is of a document without an image, and no filling of a sequence."""
    tokens = read_tensors(workspace, corpus.tokens, [split])[split]
    found = np.ones(tokens.numel(), dtype=bool)
    if corpus.first_image:
        starts, flat = starts_of(corpus, split, workspace).tolist(), tokens.flatten().numpy()
        for first, last in zip(starts, [*starts[1:], len(flat)], strict=True):
            other = np.flatnonzero(flat[first:last] != flat[last - 1])
            closed = first + other.max(initial=-1) + 2  # behind what closes the document stands filling
            found[closed:last] = False
            if (flat[first:last] >= corpus.first_image).any():
                found[first:last] = False
    return torch.from_numpy(found).view_as(tokens)


def fit_weights_of(corpus: CorpusInfo, split: str, workspace: Path, rows: tuple[int, int]) -> torch.Tensor | None:
    """How much what a block puts out at each token counts where it is fitted to the parent's, (S, T).

    As `weights_of`, and 1 at the features of images: nobody foretells those, but the text behind reads what every block
    makes of them.
    """
    weights = weights_of(corpus, split, workspace, rows)
    if weights is None or not corpus.first_image:
        return weights
    tokens = read_rows(workspace, corpus.tokens, split, rows[0], rows[0] + len(weights))
    return torch.where(tokens >= corpus.first_image, 1.0, weights)


def _weights(
    packed: dict[str, torch.Tensor], prompt_weight: float, tokenizer: "DocumentTokenizer"
) -> dict[str, torch.Tensor]:
    """Take the marks of `DocumentTokenizer.marked` off the tokens of all splits, and make weights of them.

    A prediction has the weight of the token that it predicts: the one behind.
    """
    found = {}
    for split, tokens in packed.items():
        counts = torch.where(tokens < 0, prompt_weight, 1.0)
        counts[tokens == PADDING] = 0.0
        tokens[tokens == PADDING] = tokenizer.padding
        packed[split] = plain_ids = torch.where(tokens < 0, ~tokens, tokens)
        if tokenizer.images is not None:
            counts[plain_ids >= tokenizer.images.first] = 0.0
        weights = torch.cat([counts.flatten()[1:], counts.flatten()[-1:]]).view_as(counts)
        if not weights.any():
            raise CorpusError(
                f"in the split {split} no token is of an assistant's answer, so none would count: set "
                "corpus.prompt_weight above 0, or give chats with longer answers, or more of them."
            )
        found[f"{split}{WEIGHTS}"] = weights / weights.mean()
    if all(bool((weights == 1).all()) for weights in found.values()):
        raise CorpusError(
            "corpus.prompt_weight is for chats, and the documents hold none (text_field must name lists of messages), "
            "or it is 1: leave it out."
        )
    return found


def _singly(
    queues: Sequence["Queue"],
    test: torch.Tensor,
    starts: Sequence[int],
    tokenizer: "DocumentTokenizer",
    images: ImageIds,
) -> dict[str, torch.Tensor]:
    """SINGLY of a packed test split, whose documents begin at `starts`. Of questions that a sequence holds."""
    texts = (text for queue in queues for text in queue.documents if isinstance(text, Conversation))
    by_image = {mark[1]: text for text in texts if (mark := IMAGE.search(text))}
    digests = {ids.start: digest for digest, ids in images.ids.items()}
    tokens, flat, found, numbers = [*starts, test.numel()], test.flatten(), list[NDArray[np.int32]](), list[int]()
    for number, (first, last) in enumerate(zip(tokens, tokens[1:], strict=False)):
        features = flat[first:last][flat[first:last] >= images.first]
        for text in by_image[digests[int(features[0])]].singly if len(features) else ():
            ids = [*tokenizer.start, *tokenizer.ids_of(text, 0, len(text)), *tokenizer.end]
            if len(ids) <= test.shape[1]:
                found.append(np.array(ids, dtype=np.int32))
                numbers.append(number)
    begins = np.cumsum([0, *map(len, found)])[: len(found)]
    whole = np.concatenate([np.zeros(0, np.int32), *found])
    return dict(zip(SINGLY, (torch.from_numpy(whole), torch.from_numpy(begins), torch.tensor(numbers)), strict=True))


def main_documents(starts: NDArray[np.int64], total: int, every: int, length: int) -> tuple[int, ...]:
    """For each of the sequences that begin at every `every`-th of `total` tokens, the document that has most of its
    first `length` tokens, by its number. starts: of each document, ascending from 0.
    """
    begins = np.arange(0, total, every)
    bounds = np.unique(np.concatenate([starts, begins, begins + length]))
    bounds = bounds[bounds < total]
    sizes = np.diff(bounds, append=total) * (bounds % every < length)
    order = np.lexsort((-sizes, bounds // every))  # of each sequence, its longest piece first
    _, first = np.unique(bounds[order] // every, return_index=True)
    return tuple((np.searchsorted(starts, bounds[order][first], side="right") - 1).tolist())


def _row(corpus: Corpus) -> int:
    return corpus.sequence_length if corpus.one_document_rows else 1


def _check_ids(packed: Mapping[str, torch.Tensor], config: Path, images: ImageIds | None) -> None:
    """Raise CorpusError for token ids that the model has no embedding for: the tokenizer is another model's."""
    if images is None and config.is_file():  # else every document was checked when it was read
        known = json.loads(config.read_text(encoding="utf-8"))["vocab_size"]
        for tokens in packed.values():
            check_words(tokens.numpy(), known)


def _description(corpus: Corpus, starts: Mapping[str, torch.Tensor], notes: Sequence[str]) -> str:
    kinds = ", ".join(dict.fromkeys(source.kind for source in corpus.sources))
    counts = ", ".join(f"{split} {len(where)}" for split, where in starts.items())
    return "; ".join([kinds, f"documents used: {counts}", *notes])


def ordered_documents(documents: Iterable[DocumentT]) -> list[DocumentT]:
    """Distinct documents in the order of the sha256 of their text or ids."""
    return sorted(set(documents), key=lambda document: hashlib.sha256(_bytes_of(document)).digest())


def _bytes_of(document: Document) -> bytes:
    return document.encode() if isinstance(document, str) else document


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Documents in the order in which they are used. weight: its share of the tokens, beside those of other queues."""

    documents: Sequence[Document]
    weight: float = 1.0
    name: str = ""


def queues_of(corpus: Corpus, chat: Chat, notes: list[str] | None = None) -> list[Queue]:
    """The distinct documents of all sources as one queue; where sources have weights, a queue of each source.

    Of what two sources hold, the first keeps it.
    """
    known: set[Document] = set()
    if corpus.sources[0].weight is None:
        return [Queue(documents=_in_order(iterate_batches(corpus, chat, notes), known))]
    return [
        Queue(
            documents=_in_order(iterate_batches(corpus, chat, notes, one), known),
            weight=one.weight or 0.0,  # each has one where the first has: the profile was checked
            name=name_of(one),
        )
        for one in corpus.sources
    ]


def _in_order(documents: Iterable[tuple[int, Document]], known: set[Document]) -> list[Document]:
    """Documents batch by batch, each batch in the order of the hashes. Those that are `known` are left out."""
    batches: dict[int, set[Document]] = {}
    for batch, document in documents:
        batches.setdefault(batch, set()).add(document)
    found: list[Document] = []
    for batch in sorted(batches):
        new = batches[batch] - known
        known |= new
        found += ordered_documents(new)
    return found


@dataclass(frozen=True)
class DocumentTokenizer:
    """Text -> token ids without special tokens, what stands before and after each document, and chats -> text."""

    encode: Callable[[str], list[int]]
    start: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    chat: Chat = contents_alone
    marked: Callable[[str, Sequence[Span]], list[int]] | None = None
    images: ImageIds | None = None

    @property
    def padding(self) -> int:
        """The token that fills a sequence."""
        return (*self.end, *self.start, 0)[0]

    def sees(self, text: Document) -> bool:
        """Whether a document begins with an image, which it is not to be cut from."""
        return self.images is not None and isinstance(text, Conversation) and IMAGE.search(text) is not None

    def ids_of(self, text: Document, start: int, end: int) -> NDArray[np.int32]:
        """The token ids of a part of a document. Those of a chat that the assistant does not say are marked: ~id."""
        part = str(text[start:end])
        if self.marked is None or not isinstance(text, Conversation):
            return self.words(np.array(self.encode(part), dtype=np.int32))
        inside = [(max(first, start) - start, min(last, end) - start) for first, last in text.answers]
        return np.array(self.marked(part, [span for span in inside if span[0] < span[1]]), dtype=np.int32)

    def words(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Ids that are words. Raises CorpusError for those that would be read as an image."""
        if self.images is not None:
            check_words(ids, self.images.first)
        return ids

    def bare(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Token ids without what stands before and after each document, which whoever made them may have written."""
        first = len(self.start) if self.start and tuple(ids[: len(self.start)]) == self.start else 0
        last = len(ids) - (len(self.end) if self.end and tuple(ids[-len(self.end) :]) == self.end else 0)
        return ids[first:last]

    def framed(self, ids: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
        """At most `limit` tokens from the middle of a document: the beginnings of documents are too much alike."""
        room = max(0, limit - len(self.start) - len(self.end))
        cut = max(0, (len(ids) - room) // 2)
        return np.array([*self.start, *ids[cut : cut + room], *self.end], dtype=np.int32)


@dataclass
class _Document:
    """A document that is tokenised only as far as its tokens are needed, from its middle outwards."""

    text: Document
    ids: dict[int, NDArray[np.int32]] = field(default_factory=dict)

    def middle(self, tokenizer: DocumentTokenizer, limit: int) -> NDArray[np.int32]:
        """At most `limit` tokens, with what stands before and after a document."""
        if isinstance(self.text, bytes):
            given = tokenizer.words(np.frombuffer(self.text, np.int32))
            return tokenizer.framed(tokenizer.bare(given), limit)
        if tokenizer.sees(self.text):
            ids = tokenizer.ids_of(self.text, 0, len(self.text))
            return np.array([*tokenizer.start, *ids, *tokenizer.end], dtype=np.int32)
        spans = spans_of(self.text)
        taken: list[int] = []
        for part in sorted(range(len(spans)), key=lambda part: abs(2 * part - len(spans) + 1)):
            if sum(len(self.ids[one]) for one in taken) >= limit:
                break
            if part not in self.ids:
                self.ids[part] = tokenizer.ids_of(self.text, *spans[part])
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


def load_tokenizer(folder: Path, weighs: bool = False, foreseen: Iterable[str] = ()) -> DocumentTokenizer:
    """The parent's tokenizer; `weighs`: it marks what the assistant does not say. foreseen: see `places_of`. Raises
    CorpusError.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CorpusError(
            f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): check the parent."
        ) from error
    return document_tokenizer(tokenizer, weighs, image_ids_of(folder, tokenizer, foreseen))


def document_tokenizer(tokenizer: Any, weighs: bool = False, images: ImageIds | None = None) -> DocumentTokenizer:
    """How a tokenizer of transformers reads documents: bos before each if it writes one by itself, and eos after it.

    images: how it reads documents with images.
    """
    start = tuple(token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id)
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def encode(text: str) -> list[int]:
        # verbose=False: a document may well be longer than the parent's context, it is packed to shorter sequences
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    write = template_of(tokenizer, images.token if images else "")

    def begun(text: str) -> str:
        return text.lstrip().removeprefix(tokenizer.bos_token).lstrip() if start else text.lstrip()

    def chat(messages: Sequence[Message]) -> str:
        if images is not None and any(images.token in message["content"] for message in messages):
            raise Unusable(f"holds the parent's token for an image, {images.token}, as a word")
        if not tokenizer.chat_template and IMAGE.search(messages[0]["content"]):
            return plain(messages)
        # many templates write bos and eos, which every document gets anyway
        text = begun(write(messages)).rstrip()
        text = text.removesuffix(tokenizer.eos_token).rstrip() if end else text
        if not weighs:
            return text
        clean = [{**message, "content": normalise(message["content"])} for message in messages]
        text = normalise(text)
        return Conversation(text, answers_in(text, clean, lambda some: normalise(begun(write(some, True)))))

    if not weighs:
        return DocumentTokenizer(encode, start, end, chat)
    if not tokenizer.is_fast:
        raise CorpusError("corpus.prompt_weight needs a tokenizer of the package tokenizers: leave it out.")
    read = partial(_marked, tokenizer)
    if images is None:
        return DocumentTokenizer(encode, start, end, chat, read)
    check_words([*start, *end], images.first)
    return DocumentTokenizer(encode, start, end, chat, partial(images.read, read), images)


def _marked(tokenizer: Any, text: str, answers: Sequence[Span]) -> list[int]:
    """Token ids, those outside of the answers as ~id. The special token that ends an answer belongs to it."""
    read = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    special, ids = set(tokenizer.all_special_ids), list[int]()
    inside = False
    for token, (first, last) in zip(read["input_ids"], read["offset_mapping"], strict=True):
        ends = inside and token in special
        inside = any(start < last and first < end for start, end in answers)
        ids.append(token if inside or ends else ~token)
    return ids


def pack_splits(
    documents: Sequence[Document] | Sequence[Queue],
    tokenizer: DocumentTokenizer,
    wanted: Mapping[str, int],
    length: int,
    near: NearDuplicates = NONE,
    row: int = 1,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fill the splits of `wanted` (name -> number of sequences) with documents, one split after another.

    documents: in the order in which they are used, or several queues of them. row: what a document gives is a multiple
    of so many tokens. Returns name -> int32 (sequences, length), and name -> int64 (documents,): how many tokens of the
    split come before each document. Raises CorpusError.
    """
    alone = [one for one in documents if not isinstance(one, Queue)]
    queues = [one for one in documents if isinstance(one, Queue)] or [Queue(documents=alone)]
    try:
        return _packed(queues, tokenizer, wanted, length, near, row)
    except CorpusError:
        # a document that is much of the whole text is lost to train when its hash puts it into another split
        sizes = [len(document) for queue in queues for document in queue.documents]
        large = sum(sizes) // SHARES["test"]
        if max(sizes, default=0) <= large:
            raise
        last = [
            replace(queue, documents=sorted(queue.documents, key=lambda text: len(text) > large)) for queue in queues
        ]
        return _packed(last, tokenizer, wanted, length, near, row)


def _packed(
    queues: Sequence[Queue],
    tokenizer: DocumentTokenizer,
    wanted: Mapping[str, int],
    length: int,
    near: NearDuplicates,
    row: int,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    packed, starts, left = {}, {}, list(queues)
    near.clear()
    for split, sequences in wanted.items():
        share = max(1, sequences // SHARES[split]) * length
        filled = _Filled(queues=left, tokenizer=tokenizer, near=near, held_out=split != "train", row=row, length=length)
        filled.until(sequences * length, share)
        tokens = np.concatenate([np.zeros(0, np.int32), *filled.parts])[: sequences * length]
        if len(tokens) < sequences * length:
            raise TooLittleText(_too_small(split, sequences, length, len(tokens), queues, filled))
        packed[split] = torch.from_numpy(tokens).view(sequences, length)
        starts[split] = torch.from_numpy(np.cumsum([0, *map(len, filled.parts[:-1])])[: len(filled.parts)])
        left = [
            replace(queue, documents=queue.documents[place:]) for queue, place in zip(left, filled.places, strict=True)
        ]
    return packed, starts


@dataclass(kw_only=True)
class _Filled:
    """A split that is filled from the fronts of queues.

    held_out: no document after these may be nearly the same as one of them. row, length: see pack_splits. places:
    documents taken from each queue, those left out among them. empty: the queue that was to give the next document and
    had none.
    """

    queues: Sequence[Queue]
    tokenizer: DocumentTokenizer
    near: NearDuplicates
    held_out: bool
    row: int = 1
    length: int = 1
    parts: list[NDArray[np.int32]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    empty: Queue | None = None
    opened: dict[tuple[int, int], _Document | None] = field(default_factory=dict)

    def until(self, needed: int, share: int) -> None:
        """Take the first documents until there are `needed` tokens, at most `share` from each document.

        Train doubles the share while there are too few, until every document is used whole.
        """
        while not self._taken(needed, share) and not self.held_out and any(len(part) >= share for part in self.parts):
            share *= 2

    def _taken(self, needed: int, share: int) -> bool:
        """Whether there are enough tokens."""
        self.parts, self.places = [], [0] * len(self.queues)
        taken = [0.0] * len(self.queues)
        there = 0
        while there < needed:
            number = taken.index(min(taken))
            queue, place = self.queues[number], self.places[number]
            if place == len(queue.documents):
                self.empty = queue
                return False
            self.places[number] += 1
            document = self._open(number, place)
            if document is not None:
                part = document.middle(self.tokenizer, share)
                text, ids = queue.documents[place], np.where(part < 0, ~part, part)
                sees = self.tokenizer.sees(text)
                known = self.near.elsewhere
                if known.shows(int(ids.max()), text) if sees else known.holds(ids, text):
                    continue
                if sees:
                    part = self._kept_whole(part)
                    there += self._filled_up(there, len(part))
                    if there >= needed:  # by what was filled, and the document is left out of all splits
                        return True
                part = part[: len(part) // self.row * self.row]
                self.parts += [part] if len(part) else []
                there += len(part)
                taken[number] += len(part) / queue.weight
        return True

    def _kept_whole(self, part: NDArray[np.int32]) -> NDArray[np.int32]:
        """As much of a document with an image as a sequence holds. Raises CorpusError where that is no answer."""
        kept = part[: self.length]
        if not (kept[:-1] >= 0)[len(self.tokenizer.start) :].any():
            raise CorpusError(
                f"a sequence of {self.length} tokens does not hold an image with a question and its answer, which take "
                f"{len(part)} with all that is asked about it: raise sequence_length."
            )
        return kept

    def _filled_up(self, there: int, size: int) -> int:
        """Fill what is left of a sequence where so many tokens do not fit. Returns how many it took."""
        room = -there % self.length
        if room >= size or not self.parts:
            return 0
        self.parts[-1] = np.concatenate([self.parts[-1], np.full(room, PADDING, np.int32)])
        return room

    def _open(self, number: int, place: int) -> _Document | None:
        """A document of a queue; None where it is nearly the same as one that is held out."""
        if (number, place) not in self.opened:
            text = self.queues[number].documents[place]
            image = IMAGE.search(str(text)) if self.tokenizer.sees(text) else None
            same = self.near.seen(image[0] if image else text, add=self.held_out)
            self.opened[number, place] = None if same else _Document(text)
        return self.opened[number, place]


def _too_small(split: str, sequences: int, length: int, there: int, queues: Sequence[Queue], filled: _Filled) -> str:
    total = sum(len(queue.documents) for queue in queues)
    left = sum(len(queue.documents) for queue in filled.queues)
    near = f"; {filled.near.found} are nearly the same as one of test or validation" if filled.near.found else ""
    known = filled.near.elsewhere.found
    near += f"; {known} are in the corpus or in an earlier capability" if known else ""
    source = filled.empty.name if filled.empty else ""
    ways = f"Lower the weight of {source}, which ran out, or add" if source else "Add"
    return (
        f"the corpus is too small: {split} needs {sequences} sequences x {length} = {sequences * length} tokens, but "
        f"{left} documents are left for it ({total - left} of {total} went to the splits before{near}) and give "
        f"{there}, at most {max(1, sequences // SHARES[split]) * length} each outside train. {ways} text, split it "
        f"into more documents (text files are split at `separator`), or lower corpus.{split}_sequences."
    )


def _fingerprint(
    corpus: Corpus,
    tokenizer_folder: Path,
    parent_fingerprint: str,
    others: Sequence[CorpusInfo] = (),
    foreseen: Iterable[str] = (),
) -> str:
    """A digest of content, settings and tokenizer. Paths of this machine are not part of it."""
    chats = any(isinstance(source, TextSource | HubSource | ImagesSource) for source in corpus.sources)
    names = (*TOKENIZER_FILES, CHAT_TEMPLATE) if chats else TOKENIZER_FILES
    tokenizer = {name: sha256_of(tokenizer_folder / name) for name in names if (tokenizer_folder / name).is_file()}
    settings = corpus.model_dump(mode="json", exclude={"sources"})
    if not corpus.one_document_rows:  # older fingerprints stay
        del settings["one_document_rows"]
    if corpus.prompt_weight is None:  # as it was before there was one
        settings.pop("prompt_weight")
    sources = [
        {"settings": source.model_dump(mode="json", exclude={"path", "file"}), "content": content_of(source)}
        for source in corpus.sources
    ]
    beside: dict[str, Any] = {"others": [other.fingerprint for other in others]} if others else {}
    if corpus.images:  # ids depend on which images there are
        places = {digest: ids.start for digest, ids in places_of(tokenizer_folder, 0, foreseen).items()}
        beside |= {"images": places, "seen": SEEN_VERSION, "asked": IMAGES_VERSION}  # not bits, which devices differ in
    return digest_of(
        version=VERSION, settings=settings, sources=sources, tokenizer=tokenizer, parent=parent_fingerprint, **beside
    )
