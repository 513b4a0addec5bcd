"""Which benchmark items stand in text that a child was made with. They are looked for by runs of 13 words, as for GPT-3
(arXiv 2005.14165, appendix C).

Words, not tokens: a tokenizer splits a word differently behind a space, a line break or a quotation mark. A word is
what ASCII letters and digits stand together, in small letters; all else only separates words. The item is what a model
reads of it, its question, alone and with each of its answers, and one run that it shares is enough. A question, and one
with an answer, of fewer than 13 words is looked for whole; of fewer than 8 words not at all, since text has it by
chance.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blocks.library import digest_of, made_once, read_rows
from blocks.records import CorpusInfo, ParentInfo, SeenItems
from profiles.schema import Evaluate
from tasks.evaluate.quality import BenchmarkResult, check_benchmarks, local_data, retention, without
from tasks.inputs.corpus import splits_of, starts_of
from tasks.inputs.near_duplicates import RUN, runs_of

VERSION = 1
SHORTEST = 8  # words
SPLITS = ("train", "validation")  # blocks are fitted and trained on the one, scored and compared on the other
PIECE = 1 << 16  # tokens read at a time
OVERLAP = 256  # tokens that the next piece has too: more than 13 words are
BORDER = "\0"  # a word between two documents, which no item has

Words = NDArray[np.int64]
NONE = np.zeros(0, np.uint64)


def words_of(text: str) -> Words:
    """A hash for each word; another one in another process."""
    plain = text.encode("ascii", "replace").lower()
    return np.fromiter(map(hash, re.findall(rb"[a-z0-9]+|\0", plain)), np.int64)


def texts_of(benchmark: str, item: Mapping[str, Any]) -> list[str]:
    """The question of an item, and followed by each of its answers: text may have words between the two."""
    if benchmark == "winogrande":
        return [item["sentence"].replace("_", item[option]) for option in ("option1", "option2")]
    if benchmark == "piqa":
        question, answers = item["goal"], [item["sol1"], item["sol2"]]
    elif benchmark == "hellaswag":
        question, answers = item["ctx"], item["endings"]
    else:
        question, answers = item["question"], item["choices"]["text"]
    texts = [question, *(f"{question} {answer}" for answer in answers)]
    return [re.sub(r"\[.*?\]", " ", text) for text in texts] if benchmark == "hellaswag" else texts  # WikiHow's [step]


def seen_in(pieces: Iterable[Words], items: Sequence[Sequence[str]]) -> tuple[list[bool], list[bool]]:
    """Whether each item shares a run with a text, which is given in pieces; and whether it is too short to be looked
    for. items: of each, its texts.
    """
    own = [[words for words in map(words_of, texts) if len(words) >= SHORTEST] for texts in items]
    lengths = sorted({min(RUN, len(words)) for each in own for words in each})
    runs = [np.concatenate([NONE, *(runs_of(words, min(RUN, len(words))) for words in each)]) for each in own]
    wanted, found = np.unique(np.concatenate([NONE, *runs])), set[int]()
    begins = np.zeros(1 << 24, np.bool_)  # a table of what a hash may begin with spares nearly every search
    begins[wanted >> 40] = True
    for piece in pieces:
        for length in lengths:
            there = runs_of(piece, length)
            there = there[begins[there >> 40]]
            places = np.minimum(np.searchsorted(wanted, there), len(wanted) - 1)
            found.update(there[wanted[places] == there].tolist())
    held = np.array(sorted(found), np.uint64)
    return [bool(np.isin(each, held).any()) for each in runs], [not each for each in own]


def pieces_of(corpus: CorpusInfo, split: str, tokenizer: Any, workspace: Path) -> Iterator[Words]:
    """The words of a split piece by piece; no more than that is in memory."""
    length, rows = corpus.sequence_length, splits_of(corpus)[split]
    starts, step = starts_of(corpus, split, workspace), max(1, PIECE // corpus.sequence_length)
    for first in range(0, rows, step):
        last = min(rows, first + step + -(-OVERLAP // length))
        tokens = read_rows(workspace, corpus.tokens, split, first, last).flatten().numpy()
        inside = slice(*np.searchsorted(starts, [first * length + 1, last * length]))
        parts = np.split(tokens, starts[inside] - first * length)
        yield words_of(BORDER.join(tokenizer.decode(part) for part in parts))


def seen_path(texts: Sequence[CorpusInfo], settings: Evaluate) -> str:
    """The file of what was found, relative to the workspace."""
    asked = settings.model_dump(include={"benchmarks", "benchmark_limit", "benchmark_package"})
    key = digest_of(texts=[text.fingerprint for text in texts], asked=asked, v=VERSION, what="seen")
    return f"evaluations/{key}.json"


def look_for_items(parent: ParentInfo, texts: Sequence[CorpusInfo], settings: Evaluate, workspace: Path) -> SeenItems:
    """Look for the drawn items of the profile's benchmarks in texts: the corpus, and those of capabilities."""

    def made() -> SeenItems:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(workspace / parent.folder)
        folders = check_benchmarks(settings.benchmarks, settings.benchmark_package)
        items = {
            name: [texts_of(name, item) for item in local_data(folder, settings.benchmark_limit)["validation"]]
            for name, folder in folders.items()
        }
        pieces = (one for text in texts for split in SPLITS for one in pieces_of(text, split, tokenizer, workspace))
        marks = zip(*seen_in(pieces, [item for each in items.values() for item in each]), strict=True)
        each = {name: list(islice(marks, len(own))) for name, own in items.items()}
        return SeenItems(
            seen={name: tuple(int(seen) for seen, _ in own) for name, own in each.items()},
            short={name: sum(short for _, short in own) for name, own in each.items()},
        )

    return made_once(workspace / seen_path(texts, settings), SeenItems, workspace, made)


def without_seen(
    own: Mapping[str, BenchmarkResult], parents: Mapping[str, BenchmarkResult], found: SeenItems | None
) -> dict[str, Any]:
    """The fields of a Candidate that leave out what was found, where anything was: accuracies and retention."""
    touched = [name for name in own if found is not None and any(found.seen[name])]
    if found is None or not touched:
        return {}
    left, theirs = without(own, found.seen), without(parents, found.seen)
    return {
        "unseen": {name: left[name].metric for name in touched if name in left},
        "unseen_retention": retention(left, theirs) if left else None,
    }
