"""`puzzle doctor`: is this machine ready, and what to do where it is not."""

import json
from pathlib import Path
from typing import Annotated

import typer

MARKS = {"ok": "ok   ", "warn": "warn ", "wrong": "WRONG"}


def doctor_command(
    workspace: Annotated[
        Path, typer.Option("--workspace", metavar="DIR", help="the workspace, or where workspaces will be")
    ] = Path("workspace"),
    as_json: Annotated[bool, typer.Option("--json", help="a list of objects")] = False,
) -> None:
    """Check versions, disk, memory, threads, write access, servers, stores and GPU. Exit code 1 if a run would fail."""
    from tasks.operating.doctor import examine

    found = examine(workspace)
    if as_json:
        typer.echo(json.dumps([finding.model_dump() for finding in found], indent=1))
    else:
        for finding in found:
            typer.echo(f"{MARKS[finding.status]} {finding.name:<15} {finding.detail}")
            if finding.todo:
                typer.echo(f"{'':<21} -> {finding.todo}")
    if any(finding.status == "wrong" for finding in found):
        raise typer.Exit(1)
