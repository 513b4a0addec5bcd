"""The picture of predicted against true KL: all architectures that were measured whole, and the best sums alone."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tasks.additivity import Check, Measured
from tasks.picture import COLOURS, FAINT, INK

_MARKED = {"mip": COLOURS["child"], "corrected": COLOURS["random"], "repaired": COLOURS["greedy"]}


def draw_check(check: Check) -> Figure:
    """Left: all that was measured, on the scored sequences, logarithmic. Right: the top, on the other sequences."""
    figure = Figure(figsize=(12, 5.4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    top = check.measured[: check.top]
    late = [measured for measured in check.measured if measured.name in ("corrected", "repaired")]
    _draw(left, check.measured, "true_scored", named=False)
    _draw(right, [*top, *late], "true_others", named=True)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_title(
        f"scored sequences: true / predicted of the top {check.ratio.value:.2f} ± {check.ratio.se:.2f}",
        fontsize=11,
        color=INK,
    )
    right.set_title(
        f"other sequences, top {check.top}: rank correlation {check.rank.value:.2f} ± {check.rank.se:.2f}",
        fontsize=11,
        color=INK,
    )
    return figure


def _draw(axes: Axes, measured: Sequence[Measured], field: str, named: bool) -> None:
    for one in measured:
        true, foretold = one.figure(field), one.figure("predicted")
        colour = _MARKED.get(one.name, COLOURS["uniform"])
        errors: dict[str, Any] = {"yerr": true.se or None, "elinewidth": 1, "ecolor": FAINT, "capsize": 2}
        axes.errorbar(foretold.value, true.value, marker="o", ls="", markersize=6, color=colour, zorder=3, **errors)
        if named or not one.name.startswith("top"):
            axes.annotate(
                one.name, (foretold.value, true.value), xytext=(6, 4), textcoords="offset points", fontsize=8, color=INK
            )
    if not named:
        foretold_all = [one.figure("predicted").value for one in measured]
        ends = [min(foretold_all), max(foretold_all)]
        axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle=":", zorder=1, label="true = predicted")
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    axes.set_xlabel("predicted: sum of replace-1-block scores, nats per token", color=INK, fontsize=9)
    axes.set_ylabel("true KL(parent || architecture), nats per token", color=INK, fontsize=9)
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=3)
