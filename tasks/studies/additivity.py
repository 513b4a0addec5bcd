"""Does the sum of replace-1-block scores predict the KL of a whole architecture, and does it choose the right one?

The check measures whole architectures: the best ones by summed score, any two of which differ enough, and those that
simpler searches find. On the sequences that the scores were taken on, predicted and true KL belong to the same tokens,
so they differ by additivity alone. On other validation sequences, which no score and no search looked at, the check
judges the choice. At last it swaps single variants and keeps the swaps that lower the true KL beyond noise.

T = sequences, K = architectures, L = layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blocks.errors import PuzzleError
from blocks.estimates import Estimate, is_clear, mean, parts_of, rank_correlation, ratio, resampled
from blocks.records import Architecture, LayerChoice, Metric, Value
from tasks.search.grid import Grid, make_grid
from tasks.search.program import Floats, Integers
from tasks.search.totals import Batches, Problem, broken_limits, predicted, scores_behind
from tasks.studies.peers import find, top
from tasks.studies.swaps import Step, beyond_noise, paired, swap_repair

Layers = tuple[LayerChoice, ...]

Documents = tuple[Sequence[int], Sequence[int]]  # of every scored sequence, and of every other one

OTHERS = ("uniform", "depth", "greedy", "random", "no_op_only", "max_params")  # simpler searches, measured beside
FAR_OFF = 0.05  # the sums mislead when true / predicted differs from 1 by more than this, and by two standard errors
_DRAWS, _SEED = 1000, 0  # of the bootstrap over sequences


class Truth(Protocol):
    """The true KL of an architecture: of every scored sequence (T,), and of every other one, empty if not asked for."""

    def __call__(self, layers: Layers, only_scored: bool = False) -> tuple[Floats, Floats]: ...


class Measured(Value):
    """An architecture with its predicted and its true KL, per scored sequence, and true on the other sequences.

    documents, other_documents: that of each of these sequences, where they are known.
    """

    name: str
    layers: Layers
    score: float
    predicted: tuple[float, ...]
    true_scored: tuple[float, ...]
    true_others: tuple[float, ...]
    documents: tuple[int, ...] = ()
    other_documents: tuple[int, ...] = ()

    def figure(self, field: str) -> Metric:
        """Mean, standard error and count of one of the three."""
        return self.estimate(field).metric

    def estimate(self, field: str) -> Estimate:
        """The mean of one of the three, over documents."""
        return mean(getattr(self, field), self.other_documents if field == "true_others" else self.documents)


class Difference(Value):
    """True KL of one architecture minus another's on the other sequences, paired; clear: beyond noise."""

    name: str
    than: str
    value: float
    se: float
    clear: bool


class Check(Value):
    """What was found.

    measured: the `top` best sums first, then the other searches', then what the swaps led to. rank: Spearman's
    correlation of predicted and true over the top, on the other sequences; rank_all: over all. ratio: true / predicted
    over the top, on the scored sequences. differences: against the first, the MIP's choice.
    """

    measured: tuple[Measured, ...]
    top: int
    rank: Metric
    rank_all: Metric
    ratio: Metric
    steps: tuple[Step, ...]
    differences: tuple[Difference, ...]
    forecast_misleads: bool
    choice_misleads: bool
    final: str
    evaluations: int


@dataclass(frozen=True, kw_only=True)
class CheckSize:
    """How much is measured: `top` architectures that differ in `min_different` slots, and `swaps` swaps."""

    top: int = 8
    min_different: int = 4
    swaps: int = 24
    seed: int = 0


@dataclass(kw_only=True, eq=False)
class _Measuring:
    """A problem at the batch sizes of the MIP's choice, and what was measured so far."""

    problem: Problem
    truth: Truth
    grid: Grid
    tell: Callable[[str], None]
    documents: Documents
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
            documents=tuple(self.documents[0]),
            other_documents=tuple(self.documents[1]),
        )
        self.found.append(own)
        self.tell(name)
        return own

    def repaired(self, start: Measured, swaps: int) -> tuple[Measured, Sequence[Step], int]:
        """Where swaps on the true KL of the scored sequences led to, the swaps kept, how many were measured."""
        selection = self.grid.selection(start.layers)
        if selection is None or not swaps:
            return start, (), 0

        def measure(own: Integers) -> Floats:
            self.tell("swap")
            return np.asarray(self.truth(self.grid.choice(own), only_scored=True)[0])

        repair = swap_repair(self.grid.program, selection, measure, swaps, documents=self.documents[0])
        end = self.add("repaired", self.grid.choice(np.array(repair.selection))) if repair.steps else start
        return end, repair.steps, repair.evaluations


def check_additivity(
    problem: Problem,
    truth: Truth,
    best: Architecture,
    size: CheckSize,
    tell: Callable[[str], None] = lambda text: None,
    documents: Documents = ((), ()),
) -> Check:
    """Measure whole architectures and repair the best. `best`: the MIP's choice. documents: empty where not known.

    PuzzleError when the scores are not KLs.
    """
    if problem.metric != "kl":
        raise PuzzleError("the check sets summed KL against measured KL: set scoring.metric: kl.")
    batches = best.batches
    measuring = _Measuring(
        problem=problem, truth=truth, grid=make_grid(problem, batches), tell=tell, documents=documents, found=[]
    )
    measuring.add("mip", best.layers)
    for place, layers in enumerate(top(problem, size.top, size.min_different, batches)[1:], start=2):
        measuring.add(f"top {place}", layers)
    first = tuple(measuring.found)
    for name, layers in _of_other_searches(problem, batches, size.seed).items():
        measuring.add(name, layers)
    final, steps, swaps = measuring.repaired(_best_scored(first), size.swaps)
    chosen, share = first[0], _ratio(first)
    off = abs(share.value - 1)
    return Check(
        measured=tuple(measuring.found),
        top=len(first),
        rank=_rank(first),
        rank_all=_rank(measuring.found),
        ratio=share,
        steps=tuple(steps),
        differences=tuple(_difference(measured, chosen) for measured in measuring.found[1:]),
        forecast_misleads=off > FAR_OFF and is_clear(share.model_copy(update={"value": off})),
        choice_misleads=final is not chosen and _difference(final, chosen).clear,
        final=final.name,
        evaluations=len(measuring.found) + swaps,
    )


def contributions(problem: Problem, layers: Layers) -> Floats:
    """(L, T) the score that every layer adds, per scored sequence."""
    found = np.zeros((len(layers), problem.sequences))
    for layer, choice in enumerate(layers):
        for score in scores_behind(problem, layer, choice):
            found[layer] += score.kl_per_sequence
    return found


def _of_other_searches(problem: Problem, batches: Batches, seed: int) -> dict[str, Layers]:
    """Architectures of the simpler searches that keep the budget at these batch sizes, by name."""
    found: dict[str, Layers] = {}
    for name in OTHERS:
        try:
            layers = find(name, problem, seed).layers
        except PuzzleError:
            continue
        if not broken_limits(problem, layers, batches):
            found[name] = layers
    return found


def _best_scored(first: Sequence[Measured]) -> Measured:
    """The lowest true KL on the scored sequences, if it is lower than the MIP's choice beyond noise; else that."""
    best = min(first, key=lambda measured: float(np.mean(measured.true_scored)))
    differences = np.array(best.true_scored) - np.array(first[0].true_scored)
    return best if beyond_noise(differences, max(len(first) - 1, 1), best.documents) else first[0]


def _difference(measured: Measured, than: Measured) -> Difference:
    differences, documents = np.array(measured.true_others) - np.array(than.true_others), than.other_documents
    value, error = paired(differences, documents)
    clear = any(beyond_noise(each, documents=documents) for each in (differences, -differences))
    return Difference(name=measured.name, than=than.name, value=value, se=error, clear=clear)


def _ratio(measured: Sequence[Measured]) -> Metric:
    """Summed true / summed predicted KL on the scored sequences."""
    sums = (np.sum([getattr(m, field) for m in measured], axis=0) for field in ("true_scored", "predicted"))
    found = ratio(*(mean(each, measured[0].documents) for each in sums))
    assert found is not None, "a choice that changes nothing was not searched for"
    return found.metric


def _rank(measured: Sequence[Measured]) -> Metric:
    """Spearman's correlation of the summed scores with the true KL on the other sequences, bootstrapped error."""
    scores = np.array([m.score for m in measured])
    true = np.array([m.true_others for m in measured])
    generator, parts = np.random.default_rng(_SEED), parts_of(true.shape[1], measured[0].other_documents)
    drawn = np.array([resampled(generator, parts) for _ in range(_DRAWS)])
    draws = rank_correlation(scores, true @ drawn.T / drawn.sum(axis=1))
    value = float(rank_correlation(scores, true.mean(axis=1, keepdims=True))[0])
    return Metric(value=value, se=float(draws.std()), n=len(measured))
