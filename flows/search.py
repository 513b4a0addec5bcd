"""`puzzle choose | explain | sweep | confidence`: the search on a block library alone; no model, no GPU, no Prefect."""

import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from blocks.errors import PuzzleError
from profiles.schema import Search
from tasks.running.progress import shown
from tasks.search.joint import QUANTITIES, LibraryFileError, at, flag

if TYPE_CHECKING:
    from tasks.search.confidence import Confidence
    from tasks.search.joint import JointLibrary
    from tasks.search.request import Request
    from tasks.search.solve import JointChoice, PlaceTotals, Price

Budget = list[str] | None
AMOUNT = "N|N%|SCENARIO=N"


def _budget(name: str, what: str) -> Any:
    return typer.Option(flag(name), metavar=AMOUNT, help=f"budget: {what}, or a share of the parent's")


def asked(
    library: Annotated[
        Path,
        typer.Option(
            "--library", metavar="PATH", help="a workspace, a library in the open format, or NVlabs' block_library.json"
        ),
    ],
    memory_mib: Annotated[Budget, _budget("memory_mib", "weights + KV cache, MiB")] = None,
    runtime_ms: Annotated[Budget, _budget("runtime_ms", "latency of one batch, ms")] = None,
    ttft_ms: Annotated[Budget, _budget("ttft_ms", "time to first token, ms")] = None,
    tokens_per_second: Annotated[Budget, _budget("tokens_per_second", "throughput, at least")] = None,
    num_params: Annotated[Budget, _budget("num_params", "parameters")] = None,
    active_params: Annotated[Budget, _budget("active_params", "parameters that a token passes through")] = None,
    layer_params: Annotated[Budget, _budget("layer_params", "parameters of the layers alone")] = None,
    score: Annotated[str | None, typer.Option("--score", metavar="N", help="budget: the summed score")] = None,
    traffic: Annotated[
        list[str] | None,
        typer.Option("--traffic", metavar="SCENARIO=SHARE", help="times then hold for the mean request of this mix"),
    ] = None,
    scenario: Annotated[str | None, typer.Option("--scenario", help="this one alone [all of the library]")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="this one alone [the best]")] = None,
    metric: Annotated[str, typer.Option("--metric", help="what is summed and minimised, e.g. lm_loss")] = "kl_div",
    robust: Annotated[float, typer.Option("--robust", help="minimise mean + this many standard errors")] = 0.0,
    max_block_types: Annotated[
        int | None, typer.Option("--max-block-types", help="distinct variants in one architecture")
    ] = None,
    max_groups: Annotated[
        int | None, typer.Option("--max-groups", help="contiguous groups of layers with equal variants")
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option("--forbid", metavar="LABEL_OR_KIND", help="e.g. no_op, attention=no_op, or a label"),
    ] = None,
    keep: Annotated[
        list[int] | None, typer.Option("--keep", metavar="LAYER", help="a layer that stays as it is")
    ] = None,
    width_multiple: Annotated[int, typer.Option("--width-multiple", help="of every FFN width")] = 1,
    engine: Annotated[
        str | None, typer.Option("--engine", help="use only what it can run: llama.cpp, vllm, tensorrt-llm, sglang")
    ] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", help="seconds the solver may take, at most")] = 60.0,
) -> "tuple[JointLibrary, Request]":
    """What every command here is asked: a library, budgets, constraints."""
    values = dict(locals())
    from tasks.libraries.interchange import open_library
    from tasks.search.request import Request, limit_of

    opened = open_library(library, scenario, batch_size)
    found = [limit_of(name, text) for name in QUANTITIES for text in _listed(values[name])]
    try:
        search = Search(
            robust=robust,
            max_block_types=max_block_types,
            max_groups=max_groups,
            forbid=tuple(forbid or ()),
            keep_layers=tuple(keep or ()),
            width_multiple=width_multiple,
            engine=engine,  # type: ignore[arg-type]  # checked by pydantic
            time_limit_seconds=time_limit,
        )
        request = Request(limits=tuple(found), metric=metric, traffic=_traffic(traffic or []), search=search)
    except ValidationError as error:
        raise _refused(error) from None
    return opened, request


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _traffic(texts: Sequence[str]) -> dict[str, float]:
    shares = {}
    for text in texts:
        name, equals, share = text.partition("=")
        try:
            shares[name.strip()] = float(share.strip().removesuffix("%"))
        except ValueError:
            raise PuzzleError(f"--traffic: SCENARIO=SHARE, such as chat=0.7, not {text!r}.") from None
        if not 0 < shares[name.strip()] < math.inf:
            raise PuzzleError(f"--traffic: a finite share greater than 0, not {text!r}.")
    return shares


def _refused(error: ValidationError) -> PuzzleError:
    first = error.errors()[0]
    where = f"{flag(first['loc'][0])}: " if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    return PuzzleError(f"{where}{message[0].lower()}{message[1:]}.")


def with_request(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `asked`; it is called with the open library and the request."""
    shared = list(inspect.signature(asked).parameters.values())
    own = list(inspect.signature(command).parameters.values())[2:]

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        library, request = asked(**{one.name: values.pop(one.name) for one in shared})
        command(library, request, **values)

    told: Any = wrapped
    del told.__wrapped__
    told.__signature__ = inspect.Signature([*shared, *own])
    told.__annotations__ = {one.name: one.annotation for one in [*shared, *own]}
    return wrapped


Json = Annotated[bool, typer.Option("--json", help="one object, or a list when several were asked for")]


@with_request
def choose_command(
    library: "JointLibrary",
    request: "Request",
    diverse: Annotated[int, typer.Option("--diverse", help="how many architectures")] = 1,
    min_different: Annotated[
        int, typer.Option("--min-different", help="layers in which any two of them differ, at least")
    ] = 1,
    alpha: Annotated[
        float | None, typer.Option("--alpha", min=0, max=1, help="or: the largest share of layers two may have alike")
    ] = None,
    as_json: Json = False,
) -> None:
    """The best architecture of a block library within your budgets, with its certificate."""
    from tasks.search.request import Request
    from tasks.search.solve import choose_joint

    if alpha is not None:
        min_different = max(1, math.ceil((1 - alpha) * len(library.layers) - 1e-9))
    try:
        several = {"diverse": diverse, "min_different": min_different}
        request = Request(**{**request.model_dump(), **several})
    except ValidationError as error:
        raise _refused(error) from None
    found = choose_joint(library, request)
    if as_json:
        answers = [choice.model_dump() for choice in found]
        typer.echo(json.dumps(answers if diverse > 1 else answers[0], indent=1))
    else:
        typer.echo("\n\n".join(_told(choice, library, request) for choice in found))
    if len(found) < diverse:
        typer.echo(f"no more than {len(found)} exist that differ in {min_different} layers", err=True)


@with_request
def explain_command(library: "JointLibrary", request: "Request", as_json: Json = False) -> None:
    """What each budget costs: how much of it is used, its marginal price, the objective at 5 % less and more."""
    from tasks.search.solve import choose_joint, prices

    (choice,) = choose_joint(library, request)
    found = prices(library, request, choice)
    if as_json:
        typer.echo(json.dumps({**choice.model_dump(), "prices": [price.model_dump() for price in found]}, indent=1))
        return
    typer.echo(_summary(choice, library, request))
    for price in found:
        typer.echo(_priced(price, choice))


@with_request
def sweep_command(
    library: "JointLibrary",
    request: "Request",
    over: Annotated[str, typer.Option("--over", help=f"what is limited: {', '.join(QUANTITIES)}")] = "runtime_ms",
    minimise: Annotated[
        str, typer.Option("--minimise", help="what is minimised at each limit (throughput: maximised)")
    ] = "score",
    points: Annotated[int, typer.Option("--points", min=2, max=1000, help="limits along the front")] = 20,
    as_json: Json = False,
) -> None:
    """The Pareto front of any two of score, memory, throughput, latency ..., the other budgets kept."""
    from tasks.search.solve import front, front_values

    over, minimise = over.replace("-", "_"), minimise.replace("-", "_")
    unknown = [name for name in (over, minimise) if name not in QUANTITIES]
    if unknown or over == minimise:
        raise LibraryFileError(f"a front needs two different of {', '.join(QUANTITIES)}, not {over} and {minimise}.")
    request = request.model_copy(update={"minimise": minimise})
    values = front_values(library, request, over, points)
    with shown("sweep", beside=True) as tell:
        found = front(library, request, over, values, tell)
    if as_json:
        rows = [{"limit": at, **_or_infeasible(choice)} for at, choice in zip(values, found, strict=True)]
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(_row(over, "objective", "score", "memory_mib", "runtime_ms", "status"))
    for value, choice in zip(values, found, strict=True):
        figures = ("-", "-", "-", "-", "infeasible")
        if choice:
            figures = (
                f"{choice.objective:.6f}",
                f"{choice.score:.6f}",
                _figure(choice.memory_mib),
                _figure(choice.runtime_ms),
                choice.status,
            )
        typer.echo(_row(f"{value:.6g}", *figures))


@with_request
def confidence_command(
    library: "JointLibrary",
    request: "Request",
    draws: Annotated[int, typer.Option("--draws", min=2, max=100_000, help="bootstrap draws, at most")] = 200,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="time for them, at most")] = 120,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """How sure the choice is: the whole search again on resampled sequences, how often each layer's choice recurs."""
    from tasks.search.confidence import Draws, bootstrap

    with shown("bootstrap", beside=True) as tell:
        found = bootstrap(library, request, Draws(most=draws, seconds=seconds, seed=seed), tell)
    typer.echo(found.model_dump_json(indent=1) if as_json else _sure(found))


def _or_infeasible(choice: "JointChoice | None") -> dict[str, Any]:
    return {"status": "infeasible"} if choice is None else choice.model_dump()


def _row(*cells: str) -> str:
    return "".join(f"{cell:>15}" for cell in cells[:-1]) + f"  {cells[-1]}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _told(choice: "JointChoice", library: "JointLibrary", request: "Request") -> str:
    width = max(len(layer) for layer in choice.layers)
    rows = [f"{layer:<{width}}  {_shown(label)}" for layer, label in choice.layers.items()]
    return "\n".join([_summary(choice, library, request), *rows])


def _summary(choice: "JointChoice", library: "JointLibrary", request: "Request") -> str:
    types, robust = len(set(choice.layers.values())), request.search.robust
    what = f"{request.metric}, sum over {len(choice.layers)} layers"
    lines = [f"objective  {choice.objective:.6f} ({what}{f' + {robust:g} se' if robust else ''})"]
    if choice.score_se is not None:
        lines.append(f"score  {choice.score:.6f} +- {choice.score_se:.6f} (one standard error over sequences)")
    lines.append(f"certificate  {choice.status}, bound {choice.bound:.6f}, gap {choice.gap:.2e}; {types} block types")
    lines.append(f"solved by  {choice.solved_by}")
    limits = {limit.label: limit for limit in request.limits}
    for totals in choice.scenarios:
        if totals.scenario:
            lines.append(f"scenario  {totals.scenario}, batch {totals.batch_size}")
        for name in ("memory_mib", "runtime_ms", "ttft_ms", "tokens_per_second"):
            limit = limits.get(f"{name} of {totals.scenario}", limits.get(name))
            lines += _used(library, name, getattr(totals, name), limit, _place(library, totals))
    lines += _used(library, "num_params", choice.num_params, limits.get("num_params"), 0)
    return "\n".join(lines)


def _place(library: "JointLibrary", totals: "PlaceTotals") -> int:
    places = [(place.scenario, place.batch_size) for place in library.places]
    return places.index((totals.scenario, totals.batch_size))


def _used(library: "JointLibrary", name: str, value: float | None, limit: Any, place: int) -> list[str]:
    """One total beside its limit, and how much of it lies outside the blocks."""
    if value is None:
        return []
    kind = QUANTITIES[name]
    of = ""
    if limit is not None:
        of = f" of {100 * limit.asked:.10g}% of the parent's" if limit.share else f" of {limit.asked:.10g}"
    outside = ""
    if kind.cost in library.fixed and not kind.floor:
        outside = f", {at(library.fixed[kind.cost], place):.3f} of it outside the blocks"
    return [f"{name.removesuffix('_mib').removesuffix('_ms')}  {value:.3f}{of} {kind.unit}{outside}"]


def _shown(label: str) -> str:
    return " ".join(label.split())


def _priced(price: "Price", choice: "JointChoice") -> str:
    moves = [
        f"{step}: " + ("nothing fits" if value is None else f"{value:.6f} ({value - choice.objective:+.6f})")
        for step, value in price.resolved.items()
    ]
    many = price.budget.endswith("params") and not price.share
    unit = "one percent of the parent's" if price.share else f"one {'million parameters' if many else price.unit}"
    per_unit = price.per_unit * (0.01 if price.share else 1e6 if many else 1)
    return (
        f"{price.budget}  {price.used / price.limit:.2%} used; {unit} more changes the LP's bound by {per_unit:+.3e}; "
        f"solved again at {', '.join(moves)}"
    )


def _sure(found: "Confidence") -> str:
    lines = [
        f"objective  {found.objective:.6f}, 90 % of the draws {found.low:.6f} to {found.high:.6f}",
        f"regret  {found.regret:.2%} above the draw's own best on average; within 1 % in "
        f"{found.within_1_percent:.0%} of {found.draws} draws over {found.sequences} sequences",
        f"optimism  a choice scores {found.optimism:+.1%} on sequences that did not help to choose it",
        f"agreement  {found.agreement:.0%} +- {found.agreement_se:.1%} of the layers' choices recur on average",
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
