"""What a run survives: `kill -9` at random moments, a full disk, a flipped bit, servers that go away.

    .venv/bin/python -m benchmarks.faults [--runner threads|dask|ray] [--kills 20] [--only WORD]

Every case runs the tiny profile, compares the child with the uninterrupted run's by digest, and counts finished
variants whose files changed. A finished case is a line of `workspace/faults/results.jsonl` and is not run again; the
page is written from all lines. The full disk needs root (a tmpfs is mounted).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cluster import CLUSTERS
from benchmarks.common import commit
from benchmarks.faults_killed import flow_of_a_cluster, killed, uninterrupted
from benchmarks.faults_page import write
from benchmarks.faults_runs import (
    LIMIT_SECONDS,
    PLACE,
    Bench,
    Case,
    changed,
    digest,
    ended_well,
    finished_variants,
    fresh,
    log_of,
    told,
    variants_reach,
    verdict,
    wait_for,
)
from benchmarks.faults_served import serve_killed, served_run_killed
from tasks.running.servers import QUIET, free_port, mlflow_server, prefect_server, running, stop

RESULTS = PLACE / "results.jsonl"
COMMIT, _ = commit()  # the one that runs, whatever is there at the end


def disk_full(bench: Bench) -> dict[str, Any]:
    """The disk fills up in mid-distillation; room is made, and the run started again."""
    workspace = fresh("disk")
    workspace.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(workspace)], check=True)
    try:
        process = bench.start(workspace)
        wait_for(process, variants_reach(workspace, 4), workspace)
        ballast = workspace / "ballast"
        with ballast.open("wb", buffering=0) as file:
            block = b"0" * (1 << 16)
            while process.poll() is None:
                try:
                    file.write(block)
                except OSError:
                    time.sleep(0.05)
        printed = log_of(workspace).read_text()
        assert process.returncode == 1 and "Traceback" not in printed, printed[-4000:]
        sentence = told(workspace, r"(puzzle failed: .*)")
        before = finished_variants(workspace)
        ballast.unlink()
        child = bench.finish(workspace)
        found = verdict_of_mounted(bench, child, before, workspace)
    finally:
        subprocess.run(["umount", "-l", str(workspace)], check=False)
    return {"told": sentence, **found}


def verdict_of_mounted(
    bench: Bench, child: Path, before: dict[str, tuple[int, int]], workspace: Path
) -> dict[str, Any]:
    """As `verdict`, but the folder is a mount and stays."""
    same, again = digest(child) == bench.reference["digest"], changed(before, workspace)
    assert same and not again, f"same child {same}, {again} finished variants made again"
    return {"same_child": same, "finished": len({Path(name).stem for name in before}), "made_again": again}


def flipped_bit(bench: Bench) -> dict[str, Any]:
    """One bit of a stored block flips between two runs."""
    workspace = fresh("bit")
    process = bench.start(workspace)
    wait_for(process, variants_reach(workspace, 6), workspace)
    process.kill()
    process.wait()
    victim = sorted((workspace / "library").glob("*.safetensors"))[0]
    raw = bytearray(victim.read_bytes())
    raw[-9] ^= 1
    victim.write_bytes(raw)
    before = {name: mark for name, mark in finished_variants(workspace).items() if Path(name).stem != victim.stem}
    child = bench.finish(workspace)
    sentence = told(workspace, r"(layer .*the stored block is damaged.*)")
    return {"told": sentence, **verdict(bench, child, before, workspace)}


def killed_in_the_middle(server: subprocess.Popen[bytes], run: subprocess.Popen[str], workspace: Path) -> None:
    """kill -9 a server, and all it started, when a run has finished four variants."""
    wait_for(run, variants_reach(workspace, 4), workspace)
    os.killpg(server.pid, signal.SIGKILL)
    stop(server, 1)


def prefect_restarted(bench: Bench) -> dict[str, Any]:
    """The Prefect server is killed under a run and started again ten seconds later."""
    workspace, port = fresh("prefect"), free_port()
    command, url = prefect_server(port)
    home = {**QUIET, "PREFECT_HOME": str(PLACE / "prefect-home")}
    with running(command, f"{url}/health", PLACE / "prefect-1.log", home) as server:
        process = bench.start(workspace, PREFECT_API_URL=url)
        killed_in_the_middle(server, process, workspace)
    time.sleep(10)
    with running(command, f"{url}/health", PLACE / "prefect-2.log", home):
        before = finished_variants(workspace)
        code = process.wait(LIMIT_SECONDS)
        sentence = told(workspace, r"(puzzle failed: .*)" if code else r"(Prefect's server does not answer.*)")
        child = bench.finish(workspace, PREFECT_API_URL=url) if code else ended_well(process, workspace)
        assert "Traceback" not in log_of(workspace).read_text()
    return {"told": sentence, "exit_code": code, **verdict(bench, child, before, workspace)}


def mlflow_down(bench: Bench) -> dict[str, Any]:
    """The MLflow server is killed under a run, and comes back ten seconds after the run has said that it waits."""
    workspace, port = fresh("mlflow"), free_port()
    store = f"sqlite:///{PLACE / 'mlflow-server.db'}"
    command, url = mlflow_server(port, store, str(PLACE / "mlartifacts"))
    with running(command, f"{url}/health", PLACE / "mlflow-1.log", QUIET) as server:
        process = bench.start(workspace, MLFLOW_TRACKING_URI=url)
        killed_in_the_middle(server, process, workspace)
    wait_for(process, lambda: "does not answer: waiting" in log_of(workspace).read_text(), workspace)
    time.sleep(10)
    with running(command, f"{url}/health", PLACE / "mlflow-2.log", QUIET):
        before = finished_variants(workspace)
        child = ended_well(process, workspace)
    sentence = told(workspace, r"(MLflow at .* does not answer.*)")
    return {"told": sentence, **verdict(bench, child, before, workspace)}


def cases(runner: str, kills: int) -> dict[str, Case]:
    """Every case of a runner by name."""
    found: dict[str, Case] = {f"kill-{number:02d}": killed(number) for number in range(1, kills + 1)}
    if runner != "threads":
        return {**found, "flow": flow_of_a_cluster}
    others: Sequence[Case] = (disk_full, flipped_bit, prefect_restarted, mlflow_down)
    place = PLACE / "served"
    found |= {case.__name__: case for case in others}
    found |= {case.__name__: partial(_in_place, case, place) for case in (served_run_killed, serve_killed)}
    return found


def _in_place(case: Callable[[Path], dict[str, Any]], place: Path, _: Bench) -> dict[str, Any]:
    return case(place)


def known() -> dict[str, dict[str, Any]]:
    """Results of earlier calls by runner and case."""
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {f"{line['runner']}/{line['case']}": line for line in lines}


def keep(runner: str, name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Write a result down."""
    line = {"runner": runner, "case": name, "commit": COMMIT, **found}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return line


@contextmanager
def one_server() -> Iterator[dict[str, str]]:
    """A Prefect server for all runs: starting one for each would take most of the time."""
    command, url = prefect_server(free_port())
    with running(command, f"{url}/health", PLACE / "prefect.log", {**QUIET, "PREFECT_HOME": str(PLACE / "home")}):
        yield {"PREFECT_API_URL": url}


def run_missing(runner: str, missing: Sequence[str], wanted: dict[str, Case]) -> None:
    """Cases one after the other, on one server and one cluster."""
    with ExitStack() as stack:
        bench = Bench(runner=runner, environment=stack.enter_context(one_server()), reference={})
        if runner != "threads":
            bench.cluster = stack.enter_context(CLUSTERS[runner](PLACE / f"{runner}-cluster", workers=2))
        bench.reference = known().get(f"{runner}/uninterrupted") or keep(runner, "uninterrupted", uninterrupted(bench))
        others = {line["digest"] for name, line in known().items() if name.endswith("/uninterrupted")}
        assert others == {bench.reference["digest"]}, "runners make different children"
        for name in missing:
            started = time.monotonic()
            found = wanted[name](bench)
            keep(runner, name, {"took": time.monotonic() - started, **found})


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runner", choices=["threads", "dask", "ray"], default="threads")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name contains this word")
    options = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    os.environ["PUZZLE_DEVICE_LOCKS"] = str(PLACE / "devices")  # no turns with other runs on this machine
    wanted, there = cases(options.runner, options.kills), known()
    missing = [name for name in wanted if options.only in name and f"{options.runner}/{name}" not in there]
    if missing:
        run_missing(options.runner, missing, wanted)
    there = known()
    write(
        list(there.values()),
        {
            runner: [name for name in cases(runner, options.kills) if f"{runner}/{name}" not in there]
            for runner in ("threads", "dask", "ray")
        },
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and workers end with it
    main()
