"""Figures with standard errors, and whether one is larger than another for certain. All statistics of the project that
scipy.stats does not give as it is.

An estimate is a value together with how far each independent part of its sample moved it. A part is a test sequence, a
benchmark item, or a group of items on one text. The squares of these moves add up to the square of the standard error
(the sandwich estimator, with clusters). Two estimates of the same sample are compared part by part, so a part that was
hard for both counts for neither. The moves of a ratio are those of its tangent (the delta method).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from blocks.records import Metric

CLEAR = 2.0  # a difference of large samples is clear when it exceeds so many standard errors


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A figure and how far each independent part of its sample moved it."""

    value: float
    moves: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(float(np.sum(self.moves**2)))

    @property
    def metric(self) -> Metric:
        """The figure as it is reported; n counts independent parts."""
        return Metric(value=self.value, se=self.error, n=len(self.moves))


def mean(values: ArrayLike, groups: Sequence[Hashable] = ()) -> Estimate:
    """Mean of (N,) values. Without groups its error is std / sqrt(N), with N - 1 degrees of freedom.

    groups: one for each value; the values of one group are not independent of each other and count as one part.
    """
    numbers = np.asarray(values, dtype=np.float64)
    parts = parts_of(len(numbers), groups)
    summed = np.bincount(parts, weights=(numbers - numbers.mean()) / len(numbers))
    count = len(summed)
    moves = np.asarray(summed * (math.sqrt(count / (count - 1)) if count > 1 else 1.0), dtype=np.float64)
    return Estimate(value=float(numbers.mean()), moves=moves)


def parts_of(count: int, groups: Sequence[Hashable] = ()) -> NDArray[np.int64]:
    """(N,) the part of the sample that each of `count` values belongs to: its group, or itself without groups."""
    if not groups:
        return np.arange(count)
    if len(groups) != count:
        raise ValueError(f"{count} values need as many groups, not {len(groups)}")
    order = {group: part for part, group in enumerate(dict.fromkeys(groups))}
    return np.array([order[group] for group in groups], dtype=np.int64)


def resampled(generator: np.random.Generator, parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) how often each value is in a sample that is drawn with replacement, part by part (the bootstrap)."""
    count = int(parts.max()) + 1
    drawn: NDArray[np.int64] = generator.multinomial(count, np.full(count, 1 / count))[parts]
    return drawn


Groups = Mapping[str, Sequence[Hashable]]
EACH_ALONE: Groups = MappingProxyType({})  # every item is on a text of its own


def pooled_accuracy(
    correct: Mapping[str, Sequence[int]], groups: Groups = EACH_ALONE, by_task: bool = False
) -> Estimate:
    """Share of all items that are right; `by_task`: the mean of the tasks' shares. correct: 0 or 1 per item, by task.

    The tasks are given, not drawn from many: only the items within each contribute to the error. ValueError without
    items.
    """
    if not any(correct.values()):
        raise ValueError("an accuracy needs items")
    tasks = {name: mean(correct[name], groups.get(name, ())) for name in sorted(correct) if correct[name]}
    items = sum(len(correct[name]) for name in tasks)
    weights = {name: 1 / len(tasks) if by_task else len(correct[name]) / items for name in tasks}
    return Estimate(
        value=sum(weights[name] * one.value for name, one in tasks.items()),
        moves=np.concatenate([weights[name] * one.moves for name, one in tasks.items()]),
    )


def paired_difference(first: Estimate, second: Estimate) -> Metric:
    """first - second, both of the same sample. ValueError when the samples differ in size."""
    if len(first.moves) != len(second.moves):
        raise ValueError(f"pairs need the same sample: {len(first.moves)} and {len(second.moves)} parts")
    return Estimate(value=first.value - second.value, moves=first.moves - second.moves).metric


def independent_difference(first: Metric, second: Metric) -> Metric:
    """first - second, where the two were measured independently of each other."""
    return Metric(value=first.value - second.value, se=math.hypot(first.se, second.se), n=min(first.n, second.n))


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate | None:
    """numerator / denominator of the same sample; None where the denominator is 0."""
    if denominator.value == 0:
        return None
    value = numerator.value / denominator.value
    return Estimate(value=value, moves=(numerator.moves - value * denominator.moves) / denominator.value)


def ratio_by_groups(
    numerator: Estimate, of: Sequence[Hashable], denominator: Estimate, per: Sequence[Hashable]
) -> Metric | None:
    """numerator / denominator of two samples that may share groups; None where the denominator is 0.

    of, per: the groups that the two were estimated with. What they share is compared in pairs; a group that a sample
    lacks moved nothing in it. Without a shared group the two are independent of each other.
    """
    among = {group: part for part, group in enumerate(dict.fromkeys([*of, *per]))}
    sides = []
    for one, groups in ((numerator, of), (denominator, per)):
        moves = np.zeros(len(among))
        moves[[among[group] for group in dict.fromkeys(groups)]] = one.moves
        sides.append(Estimate(value=one.value, moves=moves))
    found = ratio(*sides)
    least = min(len(numerator.moves), len(denominator.moves))
    return None if found is None else found.metric.model_copy(update={"n": least})


def independent_ratio(numerator: Metric | None, denominator: Metric | None) -> Metric | None:
    """numerator / denominator, measured independently of each other, with errors to first order.

    None where one of the two is missing or the denominator is 0.
    """
    if numerator is None or denominator is None or denominator.value == 0:
        return None
    value = numerator.value / denominator.value
    relative = numerator.se / numerator.value if numerator.value else 0.0
    error = abs(value) * math.hypot(relative, denominator.se / denominator.value)
    return Metric(value=value, se=error, n=min(numerator.n, denominator.n))


def interval(found: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided confidence interval by Student's t. ValueError for a single part, which shows no error."""
    if len(found.moves) < 2:
        raise ValueError("an interval needs a sample of two parts or more")
    half = float(stats.t.ppf((1 + confidence) / 2, len(found.moves) - 1)) * found.error
    return found.value - half, found.value + half


def exact_upper_bound(share: float, count: int, confidence: float) -> float:
    """The one-sided upper bound of a share that was counted over `count` independent parts (Clopper and Pearson)."""
    found = share * count
    return float(stats.beta.ppf(confidence, found + 1, count - found)) if found < count else 1.0


def lower_bound(found: Metric, confidence: float) -> float:
    """One-sided lower confidence bound by Student's t; minus infinity for a single part, which shows no error."""
    if found.n < 2:
        return -math.inf
    return found.value - float(stats.t.ppf(confidence, found.n - 1)) * found.se


def upper_bound(found: Metric, confidence: float) -> float:
    """One-sided upper confidence bound, as `lower_bound`; infinity for a single part."""
    return -lower_bound(found.model_copy(update={"value": -found.value}), confidence)


def confidence_of_look(confidence: float, look: int) -> float:
    """The confidence that the look-th of many comparisons needs, from 1, so that all of them together, however many
    there will be, err with a probability of at most 1 - confidence. That error is spent as 1/2, 1/6, 1/12, ... of it;
    the bound is the sum (Bonferroni), so the comparisons may depend on each other in any way.
    """
    return 1 - (1 - confidence) / (look * (look + 1))


def rank_correlation(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """(D,) Spearman correlations of `first` (K,) with every column of `second` (K, D); 0 where one does not vary."""
    ranks, columns = stats.rankdata(first), stats.rankdata(second, axis=0)
    varies = (np.ptp(columns, axis=0) > 0) & (np.ptp(ranks) > 0)
    found = np.zeros(columns.shape[1])
    if varies.any():
        found[varies] = stats.pearsonr(ranks[:, None], columns[:, varies], axis=0).statistic
    return found


def is_below_zero(difference: Metric, level: float, comparisons: int = 1) -> bool:
    """Whether a difference is below 0 by a one-sided t test, its level shared among so many comparisons (Bonferroni).

    A sample of one shows no error, so it is never below for certain.
    """
    if difference.n < 2 or difference.value >= 0:
        return False
    if difference.se == 0:  # every part says the same
        return True
    return float(stats.t.cdf(difference.value / difference.se, difference.n - 1)) < level / comparisons


def is_clear(difference: Metric) -> bool:
    """Whether a difference exceeds its error: two standard errors; where the sample is small, as many as give the same
    confidence by Student's t (2.5 for seven parts). A sample of one shows no error: nothing is clear.
    """
    if difference.n < 2:
        return False
    errors = float(stats.t.isf(stats.norm.sf(CLEAR), difference.n - 1))
    return abs(difference.value) > errors * difference.se


def rounded(metric: Metric, scale: float = 1.0) -> str:
    """`value ±error` with the error to two digits; an error of 0 (exact, or one sample) is left out."""
    value, error = metric.value * scale, metric.se * scale
    if error <= 0:
        return plain(value)
    decimals = min(9, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ±{error:,.{decimals}f}"


def plain(value: float) -> str:
    """Four digits, without a power of ten for everyday sizes."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
