"""What a probe found, in tables and sentences: for the terminal, for the page of a run, for benchmarks."""

from collections.abc import Iterator

from blocks.estimates import is_below_zero, is_clear, rounded
from blocks.records import PARENT, Metric
from tasks.probe.records import (
    LEVEL,
    Agreement,
    DomainFigures,
    LengthFigures,
    OnDomain,
    ProbeReport,
    TuningFigures,
)

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows
NONE = "–"
MEANS = (
    "± is one standard error over documents. Over parent: the model's figure less the parent's, in pairs. KL is the "
    "divergence from the parent, loss and entropy too are in nats per token. Calibration is the expected error of the "
    "probability that a model gives to its first choice."
)


def tables(report: ProbeReport) -> list[Table]:
    """Every part that was probed."""
    others = report.models[1:]
    found = [_shift(report.domains, others), _calibration(report.domains, others)]
    if report.length:
        found.append(_length(report.length, others))
    if report.tuning:
        found.append(_tuning(report.tuning, others))
    if report.agreement:
        found.append(_agreement(report.agreement))
    return found


def sentences(report: ProbeReport) -> list[str]:
    """Where the child breaks, part by part."""
    found = [_worst(report)]
    if report.length:
        found.append(_growth(report.length))
    found.append(_confidence(report.domains[0]))
    if report.tuning:
        found.append(_learning(report.tuning))
    if report.agreement:
        found.append(_answers(report.agreement))
    return [*found, *(f"Note: {note}." for note in report.notes)]


def worst_domain(report: ProbeReport, model: str = "child") -> DomainFigures | None:
    """The text on which a model's KL is most times that on the run's own; None where no ratio is known."""
    known = [(one.models[model].times, one) for one in report.domains]
    ratios = [(times.value, place) for place, (times, _) in enumerate(known) if times is not None]
    return known[max(ratios)[1]][1] if ratios else None


def cell(metric: Metric | None, scale: float = 1.0) -> str:
    """A figure with its error, or a dash."""
    return NONE if metric is None else rounded(metric, scale)


def _headed(first: list[str], others: tuple[str, ...], each: tuple[str, ...]) -> list[str]:
    return [*first, *(f"{model}: {name}" for model in others for name in each)]


def _shift(domains: tuple[DomainFigures, ...], others: tuple[str, ...]) -> Table:
    def cells(one: OnDomain) -> list[str]:
        return [cell(one.loss_over_parent), cell(one.kl), cell(one.times)]

    rows = [
        [one.name, str(one.documents), cell(one.models[PARENT].loss)]
        + [text for model in others for text in cells(one.models[model])]
        for one in domains
    ]
    header = _headed(["text", "documents", "parent: loss"], others, ("loss over parent", "KL", "times test"))
    return "Other text", header, rows


def _calibration(domains: tuple[DomainFigures, ...], others: tuple[str, ...]) -> Table:
    def cells(one: OnDomain) -> list[str]:
        return [cell(one.calibration), cell(one.calibration_over_parent), cell(one.entropy_over_parent)]

    rows = [
        [one.name, cell(one.models[PARENT].calibration), cell(one.models[PARENT].entropy)]
        + [text for model in others for text in cells(one.models[model])]
        for one in domains
    ]
    each = ("calibration error", "over parent", "entropy over parent")
    return "Confidence", _headed(["text", "parent: calibration error", "entropy"], others, each), rows


def _length(found: LengthFigures, others: tuple[str, ...]) -> Table:
    rows = [
        [f"{span.first}–{span.last}", cell(span.loss[PARENT])]
        + [text for model in others for text in (cell(span.over_parent[model]), cell(span.growth.get(model)))]
        for span in found.spans
    ]
    header = _headed(["tokens of context", "parent: loss"], others, ("loss over parent", "more than before"))
    return f"Length, {found.rows} rows of one document each, {found.about}", header, rows


def _tuning(found: TuningFigures, others: tuple[str, ...]) -> Table:
    rows = [
        [f"{tokens:,}", cell(found.models[PARENT].loss[place])]
        + [
            text
            for model in others
            for text in (cell(found.models[model].loss[place]), cell(found.models[model].over_parent[place]))
        ]
        for place, tokens in enumerate(found.tokens)
    ]
    header = _headed(["tokens", "parent: loss"], others, ("loss", "over parent"))
    return f"Fine-tuning, {found.steps} steps at {found.learning_rate:g}, {found.about}", header, rows


def _agreement(found: Agreement) -> Table:
    rows = [
        [
            model,
            cell(one.common),
            NONE if one.quartiles is None else " / ".join(f"{value:.4g}" for value in one.quartiles),
            cell(one.never, 100),
            cell(one.loops, 100),
            cell(one.loops_over_parent, 100),
        ]
        for model, one in found.models.items()
    ]
    header = ["model", "tokens as the parent", "quartiles", "never parts, %", "loops, %", "over parent, points"]
    return f"Answers to {found.prompts} beginnings, {found.answer_tokens} tokens at most", header, rows


def _worst(report: ProbeReport) -> str:
    worst = worst_domain(report)
    if worst is None:
        return "Other text: the child's KL on the run's own test text is 0, so nothing is a multiple of it."
    times = worst.models["child"].times
    assert times is not None
    more = times.model_copy(update={"value": 1 - times.value})
    beyond = is_below_zero(more, LEVEL, len(report.domains) - 1)
    said = f"on {worst.name} ({worst.about}) the child's KL is {rounded(times)} times that on its own test text"
    return f"Other text: worst {said}" + ("." if beyond else ", which is no more for certain.")


def _growth(found: LengthFigures) -> str:
    first, longest = found.grows_from["child"], found.spans[-1].last
    where = f"up to {longest} tokens of context ({found.trained} were trained on)"
    if first is None:
        return f"Length: the child's loss over the parent's does not grow for certain {where}."
    growth = next(span.growth["child"] for span in found.spans if span.first == first)
    return (
        f"Length: from {first} tokens of context on the child loses {rounded(growth)} nats more than before, {where}."
    )


def _confidence(own: DomainFigures) -> str:
    parent, child = own.models[PARENT], own.models["child"]
    assert child.calibration_over_parent is not None
    clear = "" if is_clear(child.calibration_over_parent) else ", within the error"
    return (
        f"Confidence: on the test text the expected calibration error is {cell(parent.calibration)} of the parent and "
        f"{cell(child.calibration)} of the child; the difference is {cell(child.calibration_over_parent)}{clear}."
    )


def _learning(found: TuningFigures) -> str:
    child = found.models["child"]
    before, after = child.over_parent[0], child.over_parent[-1]
    level = f"after {child.tokens_to_parent:,} tokens" if child.tokens_to_parent else "from the start"
    if child.tokens_to_parent is None:
        level = f"not within {found.tokens[-1]:,} tokens"
    return (
        f"Fine-tuning on {found.text}: the child's loss is {rounded(before)} over the parent's before and "
        f"{rounded(after)} after it; it has the loss that the parent began with {level}."
    )


def _answers(found: Agreement) -> str:
    child, parent = found.models["child"], found.models[PARENT]
    assert child.quartiles is not None
    quartiles = " / ".join(f"{value:.4g}" for value in child.quartiles)
    return (
        f"Answers: {cell(child.never, 100)} % of the child's are the parent's to the end; the first {quartiles} tokens "
        f"(quartiles) of {found.answer_tokens} are the parent's. The child loops in {cell(child.loops, 100)} %, its "
        f"parent in {cell(parent.loops, 100)} %."
    )


def figures(report: ProbeReport) -> Iterator[tuple[str, Metric]]:
    """Every figure by name, for MLflow: `probe_python/child_kl`."""
    for domain in report.domains:
        for model, one in domain.models.items():
            found = ((name, getattr(one, name)) for name in OnDomain.model_fields)
            yield from ((f"probe_{domain.name}/{model}_{name}", metric) for name, metric in found if metric is not None)
    for span in report.length.spans if report.length else ():
        for model, metric in span.over_parent.items():
            yield f"probe_length/{model}_loss_over_parent_from_{span.first}", metric
    yield from _figures_of_tuning(report)
    for model, answers in report.agreement.models.items() if report.agreement else ():
        named = {"loops": answers.loops, "tokens_in_common": answers.common, "never_parts": answers.never}
        yield from ((f"probe_answers/{model}_{name}", one) for name, one in named.items() if one is not None)


def _figures_of_tuning(report: ProbeReport) -> Iterator[tuple[str, Metric]]:
    for model, curve in report.tuning.models.items() if report.tuning else ():
        for name, metrics in (("loss", curve.loss), ("over_parent", curve.over_parent)):
            if metrics:
                yield f"probe_tuning/{model}_{name}_before", metrics[0]
                yield f"probe_tuning/{model}_{name}_after", metrics[-1]
