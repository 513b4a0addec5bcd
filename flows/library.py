"""`puzzle library show`: what a block library holds, ours or others'; no model, no GPU, no Prefect."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tasks.libraries.summary import Share, Span, Summary

app = typer.Typer(no_args_is_help=True, help=__doc__)
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="a workspace, a folder in the open format, NVlabs' block_library.json, or a puzzle_dir of puzzletron",
    ),
]


@app.command("show")
def show_command(source: Source, as_json: Annotated[bool, typer.Option("--json", help="one object")] = False) -> None:
    """What a library holds: layers, variants, scores, costs at every scenario, and what is missing."""
    from tasks.libraries.summary import summarise

    found = summarise(source)
    typer.echo(found.model_dump_json(indent=1) if as_json else _page(found))


def _page(found: "Summary") -> str:
    lines = [
        f"library   {found.path}",
        f"source    {found.source}",
        f"parent    {found.parent or 'not named'}",
        f"layers    {found.layers}, each with {found.per_layer} variants of its block; {found.options} in all, "
        f"{found.labels} different labels",
        f"hardware  {found.measured_on}",
        f"{'score':<36} {'least':>12} {'median':>12} {'largest':>12} {'largest se':>12} {'sequences':>10}",
    ]
    lines += [_scored(metric, span) for metric, span in found.scores.items()]
    for place, shares in found.costs.items():
        lines.append(f"{place:<36} {'parent':>16} {'cheapest child':>16} {'outside blocks':>16}")
        lines += [_costs(name, share) for name, share in shares.items()]
    lines += [f"missing   {what}" for what in found.missing]
    return "\n".join(lines)


def _scored(metric: str, span: "Span") -> str:
    error = "-" if span.se is None else f"{span.se:.3g}"
    figures = f"{span.least:>12.5g} {span.median:>12.5g} {span.largest:>12.5g} {error:>12}"
    return f"  {metric:<34} {figures} {span.sequences or '-':>10}"


def _costs(name: str, share: "Share") -> str:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}" if share.unit != "parameters" else f"{value:,.0f}"

    columns = (share.parent, share.cheapest_child, share.outside_blocks)
    return f"  {f'{name}, {share.unit}':<34} {' '.join(f'{figure(value):>16}' for value in columns)}"
