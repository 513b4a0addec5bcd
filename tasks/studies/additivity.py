"""Does the sum of replace-1-block scores foretell the KL of a whole architecture, and does it choose the right one?

The best architectures by their sums, no two of them alike, and some that simpler searches make, are measured whole.
On the sequences that were scored, predicted and true are paired: what differs is additivity alone. On the others,
which nothing has looked at, the choice is judged. A correction is fitted, and used where it foretells better; swaps on
the true KL follow.

T = sequences, K = architectures, L = layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from blocks.errors import PuzzleError
from blocks.estimates import rank_correlation
from blocks.records import Architecture, LayerChoice, Metric, Value
from tasks.search.grid import Grid, make_grid
from tasks.search.mip import minimise
from tasks.search.program import Floats, Integers
from tasks.search.totals import Batches, Problem, broken_limits, predicted, scores_behind
from tasks.studies.correction import LEAST, Correction, fit_correction
from tasks.studies.neighbours import minimise_with_neighbours
from tasks.studies.peers import find, top
from tasks.studies.swaps import Step, beyond_noise, paired, swap_repair

Layers = tuple[LayerChoice, ...]

OTHERS = ("uniform", "depth", "greedy", "random", "no_op_only", "max_params")  # searches that spread the measured ones
FAR_OFF = 0.05  # a forecast is called off when it is by more than this share, and beyond two standard errors
_DRAWS, _SEED = 1000, 0  # of the bootstrap over sequences


class Truth(Protocol):
    """The true KL of an architecture: of every scored sequence (T,), and of every other one, empty if not asked for."""

    def __call__(self, layers: Layers, only_scored: bool = False) -> tuple[Floats, Floats]: ...


class Measured(Value):
    """An architecture with its predicted and its true KL, per scored sequence, and true on the other sequences."""

    name: str
    layers: Layers
    score: float
    predicted: tuple[float, ...]
    true_scored: tuple[float, ...]
    true_others: tuple[float, ...]

    def figure(self, field: str) -> Metric:
        """Mean, standard error and count of one of the three."""
        values = np.array(getattr(self, field))
        mean, error = paired(values)
        return Metric(value=mean, se=error if len(values) > 1 else 0.0, n=len(values))


class Difference(Value):
    """True KL of one architecture minus another's on the other sequences, paired; clear: beyond noise."""

    name: str
    than: str
    value: float
    se: float
    clear: bool


class Check(Value):
    """What was found.

    measured: the `top` best sums first, then the other searches', then what correction and swaps led to. rank:
    Spearman's correlation of predicted and true over the top, on the other sequences. ratio: true / predicted over the
    top, on the scored sequences. differences: against the first, the MIP's choice.
    """

    measured: tuple[Measured, ...]
    top: int
    rank: Metric
    rank_all: Metric
    ratio: Metric
    correction: Correction | None
    steps: tuple[Step, ...]
    differences: tuple[Difference, ...]
    forecast_misleads: bool
    choice_misleads: bool
    final: str
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How much is measured: `top` architectures that differ in `min_different` slots, and `swaps` swaps."""

    top: int = 8
    min_different: int = 4
    swaps: int = 24
    seed: int = 0


@dataclass(kw_only=True, eq=False)
class _Study:
    """A problem at the batch sizes of the MIP's choice, and what was measured so far."""

    problem: Problem
    truth: Truth
    grid: Grid
    tell: Callable[[str], None]
    found: list[Measured]

    def add(self, name: str, layers: Layers) -> Measured:
        """Measure an architecture; one that was measured before keeps its first name."""
        for known in self.found:
            if known.layers == layers:
                return known
        scored, others = self.truth(layers)
        own = Measured(
            name=name,
            layers=layers,
            score=predicted(self.problem, layers, name, self.grid.batches).score,
            predicted=tuple(contributions(self.problem, layers).sum(axis=0).tolist()),
            true_scored=tuple(np.asarray(scored).tolist()),
            true_others=tuple(np.asarray(others).tolist()),
        )
        self.found.append(own)
        self.tell(name)
        return own


def check_additivity(
    problem: Problem, truth: Truth, best: Architecture, ask: Ask, tell: Callable[[str], None] = lambda text: None
) -> Check:
    """Measure, fit, solve again, repair. `best`: the MIP's choice. PuzzleError when the scores are not KLs."""
    if problem.metric != "kl":
        raise PuzzleError("the check sets summed KL against measured KL: set scoring.metric: kl.")
    batches = tuple(totals.batch_size for totals in best.totals)
    study = _Study(problem=problem, truth=truth, grid=make_grid(problem, batches), tell=tell, found=[])
    study.add("mip", best.layers)
    for place, layers in enumerate(top(problem, ask.top, ask.min_different, batches)[1:], start=2):
        study.add(f"top {place}", layers)
    first = tuple(study.found)
    for name, layers in _spread(problem, batches, ask.seed).items():
        study.add(name, layers)
    correction = _correct(problem, study.found)
    best_known = _best_scored(first)
    if correction is not None and correction.changes_the_choice:
        best_known = _better(study.add("corrected", _solve_again(study, correction)), best_known)
    final, steps, spent = _repair(study, best_known, ask.swaps)
    return _concluded(study, first, correction, steps, final, spent)


def _concluded(
    study: _Study,
    first: Sequence[Measured],
    correction: Correction | None,
    steps: Sequence[Step],
    final: Measured,
    swaps: int,
) -> Check:
    chosen, ratio = first[0], _ratio(first)
    off = abs(ratio.value - 1)
    return Check(
        measured=tuple(study.found),
        top=len(first),
        rank=_rank(first),
        rank_all=_rank(study.found),
        ratio=ratio,
        correction=correction,
        steps=tuple(steps),
        differences=tuple(_difference(measured, chosen) for measured in study.found[1:]),
        forecast_misleads=off > FAR_OFF and off > 2 * ratio.se,
        choice_misleads=final is not chosen and _difference(final, chosen).clear,
        final=final.name,
        evaluations=len(study.found) + swaps,
    )


def contributions(problem: Problem, layers: Layers) -> Floats:
    """(L, T) the score that every layer adds, per scored sequence."""
    count = max((len(score.kl_per_sequence) for score in problem.scores), default=0)
    rows = [
        np.sum([score.kl_per_sequence for score in scores_behind(problem, layer, choice)], axis=0)
        if scores_behind(problem, layer, choice)
        else np.zeros(count)
        for layer, choice in enumerate(layers)
    ]
    return np.array(rows)


def _spread(problem: Problem, batches: Batches, seed: int) -> dict[str, Layers]:
    """Architectures of the simple searches, those that can keep the budget at these batch sizes."""
    found: dict[str, Layers] = {}
    for name in OTHERS:
        try:
            layers = find(name, problem, seed).layers
        except PuzzleError:
            continue
        if not broken_limits(problem, layers, batches):
            found[name] = layers
    return found


def _correct(problem: Problem, found: Sequence[Measured]) -> Correction | None:
    """Fitted to the scored sequences, where predicted and true are of the same tokens; None with too few."""
    usable = [measured for measured in found if np.mean(measured.true_scored) > 0]
    if len(usable) < LEAST:
        return None
    added = np.array([contributions(problem, measured.layers).mean(axis=1) for measured in usable])
    return fit_correction(added, np.array([np.mean(measured.true_scored) for measured in usable]))


def _solve_again(study: _Study, correction: Correction) -> Layers:
    """The MIP's choice by corrected scores."""
    problem, batches = study.problem, study.grid.batches
    if correction.kind == "neighbours":
        grid = make_grid(problem, batches, joint=True)
        selection = minimise_with_neighbours(grid.program, correction.neighbours, problem.search)
    else:
        grid = study.grid
        scale = np.array(correction.scales)[[option.layer for option in grid.options]]
        answer = minimise(replace(grid.program, scores=grid.scores * scale), problem.search)
        selection = None if answer is None else answer.selection
    assert selection is not None, "the MIP found an architecture within the same rows"
    return grid.choice(selection)


def _repair(study: _Study, start: Measured, swaps: int) -> tuple[Measured, Sequence[Step], int]:
    """Swaps on the true KL of the scored sequences: where they led to, those kept, how many were measured."""
    selection = study.grid.selection(start.layers)
    if selection is None or not swaps:
        return start, (), 0

    def measure(own: Integers) -> Floats:
        study.tell("swap")
        return np.asarray(study.truth(study.grid.choice(own), only_scored=True)[0])

    repair = swap_repair(study.grid.program, selection, measure, swaps)
    end = study.add("repaired", study.grid.choice(np.array(repair.selection))) if repair.steps else start
    return end, repair.steps, repair.evaluations


def _best_scored(first: Sequence[Measured]) -> Measured:
    """The lowest true KL on the scored sequences, if it is lower than the MIP's choice beyond noise; else that."""
    best = min(first, key=lambda measured: float(np.mean(measured.true_scored)))
    return _better(best, first[0], len(first) - 1)


def _better(new: Measured, old: Measured, comparisons: int = 1) -> Measured:
    differences = np.array(new.true_scored) - np.array(old.true_scored)
    return new if beyond_noise(differences, max(comparisons, 1)) else old


def _difference(measured: Measured, than: Measured) -> Difference:
    differences = np.array(measured.true_others) - np.array(than.true_others)
    value, error = paired(differences)
    clear = beyond_noise(differences) or beyond_noise(-differences)
    return Difference(name=measured.name, than=than.name, value=value, se=error, clear=clear)


def _ratio(measured: Sequence[Measured]) -> Metric:
    """Summed true / summed predicted KL on the scored sequences, error by leaving out one sequence at a time."""
    true = np.sum([m.true_scored for m in measured], axis=0)
    foretold = np.sum([m.predicted for m in measured], axis=0)
    count = len(true)
    without = (true.sum() - true) / (foretold.sum() - foretold) if count > 1 else np.array([np.nan])
    error = float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())) if count > 1 else 0.0
    return Metric(value=float(true.sum() / foretold.sum()), se=error, n=count)


def _rank(measured: Sequence[Measured]) -> Metric:
    """Spearman's correlation of the summed scores with the true KL on the other sequences, error by bootstrap."""
    scores = np.array([m.score for m in measured])
    true = np.array([m.true_others for m in measured])
    count = true.shape[1]
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), _DRAWS)
    draws = rank_correlation(scores, true @ drawn.T)
    value = float(rank_correlation(scores, true.mean(axis=1, keepdims=True))[0])
    return Metric(value=value, se=float(draws.std()), n=len(measured))
