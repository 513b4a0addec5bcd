"""Whose figure is the best for certain: candidates compared in pairs where they had the same sequences and items.

A best figure that its error does not tell from another is none: it gets no star, and nobody is called a winner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks.records import Candidate, Metric
from tasks.evaluate import estimates
from tasks.evaluate.estimates import Estimate


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A figure of a candidate. estimate: its parts, where there are pairs. exact: counted, not measured.

    model: what was timed; two figures of one model are the same, whatever the clock said.
    """

    metric: Metric
    estimate: Estimate | None = None
    exact: bool = False
    model: object = None


def counted(value: float | None) -> Reading | None:
    """A figure without an error."""
    return None if value is None else Reading(metric=Metric(value=value, se=0, n=1), exact=True)


def timed(own: Candidate, metric: Metric | None) -> Reading | None:
    """A speed: of the layers, whatever their weights are."""
    return None if metric is None else Reading(metric=metric, model=own.layers or own.name)


def of_sequences(own: Candidate, name: str) -> Reading | None:
    """Loss, kl or top1_agreement on the test sequences."""
    metric: Metric | None = getattr(own, name)
    values = own.samples.get(name)
    return None if metric is None else Reading(metric=metric, estimate=estimates.mean(values) if values else None)


def of_items(own: Candidate, benchmark: str) -> Reading | None:
    """Accuracy on one benchmark."""
    metric, correct = own.benchmarks.get(benchmark), own.correct.get(benchmark)
    if metric is None:
        return None
    known = {benchmark: correct} if correct else {}
    return Reading(metric=metric, estimate=_accuracy(own, known, by_task=False) if known else None)


def of_all_items(own: Candidate, by_task: bool = False) -> Reading | None:
    """Accuracy on the items of all benchmarks, or the mean of the benchmarks' accuracies."""
    if not any(own.correct.values()):
        return None
    found = _accuracy(own, own.correct, by_task)
    return Reading(metric=found.metric, estimate=found)


def _accuracy(own: Candidate, correct: Mapping[str, Sequence[int]], by_task: bool) -> Estimate:
    return estimates.pooled_accuracy(correct, own.item_groups, by_task)


def over_parent(own: Candidate, parent: Candidate | None) -> Reading | None:
    """Accuracy on all items minus the parent's, in pairs: the parent's own errors on hard items do not count."""
    ours, theirs = of_all_items(own), of_all_items(parent) if parent else None
    if ours is None or theirs is None or own is parent:
        return None
    return Reading(metric=difference(ours, theirs), estimate=ours.estimate)


def retained(own: Candidate, parent: Candidate | None) -> Reading | None:
    """Mean accuracy over the benchmarks as a share of the parent's."""
    if own.retention is None:
        return None
    ours, theirs = of_all_items(own, by_task=True), of_all_items(parent, by_task=True) if parent else None
    pairs = None
    if ours is not None and theirs is not None and ours.estimate is not None and theirs.estimate is not None:
        pairs = estimates.ratio(ours.estimate, theirs.estimate)
    return Reading(metric=own.retention, estimate=pairs)


def difference(first: Reading, second: Reading) -> Metric:
    """first - second: in pairs where both have the same parts, else with errors taken as independent."""
    ours, theirs = first.estimate, second.estimate
    if ours is not None and theirs is not None and len(ours.moves) == len(theirs.moves):
        return estimates.paired_difference(ours, theirs)
    return estimates.independent_difference(first.metric, second.metric)


def best_places(figures: Mapping[int, Reading], less: bool) -> frozenset[int]:
    """Places of the best figure: of one, or of several that are the same. None where the error covers its lead over
    any other, and none where all are the same.
    """
    if not figures:
        return frozenset()
    value = {place: figure.metric.value for place, figure in figures.items()}
    top = (min if less else max)(value, key=value.__getitem__)
    best = {top}
    for place, figure in figures.items():
        if place == top:
            continue
        lead = difference(figures[top], figure)
        if _same(figures[top], figure, lead):
            best.add(place)
        elif not (figure.exact or estimates.is_clear(lead)):
            return frozenset()
    return frozenset() if len(best) == len(figures) else frozenset(best)


def _same(first: Reading, second: Reading, lead: Metric) -> bool:
    if first.model is not None:
        return first.model == second.model
    return lead.value == 0 and (first.exact or (first.estimate is not None and lead.se == 0))


def alike(own: Candidate, other: Candidate) -> bool:
    """Whether two candidates are of one architecture; in reports that do not tell, whether their KL is the same."""
    if own.layers and other.layers:
        return own.layers == other.layers
    return own.kl is not None and own.kl == other.kl
