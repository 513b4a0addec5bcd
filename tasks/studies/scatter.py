"""The picture of predicted against true KL: all architectures that were measured whole, and the best sums alone."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.pages.picture import COLOURS, FAINT, INK
from tasks.studies.additivity import Check, Measured

_MARKED = {"mip": COLOURS["child"], "corrected": COLOURS["random"], "repaired": COLOURS["greedy"]}


def draw_check(check: Check) -> Figure:
    """Left: all that was measured, on the scored sequences, logarithmic. Right: the top, on the other sequences.

    On the right true KL is drawn as its paired difference from the first's, the MIP's choice.
    """
    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_all(left, check.measured)
    late = [measured for measured in check.measured if measured.name in ("corrected", "repaired")]
    _draw_differences(right, check, [*check.measured[1 : check.top], *late])
    _title(left, f"scored sequences: true / predicted of the top {check.ratio.value:.2f} ± {check.ratio.se:.2f}")
    rank = f"rank correlation {check.rank.value:.2f} ± {check.rank.se:.2f}"
    _title(right, f"other sequences: top {check.top}, {rank}")
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=11, color=INK)
    axes.set_xlabel("predicted: sum of replace-1-block scores, nats per token", color=INK, fontsize=9)
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=3)


def _draw_all(axes: Axes, measured: Sequence[Measured]) -> None:
    for one in measured:
        true, foretold = one.figure("true_scored"), one.figure("predicted")
        _point(axes, one.name, foretold.value, true.value, true.se, named=not one.name.startswith("top"))
    values = [one.figure("predicted").value for one in measured]
    ends = [min(values), max(values)]
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=":", zorder=1, label="true = predicted")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylabel("true KL(parent || architecture), nats per token", color=INK, fontsize=9)


def _draw_differences(axes: Axes, check: Check, measured: Sequence[Measured]) -> None:
    against = {difference.name: difference for difference in check.differences}
    _point(axes, check.measured[0].name, check.measured[0].score, 0.0, 0.0)
    for one in measured:
        _point(axes, one.name, one.score, against[one.name].value, against[one.name].se)
    axes.axhline(0, color=FAINT, linewidth=1, linestyle=":", zorder=1)
    axes.set_ylabel("true KL minus that of the MIP's choice, paired", color=INK, fontsize=9)


def _point(axes: Axes, name: str, x: float, y: float, error: float, named: bool = True) -> None:
    colour = _MARKED.get(name, COLOURS["uniform"])
    bars: dict[str, Any] = {"yerr": error or None, "elinewidth": 1, "ecolor": FAINT, "capsize": 2}
    axes.errorbar(x, y, marker="o", ls="", markersize=6, color=colour, zorder=3, **bars)
    if named:
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8, color=INK)
