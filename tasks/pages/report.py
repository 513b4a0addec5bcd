"""The report of a run: parent, child and baselines side by side, predicted beside measured, and which is best.

The terminal's table and the Markdown (report.md, the child's model card) are made from one list of rows.
"""

import html
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blocks.estimates import interval, is_clear
from blocks.files import atomic_path, write_text
from blocks.library import write_value
from blocks.records import Answer, Architecture, Candidate, ChildReport, Metric
from tasks.evaluate.standing import (
    Reading,
    best_columns,
    counted,
    difference,
    of_all_items,
    of_items,
    of_sequences,
    over_parent,
    retained,
    same_architecture,
    timed,
)
from tasks.measure.cost_sums import percent, warnings_of
from tasks.pages.picture import draw_architecture, draw_comparison, gain_of

MIB = 2**20
WordedTable = tuple[list[str], list[list[str]], str]
BEST = "★"
BEST_MEANS = (
    "the best of its row, the parent not counted. Its lead over every other column is more than two standard errors; "
    "where it is not, none is marked."
)
LEGEND = (
    "± is one standard error over test sequences, benchmark items or rounds of the speed measurement. Models are "
    "compared sequence by sequence and item by item. KL is the divergence from the parent. Loss and KL are in nats per "
    "token. A gain is the model's speed divided by the parent's."
)
SAID = (
    "Greedy answers, without a penalty on repeats. Repeated: the share of runs of four tokens that occurred earlier "
    "in the answer. An answer loops when it has the same five words three times (five tokens in a text without "
    "spaces), or ends in one run of tokens three times in a row."
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of all candidates. `best`: the columns that are marked as the best (tasks/evaluate/standing.py)."""

    label: str
    cells: tuple[str, ...]
    best: frozenset[int]


def rounded(metric: Metric, scale: float = 1.0) -> str:
    """`value ±error` with the error to two digits; an error of 0 (exact, or one sample) is left out."""
    value, error = metric.value * scale, metric.se * scale
    if error <= 0:
        return plain(value)
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ±{error:,.{decimals}f}"


def plain(value: float) -> str:
    """Four digits, without a power of ten for everyday sizes."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def parent_of(report: ChildReport) -> Candidate | None:
    """The parent's row."""
    return next((candidate for candidate in report.candidates if candidate.stage == "parent"), None)


def final_of(candidates: Sequence[Candidate], name: str) -> Candidate | None:
    """The candidate of a name after its last stage: distilled if it was, else assembled."""
    models = [model for model in candidates if model.name == name and model.stage != "parent"]
    return next((model for model in models if model.stage == "distilled"), models[0] if models else None)


def _title(candidate: Candidate) -> str:
    return candidate.name if candidate.stage == "parent" else f"{candidate.name} ({candidate.stage})"


def comparison_rows(report: ChildReport) -> list[Row]:
    """The rows of the comparison, columns in the order of `report.candidates`; rows without any figure are left out."""
    candidates, parent = report.candidates, parent_of(report)
    starred = not report.speed.disturbed  # no speed is the best that was measured on a busy machine

    def share(value: Callable[[Candidate], int]) -> Callable[[Candidate], Reading | None]:
        return lambda model: None if parent is None else counted(value(model) / value(parent))

    def gain(field: str) -> Callable[[Candidate], Reading | None]:
        return lambda model: timed(model, gain_of(model, parent, field))

    rows = [
        _row("parameters, M", candidates, lambda model: counted(model.parameters / 1e6), less=True),
        _row("params/parent", candidates, share(lambda model: model.parameters), less=True),
        _row("memory, MiB", candidates, lambda model: counted(model.memory_bytes / MIB), less=True),
        _row("memory/parent", candidates, share(lambda model: model.memory_bytes), less=True),
        _row(
            "prefill, tok/s", candidates, lambda model: timed(model, model.prefill_tokens_per_second), starred=starred
        ),
        _row("prefill gain", candidates, gain("prefill"), starred=starred),
        _row("decode, tok/s", candidates, lambda model: timed(model, model.decode_tokens_per_second), starred=starred),
        _row("decode gain", candidates, gain("decode"), starred=starred),
        _row("request, s", candidates, lambda model: timed(model, model.runtime_seconds), less=True, starred=starred),
        _row("request gain", candidates, gain("request"), starred=starred),
        _row("loss, nats", candidates, lambda model: of_sequences(model, "loss"), less=True),
        _row("KL, nats", candidates, lambda model: of_sequences(model, "kl"), less=True),
        _row("predicted KL", candidates, lambda model: counted(model.predicted_kl), less=None),
        _row("top-1 agree, %", candidates, lambda model: of_sequences(model, "top1_agreement"), scale=100),
        *_accuracy_rows(report),
        Row(label="answers that loop", cells=tuple(_looping(model) for model in candidates), best=frozenset()),
    ]
    return [row for row in rows if any(cell != "–" for cell in row.cells)]


def _accuracy_rows(report: ChildReport) -> list[Row]:
    """A row for every benchmark, then rows for all of them together."""
    candidates, parent = report.candidates, parent_of(report)
    names = list(dict.fromkeys(name for model in candidates for name in model.benchmarks))
    rows = [_row(f"{name}, %", candidates, lambda model, name=name: of_items(model, name), scale=100) for name in names]  # type: ignore[misc]
    if len(names) > 1:
        rows.append(_row("all items, %", candidates, of_all_items, scale=100))
        rows.append(_row("mean of tasks, %", candidates, lambda model: of_all_items(model, by_task=True), scale=100))
    rows.append(_row("items over parent, %", candidates, lambda model: over_parent(model, parent), scale=100))
    rows.append(_row("retention, %", candidates, lambda model: retained(model, parent), scale=100))
    return rows


def _looping(model: Candidate) -> str:
    return f"{_count(model, lambda answer: answer.loops)} of {len(model.answers)}" if model.answers else "–"


def _count(model: Candidate, which: Callable[[Answer], bool]) -> int:
    return sum(which(answer) for answer in model.answers)


def _row(
    label: str,
    candidates: Sequence[Candidate],
    figure: Callable[[Candidate], Reading | None],
    less: bool | None = False,
    scale: float = 1.0,
    starred: bool = True,
) -> Row:
    """`less`: less is better; None where there is no better. `starred`: the best may be marked."""
    figures = [figure(candidate) for candidate in candidates]
    rivals = {
        place: found
        for place, (candidate, found) in enumerate(zip(candidates, figures, strict=True))
        if candidate.stage != "parent" and found is not None
    }
    return Row(
        label=label,
        cells=tuple("–" if found is None else rounded(found.metric, scale) for found in figures),
        best=best_columns(rivals, less) if starred and less is not None else frozenset(),
    )


def headlines(report: ChildReport) -> list[str]:
    """What a reader must know first: broken answers of the child, the best model, what the benchmarks show."""
    child, parent = final_of(report.candidates, "child"), parent_of(report)
    lines = [] if child is None or parent is None else _broken_answers(child, parent)
    return [*lines, verdict(report), *([] if child is None or parent is None else _benchmark_lines(child, parent))]


def _broken_answers(child: Candidate, parent: Candidate) -> list[str]:
    """A line for each fault that more of the child's answers have than of the parent's."""
    kinds: dict[str, Callable[[Answer], bool]] = {
        "loop": lambda answer: answer.loops,
        "are empty": lambda answer: not answer.text.strip(),
    }
    found = {fault: (_count(child, which), _count(parent, which)) for fault, which in kinds.items()}
    total = len(child.answers)
    return [
        f"{ours} of {total} answers {fault}; the parent's {theirs}. Read them before anything else."
        for fault, (ours, theirs) in found.items()
        if ours > theirs
    ]


def _benchmark_lines(child: Candidate, parent: Candidate) -> list[str]:
    """Whether the benchmarks show a difference between the child and its parent."""
    lead, ours, theirs = over_parent(child, parent), of_all_items(child), of_all_items(parent)
    if lead is None or ours is None or theirs is None:
        return []
    items = sum(len(answers) for answers in child.correct.values())
    error = "" if is_clear(lead.metric) else "; this is within the error"
    line = (
        f"Benchmarks: {_percent(ours, 1)} of {items} items right, the parent {_percent(theirs, 1)}: "
        f"{_signed(lead.metric)} points, item by item{error}."
    )
    kept = retained(child, parent)
    if kept is not None and kept.estimate is not None and len(kept.estimate.moves) > 1:
        low, high = interval(kept.estimate)
        line += f" Retention {_percent(kept)}, 95 % interval {100 * low:.0f} to {100 * high:.0f} %."
    return [line]


def _percent(share: Reading, digits: int = 0) -> str:
    return f"{100 * share.metric.value:.{digits}f} %"


def _signed(points: Metric) -> str:
    return f"{'+' if points.value >= 0 else ''}{rounded(points, 100)}"


def verdict(report: ChildReport) -> str:
    """Which of child and baselines has the lowest measured KL after its last stage, in a sentence.

    A lead of less than two standard errors of the difference, sequence by sequence, makes no clear winner. A baseline
    that chose the child's architecture is named and not compared.
    """
    names = dict.fromkeys(model.name for model in report.candidates if model.stage != "parent")
    finals = [
        model for name in names if (model := final_of(report.candidates, name)) is not None and model.kl is not None
    ]
    child = next((model for model in finals if model.name == "child"), None)
    if child is None or child.kl is None:
        return "The child's KL was not measured."
    others = [model for model in finals if model is not child]
    twins = [model.name for model in others if same_architecture(child, model)]
    chose = f"{' and '.join(twins)} chose the same architecture" if twins else ""
    rivals = sorted((model for model in others if model.name not in twins), key=_kl)
    if not rivals:
        nobody = f"{chose}; no other baseline" if twins else "no baseline"
        return f"The child's KL is {rounded(child.kl)}; {nobody} was measured beside it."
    result = _against(child, rivals[0])
    return f"{result}; {chose}." if twins else f"{result}."


def _against(child: Candidate, rival: Candidate) -> str:
    """The child compared with the best baseline of another architecture."""
    ours, theirs = of_sequences(child, "kl"), of_sequences(rival, "kl")
    assert ours is not None and theirs is not None
    winner, loser = (child, rival) if _kl(child) <= _kl(rival) else (rival, child)
    against = "the best baseline," if winner is child else "the"
    figures = f"KL {_kl_text(winner)} against {_kl_text(loser)} of {against} {_title(loser)}"
    subject = f"the {_title(winner)}" if winner is child else f"the baseline {_title(winner)}"
    lead = difference(theirs, ours) if winner is child else difference(ours, theirs)
    if is_clear(lead):
        return f"Winner: {subject}, {figures}"
    if lead.n < 2:
        return f"No clear winner: a single sequence shows no error ({figures})"
    return f"No clear winner: {subject} leads by less than two standard errors ({figures}; {rounded(lead)} apart)"


def _kl(candidate: Candidate) -> float:
    return math.inf if candidate.kl is None else candidate.kl.value


def _kl_text(candidate: Candidate) -> str:
    return "?" if candidate.kl is None else rounded(candidate.kl)


def comparison_table(report: ChildReport) -> Table:
    """The comparison for the terminal: a column per candidate, the best of each row marked."""
    table = Table(
        title=f"{report.profile}: {report.parent.name} and its children",
        caption="\n".join([*headlines(report), f"{BEST} {BEST_MEANS} {LEGEND}"]),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("", no_wrap=True)
    for candidate in report.candidates:
        header = f"{candidate.name} +GKD" if candidate.stage == "distilled" else candidate.name
        table.add_column(header, justify="right", overflow="fold")
    for row in comparison_rows(report):
        cells = [
            Text(f"{BEST}{cell}", style="bold green") if place in row.best else Text(cell)
            for place, cell in enumerate(row.cells)
        ]
        table.add_row(row.label, *cells)
    return table


def print_report(report: ChildReport, console: Console) -> None:
    """Print answers and comparison."""
    said = answered(report)
    if said:
        table = Table("prompt", "parent", "child", title=SAID, title_justify="left", box=SIMPLE_HEAD, show_lines=True)
        for one in said:
            cells = [Text.assemble(shown, (f"\n{how}", "dim")) for shown, how in (one.parent, one.child)]
            table.add_row(Text.assemble(one.prompt, (f"\n{one.kind}", "dim")), *cells)
        console.print(table)
    console.print(comparison_table(report))


def report_markdown(report: ChildReport) -> str:
    """The report as Markdown: verdict, comparison, predicted beside measured, architecture, how it was made."""
    parts = [
        f"# {report.profile}: a child of {report.parent.name}",
        *headlines(report),
        "## Comparison",
        _markdown_table(
            ["", *(_title(candidate) for candidate in report.candidates)],
            [
                [row.label, *(f"**{cell}**" if place in row.best else cell for place, cell in enumerate(row.cells))]
                for row in comparison_rows(report)
            ],
        ),
        f"Bold: {BEST_MEANS} {LEGEND}",
        *_answers_markdown(report),
        "## Predicted and measured",
        _predicted_markdown(report),
        "## Architecture",
        _architecture_markdown(report.architecture),
        "## How it was made",
        _facts_markdown(report),
    ]
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt and its kind, and the answers of parent and child: (text, figures in words)."""

    prompt: str
    kind: str
    parent: tuple[str, str]
    child: tuple[str, str]


def answered(report: ChildReport) -> list[Answered]:
    """Answers of parent and finished child side by side; empty in an old report without answers."""
    parent, child = parent_of(report), final_of(report.candidates, "child")
    if parent is None or child is None:
        return []
    return [
        Answered(
            prompt=visible(theirs.prompt),
            kind="chat" if theirs.chat else "plain text",
            parent=(visible(theirs.text), _how(theirs)),
            child=(visible(ours.text), _how(ours)),
        )
        for theirs, ours in zip(parent.answers, child.answers, strict=False)
    ]


def visible(text: str) -> str:
    """A model's text that is safe on a terminal: control characters are spelt out, long runs of empty lines counted."""
    spelt = "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)
    return re.sub(r"\n{3,}", lambda lines: f"\n(and {len(lines[0]) - 1} empty lines)\n", spelt)


def _how(answer: Answer) -> str:
    ended = "ended by itself" if answer.ended else "cut off"
    loops = ", loops" if answer.loops else ""
    return f"{answer.tokens} tokens, {ended}, {answer.repetition:.0%} repeated{loops}"


def _answers_markdown(report: ChildReport) -> list[str]:
    rows = [
        [
            f"{_quoted(one.prompt)}<br>({one.kind})",
            *(f"{_quoted(shown)}<br>({how})" for shown, how in (one.parent, one.child)),
        ]
        for one in answered(report)
    ]
    return ["## Answers", _markdown_table(["prompt", "parent", "child"], rows, "---"), SAID] if rows else []


def _quoted(text: str) -> str:
    """Text for a cell of a table, escaped so that Markdown and HTML show it as it is."""
    escaped = html.escape(text.strip("\n"))
    return re.sub(r"[|*_`\[\]~\\$#!]", lambda sign: f"&#{ord(sign[0])};", escaped).replace("\n", "<br>")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    lines = [header, ["---", *[align] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _predicted_markdown(report: ChildReport) -> str:
    """What the search predicted at each scenario, beside what was measured."""
    rows = []
    for totals in report.architecture.totals:
        case = f"{totals.scenario}, batch {totals.batch_size}"
        decode_rate = (
            "–" if totals.decode_seconds_per_token <= 0 else plain(totals.batch_size / totals.decode_seconds_per_token)
        )
        parents = [
            parent
            for parent in report.architecture.parent_totals
            if (parent.scenario, parent.batch_size) == (totals.scenario, totals.batch_size)
        ]
        gain = plain(parents[0].runtime_seconds / totals.runtime_seconds) if parents and totals.runtime_seconds else "–"
        rows.append([case, plain(totals.runtime_seconds), gain, decode_rate, plain(totals.memory_bytes / MIB)])
    predicted = _markdown_table(
        ["predicted", "request, s", "request speed-up", "decode, tokens/s", "memory, MiB"], rows
    )
    parts = [predicted]
    calibration = report.speed.calibration
    if calibration is not None:
        parts.append(
            f"Predicted times are calibrated: prefill x {calibration.prefill:.3f}, decode x {calibration.decode:.3f}, "
            f"fitted on {calibration.origin}."
        )
    child, parent = final_of(report.candidates, "child"), parent_of(report)
    gains = {kind: gain_of(child, parent, kind) for kind in ("prefill", "decode", "request")} if child else {}
    found = [f"{kind} {rounded(gain)}×" for kind, gain in gains.items() if gain is not None]
    parts += [f"Measured speed-up over the parent: {', '.join(found)}."] if found else []
    for header, rows, words in (sums_table(report), speed_table(report)):
        parts += [_markdown_table(header, rows), words] if rows else []
    return "\n\n".join(parts)


def sums_table(report: ChildReport) -> WordedTable:
    """Predicted and measured times of whole models: header, rows, and an explanation."""
    speed = report.speed
    rows = [
        [
            check.model,
            f"{check.scenario}, batch {check.batch_size}",
            check.phase,
            plain(1000 * check.predicted_seconds),
            rounded(check.measured_seconds, 1000),
            percent(check.off),
            percent(check.gain_off),
        ]
        for check in speed.sums
    ]
    words = [
        f"Predicted: the sum of the measured costs of a model's blocks. Measured: the whole model in {speed.engine}, "
        f"in {speed.clock} time, one model after the other in every round. Error of the gain: of the predicted speed "
        "over the parent's, which does not depend on how fast the machine was that day.",
        *warnings_of(speed),
    ]
    header = ["model", "scenario", "phase", "predicted, ms", "measured, ms", "error", "error of the gain"]
    return header, rows, " ".join(words)


def speed_table(report: ChildReport) -> WordedTable:
    """The speed of every model at every scenario, as its users see it: header, rows, and an explanation."""
    rows = [
        [
            name,
            f"{speed.scenario}, batch {speed.batch_size}",
            rounded(speed.first_token_seconds, 1000),
            rounded(speed.output_token_seconds, 1000),
            rounded(speed.generated_tokens_per_second),
            rounded(speed.requests_per_second),
            "–" if speed.gains is None else rounded(speed.gains.request),
            "–" if speed.memory_bytes is None else plain(speed.memory_bytes / MIB),
        ]
        for name, every in report.speed.models.items()
        for speed in every
    ]
    header = ["speed", "scenario", "TTFT, ms", "TPOT, ms", "tokens/s", "requests/s", "request gain", "peak, MiB"]
    words = (
        "Wall time. TTFT: time to the first token, which is the prefill of the batch. TPOT: time per output token. "
        "tokens/s: tokens that the batch generates over the time of the whole request; requests/s: tokens/s over the "
        "tokens generated per request. Peak memory: weights, KV cache and what a request needs beside them."
    )
    return header, rows, words


def _architecture_markdown(architecture: Architecture) -> str:
    """The variant of every layer; neighbours with the same variants share a row."""
    rows, first = [], 0
    for choice, run in itertools.groupby(architecture.layers):
        last = first + len(list(run)) - 1
        where = str(first) if first == last else f"{first}–{last}"
        rows.append([where, choice.attention, choice.ffn + (" (coupled)" if choice.coupled else "")])
        first = last + 1
    score = rounded(Metric(value=architecture.score, se=architecture.score_se, n=1))
    certificate = f"Found by {architecture.method}: status {architecture.status}, predicted score {score}, lower bound "
    certificate += f"{plain(architecture.bound)}, gap {architecture.gap:.2g}"
    certificate += f"; solved by {architecture.solved_by}." if architecture.solved_by else "."
    return f"{certificate}\n\n{_markdown_table(['layers', 'attention', 'ffn'], rows)}"


def _facts_markdown(report: ChildReport) -> str:
    parent, corpus = report.parent, report.corpus
    child = final_of(report.candidates, "child")
    facts = [
        f"parent: {parent.name} ({parent.source}{', ' + parent.revision if parent.revision else ''}), "
        f"fingerprint `{parent.fingerprint[:16]}`",
        f"corpus: {corpus.description or f'{corpus.documents} documents'}, {corpus.train_sequences} train sequences of "
        f"{corpus.sequence_length} tokens, fingerprint `{corpus.fingerprint[:16]}`",
        f"time: {report.seconds / 60:.1f} min, {report.cpu_seconds / 60:.1f} CPU-minutes, peak memory "
        f"{report.peak_memory_bytes / 2**30:.2f} GiB",
    ]
    if child is not None and child.gkd_tokens:
        facts.append(f"GKD: {child.gkd_tokens:,} tokens")
    if report.failed_variants:
        facts.append(f"variants left out because they failed: {', '.join(report.failed_variants)}")
    for label, run in (("Prefect flow run", report.prefect_run_id), ("MLflow run", report.mlflow_run_id)):
        if run:
            facts.append(f"{label}: `{run}`")
    return "\n".join(f"* {fact}" for fact in facts)


def write_report(report: ChildReport, folder: Path) -> list[Path]:
    """report.json, report.md, architecture.png and comparison.png, each written atomically. Returns the paths."""
    child = final_of(report.candidates, "child")
    pictures = {
        "architecture.png": draw_architecture(report.architecture, parent_of(report), child),
        "comparison.png": draw_comparison(report.candidates),
    }
    markdown = report_markdown(report) + "".join(f"\n![{Path(name).stem}]({name})\n" for name in pictures)
    write_value(folder / "report.json", report)
    write_text(folder / "report.md", markdown)
    for name, figure in pictures.items():
        save_figure(figure, folder / name)
    return [folder / name for name in ("report.json", "report.md", *pictures)]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
