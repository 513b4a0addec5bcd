"""`puzzle plan`: what a run will take and what its budget allows, before anything is spent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blocks.errors import InfeasibleBudget, PuzzleError
from blocks.runtime import configure
from flows.options import Overrides, ProfilePath
from profiles.hardware import shipped_targets
from profiles.load import load_profile
from tasks.running.progress import clock

if TYPE_CHECKING:
    from tasks.planning.plan import ChildPlan, Plan, StagePlan


def plan_command(
    profile: ProfilePath,
    set_: Overrides = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            metavar="TARGET",
            help=f"plan the run on a hardware target: {', '.join(shipped_targets())}, or a YAML file [this machine]",
        ),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, help="money for one hour of the machine")
    ] = None,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="measure this machine, even if it was within the last day")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one object with every figure")] = False,
) -> None:
    """Search space, tasks, time per stage, disk, memory, money, and what the budget allows; from the config alone."""
    wanted = load_profile(profile, set_ or [])
    configure()
    from tasks.planning.machine import rates_for
    from tasks.planning.memory import NoRoom
    from tasks.planning.plan import config_parent, machine_rates, plan_of

    parent, rates = None, machine_rates(wanted, on)
    if rates is None:
        from tasks.operating.requirements import check_profile

        doubts, parent = check_profile(wanted)
        for line in doubts:
            typer.echo(line, err=True)
    parent = parent or config_parent(wanted.parent)
    if rates is None:
        if wanted.hardware.device != "cpu":
            raise PuzzleError(
                f"only the CPU of this machine can be measured, the profile computes on {wanted.hardware.device}: name "
                "a hardware target with --on, for example --on h100."
            )
        rates = rates_for(wanted, parent, again=remeasure)
    plan = plan_of(wanted, parent, rates, price_per_hour)
    typer.echo(
        plan.model_dump_json(indent=1, exclude={"children": {"__all__": {"layers"}}}) if as_json else plan_text(plan)
    )
    if plan.infeasible:
        raise InfeasibleBudget(f"{plan.infeasible} Times are modelled, parameters and memory are exact.")
    if plan.no_room:
        raise NoRoom(plan.no_room)


def plan_text(plan: "Plan") -> str:
    """The plan as text."""
    lines = [
        f"parent    {count_of(plan.parent_parameters)} parameters{_active(plan)}, {plan.layers} layers",
        f"search    {plan.attention_variants} attention x {plan.ffn_variants} FFN variants in {plan.layers_searched} "
        f"layers: 10^{plan.architectures_log10:.1f} architectures from {plan.blocks} distilled blocks",
        *(f"left out  {sentence}" for sentence in plan.left_out),
        f"machine   {_machine(plan)}",
        f"disk      {bytes_of(plan.disk_bytes)} in the workspace at the end",
        *(_shards(plan) if plan.shard_bytes else ()),
        f"memory    {bytes_of(plan.memory_bytes)} at the peak",
        "",
        f"{'stage':<18} {'tasks':>6} {'tokens':>9} {'FLOPs':>9} {'devices':>8} {'bytes of each':>13} {'time':>9}",
    ]
    lines += [_stage(stage) for stage in plan.stages]
    missing = [s.name for s in plan.stages if s.seconds is None]
    flops = sum(stage.flops or 0 for stage in plan.stages)
    lines += [f"{'all':<18} {plan.tasks:>6} {count_of(plan.tokens):>9} {flops:>9.2e} {_clock(plan.seconds):>32}", ""]
    if plan.utilisation:
        lines.append(f"products at {plan.utilisation}")
    cost = "" if plan.money is None else f", {plan.money:,.2f} at the given price"
    lines.append(f"{plan.seconds / 3600:.2f} hours, {plan.core_hours:.2f} core- or device-hours{cost}")
    if missing:
        lines.append(f"not counted: {', '.join(missing)}; {plan.unknown}")
    modelled = plan.costs_of
    lines += [
        "",
        f"children  times are modelled (roofline: {modelled['name']}, {modelled['precision']}, {modelled['rates']})",
    ]
    for child in plan.children:
        lines += _child(child, plan.parent_parameters)
    return "\n".join(lines)


def _shards(plan: "Plan") -> Sequence[str]:
    return (f"shards    {plan.shards}, one after another: {bytes_of(plan.shard_bytes)} of hidden states on the disk",)


def _stage(stage: "StagePlan") -> str:
    tokens = count_of(stage.tokens) if stage.tokens else ""
    flops = f"{stage.flops:.2e}" if stage.flops else ""
    held = bytes_of(stage.device_bytes) if stage.device_bytes else ""
    return (
        f"{stage.name:<18} {stage.tasks:>6} {tokens:>9} {flops:>9} {stage.devices:>8} {held:>13} "
        f"{_clock(stage.seconds):>9}"
    )


def _machine(plan: "Plan") -> str:
    if not plan.machine_measured:
        room = "" if plan.device_bytes is None else f", {bytes_of(plan.device_bytes)} each"
        return f"{plan.devices} x {plan.machine}, by its data sheet and achievable shares{room}"
    load = (
        "; others are busy on it: rates from CPU time, the plan is for the idle machine" if plan.machine_loaded else ""
    )
    return f"this machine with {plan.threads} threads, measured {plan.machine_at}{load}"


def count_of(number: int) -> str:
    """19.5 k, 134.5 M, 70.6 B."""
    size, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " k")) if number >= s), (1, ""))
    return f"{number / size:,.1f}{unit}" if unit else f"{number:,}"


def bytes_of(number: float) -> str:
    """1.2 MiB, 14.0 GiB."""
    size, unit = next(((s, u) for s, u in ((2**30, "GiB"), (2**20, "MiB")) if number >= s), (2**10, "KiB"))
    return f"{number / size:,.1f} {unit}"


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else clock(seconds)


def _active(plan: "Plan") -> str:
    """Of a parent with experts: how many of its parameters a token is computed with."""
    fewer = plan.active_parameters < plan.parent_parameters
    return f", {count_of(plan.active_parameters)} of them for each token" if fewer else ""


def _child(child: "ChildPlan", parent_parameters: int) -> list[str]:
    share = child.parameters / parent_parameters
    lines = [f"  {child.name}: {count_of(child.parameters)} parameters ({share:.1%} of the parent's)"]
    for own, parent in zip(child.totals, child.parent_totals, strict=True):
        lines.append(
            f"    {own.scenario}, batch {own.batch_size}: memory {own.memory_bytes / 2**30:.4g} GiB "
            f"({own.memory_bytes / parent.memory_bytes:.1%}), {own.tokens_per_second:,.0f} tokens/s "
            f"({parent.runtime_seconds / own.runtime_seconds:.2f}x)"
        )
    return lines


def commands() -> Sequence[tuple[str, Any]]:
    """Name and function of every command here."""
    return (("plan", plan_command),)
