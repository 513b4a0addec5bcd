"""The rows of `puzzle bench` as a table and as a picture."""

from collections.abc import Mapping, Sequence

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
        f"{row.batch_size}x{row.prompt_tokens}x{row.generated_tokens}",
        row.model,
        _figure(speed.prefill_tokens_per_second),
        "" if gains is None else gain_cell(gains.prefill, gains.prefill_cpu),
        _figure(speed.decode_tokens_per_second),
        "" if gains is None else gain_cell(gains.decode, gains.decode_cpu),
        f"{speed.first_token_seconds.value:,.4f}",
        f"{speed.output_token_seconds.value:,.5f}",
        f"{speed.generated_tokens_per_second.value:,.1f}",
        f"{speed.requests_per_second.value:,.3g}",
        f"{speed.cpu_seconds.value:,.2f}",
        "–" if speed.memory_bytes is None else f"{speed.memory_bytes / 2**30:,.3f}",
    ]


def _figure(metric: Metric) -> str:
    return f"{metric.value:,.1f} ±{metric.se:,.1f}"


def gain_cell(wall: Metric | None, cpu: Metric | None) -> str:
    """`1.45 ±0.10 (1.41 ±0.02)`: a gain, in brackets the one in CPU time; what is not known is left out."""
    texts = [f"{gain.value:.2f} ±{gain.se:.2f}" for gain in (wall, cpu) if gain is not None]
    return " ".join([*texts[:1], *(f"({text})" for text in texts[1:])])


def draw_bench(rows: Sequence[BenchRow]) -> Figure:
    """Bars of prefill and decode tokens per second by load and model, with standard errors."""
    speeds = [(row.throughput.prefill_tokens_per_second, row.throughput.decode_tokens_per_second) for row in rows]
    labels = ("prefill, tokens per second", "decode, tokens per second")
    panels = {label: [(speed[i].value, speed[i].se) for speed in speeds] for i, label in enumerate(labels)}
    figure = draw_bars([(cells(row)[0], row.model) for row in rows], panels)
    figure.suptitle(f"{rows[0].version}, {rows[0].precision}", fontsize=9, color=INK)
    return figure


def draw_bars(names: Sequence[tuple[str, str]], panels: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """A panel per figure by its label: bars of (value, standard error), a group per load, a colour per model.

    names: load and model of every bar, in the order of the values of each panel.
    """
    loads, models = (list(dict.fromkeys(own)) for own in zip(*names, strict=True))
    figure = figure_of(4.5 + 2.2 * len(loads), 3.6)
    for axes, (label, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        plain_axes(axes)
        for place, model in enumerate(models):
            own = [
                (loads.index(load), *value) for (load, name), value in zip(names, values, strict=True) if name == model
            ]
            centres = [index + (place - (len(models) - 1) / 2) * 0.8 / len(models) for index, _, _ in own]
            heights, errors = [value for _, value, _ in own], [se for _, _, se in own]
            colour = COLOURS.get(model, COLOURS[CHILD])
            axes.bar(centres, heights, 0.76 / len(models), yerr=errors, color=colour, label=model)
        axes.set_xticks(range(len(loads)), loads)
        axes.set_ylabel(label, color=INK)
    axes.legend(frameon=False)
    return figure
