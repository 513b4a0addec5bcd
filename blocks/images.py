"""Images as tokens: an id beyond the vocabulary is a row of a table of features, which the parent's own vision tower
and projector made once (tasks/inputs/vision.py).

A text about an image holds such ids where the image stands, and every stage reads it as any other text. Only what
embeds ids knows better: `see` makes an embedding look those ids up here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

VISION = "vision"  # the folder, in a parent's, of what it sees with
TABLE = "images.safetensors"  # in a parent's folder
FEATURES, DIGESTS = "features", "digests"  # (rows, D), as many rows for each image; (images, 32) sha256 of their files


def vision_of(folder: Path) -> dict[str, Any] | None:
    """The config.json of the whole model that a parent's folder is the text model of; None of one that does not see."""
    path = folder / VISION / "config.json"
    if not path.is_file():
        return None
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def features_in(folder: Path) -> Tensor | None:
    """The features (rows, D) of the images that the texts of a parent's folder ask about, on the host and mapped; None
    where they ask about none.
    """
    path = folder / TABLE
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(FEATURES)
    return found


def see(embedding: nn.Embedding, features: Tensor | None) -> None:
    """Have an embedding of V words give row `id - V` of the features for an id of V or more, in place.

    They stand among the words as transformers puts them there: behind what the embedding's class does to words.
    """
    if features is not None:
        embedding.forward = partial(_looked_up, embedding.forward, embedding.num_embeddings, features)  # type: ignore[method-assign]


@contextmanager
def seeing(embedding: nn.Embedding, features: Tensor) -> Iterator[None]:
    """Within the block an embedding of words alone sees."""
    see(embedding, features)
    try:
        yield
    finally:
        del embedding.forward


def _looked_up(words: Any, first: int, features: Tensor, ids: Tensor) -> Tensor:
    """(...) ids -> (..., D)"""
    beyond = ids >= first
    found: Tensor = words(ids.masked_fill(beyond, 0))
    if not beyond.any():
        return found
    rows = features[(ids[beyond] - first).to(features.device)]
    return found.masked_scatter(beyond.unsqueeze(-1), rows.to(found.device, found.dtype))


def as_words(ids: Tensor, words: int) -> Tensor:
    """Ids that can index what has a row for each of so many words. An image is nobody's target, and its place counts
    nothing: which word stands for it does not matter.
    """
    return ids.clamp(max=words - 1)


def image_ids(folder: Path, vocab_size: int) -> dict[str, range]:
    """The ids that stand for each image of a parent's table, by the sha256 of its file; empty without a table."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    with safe_open(path, framework="pt") as file:
        digests, rows = file.get_tensor(DIGESTS), file.get_slice(FEATURES).get_shape()[0]
    each = rows // len(digests)
    first = range(vocab_size, vocab_size + rows, each)
    return {bytes(digest.tolist()).hex(): range(at, at + each) for digest, at in zip(digests, first, strict=True)}
