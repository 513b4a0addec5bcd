"""SmolLM2 and a child of a finished run behind llama.cpp's and vLLM's servers: users who wait, and arrivals at rates.

    .venv/bin/python -m benchmarks.served_load --workspace workspace/smollm2-cpu

In each server parent and child take turns under the same requests at the same times. The rates are shares of what the
parent answers in the closed loop of the same case, so the same shares are comparable between servers; limits on latency
are multiples of the parent's own in the closed loop of one request at a time. What a case gave is kept and not measured
again. vLLM refuses linear subblocks: `--child` names another child than the run's.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import last_report, table, write_page
from blocks.engine_limits import gaps
from blocks.library import read_value, write_value
from blocks.parent import config_of
from blocks.records import PARENT, ChildReport, Metric, Value
from blocks.runtime import configure_torch
from tasks.engines.base import LoadOptions
from tasks.engines.registry import engine_of
from tasks.inputs.children import open_child
from tasks.loadtest.arrivals import Limits
from tasks.loadtest.bench_table import MEMORY
from tasks.loadtest.load_table import COLUMNS, failures_of, load_cells
from tasks.loadtest.serving_load import LoadPlan, LoadRow, load_test, served_models
from tasks.measure.bench import Point
from tasks.running.progress import clock, shown

CASES = ("llama.cpp:q8_0", "llama.cpp:bfloat16", "vllm:bfloat16")
SHARES = (0.5, 0.8, 1.1)
FIRST_ROUNDS = 3  # of the closed loops that set rates and limits
PATIENCE = 2.0  # a request is good when it waits at most so many times what an idle parent takes


class Served(Value):
    """What one server and precision gave, kept so that a run can be taken up again."""

    closed: tuple[LoadRow, ...]
    opened: tuple[LoadRow, ...]
    limits: Limits
    seconds: float
    version: str


def main() -> None:
    """Measure what is not kept yet, then write benchmarks/serving-load.md."""
    options = _options()
    configure_torch(1)
    load_before, report = os.getloadavg()[0], last_report(options.workspace)
    child = options.child or options.workspace / report.child_folder
    sources = {PARENT: options.workspace / report.parent.folder, "child": child}
    found, notes = {}, []
    for case in options.cases:
        reason = _reason_against(case.split(":")[0], child)
        if reason:
            notes.append(f"Not run: {case}: {reason}.")
        else:
            found[case] = _case(options, sources, case)
    notes += [sentence for one in found.values() for sentence in failures_of((*one.closed, *one.opened))]
    parts = [_intro(options, report, sources, load_before), *notes]
    parts += [_section(case, one, options.load) for case, one in found.items()]
    write_page("serving-load", "Parent and child behind servers, under load", parts)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, default=Path("workspace/smollm2-cpu"))
    parser.add_argument("--child", type=Path, help="[the child of the last run]")
    parser.add_argument("--keep", type=Path, default=Path("workspace/serving-load"), help="figures are kept here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--load", type=Point.parse, default=Point.parse("4x128x32"), metavar="BxPxG")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="rates, of the parent's closed loop")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="SERVER:PRECISION")
    return parser.parse_args()


def _reason_against(server: str, child: Path) -> str | None:
    """Why a server is not run; None when it is."""
    missing = engine_of(server).missing()
    return missing or "; ".join(gaps(server, config_of(child))) or None


def _case(options: argparse.Namespace, sources: dict[str, Path], case: str) -> Served:
    shares = " ".join(map(str, options.shares))
    child = "-".join(sources["child"].resolve().parts[-2:])  # its run: figures are of one child
    what = f"{case} {options.load.label} {options.rounds}x{options.requests} {shares} {child}".replace(":", " ")
    path: Path = options.keep / f"{what}.json"
    if not path.is_file():
        write_value(path, _measured(options, sources, case))
    return read_value(path, Served)


def _measured(options: argparse.Namespace, sources: dict[str, Path], case: str) -> Served:
    """Closed loops of one and of `load` requests at a time; then the rates that these set."""
    server, precision = case.split(":")
    started, vocab_size = time.monotonic(), config_of(sources["child"]).vocab_size
    single = options.load.model_copy(update={"batch_size": 1})
    first_rounds = min(FIRST_ROUNDS, options.rounds)
    points = tuple(dict.fromkeys((single, options.load)))  # one, where the load is of one at a time
    plan = LoadPlan(points=points, rounds=first_rounds, requests=options.requests)
    with served_models(sources, server, plan.points, LoadOptions(precision=precision)) as servers:
        with shown(f"{case} closed") as report:
            closed = load_test(servers, plan, vocab_size, report)
        limits, rates = limits_of_parent(closed, single.label), rates_of_parent(closed, options.load, options.shares)
        plan = LoadPlan(
            points=(options.load,), rates=rates, limits=limits, rounds=options.rounds, requests=options.requests
        )
        print(f"{case}: {rates} requests/s; the arrivals alone take {clock(plan.seconds(len(servers)))}", flush=True)
        with shown(f"{case} rates") as report:
            opened = load_test(servers, plan, vocab_size, report)
    return Served(
        closed=tuple(row for row in closed if row.load == single.label),
        opened=tuple(opened),
        limits=limits,
        seconds=time.monotonic() - started,
        version=engine_of(server).version(),
    )


def limits_of_parent(rows: Sequence[LoadRow], load: str) -> Limits:
    """So many times what the parent takes when nobody else asks."""
    (row,) = [row for row in rows if row.model == PARENT and row.load == load]
    first, token = row.first_token_seconds[0], row.output_token_seconds[0]
    assert first is not None and token is not None, "the parent's server failed with one request at a time"
    return Limits(first_token_seconds=_rounded(PATIENCE * first), output_token_seconds=_rounded(PATIENCE * token))


def rates_of_parent(rows: Sequence[LoadRow], load: Point, shares: Sequence[float]) -> tuple[float, ...]:
    """Shares of the requests per second that the parent answers in a closed loop."""
    (row,) = [row for row in rows if row.model == PARENT and row.load == load.label]
    return tuple(_rounded(share * row.requests_per_second.value) for share in sorted(shares))


def _rounded(value: float) -> float:
    """To two digits: a rate is a name too."""
    return float(f"{value:.2g}")


def _intro(options: argparse.Namespace, report: ChildReport, sources: dict[str, Path], load_before: float) -> str:
    before, after = (open_child(path).num_parameters() / 1e6 for path in sources.values())
    own = "the child of its run" if options.child is None else "a child that was named with `--child`"
    return (
        f"Parent: {report.parent.name}, {before:.1f} M parameters; {own}, {after:.1f} M. One thread a server, both up "
        f"all the time; load average {load_before:.1f} at the start, {os.getloadavg()[0]:.1f} at the end. "
        f"{options.rounds} rounds of {options.requests} requests each, parent and child in turns with the same prompts "
        "at the same times. Gains are of pairs (parent's time over child's in the same round, medians with standard "
        "errors; CPU: of the servers' processes). A load is requests at a time x prompt x generated tokens; at a rate, "
        "requests arrive by chance (Poisson, so many in a round) whether or not the ones before are answered, and TTFT "
        "counts from the arrival. The rates are shares of what the parent answers in the closed loop: "
        f"{', '.join(f'{share:g}' for share in sorted(options.shares))}. "
        f"Good: at most {PATIENCE:g} times the TTFT and the TPOT of the parent with one request at a time (p50)."
    )


def _section(case: str, found: Served, load: Point) -> str:
    rows = [load_cells(row) for row in (*found.closed, *found.opened)]
    for cells, row in zip(rows, (*found.closed, *found.opened), strict=True):
        if row.good is None:
            cells.insert(len(COLUMNS), "")
    best = [f"{load.label} at {row.rate:g}/s {_best(row)}" for row in found.opened if row.gains and row.rate]
    return "\n\n".join(
        [
            f"## {found.version}, {case.split(':')[1]}",
            f"Good: {found.limits.words()}. The case took {clock(found.seconds)}.",
            table([*COLUMNS, "good", MEMORY], rows),
            f"TTFT gain by rate: {'; '.join(best)}." if best else "No gains: requests failed.",
        ]
    )


def _best(row: LoadRow) -> str:
    gain: Metric | None = row.gains.first_token if row.gains else None
    return "" if gain is None else f"{gain.value:.2f} ±{gain.se:.2f}"


if __name__ == "__main__":
    main()
