"""The rows of `puzzle bench` as a table."""

from collections.abc import Sequence

from rich.table import Table

from blocks.records import Metric
from tasks.engines.base import LoadOptions
from tasks.measure.bench import BenchRow


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """Models by load; ± is one standard error over the rounds, gains in CPU time stand in brackets."""
    first = rows[0]
    cache = "" if first.kv_precision in ("", LoadOptions.kv_precision) else f", KV cache in {first.kv_precision}"
    title = f"{first.version}, {first.precision}{cache}, {first.threads} thread(s); "
    title += "load is batch x prompt x generated tokens"
    table = Table(title=title, title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("load", "model") else "right", overflow="fold")
    for row in rows:
        table.add_row(*cells(row))
    return table


MEMORY = "peak memory, GiB"
COLUMNS = (
    "load",
    "model",
    "prefill tokens/s",
    "gain (CPU)",
    "decode tokens/s",
    "gain (CPU)",
    "TTFT, s",
    "TPOT, s",
    "generated tokens/s",
    "requests/s",
    "CPU s",
    MEMORY,
)


def cells(row: BenchRow) -> list[str]:
    """One row in words, in the order of COLUMNS."""
    speed, gains = row.throughput, row.gains
    return [
        row.load,
        row.model,
        figure_cell(speed.prefill_tokens_per_second),
        "" if gains is None else gain_cell(gains.prefill, gains.prefill_cpu),
        figure_cell(speed.decode_tokens_per_second),
        "" if gains is None else gain_cell(gains.decode, gains.decode_cpu),
        f"{speed.first_token_seconds.value:,.4f}",
        f"{speed.output_token_seconds.value:,.5f}",
        f"{speed.generated_tokens_per_second.value:,.1f}",
        f"{speed.requests_per_second.value:,.3g}",
        f"{speed.cpu_seconds.value:,.2f}",
        "–" if speed.memory_bytes is None else f"{speed.memory_bytes / 2**30:,.3f}",
    ]


def figure_cell(metric: Metric) -> str:
    """`1,234.5 ±6.7`; a single round shows no error."""
    return f"{metric.value:,.1f}{_error(metric, 1)}"


def gain_cell(wall: Metric | None, cpu: Metric | None) -> str:
    """`1.45 ±0.10 (1.41 ±0.02)`: a gain, in brackets the one in CPU time; what is not known is left out."""
    texts = [f"{gain.value:.2f}{_error(gain, 2)}" for gain in (wall, cpu) if gain is not None]
    return " ".join([*texts[:1], *(f"({text})" for text in texts[1:])])


def _error(metric: Metric, digits: int) -> str:
    return f" ±{metric.se:,.{digits}f}" if metric.n > 1 else ""
