"""One self-contained HTML page of a choice from a block library, and of the run behind it: `puzzle report`.

Pictures are inline SVG that follows the page's colours; nothing is loaded from elsewhere. Each can be had as PNG too.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from blocks.files import write_text
from blocks.library import keep, remember
from blocks.records import ChildReport, TruthPoint, Value
from tasks.libraries.reading import read_json
from tasks.libraries.tables import validated
from tasks.pages.front import front_of
from tasks.pages.library_pictures import Front, draw_confidence, draw_front, draw_strip, draw_truth
from tasks.pages.picture import draw_capabilities, draw_comparison, draw_probe
from tasks.pages.report import (
    BEST,
    BEST_MEANS,
    LEGEND,
    SAID,
    WordedTable,
    answered,
    batch_table,
    column_names,
    comparison_rows,
    floors_table,
    race_table,
    save_figure,
    shipped_column,
    speed_table,
    sums_table,
    times_table,
)
from tasks.pages.svg import inline_svg
from tasks.pages.verdict import BUDGET_HEADER, budget_rows, evidence, verdict, warnings
from tasks.probe.records import ProbeReport
from tasks.probe.words import MEANS, sentences, tables
from tasks.running.progress import shown
from tasks.search.confidence import Confidence, Draws, bootstrap
from tasks.search.joint import JointLibrary, LibraryFileError, at, known_quantity
from tasks.search.request import Request, is_one_number
from tasks.search.solve import JointChoice, Price, choose_joint, prices

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is solved again. over: the budget on the front's axis, the one that binds most when None."""

    over: str | None = None
    points: int = 20
    draws: Draws = Draws()


DEFAULT = Extent()


class Solved(Value):
    """What takes long of a page: every search that is made again for it. confidence: None where the library keeps no
    scores per sequence.
    """

    prices: tuple[Price, ...]
    front: Front
    confidence: Confidence | None


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that a page says of a choice. made: when, where and by which command, by name. following: what to do next,
    and the command for it.
    """

    title: str
    library: JointLibrary
    request: Request
    choice: JointChoice
    solved: Solved
    truth: tuple[TruthPoint, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    missing: tuple[str, ...] = ()
    report: ChildReport | None = None
    probe: ProbeReport | None = None
    made: tuple[tuple[str, str], ...] = ()
    following: tuple[tuple[str, str], ...] = ()


def study_choice(
    title: str,
    library: JointLibrary,
    request: Request,
    extent: Extent = DEFAULT,
    choice: JointChoice | None = None,
    kept: Path | None = None,
    **parts: Any,
) -> Study:
    """Price, sweep and resample a choice, the best one when None is given, with progress on standard error.

    kept: a file of what was solved for the same page before, or where to keep it. parts: the other fields of Study.
    Raises InfeasibleBudget when nothing fits.
    """
    if choice is None:
        choice = choose_joint(library, request.model_copy(update={"diverse": 1}))[0]
    solved = None if kept is None else remember(kept, Solved, lambda _: [], kept.parent, fetch="never")
    if solved is None:
        solved = _solved(library, request, extent, choice)
        if kept is not None:
            with suppress(OSError):  # a workspace of somebody else's can be read all the same
                keep(kept, solved, [], kept.parent, fetch="never")
    return Study(title=title, library=library, request=request, choice=choice, solved=solved, **parts)


def _solved(library: JointLibrary, request: Request, extent: Extent, choice: JointChoice) -> Solved:
    priced = prices(library, request, choice)
    over = extent.over or _axis(library, request, priced)
    with shown("sweep", beside=True) as progress:
        front = front_of(library, request, choice, over, extent.points, progress)
    sure = None
    if all(len(option.samples.get(request.metric, ())) > 1 for option in library.options):
        with shown("bootstrap", beside=True) as progress:
            sure = bootstrap(library, request, extent.draws, progress, choice)
    return Solved(prices=tuple(priced), front=front, confidence=sure)


def _axis(library: JointLibrary, request: Request, priced: Sequence[Price]) -> str:
    """The quantity of which the choice uses most of its limit; where that is a floor, the cost behind it.

    Only one that has a least value: of several scenarios that nobody weighs, each has a runtime of its own.
    """
    used = [
        (price.limit / price.used if limit.kind.floor else price.used / price.limit, limit.kind.cost)
        for price, limit in zip(priced, request.limits, strict=True)
        if limit.kind.cost and price.used and is_one_number(library, request, limit.kind.cost)
    ]
    default = "memory_gib" if is_one_number(library, request, "memory_gib") else "parameters"
    return max(used)[1] if used else default


def read_truth(path: Path) -> tuple[TruthPoint, ...]:
    """Points from a JSON list of {name, predicted, true, true_se}, or an object that has one under "points"."""
    found = read_json(path)
    listed = found.get("points") if isinstance(found, dict) else found
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise LibraryFileError(f"{path}: a list of {{name, predicted, true, true_se}}, or one under 'points'.")
    return tuple(validated(TruthPoint, one, path) for one in listed)


def pictures_of(study: Study) -> dict[str, Figure]:
    """Figures by file name, those that there is something to show of."""
    found = {"strip": draw_strip(study.choice.layers), "front": draw_front(study.solved.front)}
    if study.solved.confidence is not None:
        found["confidence"] = draw_confidence(study.solved.confidence)
    if study.truth:
        found["truth"] = draw_truth(study.truth)
    if study.report is not None and any(candidate.kl for candidate in study.report.candidates):
        found["comparison"] = draw_comparison(study.report.candidates)
    if study.report is not None and any(candidate.capabilities for candidate in study.report.candidates):
        found["capabilities"] = draw_capabilities(study.report.candidates)
    if study.probe is not None:
        found["probe"] = draw_probe(study.probe)
    return found


def write_page(study: Study, target: Path, png: Path | None = None) -> list[Path]:
    """Write the page, and every picture as PNG into the folder `png`. Returns the files."""
    figures = pictures_of(study)
    written = [save_figure(figure, png / f"{name}.png") for name, figure in figures.items()] if png else []
    return [write_text(target, render(study, figures)), *written]


def render(study: Study, figures: dict[str, Figure]) -> str:
    """The page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = {
        "strip": "architecture, layer by layer",
        "front": "Pareto front with simple searches on it",
        "confidence": "how often each layer's choice recurs",
        "truth": "predicted against true",
        "comparison": "parent, child and baselines",
        "capabilities": "the KL on the corpus and on every capability",
        "probe": "the KL on other text",
    }
    report, probe = study.report, study.probe
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=study.title,
        choice=study.choice,
        request=study.request,
        front=study.solved.front,
        over=known_quantity(study.solved.front.over).title,
        prices=[_priced(price, study.choice) for price in study.solved.prices],
        sure=study.solved.confidence,
        truth=study.truth,
        facts=study.facts,
        missing=study.missing,
        pictures={name: Markup(inline_svg(figure, names[name])) for name, figure in figures.items()},  # noqa: S704
        budgets=[*_budgets(study)],
        scenarios=study.choice.scenarios if len(study.choice.scenarios) > 1 else (),
        runs=_runs(study.choice.layers),
        types=len(set(study.choice.layers.values())),
        error="" if study.choice.score_se is None else f"{study.choice.score_se:.2g}",
        made=study.made,
        following=study.following,
        budget_header=BUDGET_HEADER,
        budget=(budget_rows(report) if report else []) or [_asked_and_got(price) for price in study.solved.prices],
        columns=[] if report is None else column_names(report),
        shipped=-1 if report is None else shipped_column(report),
        rows=[] if report is None else comparison_rows(report),
        warnings=[] if report is None else warnings(report),
        verdict="" if report is None else verdict(report),
        findings=[] if report is None else evidence(report),
        answers=[] if report is None else answered(report),
        said=SAID,
        probe_lines=[] if probe is None else sentences(probe),
        probe_tables=[] if probe is None else tables(probe),
        probe_means=MEANS,
        folded=[] if report is None else _folded(report),
        best=BEST,
        legend=f"{BEST_MEANS} {LEGEND}",
        percent=lambda share, digits=0: f"{round(100 * share, digits) + 0.0:.{digits}f} %",
    )


def _folded(report: ChildReport) -> list[tuple[str, list[WordedTable]]]:
    """Tables that are opened on request, under a line each."""
    tables = {
        "limits on time, before GKD": [times_table(report)],
        "limits on capabilities, before GKD": [floors_table(report)],
        "the race that the child won": [race_table(report)],
        "what every number of requests at a time would give": [batch_table(report)],
        "speeds in every scenario, and predicted beside measured times": [sums_table(report), speed_table(report)],
    }
    shown = {line: [table for table in several if table[1]] for line, several in tables.items()}
    return [(line, several) for line, several in shown.items() if several]


def _asked_and_got(price: Price) -> tuple[str, ...]:
    """A limit of a choice from a library, in the order of BUDGET_HEADER; the solver's answer keeps all of them."""
    got = f"{100 * price.used:.4g} % of the parent's" if price.share else figure(price.used, price.unit)
    least = "" if known_quantity(price.budget.partition(" of ")[0]).floor else "at most "
    return price.budget, least + _limit(price), got, "–", "kept"


def _budgets(study: Study) -> Iterator[dict[str, str]]:
    """What the choice takes of everything that the library knows or the request limits."""
    library, choice = study.library, study.choice
    limited = {price.budget: price for price in study.solved.prices}
    for name in ("memory_gib", "latency_seconds", "parameters"):
        value = getattr(choice, name)
        if value is not None:
            yield _tile(name, value, limited.pop(name, None), library, choice)
    for price in limited.values():
        yield _tile(price.budget, price.used, price, library, choice)


def _tile(name: str, value: float, price: Price | None, library: JointLibrary, choice: JointChoice) -> dict[str, str]:
    quantity, _, scenario = name.partition(" of ")
    kind = known_quantity(quantity)
    share = outside = ""
    if len(choice.scenarios) == 1 and kind.cost == quantity:
        index = library.place_at(choice.scenarios[0].scenario, choice.scenarios[0].batch_size)
        parents = set(library.parents) == set(library.layers)
        parent = library.of_parent(quantity, index) if parents and not (price and price.share) else 0.0
        share = f"{100 * value / parent:.1f} % of the parent" if parent else ""
        known = quantity in library.fixed and at(library.fixed[quantity], index)
        outside = f"{figure(at(library.fixed[quantity], index), kind.unit)} outside the blocks" if known else ""
    shown_value = figure(value, kind.unit)
    if price is not None and price.share and value == price.used:
        shown_value = f"{100 * value:.1f} % of the parent's"
    return {
        "name": known_quantity(quantity).title + (f", {scenario}" if scenario else ""),
        "value": shown_value,
        "limit": "" if price is None else _limit(price),
        "used": "" if price is None else f"{100 * price.used / price.limit:.1f}",
        "share": share,
        "outside": outside,
    }


def _limit(price: Price) -> str:
    least = "at least " if known_quantity(price.budget.partition(" of ")[0]).floor else ""
    return least + (f"{100 * price.limit:.4g} % of the parent's" if price.share else figure(price.limit, price.unit))


def figure(value: float, unit: str) -> str:
    """`1.31 million`, `726.4 MiB`, `12.3 ms`: four figures and the unit."""
    if unit == "parameters":
        return f"{value / 1e6:,.4g} million" if value < 1e9 else f"{value / 1e9:,.4g} billion"
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"


def _priced(price: Price, choice: JointChoice) -> dict[str, Any]:
    """What a budget is worth; per million where the unit is a parameter, per percent where it is a share."""
    moves = [
        (
            step,
            "nothing fits" if value is None else f"{value:.6g}",
            "" if value is None else f"{value - choice.objective:+.3g}",
        )
        for step, value in price.resolved.items()
    ]
    quantity, _, scenario = price.budget.partition(" of ")
    many = price.unit == "parameters"
    unit, scale = ("% of the parent's", 0.01) if price.share else ("million", 1e6) if many else (price.unit, 1.0)
    return {
        "budget": known_quantity(quantity).title + (f", {scenario}" if scenario else ""),
        "used": f"{100 * price.used / price.limit:.1f} %",
        "limit": _limit(price),
        "unit": unit,
        "per_unit": f"{price.per_unit * scale:+.3g}",
        "moves": moves,
    }


def _runs(layers: dict[str, str]) -> list[tuple[str, str]]:
    """Layers with the same choice put together: (`layer_3 – layer_7`, label)."""
    found = []
    for label, run in itertools.groupby(layers.items(), key=lambda item: item[1]):
        names = [name for name, _ in run]
        found.append((names[0] if len(names) == 1 else f"{names[0]} – {names[-1]}", " ".join(label.split())))
    return found


def truth_of(folder: Path) -> tuple[TruthPoint, ...]:
    """Points of the newest `puzzle check` of a workspace; none where there was none."""
    kept = sorted((folder / "studies").glob("*/truth.json"), key=lambda path: path.stat().st_mtime)
    return read_truth(kept[-1]) if kept else ()
