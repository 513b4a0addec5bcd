"""The rows of `puzzle loadtest` (tasks/loadtest/serving_load.py) as a table, and sentences on failures."""

from collections.abc import Sequence

from rich.table import Table

from blocks.disturbance import why_disturbed
from tasks.engines.timing_in_turns import relative_error
from tasks.loadtest.arrivals import NO_LIMITS, Limits
from tasks.loadtest.bench_table import MEMORY, figure_cell, gain_cell
from tasks.loadtest.serving_load import LoadRow
from tasks.measure.bench import AGAIN

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


def load_table(rows: Sequence[LoadRow], limits: Limits = NO_LIMITS) -> Table:
    """Models by load; ± is one standard error over the rounds."""
    title = "servers in turns; load is requests at a time x prompt x generated tokens; gains are of pairs"
    if any(row.rate for row in rows):
        title += "\nat a rate: requests arrive by chance, so many a second; TTFT counts from the arrival"
    if limits.given():
        title += f"\ngood: share of requests with {limits.words()}"
    table = Table(title=title, title_justify="left", box=None)
    for column in (*COLUMNS, *(["good"] if limits.given() else []), MEMORY):
        table.add_column(column, justify="left" if column in ("load", "model") else "right", overflow="fold")
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
        figure_cell(row.generated_tokens_per_second),
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


def doubts_of(rows: Sequence[LoadRow]) -> list[str]:
    """Why these figures cannot be relied on, in a sentence; none where they can be."""
    why = why_disturbed(rows[0].busy, (relative_error(row.generated_tokens_per_second) for row in rows))
    return [f"{why}. {AGAIN}"] if why else []
