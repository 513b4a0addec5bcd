"""SmolLM2 and the child of a finished run on each engine that runs here: speed, memory, sums of costs, logits.

    .venv/bin/python -m benchmarks.serving --workspace workspace/smollm2-llama-cpp

Parent and child take turns in each engine, one thread, every figure in CPU time too: gains are of pairs. Costs are
measured in each engine anew, right before its two whole models: what they add up to stands beside these. Types of
number that the search chose are left out: the child's folder holds the weights that they were rounded from.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.common import last_report, table, write_page
from blocks.engine_limits import KNOWN_ENGINES, gaps
from blocks.library import read_value, write_value
from blocks.parent import config_of
from blocks.records import PARENT, SUBBLOCKS, ChildReport, CostTable, LayerChoice, Metric, Value
from blocks.runtime import configure_torch
from profiles.schema import Hardware, Measure, Scenario, SearchSpace
from tasks.engines.base import LoadOptions
from tasks.engines.llama_cpp import LlamaCpp
from tasks.engines.registry import ENGINES, engine_of
from tasks.export.formats import export_as
from tasks.export.logits_check import Difference, compare_logits
from tasks.gguf.reader import read_gguf
from tasks.measure.bench import BenchRow, Point, bench
from tasks.measure.cost_sums import MEASURED, PHASES, clock_of, error_of_sum, percent, sum_of
from tasks.measure.costs import CostRequest, measure_costs
from tasks.running.progress import say, shown

ValueT = TypeVar("ValueT", bound=Value)
Case = tuple[str, str]  # engine and precision
CASES = ("llama.cpp:float32", "llama.cpp:bfloat16", "llama.cpp:q8_0", "torch:float32")
LOADS = ("1x256x64", "4x128x64")


class Measured(Value):
    """What one case gave, kept so that a run can be taken up again."""

    rows: tuple[BenchRow, ...]


class Logits(Value):
    """What one file's logits gave: cells of the table."""

    cells: tuple[str, ...]


def main() -> None:
    """Measure what is not kept yet, then write benchmarks/serving.md."""
    options = _options()
    configure_torch(1)
    before = os.getloadavg()[0]
    report = last_report(options.workspace)
    options.keep /= Path(report.child_folder).parent.name  # figures are of one child
    options.keep.mkdir(parents=True, exist_ok=True)
    sources = {"parent": options.workspace / report.parent.folder, "child": options.workspace / report.child_folder}
    points = [Point.parse(load) for load in options.loads]
    cases = [
        _case(text) for text in options.cases or _default_cases(gaps_of_vllm=gaps("vllm", config_of(sources["child"])))
    ]
    files = [(name, precision) for engine, precision in cases if engine == "llama.cpp" for name in sources]
    for name, precision in files:  # written first: nothing but the engine works while it is measured
        _file(options, sources, name, precision)
    rows, costs = [], {}
    for case in cases:
        costs[case] = _cost_table(options, report, case, points[: options.cost_loads])
        rows += _rows(options, sources, case, points).rows
    logits = [_logits_of(options, sources, name, precision).cells for name, precision in files]
    parts = [_intro(report, before), *_speed(rows, points), _sums(costs, report, rows), _costs(costs)]
    write_page("serving", "A child in the engines that serve it", [*parts, _logits(logits), _limits(sources)])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/smollm2-llama-cpp"))
    parser.add_argument("--keep", type=Path, default=Path("workspace/serving"), help="files and figures are kept here")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cost-rounds", type=int, default=5)
    parser.add_argument("--loads", nargs="+", default=LOADS, metavar="BxPxG")
    parser.add_argument("--cost-loads", type=int, default=1, help="of so many loads, the first, costs are measured")
    parser.add_argument("--cases", nargs="+", metavar="ENGINE:PRECISION", help="[all that run here]")
    return parser.parse_args()


def _case(text: str) -> Case:
    engine, precision = text.split(":")
    return engine, precision


def _default_cases(gaps_of_vllm: Sequence[str]) -> tuple[str, ...]:
    """CASES, and vLLM where it is driven, installed, and can run the child."""
    there = "vllm" in ENGINES and engine_of("vllm").missing() is None and not gaps_of_vllm
    return (*CASES, "vllm:float32", "vllm:bfloat16") if there else CASES


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


def _rows(options: argparse.Namespace, sources: dict[str, Path], case: Case, points: Sequence[Point]) -> Measured:
    engine, precision = case

    def measure() -> Measured:
        own = sources
        if engine == "llama.cpp":
            own = {name: _file(options, sources, name, precision) for name in sources}
        with shown(f"{engine} {precision}") as tell:
            return Measured(
                rows=tuple(bench(own, engine, points, LoadOptions(precision=precision), options.rounds, tell))
            )

    what = [engine, precision, *(point.label for point in points), f"{options.rounds} rounds"]
    return _once(options.keep / f"{' '.join(what)}.json", Measured, measure)


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


def _intro(report: ChildReport, load_before: float) -> str:
    own = {candidate.stage: candidate for candidate in report.candidates if candidate.name in ("parent", "child")}
    sizes = f"{own['parent'].parameters / 1e6:.1f} M parameters, the child {own['assembled'].parameters / 1e6:.1f} M"
    return (
        f"Parent: {report.parent.name}, {sizes} ({Path(report.child_folder).parent.name}). One thread; load average "
        f"{load_before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end. Gains are of pairs in one run (parent's "
        "time over child's, medians over the rounds with standard errors), in wall time and in CPU time. Memory is the "
        "process's peak less what it held before the load."
    )


def _speed(rows: Sequence[BenchRow], points: Sequence[Point]) -> list[str]:
    header = ["engine", "model", "prefill tok/CPU s", "decode tok/CPU s", "TTFT, s", "TPOT, s", "requests/s"]
    header += ["prefill gain", "in CPU time", "decode gain", "in CPU time", "GiB"]
    parts = []
    for point in points:
        own = [row for row in rows if _point_of(row) == point.label]
        rounds = own[0].throughput.cpu_seconds.n
        title = f"## Speed, load {point.label} (batch x prompt x generated), {rounds} rounds"
        parts.append(f"{title}\n\n" + table(header, [_speed_cells(row) for row in own]))
    return parts


def _point_of(row: BenchRow) -> str:
    return f"{row.batch_size}x{row.prompt_tokens}x{row.generated_tokens}"


def _speed_cells(row: BenchRow) -> list[str]:
    gains, speed = ["", "", "", ""], row.throughput
    if row.gains is not None:
        found = (row.gains.prefill, row.gains.prefill_cpu, row.gains.decode, row.gains.decode_cpu)
        gains = [f"{gain.value:.2f} ±{gain.se:.2f}" for gain in found]
    prefill, decode = row.cpu_speeds()
    return [
        f"{row.version}, {row.precision}",
        row.model,
        f"{prefill:.0f}",
        f"{decode:.1f}",
        f"{speed.first_token_seconds.value:.4f}",
        f"{speed.output_token_seconds.value:.5f}",
        f"{speed.requests_per_second.value:.3f}",
        *gains,
        "–" if speed.memory_bytes is None else f"{speed.memory_bytes / 2**30:.3f}",
    ]


def _cost_table(options: argparse.Namespace, report: ChildReport, case: Case, points: Sequence[Point]) -> CostTable:
    """Costs in one engine of what stands in the child."""
    engine, precision = case
    layers = [choice.bare for choice in report.architecture.layers]
    used = {part: {getattr(choice, part) for choice in layers} - {"parent"} for part in SUBBLOCKS}
    space = SearchSpace(**{part: tuple(sorted(labels)) for part, labels in used.items()})
    scenarios = [_scenario(point) for point in points]
    hardware = Hardware.model_validate({"engine": engine, "precision": precision, "threads": 1})
    (options.keep / "parent").unlink(missing_ok=True)
    (options.keep / "parent").symlink_to((options.workspace / "parent").resolve())
    with shown(f"costs in {engine} {precision}") as tell:  # stored by what they depend on, as a run's are
        measure = Measure(rounds=options.cost_rounds, decode_steps=16)
        asked = CostRequest(
            parent=report.parent, space=space, scenarios=tuple(scenarios), hardware=hardware, measure=measure
        )
        return measure_costs(asked, options.keep, tell)


def _scenario(point: Point) -> Scenario:
    return Scenario(
        name=f"load{point.label}",
        batch_sizes=(point.batch_size,),
        prompt_tokens=point.prompt_tokens,
        generated_tokens=point.generated_tokens,
    )


def _sums(costs: dict[Case, CostTable], report: ChildReport, rows: Sequence[BenchRow]) -> str:
    """What the costs of each engine add up to, beside parent and child measured in the same engine."""
    layers = [choice.bare for choice in report.architecture.layers]
    lines = []
    for (engine, precision), found in costs.items():
        own = {(_point_of(row), row.model): row for row in rows if (row.engine, row.precision) == (engine, precision)}
        for whole in found.parent_measured:
            for phase in PHASES:
                place, load = (whole.scenario, whole.batch_size), whole.scenario.removeprefix("load")
                cells, ratios = [], {}
                for model, choices in (("parent", (LayerChoice(),) * len(layers)), ("child", layers)):
                    measured: Metric = getattr(own[load, model].throughput, MEASURED[phase, clock_of(found)])
                    summed = sum_of(found, choices, place, phase)
                    error = math.hypot(
                        error_of_sum(found, choices, place, phase) / summed, measured.se / measured.value
                    )
                    ratios[model] = summed / measured.value
                    off = Metric(value=ratios[model] - 1, se=ratios[model] * error, n=measured.n)
                    cells += [f"{1e3 * summed:.1f}", f"{1e3 * measured.value:.1f}", percent(off)]
                gain = ratios[PARENT] / ratios["child"] - 1
                calibrated = found.hardware.get("calibrated", "no").split(", on ")[0]
                lines.append([f"{engine} {precision}", load, phase, *cells, f"{gain:+.1%}", calibrated])
    header = ["engine", "load", "phase", "parent, sum ms", "measured", "off by", "child, sum ms", "measured", "off by"]
    return (
        "## Sums of costs beside whole models\n\nCosts measured in each engine, summed over the layers (CPU time where "
        "the engine's costs are CPU time); the gain is the parent's time over the child's. Calibrated: factors fitted "
        "on the parent in the rounds of the costs.\n\n" + table([*header, "gain off by", "calibrated"], lines)
    )


def _costs(costs: dict[Case, CostTable]) -> str:
    header, lines = ["block", *(f"{engine} {precision}" for engine, precision in costs)], []
    tables = list(costs.values())
    first = tables[0].costs[0]
    place = (first.scenario, first.batch_size)
    names = [(c.subblock, c.variant) for c in tables[0].costs if (c.scenario, c.batch_size) == place]
    for name in names:
        cells = [f"{name[0]} {name[1]}"]
        for found in tables:
            own = [c for c in found.costs if (c.subblock, c.variant, c.scenario, c.batch_size) == (*name, *place)]
            cells += [f"{1e3 * c.prefill_seconds:.2f} / {1e3 * c.decode_seconds_per_token:.3f}" for c in own] or ["–"]
        lines.append(cells)
    load = first.scenario.removeprefix("load")
    return f"## Costs, ms of a prefill / ms of a decode step, load {load}\n\n" + table(header, lines)


def _logits(lines: Sequence[Sequence[str]]) -> str:
    header = ["file", "MiB", "most", "KL, nats", "top-1", "most (default)", "KL (default)", "top-1 (default)"]
    return (
        f"## Logits of {LlamaCpp().version()} against torch on the same weights\n\n64 random tokens; exact: no flash "
        "attention, float32 KV cache; default: as llama.cpp runs by itself.\n\n" + table(header, lines)
    )


def _limits(sources: dict[str, Path]) -> str:
    config = config_of(sources["child"])
    lines = [[one.title, "; ".join(gaps(name, config)) or "yes", one.known_by] for name, one in KNOWN_ENGINES.items()]
    return "## Engines that can run this child\n\n" + table(
        ["engine", "runs it, or what is missing", "known by"], lines
    )


if __name__ == "__main__":
    main()
