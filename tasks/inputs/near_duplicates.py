"""Texts that are nearly the same, found by MinHash (Broder 1997) with banded look-up (locality-sensitive hashing).

The likeness of two texts is the Jaccard index of their shingles: the pieces of 24 bytes that begin at each byte, upper
and lower case and white space counted as the same. The package datasketch does this too, but takes every shingle
through Python, which is far slower than reading the text; here numpy hashes whole texts.
"""

import sys
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 24  # bytes
RUN = 13  # tokens or words, as contamination of benchmarks is looked for (GPT-3, arXiv 2005.14165)
BANDS, ROWS = 16, 4  # a pair of likeness .7 shares a band with probability .988, one of .3 with .12
CHUNK = 1 << 15  # shingles hashed at a time: they stay in a core's cache
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FLIPS, _FACTORS = np.random.default_rng(0).integers(1, 1 << 63, (2, BANDS * ROWS), dtype=np.uint64) | np.uint64(1)

Sketch = NDArray[np.uint64]


def sketch_of(document: str | bytes) -> Sketch:
    """(BANDS * ROWS,) for each hash function the least value over the shingles of a text, or of token ids (int32)."""
    plain = " ".join(document.lower().split()).encode() if isinstance(document, str) else document
    letters = np.frombuffer(plain.ljust(SHINGLE, b"\0"), np.uint8)
    least = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(letters) - SHINGLE + 1, CHUNK):
        part = letters[start : start + CHUNK + SHINGLE - 1].astype(np.uint64)
        count = len(part) - SHINGLE + 1
        hashes = np.zeros(count, np.uint64)
        for place in range(SHINGLE):
            hashes = (hashes + part[place : place + count]) * _MIX
            hashes ^= hashes >> np.uint64(29)
        for number, (flip, factor) in enumerate(zip(_FLIPS, _FACTORS, strict=True)):
            least[number] = min(least[number], ((hashes ^ flip) * factor).min())
    return least


def likeness(first: Sketch, second: Sketch) -> float:
    """The estimated Jaccard index of two texts, within about .06."""
    return float((first == second).mean())


class KnownRuns:
    """Runs of tokens that stand in other corpora. A part of a document is told by how many of its runs are among them,
    or of those in its middle: of a long document the other corpus may have taken the middle alone. A document with an
    image is told by the image.
    """

    def __init__(
        self,
        tokens: Sequence[NDArray[np.int32]],
        least: float,
        middle: int = sys.maxsize,
        images: NDArray[np.int32] | None = None,
    ) -> None:
        """least: the share of its runs from which on a part counts as known. middle: how many tokens the other corpora
        took at least of a document that has so many. images: ids of all features in them, ascending.
        """
        self._images = np.zeros(0, np.int32) if images is None else images
        self.least, self._middle = least, max(RUN, middle - 3 * RUN)  # two middles may lie a few tokens apart
        self._runs = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(runs_of, tokens)]))
        self._known: set[Hashable] = set()

    @property
    def found(self) -> int:
        """How many documents were known."""
        return len(self._known)

    def shows(self, image: int, name: Hashable) -> bool:
        """Whether an image is known, by the id of one of its features. name: of the document, for the count."""
        place = int(np.searchsorted(self._images, np.int32(image)))
        known = place < len(self._images) and int(self._images[place]) == image
        self._known |= {name} if known else set()
        return known

    def holds(self, part: NDArray[np.int32], name: Hashable) -> bool:
        """Whether a part of a document is known. name: of the document, for the count."""
        runs = runs_of(part) if len(self._runs) else self._runs
        if not len(runs):
            return False
        places = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        there = self._runs[places] == runs
        beside = max(0, len(there) - self._middle) // 2
        known = bool(max(there.mean(), there[beside : len(there) - beside].mean()) >= self.least)
        self._known |= {name} if known else set()
        return known


def runs_of(tokens: NDArray[np.signedinteger], length: int = RUN) -> NDArray[np.uint64]:
    """(N - length + 1,) hashes of the runs of `length` tokens, or of words by their hashes."""
    count = max(0, len(tokens) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(length):
        hashes = (hashes + tokens[place : place + count].astype(np.uint64)) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return hashes


class NearDuplicates:
    """Texts that were added, to be asked whether another is nearly the same as one of them."""

    def __init__(self, least: float | None) -> None:
        """least: the likeness from which on texts count as nearly the same; None: none do. elsewhere: what other
        corpora hold.
        """
        self.least = least
        self.elsewhere = KnownRuns((), 1.0)
        self.clear()

    def clear(self) -> None:
        """Forget what was added. found: how many texts were nearly the same as one of those."""
        self.found = 0
        self._bands: dict[tuple[int, bytes], list[Sketch]] = {}

    def seen(self, text: str | bytes, add: bool) -> bool:
        """Whether a text is nearly the same as an added one; if not, and it is to be, it is added."""
        if self.least is None or not (add or self._bands):
            return False
        sketch = sketch_of(text)
        keys = [(band, rows.tobytes()) for band, rows in enumerate(sketch.reshape(BANDS, ROWS))]
        known = any(likeness(sketch, other) >= self.least for key in keys for other in self._bands.get(key, ()))
        self.found += known
        for key in keys if add and not known else ():
            self._bands.setdefault(key, []).append(sketch)
        return known


NONE = NearDuplicates(None)
