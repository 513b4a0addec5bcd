"""Two pictures of a run: the architecture layer by layer, and the quality of all candidates against their speed.

Figures are made without pyplot, so they need no display and no global state, and threads may draw at the same time.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from blocks.records import SUBBLOCKS, Architecture, Candidate, LayerChoice, Metric, Subblock, Totals
from blocks.typed_labels import bare, type_in
from profiles.schema import GENERAL
from tasks.evaluate.standing import final_of, gain_of
from tasks.probe.records import ProbeReport

INK, FAINT = "#1f2933", "#9aa5b1"
PARENT_COLOUR, NO_OP_COLOUR, LINEAR_COLOUR = "#3e4c59", "#ffffff", "#f0a04b"
SIZED_MAPS = {"kv": "Blues", "ffn": "Greens"}  # kinds with a size: the larger, the darker
OTHER_MAPS = ("Purples", "RdPu", "YlOrBr", "GnBu")
HATCHES = ("///", "...", "xxx", "\\\\\\", "++", "oo")  # of types of number
COLOURS = {
    "parent": PARENT_COLOUR,
    "child": "#d1495b",
    "uniform": "#2e86ab",
    "depth": "#f0a04b",
    "greedy": "#5c9e5f",
    "random": "#8e6c8a",
}


def _split_label(label: str) -> tuple[str, int | None]:
    """Kind and size: kv1 -> (kv, 1), no_op -> (no_op, None)."""
    match = re.fullmatch(r"(.*?)(\d+)?", label)
    assert match is not None
    return match[1], int(match[2]) if match[2] else None


def variant_colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour per label. The hue depends on the kind, the shade on the rank of the size among these labels."""
    sizes: dict[str, list[int]] = {}
    for label in labels:
        kind, size = _split_label(label)
        if size is not None:
            sizes.setdefault(kind, []).append(size)
    ranks = {kind: sorted(set(known)) for kind, known in sizes.items()}
    others = sorted({_split_label(label)[0] for label in labels} - set(SIZED_MAPS) - {"parent", "no_op", "linear"})
    fixed = {"parent": PARENT_COLOUR, "no_op": NO_OP_COLOUR, "linear": LINEAR_COLOUR}
    colours = {}
    for label in dict.fromkeys(labels):
        kind, size = _split_label(label)
        if label in fixed:
            colours[label] = fixed[label]
            continue
        name = SIZED_MAPS.get(kind) or OTHER_MAPS[others.index(kind) % len(OTHER_MAPS)]
        ranked = ranks.get(kind, [])
        share = ranked.index(size) / (len(ranked) - 1) if size is not None and len(ranked) > 1 else 0.5
        colours[label] = to_hex(colormaps[name](0.25 + 0.55 * share))
    return colours


def figure_of(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, which needs no display."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes) -> None:
    """No box around the axes, quiet ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9, length=3)


def draw_architecture(
    architecture: Architecture, parent: Candidate | None = None, child: Candidate | None = None
) -> Figure:
    """A cell per subblock, layers from left to right, attention above FFN; beside it child / parent costs.

    parent, child: rows of the report, whose measured figures are drawn beside the predicted ones.
    """
    depth = len(architecture.layers)
    width = min(30.0, max(12.0, 5.5 + 0.4 * depth))
    figure = figure_of(width, 5.0)
    cells, bars = figure.subplots(1, 2, width_ratios=[width - 4.5, 4.5])
    _draw_cells(figure, cells, architecture.layers, (width - 6.0) / depth)
    _draw_costs(bars, architecture, parent, child)
    score = f"{architecture.score:.3g} ± {architecture.score_se:.2g}"
    figure.suptitle(
        f"Architecture by {architecture.method} · predicted score {score} (sum of replace-1-block scores)",
        fontsize=13,
        color=INK,
        x=0.01,
        ha="left",
    )
    return figure


def _draw_cells(figure: Figure, axes: Axes, layers: Sequence[LayerChoice], cell_inches: float) -> None:
    labels: dict[Subblock, list[str]] = {
        "attention": [layer.attention for layer in layers],
        "ffn": [layer.ffn for layer in layers],
    }
    hatches = type_hatches([type_in(label) for each in labels.values() for label in each])
    for row, subblock in enumerate(SUBBLOCKS):
        plain = [bare(label) for label in labels[subblock]]
        colours = variant_colours(plain)
        for layer, label in enumerate(labels[subblock]):
            _draw_cell(axes, (layer, 1 - row), bare(label), colours[bare(label)], cell_inches, hatches[type_in(label)])
        _legend(figure, axes, subblock, plain, colours)
    _type_legend(axes, [type_in(label) for each in labels.values() for label in each if label != "no_op"], hatches)
    coupled = [layer for layer, choice in enumerate(layers) if choice.coupled]
    for layer in coupled:
        axes.plot([layer, layer], [0.42, 0.58], color=INK, linewidth=3, solid_capstyle="round")
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_ylim(-0.5, 1.5)
    every = 1 if len(layers) <= 40 else 5
    axes.xaxis.set_major_locator(FixedLocator(list(range(0, len(layers), every))))
    axes.yaxis.set_major_locator(FixedLocator([0, 1]))
    axes.set_yticklabels(["ffn", "attention"], fontsize=11)
    axes.set_xlabel("layer" + ("   (joined cells: distilled together)" if coupled else ""), color=INK)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.tick_params(axis="y", labelsize=11)
    for spine in axes.spines.values():
        spine.set_visible(False)


def type_hatches(kinds: Sequence[str]) -> dict[str, str]:
    """A hatch per type of number; none for the profile's precision."""
    named = sorted(set(kinds) - {""})
    return {"": "", **{kind: HATCHES[place % len(HATCHES)] for place, kind in enumerate(named)}}


def _type_legend(axes: Axes, kinds: Sequence[str], hatches: dict[str, str]) -> None:
    """Types of number with how often each occurs, above the cells; nothing where no type was chosen."""
    counts = Counter(kinds)
    if set(counts) <= {""}:
        return
    handles = [
        Patch(
            facecolor="white", edgecolor=INK, hatch=hatches[kind], label=f"{kind or 'as the profile'} × {counts[kind]}"
        )
        for kind in sorted(counts)
    ]
    first = axes.get_legend()
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=len(handles), frameon=False)
    if first is not None:
        axes.add_artist(first)


def _draw_cell(axes: Axes, at: tuple[int, int], label: str, colour: str, cell_inches: float, hatch: str) -> None:
    layer, height = at
    dashed = label == "no_op"
    cell = FancyBboxPatch(
        (layer - 0.44, height - 0.4),
        0.88,
        0.8,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=colour,
        edgecolor=FAINT if dashed else "none",
        linestyle="--" if dashed else "-",
        linewidth=0.8,
        hatch=hatch,
    )
    cell.set_hatchcolor(_readable_on(colour))
    axes.add_patch(cell)
    points = min(9.0, 0.62 * 72 * cell_inches)  # text that is turned by 90 degrees is as high as the cell is wide
    if points >= 4:
        fits_across = 0.62 * points * len(label) / 72 < 0.85 * cell_inches
        axes.text(
            layer,
            height,
            label.replace("no_op", "no-op"),
            ha="center",
            va="center",
            fontsize=points,
            rotation=0 if fits_across else 90,
            color=_readable_on(colour),
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8} if hatch else None,
        )


def _readable_on(colour: str) -> str:
    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else INK


def _legend(figure: Figure, axes: Axes, subblock: Subblock, labels: Sequence[str], colours: dict[str, str]) -> None:
    """Variants of one subblock with how often each occurs, the largest first; the FFN's legend is below the cells."""
    order = {"parent": (0, 0), "linear": (2, 0), "no_op": (3, 0)}
    counts = Counter(labels)
    names = sorted(counts, key=lambda label: order.get(label, (1, -(_split_label(label)[1] or 0))))
    handles: list[Any] = [
        Patch(
            facecolor=colours[name],
            edgecolor=FAINT if name == "no_op" else colours[name],
            linestyle="--" if name == "no_op" else "-",
            label=f"{name.replace('no_op', 'no-op')} × {counts[name]}",
        )
        for name in names
    ]
    handles.insert(0, Line2D([], [], linestyle="", label=subblock))
    style: dict[str, Any] = {
        "ncols": min(len(handles), 11),
        "frameon": False,
        "fontsize": 10,
        "handlelength": 1.2,
        "labelcolor": INK,
    }
    if subblock == "attention":
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 0.99), **style)
    else:
        figure.legend(handles=handles, loc="outside lower left", **style)


def _draw_costs(axes: Axes, architecture: Architecture, parent: Candidate | None, child: Candidate | None) -> None:
    """Bars of child / parent: predicted behind, measured in front."""
    predicted = _predicted_shares(architecture)
    measured = _measured_shares(parent, child) if parent is not None and child is not None else {}
    for place, (name, share) in enumerate(predicted.items()):
        found = measured.get(name)
        axes.barh(place - 0.2, share, 0.34, color="#cbd2d9")
        axes.text(share + 0.015, place - 0.2, f"{share:.2f}", va="center", fontsize=9, color=INK)
        if found is not None:
            error = found.se if found.se > 0 else None
            axes.barh(place + 0.2, found.value, 0.34, color=COLOURS["child"], xerr=error, error_kw={"ecolor": INK})
            axes.text(
                found.value + found.se + 0.015, place + 0.2, f"{found.value:.2f}", va="center", fontsize=9, color=INK
            )
    axes.axvline(1, color=INK, linewidth=1, linestyle=":")
    top = max([1.0, *predicted.values(), *(found.value + found.se for found in measured.values())])
    axes.set_xlim(0, top * 1.15)
    axes.set_ylim(len(predicted) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(predicted)))))
    axes.set_yticklabels(list(predicted))
    axes.set_xlabel("child / parent (parent = 1, less is better)", fontsize=9, color=INK)
    handles = [Patch(color="#cbd2d9", label="predicted")]
    if measured:
        handles.append(Patch(color=COLOURS["child"], label="measured"))
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False, fontsize=9)
    plain_axes(axes)


def _predicted_shares(architecture: Architecture) -> dict[str, float]:
    """Child / parent at the first scenario."""
    if not architecture.totals or not architecture.parent_totals:
        return {}
    child = architecture.totals[0]
    parent = next((totals for totals in architecture.parent_totals if _same_case(totals, child)), None)
    parent = parent or architecture.parent_totals[0]
    return {
        "prefill time": child.prefill_seconds / parent.prefill_seconds,
        "decode time": child.decode_seconds_per_token / parent.decode_seconds_per_token,
        "memory": child.memory_bytes / parent.memory_bytes,
        "parameters": child.parameters / parent.parameters,
    }


def _same_case(first: Totals, second: Totals) -> bool:
    return (first.scenario, first.batch_size) == (second.scenario, second.batch_size)


def _measured_shares(parent: Candidate, child: Candidate) -> dict[str, Metric]:
    shares = {
        "memory": Metric(value=child.memory_bytes / parent.memory_bytes, se=0, n=1),
        "parameters": Metric(value=child.parameters / parent.parameters, se=0, n=1),
    }
    for kind in ("prefill", "decode"):
        gain = gain_of(child, parent, kind)
        if gain is not None:
            shares[f"{kind} time"] = Metric(value=1 / gain.value, se=gain.se / gain.value**2, n=gain.n)
    return shares


def draw_capabilities(candidates: Sequence[Candidate]) -> Figure:
    """The KL of every model on the corpus and on each capability, its standard error, and what the child was allowed.

    The parent's is 0. Models after their last stage.
    """
    finals = {model.name: final_of(candidates, model.name) for model in candidates if model.stage != "parent"}
    last = {name: model for name, model in finals.items() if model is not None}
    names = list(dict.fromkeys(name for model in last.values() for name in model.capabilities))
    child = last.get("child")
    limits = {limit.name.removeprefix("max_kl of "): limit.asked for limit in child.limits} if child else {}
    figure = figure_of(max(6.0, 1.6 + 2.4 * (1 + len(names))), 4.2)
    axes, width = figure.subplots(), 0.8 / max(1, len(last))
    for place, (name, model) in enumerate(last.items()):
        figures = [model.kl, *(one.kl if (one := model.capabilities.get(each)) else None for each in names)]
        bars = [(x + width * place, kl) for x, kl in enumerate(figures) if kl is not None]
        tops, errors = [kl.value for _, kl in bars], [kl.se for _, kl in bars]
        style: dict[str, Any] = {
            "color": COLOURS.get(name, FAINT),
            "label": name,
            "error_kw": {"ecolor": INK, "capsize": 2},
        }
        axes.bar([x for x, _ in bars], tops, 0.9 * width, yerr=errors, **style)
    for x, name in enumerate([GENERAL, *names]):
        if name in limits:
            label = None if axes.get_legend_handles_labels()[1].count("asked: at most") else "asked: at most"
            edges = (x - 0.6 * width, x + 0.8 - 0.4 * width)
            axes.plot(edges, (limits[name], limits[name]), color=INK, ls="--", lw=1.4, label=label)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(1 + len(names))], ["the corpus", *names])
    axes.set_ylabel("KL(parent || model), nats per token", color=INK)
    each = [kl for model in last.values() for kl in (model.kl, *(one.kl for one in model.capabilities.values()))]
    heights = [kl.value for kl in each if kl is not None]
    if heights and 0 < 10 * min(heights) < max(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(loc="outside upper center", ncols=1 + len(last), frameon=False, fontsize=9)
    plain_axes(axes)
    return figure


def draw_probe(report: ProbeReport) -> Figure:
    """The KL of every model but the parent on each text of a probe, with its standard error."""
    models, domains = report.models[1:], report.domains
    figure = figure_of(6.0, 1.0 + 0.3 * len(domains) * len(models))
    axes, height = figure.subplots(), 0.8 / len(models)
    for place, name in enumerate(models):
        kl = [domain.models[name].kl for domain in domains]
        axes.barh(
            [row + height * place for row in range(len(domains))],
            [one.value for one in kl],
            0.9 * height,
            xerr=[one.se for one in kl],
            color=COLOURS.get(name, FAINT),
            label=name,
            error_kw={"ecolor": INK, "capsize": 2},
        )
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(domains))], [domain.name for domain in domains])
    axes.invert_yaxis()
    axes.set_xlabel("KL(parent || model), nats per token", color=INK)
    figure.legend(loc="outside upper center", ncols=len(models), frameon=False, fontsize=9)
    plain_axes(axes)
    return figure


def draw_comparison(candidates: Sequence[Candidate]) -> Figure:
    """Quality against speed: KL (and retention, where it was measured) over prefill and decode speed-up.

    Hollow marks are assembled models, filled ones distilled; a line joins the two of one name. The parent is at (1, 0).
    """
    parent = next((candidate for candidate in candidates if candidate.stage == "parent"), None)
    others = [candidate for candidate in candidates if candidate.stage != "parent"]
    rows = ["kl"]
    if any(candidate.retention is not None for candidate in others):
        rows.append("retention")
    figure = figure_of(11, 1.2 + 4.2 * len(rows))
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex="col", sharey="row")
    for row, quality in enumerate(rows):
        for column, speed in enumerate(("prefill", "decode")):
            axes = grid[row][column]
            _draw_plane(axes, parent, others, speed, quality)
            if row == len(rows) - 1:
                axes.set_xlabel(f"{speed} gain over the parent (more is better)", color=INK)
            if column == 0:
                name = "KL(parent || model), nats per token (less is better)"
                axes.set_ylabel(name if quality == "kl" else "retention of benchmarks (more is better)", color=INK)
    handles = _comparison_handles(others)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=10)
    return figure


def _draw_plane(axes: Axes, parent: Candidate | None, others: Sequence[Candidate], speed: str, quality: str) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for candidate in others:
        figure: Metric | None = getattr(candidate, quality)
        if parent is None or figure is None:
            continue
        ratio = gain_of(candidate, parent, speed)
        if ratio is None:
            continue
        points.setdefault(candidate.name, []).append((ratio.value, figure.value))
        colour = COLOURS.get(candidate.name, INK)
        axes.errorbar(
            ratio.value,
            figure.value,
            xerr=ratio.se or None,
            yerr=figure.se or None,
            marker="*" if candidate.name == "child" else "o",
            markersize=15 if candidate.name == "child" else 8,
            color=colour,
            markerfacecolor=colour if candidate.stage == "distilled" else "white",
            markeredgewidth=1.6,
            elinewidth=1.2,
            capsize=2,
            zorder=4 if candidate.name == "child" else 3,
        )
    for name, pair in points.items():
        axes.plot(*zip(*pair, strict=True), color=COLOURS.get(name, INK), linewidth=1, alpha=0.4, zorder=2)
    axes.axvline(1, color=FAINT, linewidth=1, linestyle=":")
    # the errors of a disturbed measurement would leave no room for anything else
    axes.set_xlim(0, 1.2 * max([1.0, *(point[0] for pair in points.values() for point in pair)]))
    _scale(axes, quality, [point[1] for pair in points.values() for point in pair])
    axes.grid(color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    plain_axes(axes)


def _scale(axes: Axes, quality: str, heights: Sequence[float]) -> None:
    """KL on a logarithmic axis where candidates differ tenfold; else a line at the parent's height."""
    positive = [height for height in heights if height > 0]
    if quality == "kl" and positive and max(positive) > 10 * min(positive):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(min(positive) / 1.6, max(positive) * 1.6)
        return
    axes.axhline(0 if quality == "kl" else 1, color=FAINT, linewidth=1, linestyle=":")


def _comparison_handles(others: Sequence[Candidate]) -> list[Any]:
    handles = []
    for name in dict.fromkeys(candidate.name for candidate in others):
        colour, child = COLOURS.get(name, INK), name == "child"
        handles.append(
            Line2D([], [], color=colour, marker="*" if child else "o", markersize=12 if child else 7, ls="", label=name)
        )
    for stage in ("assembled", "distilled"):
        if any(candidate.stage == stage for candidate in others):
            face = INK if stage == "distilled" else "white"
            handles.append(
                Line2D([], [], color=INK, marker="o", markerfacecolor=face, markersize=7, ls="", label=stage)
            )
    return handles
