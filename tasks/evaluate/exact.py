"""Whether a model that answers by itself gives the known answer, on one capability's questions.

On given text a child may be hardly worse than its parent, and still answer far fewer questions when it reads its own
words. A text with `prompt_weight` 0 marks its answers by its weights. Each marked answer of at most LONGEST tokens in
the test split is a question, and what stands before it is the prompt. Longer answers are left out: no wording of them
is the right one.

A model is right when the words of the known answer are the first words that it says. Words are much as in SQuAD (arXiv
1606.05250): in small letters, without punctuation, without a, an and the; but a number keeps its sign and its point. So
`Yes, it does` is right where `yes` is known, and `123456` is wrong where `12345` is. What is said behind it does not
count, since a parent without fine-tuning does not know where to stop. Where a data set knows several answers, the
text has the first of them alone.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks.compute import Compute
from blocks.library import digest_of, made_once, read_tensors
from blocks.records import CorpusInfo, ParentInfo, RightAnswers
from profiles.schema import Evaluate
from tasks.evaluate.answers import continued, stop_tokens
from tasks.evaluate.compare import Contender, served
from tasks.evaluate.loops import evenly
from tasks.inputs.corpus import SINGLY, starts_of, weights_of
from tasks.inputs.questions import DIGITS
from tasks.running.progress import Progress, no_progress

VERSION = 1
LONGEST = 16  # tokens of a known answer
MORE = 8  # tokens that a model may say beyond those: an article, a quotation mark, the rest of a longer word
TOGETHER = 4096  # tokens of prompts that are answered together
ARTICLES = {"a", "an", "the"}
WORD = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*(?!\w)|\w+")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, its known answer, and how many tokens that has. is_code: nobody can know it but from the prompt."""

    prompt: tuple[int, ...]
    answer: str
    tokens: int
    document: int
    is_code: bool = False


def words_of(text: str) -> list[str]:
    """The words of an answer that count. An article counts where there is nothing else: an answer may be a letter."""
    words = WORD.findall(text.lower())
    return [word for word in words if word not in ARTICLES] or words


def is_right(said: str, known: str) -> bool:
    """Whether what was said begins with the words of the known answer."""
    wanted, words = words_of(known), WORD.findall(said.lower())
    if not ARTICLES.issuperset(wanted):
        words = [word for word in words if word not in ARTICLES]
    return words[: len(wanted)] == wanted


def questions_of(corpus: CorpusInfo, tokenizer: Any, workspace: Path, count: int) -> list[Question]:
    """At most `count` questions, evenly spread over the test split of a capability.

    A prompt is at most as long as a sequence: what the document has before the answer, and before that as many whole
    documents as there is room for. They show in which form an answer is wanted, and a model that was never told says
    whole sentences. With `one_document_rows` there is never room for another document. About an image the prompt is the
    image and the question alone: earlier answers about it would tell the blind much.

    What is no question: an answer that may have been cut off with its document, or that has no words; and, where all
    answers are numbers of one length, of DIGITS digits or more, one that the prompt does not tell.
    """
    weights = weights_of(corpus, "test", workspace)
    if weights is None:
        return []
    found = list(_asked_in_words(corpus, weights, tokenizer, workspace))
    lengths = {len(one.answer) if one.answer.isdigit() else 0 for one in found}
    if len(lengths) == 1 and min(lengths) >= DIGITS:
        told = [one for one in found if one.answer in tokenizer.decode(list(one.prompt))]
        found = [replace(one, is_code=True) for one in told]
    if corpus.first_image:
        found = sorted([*found, *_asked_singly(corpus, tokenizer, workspace)], key=lambda one: one.document)
    return evenly(found, count)


def _asked_in_words(corpus: CorpusInfo, weights: Tensor, tokenizer: Any, workspace: Path) -> Iterator[Question]:
    """The questions of a test split that are about no image, behind documents without one."""
    starts = starts_of(corpus, "test", workspace)
    tokens = read_tensors(workspace, corpus.tokens, ["test"])["test"].flatten().numpy()
    special = np.isin(tokens, tokenizer.all_special_ids)
    behind = weights.flatten().numpy() > 0  # a weight is of the token behind, and the first token of all has none
    marked = np.append(behind[:1], behind[:-1]) & ~special
    ends = np.append(starts[1:], len(tokens))
    cut = ((ends - starts) % corpus.sequence_length == 0) | (ends == len(tokens))
    images = np.flatnonzero(tokens >= corpus.first_image) if corpus.first_image else np.zeros(0, np.int64)
    for first, last in np.flatnonzero(np.diff(marked, prepend=False, append=False)).reshape(-1, 2).tolist():
        document = int(np.searchsorted(starts, first, side="right")) - 1
        seen = images[: np.searchsorted(images, first)][-1:].max(initial=-1)
        if seen >= starts[document]:
            continue
        earliest = max(first - corpus.sequence_length, int(seen) + 1)
        begin = max(int(starts[min(document, int(np.searchsorted(starts, earliest)))]), earliest)
        at_the_cut = cut[document] and special[last : ends[document]].all()
        if last - first > LONGEST or at_the_cut or special[max(begin, starts[document]) : first].all():
            continue
        prompt, answer = tuple(tokens[begin:first].tolist()), tokenizer.decode(tokens[first:last].tolist()).strip()
        if words_of(answer):
            yield Question(prompt=prompt, answer=answer, tokens=last - first, document=document)


def _asked_singly(corpus: CorpusInfo, tokenizer: Any, workspace: Path) -> Iterator[Question]:
    """The questions about images of a test split, each behind its image alone."""
    read = read_tensors(workspace, corpus.tokens, list(SINGLY))
    tokens, starts, documents = (read[name].numpy() for name in SINGLY)
    for document, ids in zip(documents.tolist(), np.split(tokens, starts[1:]), strict=len(documents) > 0):
        said = np.flatnonzero((ids >= 0) & ~np.isin(ids, tokenizer.all_special_ids))
        if not len(said) or said[-1] - said[0] >= LONGEST:
            continue
        first, last = int(said[0]), int(said[-1]) + 1
        answer = tokenizer.decode(ids[first:last].tolist()).strip()
        prompt = tuple(np.where(ids < 0, ~ids, ids)[:first].tolist())
        if words_of(answer):
            yield Question(prompt=prompt, answer=answer, tokens=last - first, document=document)


def distances_of(questions: Sequence[Question], tokenizer: Any) -> tuple[int, ...]:
    """How many tokens before the end of its prompt each answer last begins. Empty unless answers are codes: a word such
    as `no` may stand anywhere.
    """
    found = []
    for one in (one for one in questions if one.is_code):
        _, code, behind = tokenizer.decode(list(one.prompt)).rpartition(one.answer)
        found.append(len(tokenizer(code + behind, add_special_tokens=False)["input_ids"]))
    return tuple(found)


def right_path(which: Contender, parent: ParentInfo, corpus: CorpusInfo, settings: Evaluate) -> str:
    """The file of a contender's right answers, relative to the workspace."""
    text = {"parent": parent.fingerprint, "corpus": corpus.fingerprint, "asked": settings.answered_questions}
    return f"answers/{digest_of(model=which.served_key, **text, v=VERSION, what='right answers')}.json"


def right_answers_of(
    which: Contender,
    source: tuple[ParentInfo, CorpusInfo],
    settings: Evaluate,
    workspace: Path,
    compute: Compute,
    progress: Progress = no_progress,
) -> RightAnswers:
    """What the parent or a child answers right of a capability's questions; a stored result is read."""
    parent, corpus = source

    def made() -> RightAnswers:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(workspace / parent.folder)
        questions = questions_of(corpus, tokenizer, workspace, settings.answered_questions)
        if not questions:
            return RightAnswers(right=(), documents=())
        model = served(which, parent, workspace, compute)
        stops = stop_tokens(workspace / parent.folder, model.config, tokenizer)

        def told(right: int, done: int) -> None:
            progress(done, len(questions), f"{which.name}{corpus.where}, {right} right")

        return RightAnswers(
            right=answered(model, tokenizer, questions, stops, told),
            documents=tuple(one.document for one in questions),
            distances=distances_of(questions, tokenizer),
        )

    return made_once(workspace / right_path(which, parent, corpus, settings), RightAnswers, workspace, made)


def answered(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    stops: frozenset[int],
    told: Callable[[int, int], None],
) -> tuple[int, ...]:
    """1 for each question that a model answers right, else 0. told: how many were right, and how many asked so far."""
    right = dict[int, int]()
    for batch in _batches(questions):
        prompts = torch.tensor([questions[number].prompt for number in batch])
        longest = max(questions[number].tokens for number in batch)
        for number, said in zip(batch, continued(model, prompts, longest + MORE, stops), strict=True):
            asked = questions[number]
            text: Any = tokenizer.decode(said[: asked.tokens + MORE], skip_special_tokens=True)
            right[number] = int(is_right(text, asked.answer))
        told(sum(right.values()), len(right))
    return tuple(right[number] for number in range(len(questions)))


def _batches(questions: Sequence[Question]) -> list[list[int]]:
    """Numbers of questions whose prompts have one length: nobody's answer depends on padding."""
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
    found = []
    for length, group in groupby(order, key=lambda number: len(questions[number].prompt)):
        alike, size = list(group), max(1, TOGETHER // length)
        found += [alike[first : first + size] for first in range(0, len(alike), size)]
    return found
