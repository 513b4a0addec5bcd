"""Which candidate's figure is the best for certain. Candidates measured on the same sequences and items are compared in
pairs.

A figure whose lead is within its error gets no star in the table, and its candidate is not called the winner.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blocks import estimates
from blocks.estimates import Estimate
from blocks.records import Candidate, ChildReport, Metric

NEAR = 128  # tokens


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A figure of a candidate.

    estimate: the figure with the parts of its sample, where it can be compared in pairs. exact: it was counted, not
    measured. model: of a speed, the model that was timed; two speeds of one model count as the same. disturbed: others
    used the machine meanwhile, so that the figure decides nothing.
    """

    metric: Metric
    estimate: Estimate | None = None
    exact: bool = False
    model: object = None
    disturbed: bool = False


def parent_of(report: ChildReport) -> Candidate | None:
    """The parent's row."""
    return next((candidate for candidate in report.candidates if candidate.stage == "parent"), None)


def final_of(candidates: Sequence[Candidate], name: str) -> Candidate | None:
    """The candidate of a name after its last stage: distilled if it was, else assembled."""
    models = [model for model in candidates if model.name == name and model.stage != "parent"]
    return next((model for model in models if model.stage == "distilled"), models[0] if models else None)


def counted(value: float | None) -> Reading | None:
    """A figure that was counted, which has no error."""
    return None if value is None else Reading(metric=Metric(value=value, se=0, n=1), exact=True)


def timed(candidate: Candidate, metric: Metric | None, disturbed: bool = False) -> Reading | None:
    """A speed. It depends on the layers only, whatever their weights are."""
    if metric is None:
        return None
    return Reading(metric=metric, model=candidate.layers or candidate.name, disturbed=disturbed)


def gain_of(candidate: Candidate, parent: Candidate | None, kind: str) -> Metric | None:
    """Speed over the parent's: `prefill`, `decode` or `request`. From pairs of rounds, in old reports from medians."""
    field = {"request": "runtime_seconds"}.get(kind, f"{kind}_tokens_per_second")
    if candidate is parent:
        return None if getattr(candidate, field) is None else Metric(value=1.0, se=0.0, n=1)
    if candidate.gains is not None:
        paired: Metric = getattr(candidate.gains, kind)
        return paired
    if parent is None:
        return None
    above, below = (parent, candidate) if kind == "request" else (candidate, parent)
    return estimates.independent_ratio(getattr(above, field), getattr(below, field))


def of_sequences(candidate: Candidate, name: str) -> Reading | None:
    """Loss, kl or top1_agreement on the test sequences."""
    metric: Metric | None = getattr(candidate, name)
    values = candidate.samples.get(name)
    if metric is None or not values:
        return None if metric is None else Reading(metric=metric)
    return Reading(metric=metric, estimate=estimates.mean(values, candidate.sample_documents))


def on_capability(candidate: Candidate, capability: str, name: str) -> Reading | None:
    """Loss, kl or top1_agreement on the test sequences of a capability."""
    found = candidate.capabilities.get(capability)
    if found is None:
        return None
    return Reading(metric=getattr(found, name), estimate=estimates.mean(found.samples[name], found.documents))


def of_loops(candidate: Candidate) -> Reading | None:
    """Share of the beginnings on which a model loops, where that was counted."""
    found = candidate.looping
    if found is None or not found.loops:
        return None
    share = estimates.mean(found.loops, found.documents)
    return Reading(metric=share.metric, estimate=share)


def of_right(candidate: Candidate, capability: str, far: int = 0) -> Reading | None:
    """Share of a capability's questions that a model answers right by itself. far: of those in one of `distances`."""
    found = candidate.right_answers.get(capability)
    pairs = [] if found is None else list(zip(found.right, found.documents, strict=True))
    if found is not None and far:
        pairs = [pair for pair, distance in zip(pairs, found.distances, strict=True) if _reach(distance) == far]
    if not pairs:
        return None
    share = estimates.mean(*zip(*pairs, strict=True))
    return Reading(metric=share.metric, estimate=share)


def distances(candidate: Candidate, capability: str) -> list[int]:
    """Powers of two that its questions are grouped by: their answers stand at most so many tokens back, and more than
    half as many. All up to NEAR are one group. Empty where there is one group alone.
    """
    found = candidate.right_answers.get(capability)
    groups = sorted({_reach(distance) for distance in found.distances}) if found else []
    return groups if len(groups) > 1 else []


def _reach(distance: int) -> int:
    return max(NEAR, 1 << (distance - 1).bit_length())


def right_beside(candidate: Candidate, parent: Candidate | None, capability: str) -> Reading | None:
    """A model's share of right answers as a share of its parent's; None where the parent has none right."""
    ours, theirs = of_right(candidate, capability), of_right(parent, capability) if parent else None
    if candidate is parent or ours is None or theirs is None or ours.estimate is None or theirs.estimate is None:
        return None
    found = estimates.ratio(ours.estimate, theirs.estimate)
    return None if found is None else Reading(metric=found.metric, estimate=found)


def of_items(candidate: Candidate, benchmark: str) -> Reading | None:
    """Accuracy on one benchmark."""
    metric, correct = candidate.benchmarks.get(benchmark), candidate.correct.get(benchmark)
    if metric is None:
        return None
    known = {benchmark: correct} if correct else {}
    return Reading(metric=metric, estimate=_accuracy(candidate, known, by_task=False) if known else None)


def of_all_items(candidate: Candidate, by_task: bool = False) -> Reading | None:
    """Accuracy on the items of all benchmarks, or the mean of the benchmarks' accuracies."""
    if not any(candidate.correct.values()):
        return None
    found = _accuracy(candidate, candidate.correct, by_task)
    return Reading(metric=found.metric, estimate=found)


def _accuracy(candidate: Candidate, correct: Mapping[str, Sequence[int]], by_task: bool) -> Estimate:
    return estimates.pooled_accuracy(correct, candidate.item_groups, by_task)


def typed_parent(kind: str) -> str:
    """The name of the whole parent in a type of number, as a model that is compared."""
    return f"parent {kind}"


def is_typed_parent(name: str) -> bool:
    """Whether a model is the whole parent in a type of number: a rival only where it keeps the child's budget."""
    return name.startswith(typed_parent(""))


def over_parent(candidate: Candidate, parent: Candidate | None) -> Reading | None:
    """How a candidate's accuracy on all items stands to its parent's; shares, not percent.

    `metric` is the difference item by item, so that items hard for both do not count. `estimate` is the candidate's own
    accuracy, by which stars compare candidates. None for the parent itself, or where no items were asked.
    """
    ours, theirs = of_all_items(candidate), of_all_items(parent) if parent else None
    if ours is None or theirs is None or candidate is parent:
        return None
    return Reading(metric=difference(ours, theirs), estimate=ours.estimate)


def retained(candidate: Candidate, parent: Candidate | None) -> Reading | None:
    """Mean accuracy over the benchmarks as a share of the parent's."""
    if candidate.retention is None:
        return None
    ours, theirs = of_all_items(candidate, by_task=True), of_all_items(parent, by_task=True) if parent else None
    pairs = None
    if ours is not None and theirs is not None and ours.estimate is not None and theirs.estimate is not None:
        pairs = estimates.ratio(ours.estimate, theirs.estimate)
    return Reading(metric=candidate.retention, estimate=pairs)


def difference(first: Reading, second: Reading) -> Metric:
    """first - second: in pairs where both have the same parts, else as independent measurements."""
    ours, theirs = first.estimate, second.estimate
    if ours is not None and theirs is not None and len(ours.moves) == len(theirs.moves):
        return estimates.paired_difference(ours, theirs)
    return estimates.independent_difference(first.metric, second.metric)


def best_columns(figures: Mapping[int, Reading], less: bool) -> frozenset[int]:
    """Columns of the best figure; several where their figures are the same.

    Empty where the lead over any other figure is within its error, where all figures are the same, and where one of
    them is of a disturbed measurement.
    """
    if not figures or any(figure.disturbed for figure in figures.values()):
        return frozenset()
    value = {column: figure.metric.value for column, figure in figures.items()}
    top = (min if less else max)(value, key=value.__getitem__)
    best = {top}
    for column, figure in figures.items():
        if column == top:
            continue
        lead = difference(figures[top], figure)
        if _same(figures[top], figure, lead):
            best.add(column)
        elif not (figure.exact or estimates.is_clear(lead)):
            return frozenset()
    return frozenset() if len(best) == len(figures) else frozenset(best)


def _same(first: Reading, second: Reading, lead: Metric) -> bool:
    if first.model is not None:
        return first.model == second.model
    return lead.value == 0 and (first.exact or (first.estimate is not None and lead.se == 0))


def same_architecture(candidate: Candidate, other: Candidate) -> bool:
    """Whether two candidates have the same architecture. Old reports do not name it; there their KL is compared."""
    if candidate.layers and other.layers:
        return candidate.layers == other.layers
    return candidate.kl is not None and candidate.kl == other.kl
