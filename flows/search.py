"""`puzzle choose | explain | sweep | confidence`: the search on a block library alone; no model, no GPU, no Prefect."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tasks.confidence import Confidence, bootstrap
from tasks.interchange import open_library
from tasks.joint import (
    BUDGETS,
    JointChoice,
    JointLibrary,
    LibraryFileError,
    Price,
    Request,
    choose_joint,
    prices,
    sweep,
)
from tasks.progress import shown
from tasks.sweeping import limits_between, request_for

LibraryPath = Annotated[
    Path,
    typer.Option(
        "--library", metavar="PATH", help="a workspace, a library in the open format, or NVlabs' block_library.json"
    ),
]
ScenarioName = Annotated[str | None, typer.Option("--scenario", help="of a library that has several [the first]")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="[the smallest that was measured]")]
Memory = Annotated[
    str | None, typer.Option("--memory-mib", metavar="N|N%", help="budget: MiB, or a share of the parent")
]
Runtime = Annotated[
    str | None, typer.Option("--runtime-ms", metavar="N|N%", help="budget: ms, or a share of the parent")
]
Params = Annotated[str | None, typer.Option("--num-params", metavar="N|N%", help="budget: parameters, or a share")]
Metric = Annotated[str, typer.Option("--metric", help="what is summed and minimised, e.g. kl_div or lm_loss")]
Robust = Annotated[float, typer.Option("--robust", help="minimise mean + this many standard errors of every score")]
Types = Annotated[int | None, typer.Option("--max-block-types", help="distinct variants in one architecture")]
Forbid = Annotated[
    list[str] | None, typer.Option("--forbid", metavar="LABEL_OR_KIND", help="e.g. no_op, attention=no_op, or a label")
]
Json = Annotated[bool, typer.Option("--json", help="one object, or a list when several were asked for")]


def choose_command(
    library: LibraryPath,
    memory_mib: Memory = None,
    runtime_ms: Runtime = None,
    num_params: Params = None,
    metric: Metric = "kl_div",
    robust: Robust = 0.0,
    diverse: Annotated[int, typer.Option("--diverse", help="how many architectures")] = 1,
    min_different: Annotated[
        int, typer.Option("--min-different", help="layers in which any two of them differ, at least")
    ] = 1,
    max_block_types: Types = None,
    forbid: Forbid = None,
    scenario: ScenarioName = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """The best architecture of a block library within your budgets, with its certificate."""
    opened = open_library(library, scenario, batch_size)
    request = request_for(
        opened,
        {"memory_mib": memory_mib, "runtime_ms": runtime_ms, "num_params": num_params},
        metric=metric,
        robust=robust,
        diverse=diverse,
        min_different=min_different,
        max_block_types=max_block_types,
        forbid=tuple(forbid or ()),
    )
    found = choose_joint(opened, request)
    if as_json:
        answers = [choice.model_dump() for choice in found]
        typer.echo(json.dumps(answers if diverse > 1 else answers[0], indent=1))
    else:
        typer.echo("\n\n".join(_told(choice, opened, request) for choice in found))
    if len(found) < diverse:
        typer.echo(f"no more than {len(found)} exist that differ in {min_different} layers", err=True)


def explain_command(
    library: LibraryPath,
    memory_mib: Memory = None,
    runtime_ms: Runtime = None,
    num_params: Params = None,
    metric: Metric = "kl_div",
    robust: Robust = 0.0,
    max_block_types: Types = None,
    forbid: Forbid = None,
    scenario: ScenarioName = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """What each budget costs: how much of it is used, its marginal price, the objective at 5 % less and more."""
    opened = open_library(library, scenario, batch_size)
    request = request_for(
        opened,
        {"memory_mib": memory_mib, "runtime_ms": runtime_ms, "num_params": num_params},
        metric=metric,
        robust=robust,
        max_block_types=max_block_types,
        forbid=tuple(forbid or ()),
    )
    (choice,) = choose_joint(opened, request)
    found = prices(opened, request)
    if as_json:
        typer.echo(json.dumps({**choice.model_dump(), "prices": [price.model_dump() for price in found]}, indent=1))
        return
    typer.echo(_summary(choice, opened, request))
    for price in found:
        typer.echo(_priced(price, choice))


def sweep_command(
    library: LibraryPath,
    over: Annotated[str, typer.Option(help=f"the budget to sweep: {', '.join(BUDGETS)}")] = "runtime_ms",
    points: Annotated[int, typer.Option(min=2, max=1000, help="limits between the cheapest child and the best")] = 20,
    memory_mib: Memory = None,
    runtime_ms: Runtime = None,
    num_params: Params = None,
    metric: Metric = "kl_div",
    scenario: ScenarioName = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """The Pareto front of the objective over one budget, the others kept."""
    name = over.replace("-", "_")
    if name not in BUDGETS:
        raise LibraryFileError(f"cannot sweep over {over!r}: it is one of {', '.join(BUDGETS)}.")
    opened = open_library(library, scenario, batch_size)
    limits = limits_between(opened, name, points)
    kept = {"memory_mib": memory_mib, "runtime_ms": runtime_ms, "num_params": num_params, name: str(limits[0])}
    request = request_for(opened, kept, metric=metric)
    with shown("sweep", beside=True) as tell:
        found = sweep(opened, request, name, limits, tell)
    if as_json:
        rows = [{"limit": at, **_or_infeasible(choice)} for at, choice in zip(limits, found, strict=True)]
        typer.echo(json.dumps(rows, indent=1))
        return
    typer.echo(f"{name:>14} {'objective':>14} {'memory_mib':>14} {'runtime_ms':>14}  status")
    for limit, choice in zip(limits, found, strict=True):
        figures = (
            f"{choice.objective:14.6f} {choice.memory_mib:14.1f} {choice.runtime_ms:14.1f}  {choice.status}"
            if choice
            else f"{'-':>14} {'-':>14} {'-':>14}  infeasible"
        )
        typer.echo(f"{limit:14.1f} {figures}")


def confidence_command(
    library: LibraryPath,
    memory_mib: Memory = None,
    runtime_ms: Runtime = None,
    num_params: Params = None,
    metric: Metric = "kl_div",
    robust: Robust = 0.0,
    draws: Annotated[int, typer.Option(min=2, max=100_000, help="bootstrap draws")] = 200,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_block_types: Types = None,
    forbid: Forbid = None,
    scenario: ScenarioName = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """How sure the choice is: the whole search again on resampled sequences, how often each layer's choice recurs."""
    opened = open_library(library, scenario, batch_size)
    request = request_for(
        opened,
        {"memory_mib": memory_mib, "runtime_ms": runtime_ms, "num_params": num_params},
        metric=metric,
        robust=robust,
        max_block_types=max_block_types,
        forbid=tuple(forbid or ()),
    )
    with shown("bootstrap", beside=True) as tell:
        found = bootstrap(opened, request, draws, seed, tell)
    typer.echo(found.model_dump_json(indent=1) if as_json else _sure(found, request))


def _or_infeasible(choice: JointChoice | None) -> dict[str, Any]:
    return {"status": "infeasible"} if choice is None else choice.model_dump()


def _told(choice: JointChoice, library: JointLibrary, request: Request) -> str:
    width = max(len(layer) for layer in choice.layers)
    rows = [f"{layer:<{width}}  {_shown(label)}" for layer, label in choice.layers.items()]
    return "\n".join([_summary(choice, library, request), *rows])


def _summary(choice: JointChoice, library: JointLibrary, request: Request) -> str:
    types = len(set(choice.layers.values()))
    what = f"{request.metric}, sum over {len(choice.layers)} layers"
    lines = [f"objective  {choice.objective:.6f} ({what}{f' + {request.robust:g} se' if request.robust else ''})"]
    if choice.score_se is not None:
        lines.append(f"score  {choice.score:.6f} +- {choice.score_se:.6f} (one standard error over sequences)")
    lines.append(f"certificate  {choice.status}, bound {choice.bound:.6f}, gap {choice.gap:.2e}; {types} block types")
    for name, unit in BUDGETS.items():
        value, limit = getattr(choice, name), request.budgets.get(name)
        if value is None:
            continue
        of = "" if limit is None else f" of {limit:.10g}"
        outside = f", {library.fixed[name]:.3f} of it outside the blocks" if name in library.fixed else ""
        lines.append(f"{name.removesuffix('_mib').removesuffix('_ms')}  {value:.3f}{of} {unit}{outside}")
    return "\n".join(lines)


def _shown(label: str) -> str:
    return " ".join(label.split())


def _priced(price: Price, choice: JointChoice) -> str:
    unit = {"MiB": "MiB", "ms": "ms", "parameters": "million parameters"}[BUDGETS[price.budget]]
    per_unit = price.per_unit * (1e6 if price.budget == "num_params" else 1)
    moves = [
        f"{step}: " + ("nothing fits" if value is None else f"{value:.6f} ({value - choice.objective:+.6f})")
        for step, value in price.resolved.items()
    ]
    share = price.used / price.limit
    return (
        f"{price.budget}  {share:.2%} used; one {unit} more changes the LP's bound by {per_unit:+.3e}; "
        f"solved again at {', '.join(moves)}"
    )


def _sure(found: Confidence, request: Request) -> str:
    lines = [
        f"objective  {found.objective:.6f}, 90 % of the draws {found.low:.6f} to {found.high:.6f}",
        f"regret  {found.regret:.2%} above the draw's own best on average; within 1 % in "
        f"{found.within_1_percent:.0%} of {found.draws} draws over {found.sequences} sequences",
        f"optimism  a choice scores {found.optimism:+.1%} on sequences that did not help to choose it",
        f"agreement  {found.agreement:.0%} of the layers' choices recur on average",
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
