"""Greedy answers of all models to the same beginnings of test text: how long they say the same, and how often they
loop.
"""

from collections.abc import Sequence

from profiles.schema import Evaluate
from tasks.evaluate.compare import Contender
from tasks.evaluate.loops import Continued, go_on
from tasks.probe.records import Asked
from tasks.probe.sides import Bench
from tasks.running.progress import Progress

VERSION = 1


def answers_of_all(bench: Bench, asked: Asked, progress: Progress) -> dict[str, Continued]:
    """What every model says."""
    run, settings = bench.run, Evaluate(loop_prompts=asked.prompts, answer_tokens=asked.answer_tokens)
    source = (run.lineage.parent, run.lineage.corpus)

    def said(which: Contender, own: Progress) -> Continued:
        return go_on(bench.model(which), source, settings, run.workspace, own, which.name)

    decides = [run.lineage.corpus.fingerprint, asked.prompts, asked.answer_tokens]
    return bench.of_each(Continued, said, progress, answers=decides, v=VERSION)


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))
