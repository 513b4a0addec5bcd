"""`puzzle choose | explain | sweep | confidence`: the search on a block library alone; no model, no GPU, no Prefect."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from flows.in_workspace import kept_in_mlflow
from flows.options import LibraryOptions, refused, share_of, takes
from tasks.running.progress import shown
from tasks.search.joint import HEAD, KL_OF, QUANTITIES, LibraryFileError, at, known_quantity

if TYPE_CHECKING:
    from tasks.search.confidence import Confidence
    from tasks.search.joint import JointLibrary
    from tasks.search.request import Request
    from tasks.search.solve import JointChoice, Price

Json = Annotated[bool, typer.Option("--json", help="one object, or a list when several were asked for")]


Minimise = Annotated[
    str,
    typer.Option(
        "--minimise", help=f"what is minimised (tokens_per_second: maximised): {', '.join(QUANTITIES)}, {KL_OF}NAME"
    ),
]


@takes(LibraryOptions)
def choose_command(
    asked: LibraryOptions,
    minimise: Minimise = "score",
    diverse: Annotated[int, typer.Option("--diverse", help="how many architectures")] = 1,
    min_different: Annotated[
        int, typer.Option("--min-different", help="layers in which any two of them differ, at least")
    ] = 1,
    alpha: Annotated[
        str | None, typer.Option("--alpha", metavar="SHARE", help="or: the largest share of layers two may have alike")
    ] = None,
    as_json: Json = False,
) -> None:
    """The best architecture of a block library within your budgets, with its certificate."""
    from tasks.search.request import Request
    from tasks.search.solve import choose_joint

    library, request = asked.open()
    if alpha is not None:
        min_different = max(1, math.ceil((1 - share_of("--alpha", alpha, 1.0)) * len(library.layers) - 1e-9))
    try:
        several = {"diverse": diverse, "min_different": min_different, "minimise": minimise.replace("-", "_")}
        request = Request(**{**request.model_dump(), **several})
    except ValidationError as error:
        raise refused(error) from None
    found = choose_joint(library, request)
    if as_json:
        answers = [choice.model_dump() for choice in found]
        typer.echo(json.dumps(answers if diverse > 1 else answers[0], indent=1))
    else:
        typer.echo("\n\n".join(_in_words(choice, library, request) for choice in found))
    if len(found) < diverse:
        typer.echo(f"no more than {len(found)} exist that differ in {min_different} layers", err=True)


@takes(LibraryOptions)
def explain_command(asked: LibraryOptions, as_json: Json = False) -> None:
    """What each budget is worth: how much of it is used, and the objective with a little less or more of it."""
    from tasks.search.solve import choose_joint, prices

    library, request = asked.open()
    (choice,) = choose_joint(library, request)
    found = prices(library, request, choice)
    if as_json:
        typer.echo(json.dumps({**choice.model_dump(), "prices": [price.model_dump() for price in found]}, indent=1))
        return
    typer.echo(_summary(choice, library, request))
    for price in found:
        typer.echo(_priced(price, choice))


@takes(LibraryOptions)
def sweep_command(
    asked: LibraryOptions,
    over: Annotated[
        str, typer.Option("--over", help=f"what is limited: {', '.join(QUANTITIES)}, {KL_OF}NAME")
    ] = "latency_seconds",
    minimise: Minimise = "score",
    points: Annotated[int, typer.Option("--points", min=2, max=1000, help="limits along the front")] = 20,
    as_json: Json = False,
) -> None:
    """The Pareto front of any two of score, memory, throughput, latency ..., the other budgets kept."""
    from tasks.search.solve import front, front_values

    over, minimise = over.replace("-", "_"), minimise.replace("-", "_")
    library, request = asked.open()
    names = library.quantities
    if over == minimise or not {over, minimise} <= set(names):
        raise LibraryFileError(f"a front needs two different of {', '.join(names)}, not {over} and {minimise}.")
    request = request.model_copy(update={"minimise": minimise})
    values = front_values(library, request, over, points)
    with shown("sweep", beside=True) as progress:
        found = front(library, request, over, values, progress)
    if as_json:
        rows = [{"limit": at, **_or_infeasible(choice)} for at, choice in zip(values, found, strict=True)]
        typer.echo(json.dumps(rows, indent=1))
    else:
        typer.echo(f"the best {minimise} at each limit on {over}")
        _show_front(values, found, minimise)
    if asked.workspace and not asked.library:
        _keep_front(asked.workspace, over, values, found)


def _show_front(values: Sequence[float], found: "Sequence[JointChoice | None]", minimise: str) -> None:
    typer.echo(_row("limit", "objective", "score", "memory_gib", "latency_seconds", "status"))
    for value, choice in zip(values, found, strict=True):
        figures = ("-", "-", "-", "-", "infeasible")
        if choice:
            figures = (
                f"{_in_unit(choice.objective, choice, minimise):.6f}",
                f"{choice.score:.6f}",
                _figure(choice.memory_gib),
                _figure(choice.latency_seconds),
                choice.status,
            )
        typer.echo(_row(f"{value:.6g}", *figures))


def _keep_front(folder: Path, over: str, values: Sequence[float], found: "Sequence[JointChoice | None]") -> None:
    """A workspace's front as a run in its MLflow, where it has one."""
    from tasks.operating.tracking import has_runs

    if not has_runs(folder):
        return
    from tasks.operating.study_runs import log_sweep
    from tasks.operating.sweeping import points_of

    kept_in_mlflow(lambda: log_sweep(folder, over, points_of(values, found)))


@takes(LibraryOptions)
def confidence_command(
    asked: LibraryOptions,
    draws: Annotated[int, typer.Option("--draws", min=2, max=100_000, help="bootstrap draws, at most")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="time for them, at most")] = 120,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """How sure the choice is: the whole search again on resampled sequences, how often each layer's choice recurs."""
    from tasks.search.confidence import Draws, bootstrap

    library, request = asked.open()
    with shown("bootstrap", beside=True) as progress:
        found = bootstrap(library, request, Draws(most=draws, seconds=seconds, seed=seed), progress)
    typer.echo(found.model_dump_json(indent=1) if as_json else _sure(found))


def _or_infeasible(choice: "JointChoice | None") -> dict[str, Any]:
    return {"status": "infeasible"} if choice is None else choice.model_dump()


def _row(*cells: str) -> str:
    return "".join(f" {cell:>16}" for cell in cells[:-1]) + f"  {cells[-1]}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _in_words(choice: "JointChoice", library: "JointLibrary", request: "Request") -> str:
    width = max(len(layer) for layer in choice.layers)
    rows = [f"{layer:<{width}}  {_shown(label)}" for layer, label in choice.layers.items()]
    return "\n".join([_summary(choice, library, request), *rows])


def _summary(choice: "JointChoice", library: "JointLibrary", request: "Request") -> str:
    types, robust = len(set(choice.layers.values())), request.search.robust
    what = f"{request.metric}, sum over {len(choice.layers) - (HEAD in choice.layers)} layers"
    what += " and the head" if HEAD in choice.layers else ""
    what += f" + {robust:g} se" if robust else ""
    if request.minimise != "score":
        floor = known_quantity(request.minimise).floor
        what = f"{'most' if floor else 'least'} {known_quantity(request.minimise).title}"
        what += "" if not floor or _in_tokens(choice, request.minimise) else ", as the seconds of one request"
    lines = [f"objective  {_in_unit(choice.objective, choice, request.minimise):.6f} ({what})"]
    if choice.score_se is None and request.minimise != "score":
        lines.append(f"score  {choice.score:.6f}")
    if choice.score_se is not None:
        lines.append(f"score  {choice.score:.6f} +- {choice.score_se:.6f} (one standard error over sequences)")
    bound = _in_unit(choice.bound, choice, request.minimise)
    lines.append(f"certificate  {choice.status}, bound {bound:.6f}, gap {choice.gap:.2e}; {types} block types")
    lines.append(f"solved by  {choice.solved_by}")
    limits = {limit.label: limit for limit in request.limits}
    for totals in choice.scenarios:
        if totals.scenario:
            lines.append(f"scenario  {totals.scenario}, batch {totals.batch_size}")
        for name in ("memory_gib", "latency_seconds", "time_to_first_token_seconds", "tokens_per_second"):
            limit = limits.get(f"{name} of {totals.scenario}", limits.get(name))
            lines += _used(
                library, name, getattr(totals, name), limit, library.place_at(totals.scenario, totals.batch_size)
            )
    lines += _used(library, "parameters", choice.parameters, limits.get("parameters"), 0)
    return "\n".join(lines)


def _in_unit(objective: float, choice: "JointChoice", minimise: str) -> float:
    """An objective in the unit of the quantity: where most tokens per second are sought, it is the seconds of one."""
    return 1 / objective if _in_tokens(choice, minimise) and objective > 0 else objective


def _in_tokens(choice: "JointChoice", minimise: str) -> bool:
    """Whether an objective is the seconds of one token: not where the library does not say how many a request has."""
    return known_quantity(minimise).floor and all(found.tokens_per_second for found in choice.scenarios)


def _used(library: "JointLibrary", name: str, value: float | None, limit: Any, place: int) -> list[str]:
    """One total beside its limit, and how much of it lies outside the blocks."""
    if value is None:
        return []
    kind = known_quantity(name)
    unit, asked = "" if kind.unit == kind.title else f" {kind.unit}", ""
    if limit is not None:
        most = f"{100 * limit.asked:.10g}% of the parent's" if limit.share else f"{limit.asked:.10g}{unit}"
        asked = f", asked: {'at least' if kind.floor else 'at most'} {most}"
    outside = ""
    if at(library.fixed.get(kind.cost, 0.0), place) and not kind.floor:
        outside = f", {at(library.fixed[kind.cost], place):.6g} of it outside the blocks"
    return [f"{kind.title}  {value:.6g}{unit}{asked}{outside}"]


def _shown(label: str) -> str:
    return " ".join(label.split())


def _priced(price: "Price", choice: "JointChoice") -> str:
    moves = [
        f"{step}: " + ("nothing fits" if value is None else f"{value:.6f} ({value - choice.objective:+.6f})")
        for step, value in price.resolved.items()
    ]
    many = price.unit == "parameters" and not price.share
    near = price.unit == "nats per token"  # a nat is far more than any limit
    unit = "1 % of the parent's" if price.share else f"one {'million parameters' if many else price.unit}"
    unit = f"0.01 {price.unit}" if near else unit
    per_unit = price.per_unit * (0.01 if price.share or near else 1e6 if many else 1)
    moves += _without(price, choice)
    return (
        f"{price.budget}  {price.used / price.limit:.2%} used. If the budget were {unit} larger, the objective would "
        f"change by about {per_unit:+.3e} (an estimate by the LP relaxation). Solved again with other budgets: "
        f"{', '.join(moves)}"
    )


def _without(price: "Price", choice: "JointChoice") -> list[str]:
    """What a limit on the KL of a capability costs, in words."""
    if price.without is None:
        return []
    said = f"without it: {price.without:.6f} ({price.without - choice.objective:+.6f})"
    if price.speed is not None:
        said += f", or at this objective {price.speed:+.1%} tokens a second"
    return [said]


def _sure(found: "Confidence") -> str:
    lines = [
        f"objective  {found.objective:.6f}, 90 % of the draws {found.low:.6f} to {found.high:.6f}",
        f"regret  {found.regret:.2%} above the draw's own best on average; within 1 % in "
        f"{found.within_1_percent:.0%} of {found.draws} draws over {found.sequences} sequences",
        f"optimism  a choice scores {found.optimism:+.1%} on sequences that did not help to choose it",
        f"agreement  {found.agreement:.0%} +- {found.agreement_se:.1%} of the layers' choices recur on average",
        f"draws  {found.draws}; no more, because {found.stopped}",
    ]
    width = max(len(layer) for layer in found.chosen)
    for layer, label in found.chosen.items():
        shares = found.recurrence[layer]
        others = [f"{share:.0%} {_shown(other)}" for other, share in shares.items() if other != label][:2]
        beside = f"   else {', '.join(others)}" if others else ""
        lines.append(f"{layer:<{width}}  {shares.get(label, 0.0):4.0%}  {_shown(label)}{beside}")
    return "\n".join(lines)


def commands() -> Sequence[tuple[str, Any]]:
    """Name and function of every command here."""
    return (
        ("choose", choose_command),
        ("explain", explain_command),
        ("sweep", sweep_command),
        ("confidence", confidence_command),
    )
