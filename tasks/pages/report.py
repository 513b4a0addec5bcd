"""The report of a run: parent, child and baselines side by side, predicted beside measured, and which is best.

The terminal's table and the Markdown (report.md, the child's model card) are made from one list of rows.
"""

import html
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blocks.estimates import plain, rounded
from blocks.files import atomic_path, write_text
from blocks.library import write_value
from blocks.records import Answer, Architecture, Candidate, ChildReport, Metric, Totals
from tasks.evaluate.budget import budget_state
from tasks.evaluate.standing import (
    NEAR,
    Reading,
    best_columns,
    counted,
    distances,
    final_of,
    gain_of,
    of_all_items,
    of_items,
    of_loops,
    of_right,
    of_sequences,
    on_capability,
    over_parent,
    parent_of,
    retained,
    right_beside,
    timed,
)
from tasks.measure.cost_sums import percent, warnings_of
from tasks.pages.picture import draw_architecture, draw_capabilities, draw_comparison
from tasks.pages.verdict import BUDGET_HEADER, GIB, budget_rows, count, evidence, title, verdict, warnings

WordedTable = tuple[list[str], list[list[str]], str]
BEST = "★"
DISTURBED = "†"
BEST_MEANS = (
    "the best of its row, the parent not counted. Its lead over every other column is more than two standard errors "
    "(of few documents or rounds, by as much more as Student's t asks); where it is not, none is marked."
)
LEGEND = (
    "± is one standard error over the documents of the test text, benchmark items or rounds of the speed measurement. "
    "Models are compared sequence by sequence and item by item. KL is the divergence from the parent. Loss and KL are "
    "in nats per token. A gain is the model's speed divided by the parent's. † was measured while other programs used "
    "the machine: it is not reliable, has no star and decides nothing."
)
SHOWN, SHORT = 2, 160  # answers that a terminal shows, and of how many characters
TABLE_STYLE: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 0, 0, 1)}
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


def comparison_rows(report: ChildReport) -> list[Row]:
    """The rows of the comparison: budget, quality, speed, size. Columns in the order of `report.candidates`; rows
    without any figure are left out.
    """
    candidates = report.candidates
    kept = tuple(budget_state(model, report.speed.disturbed) or "–" for model in candidates)
    rows = [
        Row(label="budget", cells=kept, best=frozenset()),
        _row("file, MB", candidates, lambda model: counted(_file_bytes(model, candidates)), less=True, scale=1e-6),
        *_quality_rows(report),
        *_speed_rows(report),
        *_size_rows(report),
    ]
    return [row for row in rows if any(cell != "–" for cell in row.cells)]


def _file_bytes(model: Candidate, candidates: Sequence[Candidate]) -> int | None:
    """Of the file that a model is served from, where the search chose types; of the parent's own the weights alone."""
    return (model.file_bytes or model.weight_bytes) if any(one.file_bytes for one in candidates) else None


def _quality_rows(report: ChildReport) -> list[Row]:
    candidates = report.candidates
    return [
        _row("KL, nats", candidates, lambda model: of_sequences(model, "kl"), less=True),
        _row("predicted KL", candidates, lambda model: counted(model.predicted_kl), less=None),
        *_capability_rows(report),
        _row("loss, nats", candidates, lambda model: of_sequences(model, "loss"), less=True),
        _row("top-1 agree, %", candidates, lambda model: of_sequences(model, "top1_agreement"), scale=100),
        *_right_rows(report),
        *_accuracy_rows(report),
        _row("loops, %", candidates, of_loops, less=None, scale=100),
        Row(label="answers that loop", cells=tuple(_looping(model) for model in candidates), best=frozenset()),
    ]


def _capability_rows(report: ChildReport) -> list[Row]:
    """The KL on the test text of every capability, and the one that was predicted."""
    rows = []
    for name in dict.fromkeys(name for model in report.candidates for name in model.capabilities):

        def predicted(model: Candidate, name: str = name) -> Reading | None:
            found = model.capabilities.get(name)
            return counted(found.predicted_kl if found else None)

        def measured(model: Candidate, name: str = name) -> Reading | None:
            return on_capability(model, name, "kl")

        rows.append(_row(f"KL on {name}", report.candidates, measured, less=True))
        rows.append(_row(f"predicted KL on {name}", report.candidates, predicted, less=None))
    return rows


def _right_rows(report: ChildReport) -> list[Row]:
    """What is answered right without help: of each capability, and of codes by how far back they stand."""
    candidates, parent, rows = report.candidates, parent_of(report), list[Row]()

    def row(label: str, figure: Callable[[Candidate], Reading | None]) -> None:
        rows.append(_row(f"right on {label}, %", candidates, figure, scale=100))

    for name in dict.fromkeys(name for model in candidates for name in model.right_answers):
        row(name, lambda model, name=name: of_right(model, name))  # type: ignore[misc]
        for far in distances(parent, name) if parent else ():
            where = f"{name}, {far // 2 + 1 if far > NEAR else 1}–{far} back"
            row(where, lambda model, name=name, far=far: of_right(model, name, far))  # type: ignore[misc]
        row(f"{name}/parent", lambda model, name=name: right_beside(model, parent, name))  # type: ignore[misc]
    return rows


def _speed_rows(report: ChildReport) -> list[Row]:
    candidates, parent = report.candidates, parent_of(report)

    def row(label: str, figure: Callable[[Candidate], Metric | None], less: bool = False) -> Row:
        return _row(label, candidates, lambda model: timed(model, figure(model), bool(report.speed.disturbed)), less)

    return [
        row("request gain", lambda model: gain_of(model, parent, "request")),
        row("prefill gain", lambda model: gain_of(model, parent, "prefill")),
        row("decode gain", lambda model: gain_of(model, parent, "decode")),
        row("request, s", lambda model: model.runtime_seconds, less=True),
        row("prefill, tokens/s", lambda model: model.prefill_tokens_per_second),
        row("decode, tokens/s", lambda model: model.decode_tokens_per_second),
    ]


def _size_rows(report: ChildReport) -> list[Row]:
    candidates, parent = report.candidates, parent_of(report)

    def share(value: Callable[[Candidate], int]) -> Callable[[Candidate], Reading | None]:
        return lambda model: None if parent is None else counted(value(model) / value(parent))

    return [
        _row("parameters, M", candidates, lambda model: counted(model.parameters / 1e6), less=True),
        _row("params/parent", candidates, share(lambda model: model.parameters), less=True),
        _row("memory, GiB", candidates, lambda model: counted(model.memory_bytes / GIB), less=True),
        _row("memory/parent", candidates, share(lambda model: model.memory_bytes), less=True),
    ]


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
    return [*rows, *_unseen_rows(candidates)]


def _unseen_rows(candidates: Sequence[Candidate]) -> list[Row]:
    """Accuracies and retention without the items that stand in text that the child was made with, where any do."""

    def row(label: str, figure: Callable[[Candidate], Metric | None]) -> Row:
        found = [figure(model) for model in candidates]
        cells = tuple("–" if metric is None else rounded(metric, 100) for metric in found)
        return Row(label=f"{label} unseen, %", cells=cells, best=frozenset())

    names = dict.fromkeys(name for model in candidates for name in model.unseen)
    rows = [row(name, lambda model, name=name: model.unseen.get(name)) for name in names]  # type: ignore[misc]
    return [*rows, row("retention", lambda model: model.unseen_retention)]


def _looping(model: Candidate) -> str:
    return f"{count(model, lambda answer: answer.loops)} of {len(model.answers)}" if model.answers else "–"


def _row(
    label: str,
    candidates: Sequence[Candidate],
    figure: Callable[[Candidate], Reading | None],
    less: bool | None = False,
    scale: float = 1.0,
) -> Row:
    """`less`: less is better; None where there is no better."""
    figures = [figure(candidate) for candidate in candidates]
    rivals = {
        place: found
        for place, (candidate, found) in enumerate(zip(candidates, figures, strict=True))
        if candidate.stage != "parent" and found is not None
    }
    return Row(
        label=label,
        cells=tuple("–" if found is None else _cell(found, scale) for found in figures),
        best=frozenset() if less is None else best_columns(rivals, less),
    )


def _cell(found: Reading, scale: float) -> str:
    return rounded(found.metric, scale) + (DISTURBED if found.disturbed else "")


def column_names(report: ChildReport) -> list[str]:
    """The heads of the comparison's columns."""
    return [f"{model.name} +GKD" if model.stage == "distilled" else model.name for model in report.candidates]


def shipped_column(report: ChildReport) -> int:
    """The column of the child that is exported; -1 where there is none."""
    child = final_of(report.candidates, "child")
    return -1 if child is None else report.candidates.index(child)


def comparison_table(report: ChildReport) -> Table:
    """The comparison for the terminal: a column per candidate, the best of each row marked."""
    table = Table(caption=f"{BEST} {BEST_MEANS} {LEGEND}", caption_justify="left", **TABLE_STYLE)
    table.add_column("", no_wrap=True)
    for name in column_names(report):
        table.add_column(name, justify="right", overflow="fold")
    for row in comparison_rows(report):
        cells = [
            Text(f"{BEST}{cell}", style="bold green") if place in row.best else Text(cell)
            for place, cell in enumerate(row.cells)
        ]
        table.add_row(row.label, *cells)
    return table


def print_report(report: ChildReport, console: Console) -> None:
    """Print warnings, the budget, the comparison, two answers, and last the verdict, where a reader looks."""
    for line in warnings(report):
        console.print(Text(line, style="bold"))
    console.print(Text(f"{report.profile}: {report.parent.name} and its children", style="bold"))
    if rows := budget_rows(report):
        budget = Table(*BUDGET_HEADER, **TABLE_STYLE)
        for row in rows:
            budget.add_row(*row)
        console.print(budget)
    console.print(comparison_table(report))
    said = answered(report)
    if said:
        table = Table("prompt", "parent", "child", show_lines=True, **TABLE_STYLE)
        for one in said[:SHOWN]:
            cells = [Text.assemble(_short(shown), (f"\n{how}", "dim")) for shown, how in (one.parent, one.child)]
            table.add_row(Text.assemble(_short(one.prompt), (f"\n{one.kind}", "dim")), *cells)
        console.print(table)
        if len(said) > SHOWN:
            console.print(f"all {len(said)} answers stand in report.html and report.md", highlight=False)
    for line in (verdict(report), *evidence(report)):
        console.print(Text(line, style="bold" if line.startswith("Verdict") else ""))


def _short(text: str) -> str:
    """An answer in a few lines of a terminal."""
    joined = " ".join(text.split())
    return joined if len(joined) <= SHORT else f"{joined[:SHORT].rstrip()} ..."


def report_markdown(report: ChildReport) -> str:
    """The report as Markdown: warnings, budget, verdict, comparison, answers, predicted beside measured, architecture,
    how it was made.
    """
    budget = budget_rows(report)
    parts = [
        f"# {report.profile}: a child of {report.parent.name}",
        *warnings(report),
        *([_markdown_table(BUDGET_HEADER, budget, "---")] if budget else []),
        f"**{verdict(report)}**",
        *evidence(report),
        "## Comparison",
        _markdown_table(
            ["", *(title(candidate) for candidate in report.candidates)],
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
        *_floors_markdown(report),
        *_race_markdown(report),
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
        rows.append([case, plain(totals.runtime_seconds), gain, decode_rate, plain(totals.memory_bytes / GIB)])
    predicted = _markdown_table(["predicted", "request, s", "request gain", "decode, tokens/s", "memory, GiB"], rows)
    parts = [predicted]
    calibration = report.speed.calibration
    if calibration is not None:
        parts.append(
            f"Predicted times are calibrated: prefill x {calibration.prefill:.3f}, decode x {calibration.decode:.3f}, "
            f"fitted on {calibration.origin}."
        )
    for header, rows, words in (batch_table(report), sums_table(report), speed_table(report)):
        parts += [_markdown_table(header, rows), words] if rows else []
    return "\n\n".join(parts)


def sums_table(report: ChildReport) -> WordedTable:
    """Predicted and measured times of whole models: header, rows, and an explanation."""
    speed, mark = report.speed, DISTURBED if report.speed.disturbed else ""
    rows = [
        [
            check.model,
            f"{check.scenario}, batch {check.batch_size}",
            check.phase,
            plain(check.predicted_seconds),
            rounded(check.measured_seconds) + mark,
            *("–" if mark else percent(off) for off in (check.off, check.gain_off)),
        ]
        for check in speed.sums
    ]
    words = [
        f"Predicted: the sum of the measured costs of a model's blocks. Measured: the whole model in {speed.engine}, "
        f"in {speed.clock} time, one model after the other in every round. Error of the gain: of the predicted speed "
        "over the parent's, which does not depend on how fast the machine was that day.",
        *([] if mark else warnings_of(speed)),
    ]
    header = ["model", "scenario", "phase", "predicted, s", "measured, s", "error", "error of the gain"]
    return header, rows, " ".join(words)


def batch_table(report: ChildReport) -> WordedTable:
    """What every number of requests at a time would give: header, rows, and an explanation."""
    rows = [
        [
            f"{row.child.scenario}, batch {row.child.batch_size}" + (", chosen" if row.chosen else ""),
            *(cell for one in (row.child, row.parent) for cell in _totals_cells(one)),
            ", ".join(row.broken) or "–",
            ", ".join(row.parent_broken) or "–",
        ]
        for row in report.batch_sizes
    ]
    figures = ("request, s", "tokens/s", "memory, GiB")
    header = ["requests at a time", *figures, *(f"parent's {one}" for one in figures)]
    header += ["the child breaks", "the parent breaks"]
    words = (
        "Predicted, from the costs that were measured at each batch size. Tokens/s: prompt and generated tokens of the "
        "whole batch. Memory: weights and the KV cache of all requests. The parent is held to the limits in GiB and "
        "seconds alone."
    )
    return header, rows, words


def _totals_cells(totals: Totals) -> list[str]:
    return [plain(totals.runtime_seconds), plain(totals.tokens_per_second), plain(totals.memory_bytes / GIB)]


def speed_table(report: ChildReport) -> WordedTable:
    """The speed of every model at every scenario, as its users see it: header, rows, and an explanation."""
    mark = DISTURBED if report.speed.disturbed else ""
    rows = [
        [
            name + mark,
            f"{speed.scenario}, batch {speed.batch_size}",
            rounded(speed.first_token_seconds),
            rounded(speed.output_token_seconds),
            rounded(speed.generated_tokens_per_second),
            rounded(speed.requests_per_second),
            "–" if speed.gains is None else rounded(speed.gains.request),
            "–" if speed.memory_bytes is None else plain(speed.memory_bytes / GIB),
        ]
        for name, every in report.speed.models.items()
        for speed in every
    ]
    header = ["speed", "scenario", "TTFT, s", "TPOT, s", "generated tokens/s", "requests/s", "request gain"]
    header.append("peak memory, GiB")
    words = (
        "Wall time. TTFT: time to the first token, which is the prefill of the batch. TPOT: time per output token. "
        "Generated tokens/s: of the batch, over the time of the whole request; requests/s: the same over the tokens "
        "generated per request. Peak memory: weights, KV cache and what a request needs beside them."
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
    if architecture.head:
        rows.append(["head", architecture.head, "(with the embedding)"])
    score = rounded(Metric(value=architecture.score, se=architecture.score_se, n=1))
    certificate = f"Found by {architecture.method}: status {architecture.status}, predicted score {score}, lower bound "
    certificate += f"{plain(architecture.bound)}, gap {architecture.gap:.2g}"
    certificate += f"; solved by {architecture.solved_by}." if architecture.solved_by else "."
    return f"{certificate}\n\n{_markdown_table(['layers', 'attention', 'ffn'], rows)}"


def race_table(report: ChildReport) -> WordedTable:
    """How the architectures of a race fared, best first; no rows where there was none."""
    rounds = max((racer.kl for racer in report.race), key=len, default=())
    rows = [
        [
            str(racer.place),
            plain(racer.score),
            str(racer.different),
            *(f"{dict(racer.kl)[steps]:.4f}" if steps in dict(racer.kl) else "–" for steps, _ in rounds),
        ]
        for racer in report.race
    ]
    header = ["place by summed score", "summed score", "layers unlike the first's"]
    header += [f"KL after {steps} steps of GKD" for steps, _ in rounds]
    words = "On validation text, the best until there, in nats per token. In each round the worse half dropped out. "
    if any(candidate.file_bytes for candidate in report.candidates):
        words += "Each was rounded as for its file, and what the file holds was judged. "
    trained = sum(steps for racer in report.race[1:] for steps, _ in racer.kl[-1:])
    words += f"The others took {trained} steps of GKD together, which no baseline was given."
    return header, rows, words


def floors_table(report: ChildReport) -> WordedTable:
    """The limits on capabilities as the chosen child keeps them before GKD; no rows where there are none."""
    rows = [
        [
            one.capability,
            *(plain(value) for value in (one.asked, one.limit, one.predicted)),
            rounded(one.measured),
            "–" if one.at_most is None else plain(one.at_most),
        ]
        for one in report.floors
    ]
    header = ["max_kl of", "asked", "of the search", "predicted", "measured", "at most, for 95 %"]
    words = (
        "KL in nats per token before GKD, on text that no stage had read (of the corpus: on the text of the scores). "
        "*Of the search*: its own limit on the sum of scores, lower than what was asked where the child itself would "
        "have passed that."
    )
    return header, rows, words


def times_table(report: ChildReport) -> WordedTable:
    """The limits on time as the chosen child keeps them before GKD; no rows where there are none."""
    rows = [
        [
            one.name,
            *(plain(value) for value in (one.asked, one.limit, one.predicted)),
            rounded(one.measured),
            "–" if one.at_worst is None else plain(one.at_worst),
        ]
        for one in report.held_times
    ]
    header = ["limit", "asked", "of the search", "predicted", "measured", "no worse than, for 80 %"]
    words = (
        "Timed in turns with the parent right after the choice. *Of the search*: its own limit on the sum of costs, so "
        "that the child itself keeps what was asked, by the last column. The table above is of a later sitting, "
        "with all models."
    )
    return header, rows, words


def _floors_markdown(report: ChildReport) -> list[str]:
    tables = {"time": times_table(report), "capabilities": floors_table(report)}
    parts = (
        [f"### Limits on {what}, before GKD", _markdown_table(*one[:2]), one[2]]
        for what, one in tables.items()
        if one[1]
    )
    return [line for part in parts for line in part]


def _race_markdown(report: ChildReport) -> list[str]:
    header, rows, words = race_table(report)
    return ["### The race that the child won", _markdown_table(header, rows), words] if rows else []


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
    if child is not None and child.rounded_kl is not None:
        before, after = child.rounded_kl
        facts.append(
            f"GKD with rounded weights: KL on validation text {before:.4f} after the correction, {after:.4f} trained"
        )
    if child is not None and child.cache:
        facts.append(
            f"KL, loss and agreement are llama.cpp's own, with a KV cache in {child.cache}; benchmarks and answers are "
            "torch's, on the same weights"
        )
    if report.failed_variants:
        facts.append(f"variants left out because they failed: {', '.join(report.failed_variants)}")
    for label, run in (("Prefect flow run", report.prefect_run_id), ("MLflow run", report.mlflow_run_id)):
        if run:
            facts.append(f"{label}: `{run}`")
    return "\n".join(f"* {fact}" for fact in facts)


def write_report(report: ChildReport, folder: Path) -> list[Path]:
    """report.json, report.md and the pictures, each written atomically. Returns the paths."""
    child = final_of(report.candidates, "child")
    pictures = {
        "architecture.png": draw_architecture(report.architecture, parent_of(report), child),
        "comparison.png": draw_comparison(report.candidates),
    }
    if any(model.capabilities for model in report.candidates):
        pictures["capabilities.png"] = draw_capabilities(report.candidates)
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
