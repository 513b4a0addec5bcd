"""`puzzle export | fuse | bench | loadtest`: a finished child in the formats of engines, and with FFNs fused; its speed
beside its parent's, in an engine and behind a server.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel
from rich.table import Table

from blocks.devices import on_device
from blocks.errors import PuzzleError
from blocks.runtime import configure
from flows.in_workspace import kept_in_mlflow, run_logged
from flows.options import Device, Threads, compute_on
from profiles.schema import KV_PRECISIONS, PRECISION_ALIASES
from tasks.running.progress import clock, say, shown, wide_console

if TYPE_CHECKING:
    from tasks.measure.bench import Point

ChildPath = Annotated[
    Path, typer.Argument(metavar="CHILD", help="a child's folder (a parent's will do), or a .gguf file")
]
PRECISION = "float32, float16 or bfloat16; q8_0 too for GGUF and llama.cpp"
CALIBRATION_SEQUENCES, CALIBRATION_TOKENS = 128, 256
Precision = Annotated[str, typer.Option("--precision", help=PRECISION)]
CACHE = f"of the KV cache, with llama.cpp alone: {', '.join(KV_PRECISIONS['llama.cpp'])}"


def export_command(
    child: Annotated[
        Path,
        typer.Argument(
            metavar="CHILD",
            help="a child's folder (a parent's will do), a .gguf file, or a folder below gkd/ of a workspace: the "
            "child of a GKD that is at work, at its last checkpoint",
        ),
    ],
    form: Annotated[str, typer.Option("--format", help="gguf, nemotron-nas, vllm-plugin, transformers or native")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="the file (gguf) or folder to write")],
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help=f"{PRECISION}; GGUF alone: q5_1, q5_0, q4_1, q4_0, iq4_nl; folders alone: w4a16, w8a8 [the child's "
            "own]",
        ),
    ] = None,
    tokenizer_from: Annotated[
        Path | None,
        typer.Option("--tokenizer-from", metavar="GGUF", help="copy the tokenizer of this GGUF file; none: write none"),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="text that 4 and 5 bits, w4a16 and w8a8 are fitted to [the run's corpus]",
        ),
    ] = None,
) -> None:
    """Write a child for an engine, and check that the engine gives the same logits and tokens."""
    _quiet()
    from tasks.export.formats import export_as

    child.exists()  # a name that no file can have is the caller's mistake, no failure of the export
    step = _steps()

    def export() -> None:
        with _at_its_checkpoint(child, step) as folder:
            done = export_as(
                folder, form, precision, out, tokenizer_from, step, lambda: _calibration(folder, calibrate)
            )
        for note in done.notes:
            say(note)
        typer.echo(f"{form}: {done.path.resolve()}")

    _logged(out.resolve().parent, export)


def fuse_command(
    child: Annotated[Path, typer.Argument(metavar="CHILD", help="a child's folder")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="the folder to write [CHILD-fused, beside it]")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", metavar="A-B", help="one FFN for those of layers A to B [all that can be fused]"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="what the two are compared on [the test text of the child's run]"),
    ] = None,
    sequences: Annotated[
        int, typer.Option("--sequences", min=2, help="of the test text at most; of FILE so many, of 256 tokens each")
    ] = 64,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Run FFNs without an attention between them beside each other, as one wide FFN, and print what that costs."""
    _quiet()
    from tasks.evaluate.fusion import fuse_child, fusible, fusion_text

    target = out or child.resolve().with_name(f"{child.resolve().name}-fused")
    runs, compute = fusible(child, target, layers or ()), compute_on(device, threads)

    def fuse() -> None:
        read = fusion_text(child, sequences, text)
        with on_device((device,)):
            done = fuse_child(child, runs, target, read, compute, _steps())
        for note in done.notes:
            say(note)
        typer.echo(f"child: {done.path.resolve()}")

    _logged(target.resolve().parent, fuse)


def _steps() -> Callable[[str], None]:
    """Prints a sentence before each part of a work that takes long, with the time since now."""
    started = time.monotonic()
    return lambda text: typer.echo(f"{clock(time.monotonic() - started)}  {text}", err=True)


@contextmanager
def _at_its_checkpoint(child: Path, step: Callable[[str], None]) -> Iterator[Path]:
    """The folder of a child, or for the length of the block one that is written from a checkpoint of GKD."""
    from tasks.distill.gkd_job import open_checkpoint

    found = open_checkpoint(child)
    if found is None:
        yield child
        return
    from blocks.parent import Parent
    from tasks.export.folder import export_folder
    from tasks.inputs.children import in_precision

    course, parent = found.course, found.workspace / found.job.record.parent.folder
    what = f"step {course.best_step} of {found.job.settings.steps}, validation KL {course.best_kl:.4f}"
    step(f"the child at {what}, the best until checkpoint {course.step}")
    with tempfile.TemporaryDirectory() as folder:
        model = in_precision(found.model(), Parent(parent).dtype)
        yield export_folder(model, parent, Path(folder) / "child", f"# A child within its GKD: {what}\n")


def _calibration(child: Path, text: Path | None) -> Any:
    """Tokens (S, T) of the text that an export is fitted to: the file named, or the corpus of the run that made the
    child. None without either.
    """
    from blocks.library import read_tensors, read_value
    from tasks.evaluate.compare import LINEAGE, Lineage
    from tasks.export.child_tokenizer import open_tokenizer
    from tasks.inputs.corpus import refuse_images, tokens_of_file

    if text is not None:
        tokenizer = open_tokenizer(child)
        if tokenizer is None:
            raise PuzzleError(f"--calibrate needs the tokenizer of the child, and none lies in {child}.")
        return tokens_of_file(text, tokenizer, CALIBRATION_SEQUENCES, CALIBRATION_TOKENS)
    lineage = child.resolve().parent / LINEAGE
    if not lineage.is_file():
        return None
    corpus = read_value(lineage, Lineage).corpus
    refuse_images(corpus, "name a text with --calibrate FILE: types of numbers are fitted to words here")
    return read_tensors(lineage.parents[2], corpus.tokens, ["train"])["train"][:CALIBRATION_SEQUENCES].long()


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


Parent = Annotated[
    Path | None, typer.Option("--parent", metavar="PATH", help="folder or .gguf [the parent of the child's run]")
]
Loads = Annotated[
    list[str] | None, typer.Option("--load", metavar="BxPxG", help="batch x prompt x generated tokens [1x256x64]")
]
Rounds = Annotated[int, typer.Option(min=1, help="turns of each model, interleaved")]
AsJson = Annotated[bool, typer.Option("--json", help="the rows as a list")]
DEFAULT_LOAD = "1x256x64"


def bench_command(
    child: ChildPath,
    engine: Annotated[str, typer.Option("--engine", help="torch, llama.cpp, vllm or vllm-plugin")] = "torch",
    parent: Parent = None,
    load: Loads = None,
    precision: Precision = "float32",
    kv_precision: Annotated[str | None, typer.Option("--kv-precision", help=f"{CACHE} [float16]")] = None,
    rounds: Rounds = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Parent and child in one engine, in turns under the same load: prefill, decode, memory, gains of pairs."""
    _quiet()
    from tasks.engines.base import LoadOptions
    from tasks.engines.registry import installed_engine
    from tasks.loadtest.bench_table import bench_table
    from tasks.measure.bench import Point, bench, doubts_of
    from tasks.running.devices import alone

    installed_engine(engine)
    how = LoadOptions(precision=precision, threads=threads, kv_precision=_cache_named(kv_precision, engine))
    sources = _parent_and_child(child, parent)
    points = [Point.parse(text) for text in load or ()] or [_usual_load(sources)]

    def measure() -> None:
        with alone("bench"), shown("bench", beside=True) as report:
            rows = bench(sources, engine, points, how, rounds, report)
        doubts = doubts_of(rows)
        _show(rows, lambda: bench_table(rows), as_json, doubts)
        from tasks.operating.study_runs import log_bench  # loads MLflow, which is not to be in what was measured

        kept_in_mlflow(lambda: log_bench(child, rows, doubts))

    _logged(Path.cwd(), measure)


def loadtest_command(
    child: ChildPath,
    server: Annotated[
        str | None, typer.Option("--server", help="llama.cpp, vllm or vllm-plugin: serve parent and child on loopback")
    ] = None,
    url: Annotated[
        list[str] | None,
        typer.Option("--url", help="a server that runs already: the child's, or the parent's and then the child's"),
    ] = None,
    parent: Parent = None,
    load: Loads = None,
    precision: Annotated[str | None, typer.Option("--precision", help=f"{PRECISION} [f32]; with --server")] = None,
    kv_precision: Annotated[
        str | None, typer.Option("--kv-precision", help=f"{CACHE} [float16]; with --server")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of each server [1]; with --server")] = None,
    rounds: Rounds = 5,
    requests: Annotated[int, typer.Option(min=1, help="of each model in a round")] = 8,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="R,R", help="also at so many arrivals a second, by chance: 0.5,1,2")
    ] = None,
    max_first: Annotated[
        float | None,
        typer.Option("--max-time-to-first-token-seconds", min=1e-6, metavar="S", help="good: first token within S"),
    ] = None,
    max_output: Annotated[
        float | None,
        typer.Option("--max-output-token-seconds", min=1e-6, metavar="S", help="good: S between output tokens at most"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Parent and child behind OpenAI-style servers, in turns under the same requests: latency, throughput, failures."""
    _quiet()
    from tasks.loadtest.arrivals import Limits, rates_of
    from tasks.loadtest.load_table import doubts_of, failures_of, load_table
    from tasks.loadtest.serving_load import LoadPlan, bench_servers
    from tasks.measure.bench import CHILD, Point
    from tasks.running.devices import alone

    if server is None and not url:
        raise PuzzleError("name what is put under load: --server starts servers, --url names some that run already.")
    given = {"--parent": parent, "--precision": precision, "--threads": threads, "--kv-precision": kv_precision}
    unused = [name for name, value in given.items() if url and value is not None]
    if unused:
        raise PuzzleError(f"{unused[0]} is for servers that --server starts; those that --url names run already.")
    plan = LoadPlan(
        server=server,
        urls=tuple(url or ()),
        points=tuple(Point.parse(text) for text in load or ()),
        precision=precision or "float32",
        kv_precision=_cache_named(kv_precision, server),
        rounds=rounds,
        threads=threads or 1,
        requests=requests,
        rates=() if rate is None else rates_of(rate),
        limits=Limits(first_token_seconds=max_first, output_token_seconds=max_output),
    )
    sources = {CHILD: child} if url else _parent_and_child(child, parent)
    if not plan.points:
        plan = replace(plan, points=(_usual_load(sources),))

    def measure() -> None:
        if plan.rates:
            least = plan.seconds(len(plan.urls) or len(sources))
            typer.echo(f"load: the arrivals alone take {clock(least)} (requests x rounds / rate, each model)", err=True)
        with nullcontext() if plan.urls else alone("load"), shown("load", beside=True) as report:
            rows = bench_servers(sources, plan, report)
        _show(rows, lambda: load_table(rows, plan.limits), as_json, [*failures_of(rows), *doubts_of(rows)])

    _logged(Path.cwd(), measure)


def _cache_named(text: str | None, engine: str | None) -> str:
    """The type of number of the KV cache by its full name: llama.cpp's own, or the one that was named."""
    from tasks.engines.base import LoadOptions

    if text is None:
        return LoadOptions.kv_precision
    if engine != "llama.cpp":
        raise PuzzleError(f"--kv-precision is for llama.cpp alone, not for {engine}: leave it out.")
    return PRECISION_ALIASES.get(text.lower(), text.lower())


def _usual_load(sources: Mapping[str, Path]) -> "Point":
    """The load where none was asked for, shortened to what parent and child can take."""
    from tasks.measure.bench import Point, fitting

    usual = Point.parse(DEFAULT_LOAD)
    point = fitting(usual, sources.values())
    if point != usual:
        say(f"load {point.label} instead of {usual.label}, which is longer than the model's context")
    return point


def _parent_and_child(child: Path, parent: Path | None) -> dict[str, Path]:
    from blocks.records import PARENT
    from tasks.measure.bench import CHILD

    return {PARENT: parent or _parent_of(child), CHILD: child}


def _show(rows: Sequence[BaseModel], table: Callable[[], Table], as_json: bool, sentences: Sequence[str]) -> None:
    """The rows, and on stderr sentences about them: what was printed can be read by a program."""
    if as_json:
        typer.echo(json.dumps([row.model_dump() for row in rows], indent=1))
    else:
        wide_console().print(table())
    for sentence in sentences:
        typer.echo(f"Warning: {sentence}", err=True)


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
    return (
        ("export", export_command),
        ("fuse", fuse_command),
        ("bench", bench_command),
        ("loadtest", loadtest_command),
    )
