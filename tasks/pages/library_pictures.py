"""Pictures of a choice from a block library: strip, Pareto front, confidence per layer, predicted against true.

One column wide, so that they read on a phone. Colours are told apart by the colour-blind too: Okabe and Ito's hues,
shades of one hue for sizes.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from blocks.records import TruthPoint
from tasks.pages.picture import FAINT, INK
from tasks.pages.svg import GRID
from tasks.search.confidence import Confidence
from tasks.search.joint import known_quantity

WIDTH = 5.6  # inches
PER_ROW = 32  # layers
PARENT, LINEAR, CHOSEN = "#7b8794", "#e69f00", "#d55e00"
OTHERS = ("#cc79a7", "#56b4e9", "#8b6f47")
RAMPS = {
    "attention": LinearSegmentedColormap.from_list("attention", ["#cfe5f5", "#0072b2"]),
    "ffn": LinearSegmentedColormap.from_list("ffn", ["#c8eadf", "#00795a"]),
}
BASELINES = {"uniform": ("#0072b2", "s"), "depth": ("#cc79a7", "v"), "stepwise": ("#009e73", "D")}


FigureOf = TypeVar("FigureOf", bound=Callable[..., Figure])


def _as_written(draw: FigureOf) -> FigureOf:
    """Labels are what somebody called a variant: a $ in them is no mathematics."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return cast(FigureOf, drawn)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A subblock in a layer: its label, what is left of the parent's in percent where that is told, its size."""

    text: str
    percent: int | None
    size: float

    @property
    def is_parent(self) -> bool:
        """The parent's own subblock."""
        return self.text == "parent" or self.percent == 100

    @property
    def kind(self) -> str:
        """parent, no_op, linear, "sized", or the label."""
        first = self.text.split(" ")[0]
        if first in ("no_op", "linear"):
            return first
        if self.is_parent:
            return "parent"
        return "sized" if self.size else self.text

    @property
    def legend(self) -> str:
        """`2 kv heads, 25 %`."""
        name = self.text.replace("no_op", "no-op")
        return f"{name}, {self.percent} %" if self.percent and self.text != "parent" else name


def cells_of(label: str) -> dict[str, Cell]:
    """`attention = 2 kv heads (parent * 25%) && ffn = no_op` by subblock; {"block": ...} where it reads otherwise."""
    found = {}
    for part in label.split("&&"):
        subblock, equals, rest = part.strip().partition(" = ")
        if not equals:
            return {"block": _cell(" ".join(label.split()))}
        found[subblock.strip()] = _cell(rest.strip())
    return found


def _cell(text: str) -> Cell:
    told = re.search(r"\(parent \* (\d+)%\)", text)
    percent = int(told[1]) if told else None
    name = text.partition(" (parent")[0]
    numbers = re.findall(r"\d+\.?\d*(?:e\d+)?", name)
    return Cell(text=name, percent=percent, size=float(percent or (numbers[0] if numbers else 0)))


def colours_of(subblock: str, cells: Sequence[Cell]) -> dict[str, str]:
    """A colour by label of one subblock: shades by size, hues by kind."""
    sizes = sorted({cell.size for cell in cells if cell.kind == "sized"})
    others = sorted({cell.text for cell in cells if cell.kind not in ("parent", "no_op", "linear", "sized")})
    fixed = {"parent": PARENT, "no_op": "none", "linear": LINEAR}
    ramp = RAMPS.get(subblock, RAMPS["attention"])
    found = {}
    for cell in cells:
        if cell.kind in fixed:
            found[cell.text] = fixed[cell.kind]
        elif cell.kind == "sized":
            found[cell.text] = to_hex(ramp(sizes.index(cell.size) / (len(sizes) - 1) if len(sizes) > 1 else 0.6))
        else:
            found[cell.text] = OTHERS[others.index(cell.text) % len(OTHERS)]
    return found


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _plain_logarithm(axis: Axis, set_scale: Callable[[str], None]) -> None:
    """0.01 instead of a power of ten, which would need mathematics in its label."""
    set_scale("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _quiet(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


@_as_written
def draw_strip(layers: Mapping[str, str]) -> Figure:
    """Layers across, a cell per subblock, in rows of at most PER_ROW layers; how often each variant stands below."""
    cells = [cells_of(label) for label in layers.values()]
    subblocks = list(dict.fromkeys(name for own in cells for name in own))
    by_name = {name: [own[name] for own in cells if name in own] for name in subblocks}
    colours = {name: colours_of(name, own) for name, own in by_name.items()}
    rows = [range(start, min(start + PER_ROW, len(cells))) for start in range(0, len(cells), PER_ROW)]
    entries = [_legend_of(name, by_name[name], colours[name]) for name in subblocks]
    lines = sum(1 + -(-(len(entry) - 1) // 2) for entry in entries)
    figure = _figure(0.25 + len(rows) * (0.42 * len(subblocks) + 0.3) + 0.21 * lines)
    grid = figure.subplots(len(rows), 1, squeeze=False)
    across = min(PER_ROW, len(cells))
    for axes, row in zip(grid[:, 0], rows, strict=True):
        for place, layer in enumerate(row):
            for height, name in enumerate(reversed(subblocks)):
                if name in cells[layer]:
                    _draw_cell(axes, place, height, cells[layer][name], colours[name], WIDTH / (across + 2))
        _strip_axes(axes, row, subblocks, across)
    handles = [handle for entry in entries for handle in _in_two_columns(entry)]
    ordered = handles[0::2] + handles[1::2]  # a legend fills its columns one after another
    figure.legend(
        handles=ordered, loc="outside lower left", ncols=2, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.1
    )
    return figure


def _draw_cell(axes: Axes, place: int, height: int, cell: Cell, colours: Mapping[str, str], inches: float) -> None:
    empty = cell.kind == "no_op"
    axes.add_patch(
        Rectangle(
            (place + 0.06, height + 0.06),
            0.88,
            0.88,
            facecolor=colours[cell.text],
            edgecolor=FAINT if empty else "none",
            linestyle=(0, (2, 2)) if empty else "-",
            linewidth=0.9,
        )
    )
    text = cell.text.replace("no_op", "no-op")
    if len(text) * 0.085 < inches * 0.9:
        dark = cell.kind in ("parent",) or (cell.kind == "sized" and _is_dark(colours[cell.text]))
        colour = INK if empty else "#fdfdfd" if dark else "#101820"
        axes.text(place + 0.5, height + 0.5, text, ha="center", va="center", fontsize=9, color=colour)


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.55


def _strip_axes(axes: Axes, row: range, subblocks: Sequence[str], across: int) -> None:
    axes.set_xlim(0, across)
    axes.set_ylim(0, len(subblocks))
    every = 1 if across <= 16 else 4
    axes.set_xticks(
        [place + 0.5 for place in range(0, len(row), every)], [str(row[i]) for i in range(0, len(row), every)]
    )
    axes.set_yticks([height + 0.5 for height in range(len(subblocks))], list(reversed(subblocks)))
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend_of(name: str, cells: Sequence[Cell], colours: Mapping[str, str]) -> list[Any]:
    """A heading, then the variants from most to least that remains, each with how often it stands."""
    counts = Counter(cell.text for cell in cells)
    rank = {"parent": 0, "sized": 1, "linear": 3, "no_op": 4}
    ordered = sorted({cell.text: cell for cell in cells}.values(), key=lambda c: (rank.get(c.kind, 2), -c.size))
    handles = [_blank(name)]
    for cell in ordered:
        empty = cell.kind == "no_op"
        edge = FAINT if empty else colours[cell.text]
        style: Any = (0, (2, 2)) if empty else "-"
        label = f"{cell.legend} × {counts[cell.text]}"
        handles.append(Patch(facecolor=colours[cell.text], edgecolor=edge, linestyle=style, label=label))
    return handles


def _blank(label: str) -> Patch:
    return Patch(facecolor="none", edgecolor="none", label=label)


def _in_two_columns(entry: list[Any]) -> list[Any]:
    """Heading alone in its line, then pairs; read line by line."""
    heading, *rest = entry
    return [heading, _blank(""), *rest, *([_blank("")] if len(rest) % 2 else [])]


@dataclass(frozen=True, kw_only=True)
class Front:
    """Architectures in the plane of one budget and the objective; points are (what is used, objective).

    over, unit: the budget on the axis. parent: what the parent uses, None where it is not known.
    """

    over: str
    unit: str
    metric: str
    parent: float | None
    chosen: tuple[float, float]
    front: tuple[tuple[float, float], ...]
    baselines: dict[str, tuple[tuple[float, float], ...]]


@_as_written
def draw_front(front: Front) -> Figure:
    """The front at the limits that were solved, simple searches as marks, the choice as a star."""
    figure = _figure(4.0)
    axes = figure.subplots()
    scale = 1e-6 if front.unit == "parameters" else 1.0
    every = [(front.chosen,), front.front, *front.baselines.values()]
    heights = [height for points in every for _, height in points]
    logarithmic = min(heights) >= 0 and max(heights) > 30 * max(1e-12, _typical(front))
    for name, points in front.baselines.items():
        colour, marker = BASELINES[name]
        shown = [(x * scale, y) for x, y in points if y > 0 or not logarithmic]
        if shown:
            dots: dict[str, Any] = {"ls": "", "markevery": 1}
            style = dots if name == "uniform" else {"ls": ":", "markevery": -(-len(shown) // 12)}
            axes.plot(*zip(*sorted(shown), strict=True), marker, lw=1, color=colour, ms=4.5, label=name, **style)
    steps = sorted((x * scale, y) for x, y in front.front if y > 0 or not logarithmic)
    if steps:
        axes.plot(*zip(*steps, strict=True), "o-", color=INK, ms=3.5, lw=1.6, label="front (MIP)")
    if front.chosen[1] > 0 or not logarithmic:
        x, y = front.chosen
        axes.plot(x * scale, y, "*", ms=16, color=CHOSEN, markeredgecolor="white", label="the choice", zorder=5)
    if logarithmic:
        _plain_logarithm(axes.yaxis, axes.set_yscale)
    unit = "million parameters" if front.unit == "parameters" else front.unit
    axes.set_xlabel(f"{known_quantity(front.over).title}, {unit}", color=INK, fontsize=10)
    axes.set_ylabel(f"sum of {front.metric} (less is better)", color=INK, fontsize=10)
    _quiet(axes)
    if front.parent:
        whole = front.parent * scale

        def to_percent(value: Any) -> Any:
            return 100 * value / whole

        def from_percent(value: Any) -> Any:
            return value * whole / 100

        top = axes.secondary_xaxis("top", functions=(to_percent, from_percent))
        top.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        top.tick_params(colors=INK, labelsize=9, length=3)
        top.spines["top"].set_color(FAINT)
        top.set_xlabel("of the parent", color=INK, fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _typical(front: Front) -> float:
    """The objective in the middle of the front."""
    heights = sorted(height for _, height in front.front if height > 0) or [1.0]
    return heights[len(heights) // 2]


@_as_written
def draw_confidence(found: Confidence) -> Figure:
    """Per layer the share of draws that chose what was chosen, and what the best other choice had."""
    figure = _figure(2.9)
    axes = figure.subplots()
    layers = list(found.chosen)
    own = [found.recurrence[layer].get(found.chosen[layer], 0.0) for layer in layers]
    others = [
        max((share for label, share in found.recurrence[layer].items() if label != found.chosen[layer]), default=0.0)
        for layer in layers
    ]
    places = range(len(layers))
    axes.bar(places, own, 0.8, color="#0072b2", label="the choice recurs")
    axes.bar(places, others, 0.8, bottom=own, color=LINEAR, label="runner-up instead")
    axes.axhline(0.5, color=INK, linewidth=0.9, linestyle=":")
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    axes.set_xlabel("layer", color=INK, fontsize=10)
    axes.set_ylabel("share of draws", color=INK, fontsize=10)
    _quiet(axes)
    axes.grid(visible=False, axis="x")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure


@_as_written
def draw_truth(points: Sequence[TruthPoint]) -> Figure:
    """Sums of block scores against what the assembled models measure; on the line the two agree."""
    figure = _figure(4.2)
    axes = figure.subplots()
    spread = [value for point in points for value in (point.predicted, point.true)]
    low, high = min(spread), max(spread)
    logarithmic = low > 0 and high > 20 * low
    ends = (low * 0.7, high * 1.4) if logarithmic else (low - 0.06 * (high - low), high + 0.06 * (high - low) or 1.0)
    axes.plot(ends, ends, color=FAINT, linewidth=1.2, linestyle="--", label="predicted = true")
    axes.errorbar(
        [point.predicted for point in points],
        [point.true for point in points],
        yerr=[point.true_se for point in points],
        fmt="o",
        color="#0072b2",
        ecolor=FAINT,
        ms=5,
        capsize=2,
        label="architectures, ± one standard error",
    )
    if logarithmic:
        _plain_logarithm(axes.xaxis, axes.set_xscale)
        _plain_logarithm(axes.yaxis, axes.set_yscale)
    for point in points if len(points) <= 10 else ():
        axes.annotate(
            point.name, (point.predicted, point.true), (5, -9), textcoords="offset points", fontsize=8, color=INK
        )
    axes.set_xlabel("predicted: sum of block scores", color=INK, fontsize=10)
    axes.set_ylabel("true: measured on the whole model", color=INK, fontsize=10)
    _quiet(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return figure
