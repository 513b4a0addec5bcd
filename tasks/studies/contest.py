"""All searches side by side under one budget: what each minimised, the true KL of what it found, what it took.

Every search minimises the summed scores. The true KL that counts is that of other sequences, which no score looked at.
What a search on the true KL itself would gain, `puzzle check` tells: it exchanges single variants of the choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blocks.errors import PuzzleError
from blocks.estimates import mean
from blocks.records import Architecture, Metric, Value
from tasks.running.progress import Progress, no_progress
from tasks.search.choose import choose
from tasks.search.totals import Problem, predicted, within_budget
from tasks.studies.additivity import Layers
from tasks.studies.peers import EVALUATIONS, JUDGED, find
from tasks.studies.swaps import beyond_noise
from tasks.studies.truth import Meter, OtherModel, other_model


class Entry(Value):
    """One contender. searched: False for the untouched parent and for a model that somebody else trained.

    score: summed scores of what a search found. true: KL of every other sequence, and documents: the document of each.
    evaluations: architectures that were looked at; 0 for a solver. seconds: of the search.
    """

    name: str
    searched: bool
    layers: Layers
    score: float
    true: tuple[float, ...]
    documents: tuple[int, ...]
    evaluations: int
    seconds: float

    @property
    def kl(self) -> Metric:
        """The true KL with its standard error over documents."""
        return mean(self.true, self.documents).metric


class Contest(Value):
    """The searches, lowest true KL first. level: those that differ from the winner by no more than noise, paired,
    the test's level shared among them.

    prune: False where the untouched parent keeps the budget, or a smaller model that somebody else trained wins.
    left_out: why, by name.
    """

    budget: dict[str, float]
    scored: str
    others: str
    entries: tuple[Entry, ...]
    winner: str
    level: tuple[str, ...]
    prune: bool
    left_out: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ContestSize:
    """How many sums the evolutionary search may look at, and folders of other models of the parent's family."""

    evaluations: int = EVALUATIONS
    seed: int = 0
    smaller: tuple[Path, ...] = ()


def contest(
    problem: Problem,
    scored: Meter,
    others: Meter,
    size: ContestSize,
    progress: Progress = no_progress,
) -> Contest:
    """Search by every name, measure what was found. Raises InfeasibleBudget when the MIP finds nothing."""
    if size.smaller and others.finished.corpus.weighted:
        raise PuzzleError(
            "a smaller model is measured on tokens that all count alike, and corpus.prompt_weight gives them weights: "
            "leave out --smaller."
        )
    best = choose(problem)
    entries, left_out = list[Entry](), dict[str, str]()
    for done, name in enumerate(JUDGED, start=1):
        try:
            found = best if name == "mip" else find(name, problem, size.seed, size.evaluations)
        except PuzzleError as error:
            left_out[name] = str(error)
            continue
        entries.append(_entry(found, name, others, searched=True))
        progress(done, len(JUDGED), f"{name} KL {entries[-1].kl.value:.4f}")
    if within_budget(problem, problem.parent):
        entries.append(_entry(predicted(problem, problem.parent, "parent"), "parent", others, searched=False))
    for folder in size.smaller:
        smaller = other_model(folder, others)
        if smaller.parameters <= best.totals[0].parameters:
            entries.append(_untrained(smaller, others))
        else:
            left_out[smaller.name] = (
                f"{smaller.parameters:,} parameters, more than the child's {best.totals[0].parameters:,}"
            )
    return _ranked(problem, scored, others, entries, left_out)


def _entry(found: Architecture, name: str, others: Meter, searched: bool) -> Entry:
    return Entry(
        name=name,
        searched=searched,
        layers=found.layers,
        score=found.score,
        true=others(found.layers).per_sequence,
        documents=others.documents,
        evaluations=found.evaluations,
        seconds=found.solve_seconds if searched else 0.0,
    )


def _untrained(model: OtherModel, others: Meter) -> Entry:
    """A smaller model as an entry: nothing was searched, nothing summed."""
    return Entry(
        name=model.name,
        searched=False,
        layers=(),
        score=float(np.mean(model.per_sequence)),
        true=model.per_sequence,
        documents=others.documents,
        evaluations=0,
        seconds=model.seconds,
    )


def _ranked(
    problem: Problem, scored: Meter, others: Meter, entries: list[Entry], left_out: Mapping[str, str]
) -> Contest:
    ranked = sorted(entries, key=lambda entry: (entry.kl.value, entry.name != "parent"))
    first = ranked[0]
    level = [
        entry.name
        for entry in ranked[1:]
        if entry.layers == first.layers
        or not beyond_noise(np.array(first.true) - np.array(entry.true), max(len(ranked) - 1, 1), first.documents)
    ]
    return Contest(
        budget=problem.budget.model_dump(exclude_none=True),
        scored=str(scored.sequences),
        others=str(others.sequences),
        entries=tuple(ranked),
        winner=first.name,
        level=tuple(level),
        prune=first.searched,
        left_out=dict(left_out),
    )
