"""Figures with the error they have, and whether one is larger than another for certain.

An estimate is a value and what each independent part of its sample moved it by: a test sequence, a benchmark item, a
group of items on one text. The squares of these moves add up to the square of the standard error (the sandwich
estimator, with clusters). Two estimates of the same sample are compared part by part, so what was hard for both counts
for neither; a ratio's moves are those of its tangent (the delta method).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from blocks.records import Metric

CLEAR = 2.0  # standard errors that a difference must exceed


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """A figure and what each independent part of its sample moved it by."""

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


def mean(values: ArrayLike, groups: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of (N,) values; those of one group are not independent of each other. Without groups: std / sqrt(N)."""
    numbers = np.asarray(values, dtype=np.float64)
    if groups is not None and len(groups) != len(numbers):
        raise ValueError(f"{len(numbers)} values need as many groups, not {len(groups)}")
    places = np.arange(len(numbers)) if groups is None else _numbered(groups)
    summed = np.bincount(places, weights=(numbers - numbers.mean()) / len(numbers))
    count = len(summed)
    moves = np.asarray(summed * (math.sqrt(count / (count - 1)) if count > 1 else 1.0), dtype=np.float64)
    return Estimate(value=float(numbers.mean()), moves=moves)


def _numbered(groups: Sequence[Hashable]) -> NDArray[Any]:
    order = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return np.array([order[group] for group in groups])


def clustered_standard_error(values: ArrayLike, groups: Sequence[Hashable] | None = None) -> float:
    """Standard error of the mean of (N,) values that come in groups."""
    return mean(values, groups).error


Groups = Mapping[str, Sequence[Hashable]]
EACH_ALONE: Groups = MappingProxyType({})  # every item is on a text of its own


def pooled_accuracy(
    correct: Mapping[str, Sequence[int]], groups: Groups = EACH_ALONE, by_task: bool = False
) -> Estimate:
    """Share of all items that are right; `by_task`: the mean of the tasks' shares. correct: 0 or 1 per item, by task.

    Tasks are given, not drawn: only the items within each have an error. ValueError without items.
    """
    if not any(correct.values()):
        raise ValueError("an accuracy needs items")
    tasks = {name: mean(correct[name], groups.get(name) or None) for name in sorted(correct) if correct[name]}
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
    """first - second, measured apart from each other."""
    return Metric(value=first.value - second.value, se=math.hypot(first.se, second.se), n=min(first.n, second.n))


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate | None:
    """numerator / denominator of the same sample; None where the denominator is 0."""
    if denominator.value == 0:
        return None
    value = numerator.value / denominator.value
    return Estimate(value=value, moves=(numerator.moves - value * denominator.moves) / denominator.value)


def interval(found: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided, by Student's t. ValueError for one part, which tells no error."""
    if len(found.moves) < 2:
        raise ValueError("an interval needs a sample of two parts or more")
    half = float(stats.t.ppf((1 + confidence) / 2, len(found.moves) - 1)) * found.error
    return found.value - half, found.value + half


def is_clear(difference: Metric) -> bool:
    """Whether a difference is more than its error covers. One sample tells no error, so nothing is clear."""
    return difference.n > 1 and abs(difference.value) > CLEAR * difference.se
