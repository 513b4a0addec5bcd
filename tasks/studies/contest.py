"""All searches side by side under one budget: what each minimised, the true KL of what it found, what it took.

Every search works on the sequences that were scored, the sums by scores, the black boxes by measured KL as well if
evaluations are given for it. The true KL that counts is that of other sequences, which none of them looked at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from blocks.errors import PuzzleError
from blocks.estimates import mean
from blocks.records import Architecture, LayerChoice, Metric, Value
from tasks.running.progress import Progress, no_progress
from tasks.search.choose import choose
from tasks.search.totals import Problem, predicted, within_budget
from tasks.studies.additivity import Layers
from tasks.studies.peers import BLACK_BOXES, EVALUATIONS, NAMES, Objective, find, top
from tasks.studies.swaps import beyond_noise
from tasks.studies.truth import Meter, OtherModel, other_model

SUMS, TRUE, NOTHING = "summed scores", "true KL", "nothing"


class Entry(Value):
    """One search and what it found.

    objective: what it minimised, at what it found. true: KL of every other sequence, and documents: the
    document of each. evaluations: architectures whose objective was looked at; 0 for a solver. seconds: of the search,
    measured KLs included.
    """

    name: str
    on: str
    layers: Layers
    score: float
    objective: float
    true: tuple[float, ...]
    documents: tuple[int, ...]
    evaluations: int
    seconds: float

    @property
    def title(self) -> str:
        """The search and what it looked at; the untouched parent is no search."""
        return f"{self.name} on {self.on}" if self.on != NOTHING else self.name

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
    """What a black box may look at: so many sums, so many measured KLs (0: none), begun at the `starts` best sums."""

    evaluations: int = EVALUATIONS
    true_evaluations: int = 0
    starts: int = 6
    min_different: int = 4
    seed: int = 0
    smaller: tuple[Path, ...] = ()  # folders of other models of the parent's family


def contest(
    problem: Problem,
    scored: Meter,
    others: Meter,
    size: ContestSize,
    progress: Progress = no_progress,
) -> Contest:
    """Search by every name, measure what was found. Raises InfeasibleBudget when the MIP finds nothing."""
    total = len(NAMES) + len(BLACK_BOXES) * size.true_evaluations
    best = choose(problem)
    entries, left_out = list[Entry](), dict[str, str]()
    for done, name in enumerate(NAMES, start=1):
        try:
            found = best if name == "mip" else find(name, problem, size.seed, size.evaluations)
        except PuzzleError as error:
            left_out[name] = str(error)
            continue
        entries.append(_entry(found, name, SUMS, found.score, found.solve_seconds, others))
        progress(done, total, f"{name} KL {entries[-1].kl.value:.4f}")
    if within_budget(problem, problem.parent):
        untouched = predicted(problem, problem.parent, "parent")
        entries.append(_entry(untouched, "parent", NOTHING, 0.0, 0.0, others))
    for folder in size.smaller:
        smaller = other_model(folder, others)
        if smaller.parameters <= best.totals[0].parameters:
            entries.append(_untrained(smaller, others))
        else:
            left_out[smaller.name] = (
                f"{smaller.parameters:,} parameters, more than the child's {best.totals[0].parameters:,}"
            )
    if size.true_evaluations:
        for place, name in enumerate(BLACK_BOXES):
            after = partial(_after, progress, len(NAMES) + place * size.true_evaluations, total, f"{name} on {TRUE}")
            entries.append(_on_truth(problem, name, best, (scored, others), size, after))
    return _ranked(problem, scored, others, entries, left_out)


def _after(progress: Progress, before: int, total: int, what: str, done: int, _: int, text: str = "") -> None:
    """Steps of one search on the true KL as steps of the whole contest."""
    progress(before + done, total, what)


def _entry(found: Architecture, name: str, on: str, objective: float, seconds: float, others: Meter) -> Entry:
    return Entry(
        name=name,
        on=on,
        layers=found.layers,
        score=found.score,
        objective=objective,
        true=others(found.layers).per_sequence,
        documents=others.documents,
        evaluations=found.evaluations,
        seconds=seconds,
    )


def _untrained(model: OtherModel, others: Meter) -> Entry:
    """A smaller model as an entry: nothing was searched, nothing summed."""
    kl = float(np.mean(model.per_sequence))
    return Entry(
        name=model.name,
        on=NOTHING,
        layers=(),
        score=kl,
        objective=kl,
        true=model.per_sequence,
        documents=others.documents,
        evaluations=0,
        seconds=model.seconds,
    )


def _on_truth(
    problem: Problem,
    name: str,
    best: Architecture,
    meters: tuple[Meter, Meter],
    size: ContestSize,
    progress: Progress,
) -> Entry:
    """A black box on the measured KL of the scored sequences, started at the best sums."""
    scored, others = meters
    batches = tuple(totals.batch_size for totals in best.totals)
    took: dict[tuple[LayerChoice, ...], float] = {}

    def measure(layers: Layers) -> float:
        measured = scored(layers)
        took[layers] = measured.seconds
        return float(np.mean(measured.per_sequence))

    objective = Objective(
        name=TRUE,
        measure=measure,
        evaluations=size.true_evaluations,
        batches=batches,
        starts=tuple(top(problem, size.starts, size.min_different, batches)),
        progress=progress,
    )
    found = find(name, problem, size.seed, objective=objective)
    # by the clock of the forward passes: those of an earlier run are stored, and would take no time
    return _entry(found, name, TRUE, measure(found.layers), sum(took.values()), others)


def _ranked(
    problem: Problem, scored: Meter, others: Meter, entries: list[Entry], left_out: Mapping[str, str]
) -> Contest:
    ranked = sorted(entries, key=lambda entry: (entry.kl.value, entry.name != "parent"))
    first = ranked[0]
    level = [
        entry.title
        for entry in ranked[1:]
        if entry.layers == first.layers
        or not beyond_noise(np.array(first.true) - np.array(entry.true), max(len(ranked) - 1, 1), first.documents)
    ]
    return Contest(
        budget=problem.budget.model_dump(exclude_none=True),
        scored=str(scored.sequences),
        others=str(others.sequences),
        entries=tuple(ranked),
        winner=first.title,
        level=tuple(level),
        prune=first.on != NOTHING,
        left_out=dict(left_out),
    )
