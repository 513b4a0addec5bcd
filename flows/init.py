"""`puzzle init | schema`: a first profile for a parent and text of one's own, and the profile's schema for editors."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer

from blocks.errors import PuzzleError
from blocks.files import atomic_path
from blocks.runtime import configure
from profiles.load import load_profile
from profiles.schema import EngineName

ValueT = TypeVar("ValueT")


def init_command(
    parent: Annotated[
        str | None,
        typer.Option("--parent", metavar="PARENT", help="a folder, a .gguf file, PACKAGE:FILE, owner/name on the hub"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="a file or folder of text, jsonl or parquet, a data set owner/name on the hub, wikipedia_dump, "
            "python_stdlib",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="N%|FIELD=N", help="of the layers' parameters, or e.g. speedup=1.3 [70%]"),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help=f"the engine that will serve it: {', '.join(get_args(EngineName))} [torch]"),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="of the profile and its workspace [the parent's]")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="the profile [NAME.yaml]")] = None,
) -> None:
    """Write a commented profile that runs: for this parent, and sized to this text. Asks for what is not given."""
    configure()
    from tasks.inputs import first_profile as first
    from tasks.operating.requirements import check_profile

    source = _answered(
        "--parent", parent, "Parent (folder, .gguf file, owner/name on the hub)", None, first.read_parent
    )
    corpus = _answered("--text", text, "Text (file or folder, data set owner/name)", None, first.read_text)
    limits = _answered(
        "--budget", budget, "Budget (share of the layers' parameters, or speedup=1.3)", "70%", first.read_budget
    )
    serves = _answered(
        "--engine", engine, f"Engine that serves ({', '.join(get_args(EngineName))})", "torch", first.read_engine
    )
    usual = first.read_name(Path(getattr(source, "path", "") or getattr(source, "hub_id", "") or source.kind).stem)
    called = _answered("--name", name, "Name of profile and workspace", usual, first.read_name)
    file = out or Path(f"{called}.yaml")
    if file.exists():
        raise PuzzleError(f"{file} exists already: name another with --out.")
    written = first.first_profile(first.Wish(name=called, parent=source, source=corpus, budget=limits, engine=serves))
    with atomic_path(file) as place:
        place.write_text(written, encoding="utf-8")
        for line in check_profile(load_profile(place))[0]:
            typer.echo(line, err=True)
    typer.echo(f"wrote {file}. Next:\n  puzzle plan {file}\n  puzzle optimize {file}")


def _answered(
    option: str, given: str | None, question: str, usual: str | None, read: Callable[[str], ValueT]
) -> ValueT:
    """What an option says, else what a person answers, asked again until it can be read."""
    if given is not None:
        return read(given)
    if not sys.stdin.isatty():
        if usual is None:
            raise PuzzleError(f"{option} is missing, and nobody is at the console to be asked.")
        return read(usual)
    while True:
        try:
            return read(typer.prompt(question, default=usual))
        except PuzzleError as error:
            typer.echo(str(error), err=True)


def schema_command(
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="the file [standard output]")] = None,
) -> None:
    """The JSON schema of a profile: editors complete its keys and mark mistakes."""
    from profiles.editor_schema import editor_schema

    text = json.dumps(editor_schema(), indent=1)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")
    line = f"# yaml-language-server: $schema={out or 'FILE'}"
    typer.echo(f"put this line on top of a profile, the path as seen from it:\n{line}", err=True)


def commands() -> Sequence[tuple[str, Any]]:
    """Name and function of every command here."""
    return (("init", init_command), ("schema", schema_command))
