"""The rows of `puzzle bench` as a table and as a picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.table import Table

from blocks.records import Metric
from tasks.measure.bench import CHILD, BenchRow
from tasks.pages.picture import COLOURS, INK, figure_of, plain_axes


def bench_table(rows: Sequence[BenchRow]) -> Table:
    """Models by load; ± is one standard error over the rounds, gains in CPU time stand in brackets."""
    first = rows[0]
    title = f"{first.version}, {first.precision}, {first.threads} thread(s); load is batch x prompt x generated tokens"
    table = Table(title=title, title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("load", "model") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


COLUMNS = (
    "load",
    "model",
    "prefill tok/s",
    "gain (CPU)",
    "decode tok/s",
    "gain (CPU)",
    "TTFT ms",
    "TPOT ms",
    "tok/s",
    "requests/s",
    "CPU s",
    "peak MiB",
)


def cells(row: BenchRow) -> list[str]:
    """One row in words, in the order of COLUMNS."""
    speed, gains = row.throughput, row.gains
    return [
        f"{row.batch_size}x{row.prompt_tokens}x{row.generated_tokens}",
        row.model,
        _figure(speed.prefill_tokens_per_second),
        "" if gains is None else _gain(gains.prefill, gains.prefill_cpu),
        _figure(speed.decode_tokens_per_second),
        "" if gains is None else _gain(gains.decode, gains.decode_cpu),
        f"{speed.first_token_seconds.value * 1e3:,.0f}",
        f"{speed.output_token_seconds.value * 1e3:,.1f}",
        f"{speed.generated_tokens_per_second.value:,.1f}",
        f"{speed.requests_per_second.value:,.3g}",
        f"{speed.cpu_seconds.value:,.2f}",
        "–" if speed.memory_bytes is None else f"{speed.memory_bytes / 2**20:,.0f}",
    ]


def _figure(metric: Metric) -> str:
    return f"{metric.value:,.1f} ±{metric.se:,.1f}"


def _gain(wall: Metric, cpu: Metric) -> str:
    return f"{wall.value:.2f} ±{wall.se:.2f} ({cpu.value:.2f} ±{cpu.se:.2f})"


def draw_bench(rows: Sequence[BenchRow]) -> Figure:
    """Bars of prefill and decode tokens per second by load and model, with standard errors."""
    loads = list(dict.fromkeys(cells(row)[0] for row in rows))
    names = list(dict.fromkeys(row.model for row in rows))
    figure = figure_of(4.5 + 2.2 * len(loads), 3.6)
    for axes, kind in zip(figure.subplots(1, 2), ("prefill", "decode"), strict=True):
        plain_axes(axes)
        for place, name in enumerate(names):
            own = [row for row in rows if row.model == name]
            figures = [getattr(row.throughput, f"{kind}_tokens_per_second") for row in own]
            centres = [index + (place - (len(names) - 1) / 2) * 0.8 / len(names) for index in range(len(own))]
            axes.bar(
                centres,
                [metric.value for metric in figures],
                0.76 / len(names),
                yerr=[metric.se for metric in figures],
                color=COLOURS.get(name, COLOURS[CHILD]),
                label=name,
            )
        axes.set_xticks(range(len(loads)), loads)
        axes.set_ylabel(f"{kind}, tokens per second", color=INK)
    axes.legend(frameon=False)
    figure.suptitle(f"{rows[0].version}, {rows[0].precision}", fontsize=9, color=INK)
    return figure
