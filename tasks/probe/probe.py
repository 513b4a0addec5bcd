"""A probe of a finished run: texts are prepared and checked first, then models read, learn and answer, then figures are
compared in pairs, over documents.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blocks import estimates
from blocks.compute import Compute
from blocks.errors import PuzzleError
from blocks.estimates import Estimate
from blocks.library import digest_of, write_value
from blocks.records import PARENT, Metric
from tasks.evaluate.loops import Continued
from tasks.probe.agreement import answers_of_all, in_common
from tasks.probe.figures import FIRST_SPAN, Reading, Readings, read_all, spans_of
from tasks.probe.records import (
    LEVEL,
    PROBE,
    Agreement,
    AnswerFigures,
    Asked,
    Curve,
    DomainFigures,
    LengthFigures,
    OnDomain,
    ProbeReport,
    Span,
    TuningFigures,
)
from tasks.probe.sides import Bench, ProbedRun
from tasks.probe.texts import Text, long_text, texts_of
from tasks.probe.tuning import Tuned, check_memory, tune_all
from tasks.running.progress import Progress
from tasks.running.sharing import TaskKey, exclusive

USUAL_LENGTH = 1024
Stage = Callable[[str], AbstractContextManager[Progress]]  # opens a part of the work under a name, to show its progress


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A probe whose texts are ready. long: the rows of one document; None where no length is asked for."""

    run: ProbedRun
    asked: Asked
    texts: tuple[Text, ...]
    long: Text | None


def usual_length(run: ProbedRun) -> int:
    """Length of the long rows where none was asked for: 1024 tokens, or twice what stages saw, within the context."""
    wanted = max(USUAL_LENGTH, 2 * run.trained)
    return min(wanted, run.context or wanted)


def prepare(run: ProbedRun, files: Mapping[str, Path], asked: Asked, compute: Compute) -> Prepared:
    """Check all that is asked for, and prepare the texts; no model computes. PuzzleError for what cannot be probed."""
    if asked.length and run.context and asked.length > run.context:
        raise PuzzleError(
            f"--length {asked.length} is beyond the parent's context of {run.context} tokens: ask for less."
        )
    if 0 < asked.length <= FIRST_SPAN:
        raise PuzzleError(
            f"--length {asked.length} is too short: tokens with {FIRST_SPAN} of context and more are compared with "
            f"those that have less. Ask for more than {FIRST_SPAN}, or for 0, which leaves the part out."
        )
    if asked.finetune_steps:
        check_memory(run, compute)
    texts = texts_of(run.seen, files, asked)
    return Prepared(run=run, asked=asked, texts=texts, long=long_text(run.seen, files, asked) if asked.length else None)


def probe(prepared: Prepared, compute: Compute, stage: Stage) -> ProbeReport:
    """Probe all models of a run, and write the report beside its child."""
    run, asked = prepared.run, prepared.asked
    key = digest_of(folder=run.folder.name, asked=asked, texts=[text.corpus.fingerprint for text in prepared.texts])
    with exclusive(run.workspace, TaskKey(key=f"probe-{key}", what="the same probe")):
        report = _probed(prepared, Bench(run=run, compute=compute), stage)
        write_value(run.folder / PROBE, report)
    return report


def _probed(prepared: Prepared, bench: Bench, stage: Stage) -> ProbeReport:
    run, asked, texts = prepared.run, prepared.asked, prepared.texts
    more = (prepared.long,) if prepared.long else ()
    with stage("read") as progress:
        readings = read_all(bench, (*texts, *more), progress)
    said: dict[str, Continued] = {}
    if asked.prompts:
        with stage("answer") as progress:
            said = answers_of_all(bench, asked, progress)
    tuned: dict[str, Tuned] = {}
    if asked.finetune_steps:
        with stage("fine-tune") as progress:
            tuned = tune_all(bench, texts[1], asked, progress)
    return ProbeReport(
        profile=run.report.profile,
        parent=run.lineage.parent,
        child_folder=run.report.child_folder,
        probed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        asked=asked,
        models=tuple(which.name for which in run.models),
        domains=tuple(domain_figures(text, texts[0], readings) for text in texts),
        length=length_figures(prepared.long, readings, run.trained) if prepared.long else None,
        tuning=tuning_figures(texts[1], tuned, asked) if tuned else None,
        agreement=agreement_of(said, asked) if said else None,
        notes=run.notes,
    )


# --- figures, compared


def over_parent(own: Sequence[float], parents: Sequence[float], documents: Sequence[str]) -> Metric:
    """The mean of a model's figures less the parent's, sequence by sequence, its error over documents."""
    return estimates.mean(np.subtract(own, parents), documents).metric


def _of_text(readings: Readings, text: Text) -> dict[str, Reading]:
    return {model: reading for (model, content), reading in readings.items() if content == text.content}


def domain_figures(text: Text, reference: Text, readings: Readings) -> DomainFigures:
    """All models on a text. reference: the run's own test text."""
    own = _of_text(readings, text)
    models = {model: _on_domain(model, text, reference, readings) for model in own}
    documents = len(set(text.documents))
    return DomainFigures(name=text.name, about=text.about, sequences=text.sequences, documents=documents, models=models)


def _on_domain(model: str, text: Text, reference: Text, readings: Readings) -> OnDomain:
    own, parents = readings[model, text.content].samples, readings[PARENT, text.content].samples
    mean = {name: estimates.mean(values, text.documents) for name, values in own.items()}
    figures = {name: one.metric for name, one in mean.items()}
    if model == PARENT:
        return OnDomain(**figures)
    over = {
        f"{name}_over_parent": over_parent(own[name], parents[name], text.documents)
        for name in ("loss", "entropy", "calibration")
    }
    return OnDomain(**figures, **over, times=_times(mean["kl"], model, text, reference, readings))


def _times(kl: Estimate, model: str, text: Text, reference: Text, readings: Readings) -> Metric | None:
    """The KL on a text over that on the run's own test text, in pairs where they are of the same documents."""
    if text == reference:
        return None
    base = estimates.mean(readings[model, reference.content].samples["kl"], reference.documents)
    return estimates.ratio_by_groups(kl, text.documents, base, reference.documents)


def length_figures(text: Text, readings: Readings, trained: int) -> LengthFigures:
    """The loss of all models by length of context."""
    own, documents = _of_text(readings, text), text.documents
    spans = spans_of(text.corpus.sequence_length)
    parents = own[PARENT].by_context
    gaps = {model: np.subtract(one.by_context, parents) for model, one in own.items() if model != PARENT}  # (spans, S)
    found = []
    for place, (first, last) in enumerate(spans):
        loss = {model: estimates.mean(one.by_context[place], documents).metric for model, one in own.items()}
        over = {model: estimates.mean(gap[place], documents).metric for model, gap in gaps.items()}
        growth = {
            model: estimates.mean(gap[place] - _mean_before(gap, spans, place), documents).metric
            for model, gap in gaps.items()
            if place
        }
        found.append(Span(first=first, last=last, loss=loss, over_parent=over, growth=growth))
    return LengthFigures(
        text=text.name,
        about=text.about,
        rows=text.sequences,
        trained=trained,
        spans=tuple(found),
        grows_from={model: _grows_from(found, model) for model in own if model != PARENT},
    )


def _mean_before(gap: NDArray[np.float64], spans: Sequence[tuple[int, int]], place: int) -> NDArray[np.float64]:
    """(S,) the mean over all tokens with shorter contexts."""
    sizes = [last - first + 1 for first, last in spans[:place]]
    return np.average(gap[:place], axis=0, weights=sizes)


def _grows_from(spans: Sequence[Span], model: str) -> int | None:
    growths = {span.first: span.growth[model] for span in spans if model in span.growth}
    less = {first: one.model_copy(update={"value": -one.value}) for first, one in growths.items()}
    return next((first for first, one in less.items() if estimates.is_below_zero(one, LEVEL, len(less))), None)


def tuning_figures(text: Text, tuned: Mapping[str, Tuned], asked: Asked) -> TuningFigures:
    """The curves of all models, and when each has the loss that the parent began with."""
    parents = tuned[PARENT]
    start = float(np.mean(parents.losses[0]))
    models = {}
    for model, one in tuned.items():
        loss = tuple(estimates.mean(losses, text.documents).metric for losses in one.losses)
        there = (tokens for tokens, metric in zip(one.tokens, loss, strict=True) if metric.value <= start)
        over = tuple(over_parent(*pair, text.documents) for pair in zip(one.losses, parents.losses, strict=True))
        models[model] = Curve(
            loss=loss, over_parent=() if model == PARENT else over, tokens_to_parent=next(there, None)
        )
    return TuningFigures(
        text=text.name,
        about=text.about,
        steps=asked.finetune_steps,
        learning_rate=asked.learning_rate,
        tokens=parents.tokens,
        models=models,
    )


def agreement_of(said: Mapping[str, Continued], asked: Asked) -> Agreement:
    """How long every model says what the parent says, and how often it loops."""
    parents = said[PARENT]
    documents = parents.looping.documents
    models = {}
    for model, one in said.items():
        loops = estimates.mean(one.looping.loops, documents).metric
        if model == PARENT:
            models[model] = AnswerFigures(loops=loops)
            continue
        pairs = list(zip(one.said, parents.said, strict=True))
        common = [in_common(own, other) for own, other in pairs]
        low, median, high = np.quantile(common, (0.25, 0.5, 0.75)).tolist()
        more = np.subtract(one.looping.loops, parents.looping.loops)
        models[model] = AnswerFigures(
            loops=loops,
            loops_over_parent=estimates.mean(more, documents).metric,
            common=estimates.mean(common, documents).metric,
            quartiles=(low, median, high),
            never=estimates.mean([own == other for own, other in pairs], documents).metric,
        )
    return Agreement(prompts=len(parents.said), answer_tokens=asked.answer_tokens, models=models)
