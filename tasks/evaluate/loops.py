"""How often a model loops when it goes on from the text of the test split: parent and child on the same beginnings.

Six answers show how a child speaks, and no rate. Here a few hundred beginnings of one length are continued greedily,
many at a time, of documents without an image. tasks/evaluate/answers.py says what a loop is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.errors import CorpusError
from blocks.library import digest_of, made_once, read_tensors
from blocks.records import CorpusInfo, Looping, ParentInfo, Value
from profiles.schema import Evaluate
from tasks.evaluate.answers import continued, loops, stop_tokens
from tasks.evaluate.compare import Contender, served
from tasks.inputs.corpus import documents_of, words_alone
from tasks.running.progress import Progress, no_progress

VERSION = 1
BEGINNING = 32  # tokens of a prompt
BATCH = 40  # prompts that are continued together
Thing = TypeVar("Thing")


def evenly(things: Sequence[Thing], count: int) -> list[Thing]:
    """At most `count` things, evenly spread over all."""
    taken = min(count, len(things))
    return [things[index * len(things) // taken] for index in range(taken)]


def beginnings(tokens: Tensor, count: int, usable: Tensor | None = None) -> tuple[Tensor, list[int]]:
    """At most `count` pieces of BEGINNING tokens (P, BEGINNING), evenly spread over a split (S, T), and their rows.
    usable: (S, T), whether a token may be in one. Raises CorpusError where there is no piece.
    """
    rows, length = tokens.shape
    size = min(BEGINNING, length)
    places = ((row, size * piece) for row in range(rows) for piece in range(length // size))
    there = [(row, first) for row, first in places if usable is None or usable[row, first : first + size].all()]
    if not there:
        raise CorpusError(
            f"nobody can go on from words of the test split: no {size} tokens of it in a row are words without an "
            "image. Add text to the corpus, or set evaluate.loop_prompts to 0."
        )
    taken = evenly(there, count)
    return torch.stack([tokens[row, first : first + size] for row, first in taken]).long(), [row for row, _ in taken]


def looping_path(which: Contender, parent: ParentInfo, corpus: CorpusInfo, settings: Evaluate) -> str:
    """The file of a contender's count, relative to the workspace."""
    asked = settings.model_dump(mode="json", include={"loop_prompts", "answer_tokens"})
    text = {"parent": parent.fingerprint, "corpus": corpus.fingerprint}
    return f"answers/{digest_of(model=which.served_key, **text, asked=asked, v=VERSION, what='loops')}.json"


def looping_of(
    which: Contender,
    source: tuple[ParentInfo, CorpusInfo],
    settings: Evaluate,
    workspace: Path,
    compute: Compute,
    progress: Progress = no_progress,
) -> Looping:
    """The count of the parent or of a child; a stored one is read."""
    parent, corpus = source

    def made() -> Looping:
        model = served(which, parent, workspace, compute)
        return go_on(model, source, settings, workspace, progress, which.name).looping

    return made_once(workspace / looping_path(which, parent, corpus, settings), Looping, workspace, made)


class Continued(Value):
    """What a model said after each of the beginnings, as tokens, and whether that loops."""

    said: tuple[tuple[int, ...], ...]
    looping: Looping


def go_on(
    model: Any,
    source: tuple[ParentInfo, CorpusInfo],
    settings: Evaluate,
    workspace: Path,
    progress: Progress = no_progress,
    name: str = "",
) -> Continued:
    """Let a model go on from `settings.loop_prompts` beginnings of the test split."""
    from transformers import AutoTokenizer

    parent, corpus = source
    tokens = read_tensors(workspace, corpus.tokens, ["test"])["test"]
    prompts, rows = beginnings(tokens, settings.loop_prompts, words_alone(corpus, "test", workspace))
    documents = documents_of(corpus, "test", workspace) or tuple(range(len(tokens)))
    folder = workspace / parent.folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops, said, found = stop_tokens(folder, model.config, tokenizer), list[tuple[int, ...]](), list[int]()
    for batch in prompts.split(BATCH):
        for one in continued(model, batch, settings.answer_tokens, stops):
            text: Any = tokenizer.decode(one, skip_special_tokens=True)
            said.append(tuple(one))
            found.append(int(loops(text, one)))
        progress(len(found), len(prompts), f"{name}, {sum(found)} of {len(found)} loop")
    return Continued(
        said=tuple(said), looping=Looping(loops=tuple(found), documents=tuple(documents[row] for row in rows))
    )
