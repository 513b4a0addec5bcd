"""`puzzle export | bench`: a finished child in the formats of engines, and its speed in them beside its parent's."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from blocks.errors import PuzzleError
from blocks.runtime import configure
from flows.in_workspace import run_logged
from tasks.running.progress import clock, say, shown, wide_console

ChildPath = Annotated[
    Path, typer.Argument(metavar="CHILD", help="a child's folder (a parent's will do), or a .gguf file")
]
PRECISION = "f32, f16, bf16; q8_0 in GGUF and llama.cpp"
Precision = Annotated[str, typer.Option("--precision", help=PRECISION)]


def export_command(
    child: ChildPath,
    form: Annotated[str, typer.Option("--format", help="gguf, nemotron-nas, transformers or native")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="the file (gguf) or folder to write")],
    precision: Annotated[str | None, typer.Option("--precision", help=f"{PRECISION} [the child's own]")] = None,
    tokenizer_from: Annotated[
        Path | None,
        typer.Option("--tokenizer-from", metavar="GGUF", help="copy the tokenizer of this GGUF file; none: write none"),
    ] = None,
) -> None:
    """Write a child for an engine, and check that the engine gives the same logits and tokens."""
    _quiet()
    from tasks.export.formats import export_as

    child.exists()  # a name that no file can have is the caller's mistake, no failure of the export
    started = time.monotonic()

    def step(text: str) -> None:
        typer.echo(f"{clock(time.monotonic() - started)}  {text}", err=True)

    def export() -> None:
        done = export_as(child, form, precision, out, tokenizer_from, step)
        for note in done.notes:
            say(note)
        typer.echo(f"{form}: {done.path.resolve()}")

    _logged(out.resolve().parent, export)


def _logged(beside: Path, work: Callable[[], None]) -> None:
    """Work, of which a failure is one sentence: the traceback goes to puzzle.log in this folder, or the next one above
    that can be written to.
    """
    log = next(_logs((beside, *beside.parents, Path(tempfile.gettempdir()))))

    def told() -> str:
        work()
        return ""

    try:
        run_logged(log.parent, told)
    finally:
        if log.is_file() and not log.stat().st_size:
            log.unlink(missing_ok=True)


def _logs(folders: Sequence[Path]) -> Iterator[Path]:
    """A puzzle.log in each of the folders that lets one be written."""
    for folder in folders:
        with suppress(OSError), (folder / "puzzle.log").open("a"):
            yield folder / "puzzle.log"


def bench_command(
    child: ChildPath,
    engine: Annotated[str, typer.Option("--engine", help="torch, llama.cpp or vllm")] = "torch",
    parent: Annotated[
        Path | None, typer.Option("--parent", metavar="PATH", help="folder or .gguf [the parent of the child's run]")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option("--load", metavar="BxPxG", help="batch x prompt x generated tokens [1x256x64]")
    ] = None,
    precision: Precision = "f32",
    rounds: Annotated[int, typer.Option(min=1, help="turns of each model, interleaved")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="PNG", help="draw the figures")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the rows as a list")] = False,
    server: Annotated[
        str | None, typer.Option("--server", help="llama.cpp or vllm: serve both on loopback, put load on them")
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option("--url", help="a server that runs already: the child's, or parent's then child's"),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="of each model in a round, with --server or --url")] = 8,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="R,R", help="also at so many arrivals a second, by chance: 0.5,1,2")
    ] = None,
    max_ttft: Annotated[
        float | None, typer.Option("--max-ttft", min=0.001, metavar="MS", help="good: first token within MS")
    ] = None,
    max_tpot: Annotated[
        float | None, typer.Option("--max-tpot", min=0.001, metavar="MS", help="good: MS between output tokens at most")
    ] = None,
) -> None:
    """Parent and child in turns under the same load: prefill, decode, memory, gains of pairs."""
    _quiet()
    from tasks.engines.registry import installed_engine
    from tasks.engines.throughput import PARENT
    from tasks.measure.bench import CHILD, Point

    installed_engine(engine)
    sources = (
        {CHILD: child} if url is not None and len(url) == 1 else {PARENT: parent or _parent_of(child), CHILD: child}
    )
    points = [Point.parse(text) for text in load or ["1x256x64"]]
    if picture is not None:
        _check_picture(picture)
    if server is not None or url:
        from tasks.loadtest.arrivals import Limits, rates_of
        from tasks.loadtest.serving_load import LoadPlan

        plan = LoadPlan(
            server=server,
            urls=tuple(url or ()),
            points=tuple(points),
            precision=precision,
            rounds=rounds,
            threads=threads,
            requests=requests,
            rates=() if rate is None else rates_of(rate),
            limits=Limits(first_token_ms=max_ttft, output_token_ms=max_tpot),
        )
        _logged(Path.cwd(), lambda: _bench_servers(sources, plan, picture, as_json))
        return
    if rate is not None or max_ttft is not None or max_tpot is not None:
        raise PuzzleError("--rate, --max-ttft and --max-tpot are of a load on servers: give --server or --url too.")
    how = {"precision": precision, "rounds": rounds, "threads": threads}
    _logged(Path.cwd(), lambda: _bench_engine(sources, engine, points, how, picture, as_json))


def _bench_engine(
    sources: dict[str, Path], engine: str, points: list[Any], how: dict[str, Any], picture: Path | None, as_json: bool
) -> None:
    from tasks.loadtest.bench_table import bench_table, draw_bench
    from tasks.measure.bench import bench
    from tasks.running.devices import alone

    with alone("bench"), shown("bench", beside=True) as tell:
        rows = bench(sources, engine, points, tell=tell, **how)
    if picture is not None:
        draw_bench(rows).savefig(picture)
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=1))
    else:
        wide_console().print(bench_table(rows))


def _bench_servers(sources: dict[str, Path], plan: Any, picture: Path | None, as_json: bool) -> None:
    from tasks.loadtest.load_table import draw_load, failures_told, load_table
    from tasks.loadtest.serving_load import bench_servers
    from tasks.running.devices import alone

    if plan.rates:
        least = plan.seconds(len(plan.urls) or len(sources))
        typer.echo(f"load: the arrivals alone take {clock(least)} (requests x rounds / rate, each model)", err=True)
    here = nullcontext() if plan.urls else alone("load")
    with here, shown("load", beside=True) as tell:
        rows = bench_servers(sources, plan, tell)
    if picture is not None:
        draw_load(rows).savefig(picture)
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=1))
        return
    wide_console().print(load_table(rows, plan.limits))
    for sentence in failures_told(rows):
        say(sentence)


def _check_picture(file: Path) -> None:
    """PuzzleError, before anything is measured, for a picture that could not be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix and file.suffix[1:].lower() not in kinds:
        raise PuzzleError(f"--picture {file} is no picture: let its name end in one of {', '.join(sorted(kinds))}.")
    if not file.parent.is_dir():
        raise PuzzleError(f"--picture {file}: there is no folder {file.parent}.")


def _quiet() -> None:
    """Settings of the process; transformers' own bars off, ours tell the stage."""
    configure()
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _parent_of(child: Path) -> Path:
    from tasks.inputs.children import origin_of

    folder = origin_of(child).parent_folder
    if folder is None:
        raise PuzzleError(f"no run's report lies beside {child}, so its parent is not known: name it with --parent.")
    return folder


def commands() -> Sequence[tuple[str, Any]]:
    """Name and function of every command here."""
    return (("export", export_command), ("bench", bench_command))
