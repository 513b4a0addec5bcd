"""Greedy answers of all models to the same beginnings of test text: how long they say the same, and how often they
loop.
"""

from collections.abc import Sequence
from pathlib import Path

from blocks.library import keep, remember
from profiles.schema import Evaluate
from tasks.evaluate.compare import Contender
from tasks.evaluate.loops import Continued, go_on
from tasks.probe.records import Asked
from tasks.probe.sides import Bench
from tasks.running.progress import Progress, part_of

VERSION = 1


def answers_of_all(bench: Bench, asked: Asked, progress: Progress) -> dict[str, Continued]:
    """What every model says; what is stored is not asked again."""
    run, found = bench.run, dict[str, Continued]()
    settings = Evaluate(loop_prompts=asked.prompts, answer_tokens=asked.answer_tokens)
    for part, which in enumerate(run.models):
        path = _path(bench, which, asked)
        stored = remember(path, Continued, lambda _: [], run.workspace)
        if stored is None:
            source, own = (run.lineage.parent, run.lineage.corpus), part_of(progress, part, len(run.models))
            stored = go_on(bench.model(which), source, settings, run.workspace, own, which.name)
            keep(path, stored, [], run.workspace)
        found[which.name] = stored
    return found


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _path(bench: Bench, which: Contender, asked: Asked) -> Path:
    text = bench.run.lineage.corpus.fingerprint
    key = bench.key(which, answers=[text, asked.prompts, asked.answer_tokens], v=VERSION)
    return bench.run.workspace / "probes" / f"{key}.json"
