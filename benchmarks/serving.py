"""SmolLM2 and the child of a finished run on each engine that runs here: speed, memory, logits, prediction.

    .venv/bin/python -m benchmarks.serving --workspace workspace/smollm2-cpu [--costs]

Parent and child take turns in each engine, one thread, every figure in CPU time too: gains are of pairs.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import table, write_page
from blocks.library import read_value, write_value
from blocks.records import SUBBLOCKS, Architecture, ChildReport, Cost, CostTable, NonBlockCost, Totals, Value
from blocks.runtime import set_threads
from profiles.schema import Hardware, Measure, Scenario, SearchSpace
from tasks.bench import BenchRow, Point, bench
from tasks.children import config_of, open_child
from tasks.costs import measure_costs
from tasks.engines.limits import LIMITS, gaps
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.vllm_engine import Vllm, cannot
from tasks.formats import Difference, compare_logits, export_as
from tasks.gguf_import import read_gguf
from tasks.progress import say, shown

ValueT = TypeVar("ValueT", bound=Value)
CASES = ("torch:float32", "llama.cpp:float32", "llama.cpp:bfloat16", "llama.cpp:q8_0", "vllm:float32", "vllm:bfloat16")


class Measured(Value):
    """What one case gave, kept so that a run can be taken up again."""

    rows: tuple[BenchRow, ...]


class Logits(Value):
    """What one file's logits gave: cells of the table."""

    cells: tuple[str, ...]


def main() -> None:
    """Measure what is not kept yet, then write benchmarks/serving.md."""
    options = _options()
    set_threads(1)
    report = read_value(sorted(options.workspace.glob("runs/*/report.json"))[-1], ChildReport)
    sources = {"parent": options.workspace / report.parent.folder, "child": options.workspace / report.child_folder}
    cases = [tuple(case.split(":")) for case in options.cases]
    without = Vllm().missing() or cannot(config_of(sources["child"]))
    if without:
        say(f"no figures of vLLM: {without}")
        cases = [case for case in cases if case[0] != "vllm"]
    files = [(name, precision) for engine, precision in cases if engine == "llama.cpp" for name in sources]
    point = Point.parse(options.load)
    rows = [row for engine, precision in cases for row in _rows(options, sources, engine, precision, point).rows]
    logits = [_logits_of(options, sources, name, precision).cells for name, precision in files]
    costs = _once(options.keep / "costs.json", CostTable, lambda: _cost_table(options, report, point))
    parts = [_intro(report, sources["child"]), _speed(rows), _prediction(report, rows)]
    parts += [_costs(costs, report, rows), _logits(logits), _limits(sources["child"])]
    write_page("serving", "A child in the engines that serve it", parts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/smollm2-cpu"))
    parser.add_argument("--keep", type=Path, default=Path("workspace/serving"), help="files and figures are kept here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", default="1x256x64")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="ENGINE:PRECISION")
    return parser.parse_args()


def _once(path: Path, kind: type[ValueT], make: Callable[[], ValueT]) -> ValueT:
    """A kept value, made and kept where there is none."""
    if not path.is_file():
        write_value(path, make())
    return read_value(path, kind)


def _file(options: argparse.Namespace, sources: dict[str, Path], name: str, precision: str) -> Path:
    path: Path = options.keep / f"{name}.{precision}.gguf"
    if not path.is_file():
        for note in export_as(sources[name], "gguf", precision, path).notes:
            say(f"{path.name}: {note}")
    return path


def _rows(options: argparse.Namespace, sources: dict[str, Path], engine: str, precision: str, point: Point) -> Measured:
    def measure() -> Measured:
        own = sources
        if engine == "llama.cpp":
            own = {name: _file(options, sources, name, precision) for name in sources}
        with shown(f"{engine} {precision}") as tell:
            return Measured(rows=tuple(bench(own, engine, [point], precision, options.rounds, 1, tell)))

    return _once(options.keep / f"{engine}.{precision}.json", Measured, measure)


def _logits_of(options: argparse.Namespace, sources: dict[str, Path], name: str, precision: str) -> Logits:
    """llama.cpp beside torch on one file: exact, and as llama.cpp runs by default."""

    def measure() -> Logits:
        path = _file(options, sources, name, precision)
        model: Any = read_gguf(path)
        found = [compare_logits(model, path, 64, exact) for exact in (True, False)]
        return Logits(cells=(f"{name}, {precision}", f"{path.stat().st_size / 2**20:.0f}", *_differences(found)))

    return _once(options.keep / f"logits.{name}.{precision}.json", Logits, measure)


def _differences(found: Sequence[Difference]) -> list[str]:
    return [cell for one in found for cell in (f"{one.most:.1e}", f"{one.kl:.1e}", f"{one.agreement:.0%}")]


def _intro(report: ChildReport, child: Path) -> str:
    own = {candidate.stage: candidate for candidate in report.candidates if candidate.name in ("parent", "child")}
    sizes = f"{own['parent'].parameters / 1e6:.1f} M parameters, the child {own['assembled'].parameters / 1e6:.1f} M"
    return (
        f"Parent: {report.parent.name}, {sizes} ({child.parent.name}). One thread; other processes kept this machine "
        "busy, so gains are of pairs in one run (parent's time over child's, medians over the rounds with standard "
        "errors) and stand in CPU time as well. Memory is the process's peak less what it held before the load."
    )


def _speed(rows: Sequence[BenchRow]) -> str:
    header = ["engine", "model", "prefill tok/CPU s", "decode tok/CPU s"]
    header += ["prefill gain", "in CPU time", "decode gain", "in CPU time", "MiB"]
    first = rows[0]
    load = f"{first.batch_size} x {first.prompt_tokens} x {first.generated_tokens}"
    rounds = first.throughput.cpu_seconds.n
    lines = [_speed_cells(row) for row in rows]
    return f"## Speed\n\nLoad (batch x prompt x generated): {load}; {rounds} rounds.\n\n" + table(header, lines)


def _speed_cells(row: BenchRow) -> list[str]:
    cells = ["", "", "", ""]
    if row.gains is not None:
        found = (row.gains.prefill, row.gains.prefill_cpu, row.gains.decode, row.gains.decode_cpu)
        cells = [f"{gain.value:.2f} ±{gain.se:.2f}" for gain in found]
    prefill, decode = row.cpu_speeds()
    memory = f"{row.memory_bytes / 2**20:.0f}"
    return [f"{row.version}, {row.precision}", row.model, f"{prefill:.0f}", f"{decode:.1f}", *cells, memory]


def _gain(ours: Totals, theirs: Totals) -> tuple[float, float]:
    return (
        theirs.prefill_seconds / ours.prefill_seconds,
        theirs.decode_seconds_per_token / ours.decode_seconds_per_token,
    )


def _prediction(report: ChildReport, rows: Sequence[BenchRow]) -> str:
    """The search's own prediction, from costs measured in torch, beside what each engine makes of the child."""
    prefill, decode = _gain(report.architecture.totals[0], report.architecture.parent_totals[0])
    lines = []
    for row in rows:
        if row.gains is not None:
            found = (row.gains.prefill_cpu.value, row.gains.decode_cpu.value)
            errors = [
                f"{predicted / measured - 1:+.1%}" for predicted, measured in zip((prefill, decode), found, strict=True)
            ]
            lines.append([f"{row.engine} {row.precision}", f"{found[0]:.2f}", errors[0], f"{found[1]:.2f}", errors[1]])
    header = ["engine", "prefill measured", "prediction off by", "decode measured", "prediction off by"]
    return (
        f"## Predicted from costs in torch (float32)\n\nThe search predicted gains of {prefill:.2f} (prefill) and "
        f"{decode:.2f} (decode); measured gains in CPU time:\n\n" + table(header, lines)
    )


def _logits(lines: Sequence[Sequence[str]]) -> str:
    header = ["file", "MiB", "most", "KL, nats", "top-1", "most (default)", "KL (default)", "top-1 (default)"]
    return (
        f"## Logits of {LlamaCpp().version()} against torch on the same weights\n\n64 random tokens; exact: no flash "
        "attention, float32 KV cache; default: as llama.cpp runs by itself.\n\n" + table(header, lines)
    )


def _limits(child: Path) -> str:
    config = open_child(child).config
    lines = [[one.title, "; ".join(gaps(name, config)) or "yes", one.known_by] for name, one in LIMITS.items()]
    return "## Engines that can run this child\n\n" + table(
        ["engine", "runs it, or what is missing", "known by"], lines
    )


def _cost_table(options: argparse.Namespace, report: ChildReport, point: Point) -> CostTable:
    """Costs in llama.cpp of what stands in the child."""
    layers = report.architecture.layers
    used = {part: {getattr(choice, part) for choice in layers} - {"parent"} for part in SUBBLOCKS}
    space = SearchSpace(**{part: tuple(sorted(labels)) for part, labels in used.items()})
    scenario = Scenario(name="load", prompt_tokens=point.prompt_tokens, generated_tokens=point.generated_tokens)
    hardware = Hardware(engine="llama.cpp", precision="bfloat16", threads=1)
    with shown("costs in llama.cpp") as tell, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "parent").symlink_to((options.workspace / "parent").resolve())
        measure = Measure(rounds=options.rounds, decode_steps=16)
        return measure_costs(report.parent, space, [scenario], hardware, measure, Path(folder), tell)


def _costs(found: CostTable, report: ChildReport, rows: Sequence[BenchRow]) -> str:
    """Costs measured in llama.cpp, summed over the child, beside the child measured in the same engine."""
    predicted = _sums(found, report.architecture)
    row = next(row for row in rows if (row.engine, row.precision, row.model) == ("llama.cpp", "bfloat16", "child"))
    assert row.gains is not None
    measured = (row.gains.prefill_cpu.value, row.gains.decode_cpu.value)
    lines = [
        [phase, f"{own:.2f}", f"{theirs:.2f}", f"{own / theirs - 1:+.1%}"]
        for phase, own, theirs in zip(("prefill", "decode"), predicted, measured, strict=True)
    ]
    each = [
        [
            f"{cost.subblock} {cost.variant}",
            f"{cost.prefill_seconds * 1e3:.2f}",
            f"{cost.decode_seconds_per_token * 1e3:.3f}",
        ]
        for cost in found.costs
    ]
    return (
        "## Costs measured in llama.cpp (bfloat16)\n\nFull-depth models of one repeated layer, each in turns with the "
        "parent (`tasks/engine_costs.py`); gains that their sums predict for this child:\n\n"
        + table(["", "predicted", "measured", "off by"], lines)
        + "\n\n"
        + table(["block", "prefill, CPU ms", "decode, CPU ms a token"], each)
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _seconds(cost: Cost | NonBlockCost) -> tuple[float, float]:
    return cost.prefill_seconds, cost.decode_seconds_per_token


def _sums(costs: CostTable, architecture: Architecture) -> tuple[float, float]:
    """Predicted gains (prefill, decode) of an architecture: the sum of the parent over the sum of the child."""
    by = {(cost.subblock, cost.variant): cost for cost in costs.costs}
    layers = architecture.layers
    own = [_seconds(by[part, "parent"]) for part in SUBBLOCKS for _ in layers]
    chosen = [_seconds(by[part, getattr(choice, part)]) for part in SUBBLOCKS for choice in layers]
    fixed = _seconds(costs.non_block[0])
    sums = [[fixed[phase] + sum(cost[phase] for cost in these) for phase in (0, 1)] for these in (own, chosen)]
    return sums[0][0] / sums[1][0], sums[0][1] / sums[1][1]


if __name__ == "__main__":
    main()
