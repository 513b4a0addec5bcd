"""The rows of `puzzle loadtest` (tasks/loadtest/serving_load.py) as a table, sentences on failures, a picture."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from tasks.loadtest.arrivals import NO_LIMITS, Limits
from tasks.loadtest.bench_table import MEMORY, draw_bars, gain_cell
from tasks.loadtest.serving_load import LoadRow
from tasks.measure.bench import CHILD
from tasks.pages.picture import COLOURS, INK, figure_of, plain_axes

COLUMNS = (
    "load",
    "model",
    "ok",
    "requests/s",
    "generated tokens/s",
    "gain (CPU)",
    "TTFT p50/p95, s",
    "gain",
    "TPOT p50/p95, s",
    "gain",
)
PANELS = ("TTFT, s", "TPOT, s", "answers per second")


def load_table(rows: Sequence[LoadRow], limits: Limits = NO_LIMITS) -> Table:
    """Models by load; ± is one standard error over the rounds."""
    title = "servers in turns; load is requests at a time x prompt x generated tokens; gains are of pairs"
    if any(row.rate for row in rows):
        title += "\nat a rate: requests arrive by chance, so many a second; TTFT counts from the arrival"
    if limits.given():
        title += f"\ngood: share of requests with {limits.words()}"
    table = Table(title=title, title_justify="left", box=None)
    for column in (*COLUMNS, *(["good"] if limits.given() else []), MEMORY):
        table.add_column(column, justify="left" if column in ("load", "model") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*load_cells(row))
    return table


def load_cells(row: LoadRow) -> list[str]:
    """One row in words: COLUMNS, the share of good requests where there are limits, memory."""
    gains = row.gains
    return [
        row.load,
        row.model,
        f"{row.requests - row.failed}/{row.requests}",
        f"{row.requests_per_second.value:,.2f}",
        f"{row.generated_tokens_per_second.value:,.1f} ±{row.generated_tokens_per_second.se:,.1f}",
        gain_cell(gains.throughput, gains.cpu) if gains else "",
        _pair(row.first_token_seconds),
        gain_cell(gains.first_token, None) if gains else "",
        _pair(row.output_token_seconds),
        gain_cell(gains.output_token, None) if gains else "",
        *([] if row.good is None else [f"{row.good.value:.0%} ±{row.good.se:.0%}"]),
        "" if row.memory_bytes is None else f"{row.memory_bytes / 2**30:,.3f}",
    ]


def _pair(values: Sequence[float | None]) -> str:
    return " / ".join("failed" if value is None else f"{value:,.4f}" for value in values)


def failures_of(rows: Sequence[LoadRow]) -> list[str]:
    """A sentence for each row with failed requests."""
    return [
        f"{row.model}, {row.load}: {row.failed} of {row.requests} requests failed ({'; '.join(row.errors)}); gains are "
        "left out at this load, they would not be of the same work"
        for row in rows
        if row.failed
    ]


def draw_load(rows: Sequence[LoadRow]) -> Figure:
    """Latency against the rate where requests came at rates, else bars of the closed loop."""
    return draw_rates(rows) if any(row.rate for row in rows) else _draw_closed(rows)


def draw_rates(rows: Sequence[LoadRow]) -> Figure:
    """TTFT and TPOT (p50 whole, p95 dashed) and answers per second against the rate, a line a model, a row a shape.

    Dotted: what the model answers in a closed loop, the most it can do with so many at a time. A percentile at which
    requests failed has no point.
    """
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    figure = figure_of(11.0, 3.4 * len(shapes))
    grid = figure.subplots(len(shapes), len(PANELS), squeeze=False)
    for shape, panels in zip(shapes, grid, strict=True):
        for axes, label in zip(panels, PANELS, strict=True):
            plain_axes(axes)
            axes.set_xlabel(f"arrivals per second, {shape}", color=INK)
            axes.set_ylabel(label, color=INK)
        for name in dict.fromkeys(row.model for row in rows):
            _draw_model(panels, [row for row in rows if row.model == name and _shape(row) == shape], name)
        panels[0].set_yscale("log")  # a queue that grows dwarfs all else
        panels[-1].legend(frameon=False)
    return figure


def _shape(row: LoadRow) -> str:
    return row.load.split(" at ")[0]


def _draw_model(panels: Sequence[Axes], own: Sequence[LoadRow], name: str) -> None:
    open_loop = sorted((row for row in own if row.rate is not None), key=lambda row: row.rate or 0)
    colour, rates = COLOURS.get(name, COLOURS[CHILD]), [row.rate or 0 for row in open_loop]
    for axes, field in zip(panels, ("first_token_seconds", "output_token_seconds"), strict=False):
        for place, style in enumerate(("-", "--")):
            values = [getattr(row, field)[place] for row in open_loop]
            axes.plot(
                rates, [math.nan if value is None else value for value in values], style, marker="o", color=colour
            )
    answers = [row.requests_per_second for row in open_loop]
    look: dict[str, Any] = {"marker": "o", "color": colour, "label": name}
    panels[-1].errorbar(rates, [one.value for one in answers], yerr=[one.se for one in answers], **look)
    for row in own:
        if row.rate is None:
            panels[-1].axhline(row.requests_per_second.value, linestyle=":", color=colour)


def _draw_closed(rows: Sequence[LoadRow]) -> Figure:
    """Output tokens per second by load and model, with standard errors; TTFT (p50) beside it."""
    return draw_bars(
        [(row.load, row.model) for row in rows],
        {
            "output tokens per second": [
                (row.generated_tokens_per_second.value, row.generated_tokens_per_second.se) for row in rows
            ],
            "time to first token, s (p50)": [(row.first_token_seconds[0] or 0, 0) for row in rows],
        },
    )
