"""What a run survives: `kill -9` at random moments, a full disk, a flipped bit, servers that go away.

    .venv/bin/python -m benchmarks.faults [--runner threads|dask|ray] [--kills 20] [--only WORD]

Every case runs the tiny profile, compares the child with the uninterrupted run's by digest, and counts finished
variants whose files changed. A finished case is a line of `workspace/faults/results.jsonl` and is not run again; the
page is written from all lines. The full disk needs root (a tmpfs is mounted).
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT
from benchmarks.faults_page import write
from benchmarks.faults_served import serve_killed, served_run_killed
from tasks.operating.servers import QUIET, free_port, mlflow_server, prefect_server, running, stop

PUZZLE = [sys.executable, "-c", "from flows.cli import main; main()"]
PROFILE = ROOT / "profiles" / "tiny.yaml"
SMALLER = (
    *("corpus.sources=[{kind: python_stdlib, max_files: 80}]", "evaluate.throughput_rounds=1"),
    *("search_space.ffn=[ffn96, no_op]", "hardware.threads=1"),
)
PLACE = ROOT / "workspace" / "faults"
RESULTS = PLACE / "results.jsonl"
LIMIT_SECONDS = 900
Case = Callable[["Bench"], dict[str, Any]]


@dataclass(kw_only=True)
class Bench:
    """Where cases run, on what, and what the uninterrupted run left."""

    runner: str
    environment: dict[str, str]
    reference: dict[str, Any]

    def start(self, workspace: Path, cluster: Any = None, **environment: str) -> subprocess.Popen[str]:
        """`puzzle optimize` on the tiny profile; its output goes to a file in the workspace's parent."""
        words = [*PUZZLE, "optimize", str(PROFILE), "--workspace", str(workspace)]
        for change in SMALLER:
            words += ["--set", change]
        words += cluster.settings if cluster else []
        PLACE.mkdir(parents=True, exist_ok=True)
        with log_of(workspace).open("a") as log:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT), **environment},
            )

    def finish(self, workspace: Path, **environment: str) -> Path:
        """Run to the end; the child's folder."""
        return ended_well(self.start(workspace, **environment), workspace)


def log_of(workspace: Path) -> Path:
    """What runs on a workspace printed."""
    return PLACE / f"{workspace.name}.out"


def ended_well(process: subprocess.Popen[str], workspace: Path) -> Path:
    """The child of a run that must end with 0."""
    code = process.wait(LIMIT_SECONDS)
    printed = log_of(workspace).read_text()
    assert code == 0, f"{workspace}: exit code {code}\n{printed[-3000:]}"
    (workspace_child,) = re.findall(r"^child: (.*)$", printed, re.MULTILINE)[-1:]
    return Path(workspace_child)


def digest(child: Path) -> str:
    """sha256 over the weights and the config of a child."""
    found = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        found.update((child / name).read_bytes())
    return found.hexdigest()


def finished_variants(workspace: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files of every finished variant."""
    made = {}
    for record in (workspace / "library").glob("*.json"):
        for path in (record, record.with_suffix(".safetensors")):
            if path.exists():
                made[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return made


def changed(before: dict[str, tuple[int, int]], workspace: Path) -> int:
    """How many finished variants were made again."""
    now = finished_variants(workspace)
    return len({Path(name).stem for name, mark in before.items() if now.get(name) != mark})


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool], workspace: Path) -> None:
    """Until the moment comes."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not ready():
        assert process.poll() is None, f"ended before the moment came\n{log_of(workspace).read_text()[-3000:]}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)


def variants_reach(workspace: Path, count: int) -> Callable[[], bool]:
    """True once so many variants are finished."""
    return lambda: len(list((workspace / "library").glob("*.json"))) >= count


def fresh(name: str) -> Path:
    """An empty workspace."""
    workspace = PLACE / name
    shutil.rmtree(workspace, ignore_errors=True)
    log_of(workspace).unlink(missing_ok=True)
    return workspace


def told(workspace: Path, pattern: str) -> str:
    """The sentence that a run printed; it must be there."""
    found = re.findall(pattern, log_of(workspace).read_text())
    assert found, f"{workspace}: nothing like {pattern!r} in\n{log_of(workspace).read_text()[-3000:]}"
    return str(found[-1]).strip()


def verdict(bench: Bench, child: Path, before: dict[str, tuple[int, int]], workspace: Path) -> dict[str, Any]:
    """What every case ends with; the workspace is not needed any more."""
    same, again = digest(child) == bench.reference["digest"], changed(before, workspace)
    assert same and not again, f"{workspace}: same child {same}, {again} finished variants made again"
    shutil.rmtree(workspace, ignore_errors=True)
    return {"same_child": same, "finished": len({Path(name).stem for name in before}), "made_again": again}


# the cases


def uninterrupted(bench: Bench) -> dict[str, Any]:
    """A run that nobody disturbs."""
    workspace = fresh(f"reference-{bench.runner}")
    started = time.monotonic()
    with cluster_of(bench.runner, workspace) as cluster:
        child = ended_well(bench.start(workspace, cluster), workspace)
    return {"digest": digest(child), "seconds": time.monotonic() - started}


def killed(number: int) -> Case:
    """`kill -9` of the flow's process (threads), or of a worker (dask, ray), at a random moment of the run."""

    def case(bench: Bench) -> dict[str, Any]:
        share = random.Random(f"{bench.runner}-{number}").uniform(0.05, 0.95)
        seconds = bench.reference["seconds"]
        while True:
            workspace = fresh(f"kill-{bench.runner}-{number:02d}")
            with cluster_of(bench.runner, workspace) as cluster:
                process = bench.start(workspace, cluster)
                deadline = time.monotonic() + share * seconds
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                before, over = finished_variants(workspace), process.poll() is not None
                if not over:
                    victims = cluster.workers() if cluster else [psutil.Process(process.pid)]
                    random.Random(number).choice(victims).send_signal(signal.SIGKILL)
                if cluster is not None:
                    child = ended_well(process, workspace)
                elif process.wait() != 0:
                    child = bench.finish(workspace)
            if over:  # before the moment came: the machine is faster than it was
                seconds *= 0.8
                continue
            return {"moment": share * seconds, **verdict(bench, child, before, workspace)}

    return case


@contextmanager
def cluster_of(runner: str, workspace: Path) -> Iterator[Any]:
    """Two workers of a Dask or Ray cluster, as processes of their own; None for threads."""
    if runner == "threads":
        yield None
        return
    clusters = importlib.import_module("benchmarks.cluster").CLUSTERS
    with clusters[runner](PLACE / f"{workspace.name}-cluster", workers=2) as cluster:
        yield cluster


def flow_of_a_cluster(bench: Bench) -> dict[str, Any]:
    """`kill -9` of the flow's process while workers of its cluster are at work; started again on the same cluster."""
    workspace = fresh(f"flow-{bench.runner}")
    with cluster_of(bench.runner, workspace) as cluster:
        process = bench.start(workspace, cluster)
        wait_for(process, variants_reach(workspace, 4), workspace)
        before = finished_variants(workspace)
        process.kill()
        process.wait()
        return verdict(bench, ended_well(bench.start(workspace, cluster), workspace), before, workspace)


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
    """The MLflow server is killed under a run and comes back after a minute."""
    workspace, port = fresh("mlflow"), free_port()
    store = f"sqlite:///{PLACE / 'mlflow-server.db'}"
    command, url = mlflow_server(port, store, str(PLACE / "mlartifacts"))
    with running(command, f"{url}/health", PLACE / "mlflow-1.log", QUIET) as server:
        process = bench.start(workspace, MLFLOW_TRACKING_URI=url)
        killed_in_the_middle(server, process, workspace)
    time.sleep(60)
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
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    line = {"runner": runner, "case": name, "commit": commit.strip(), **found}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return line


@contextmanager
def one_server() -> Iterator[dict[str, str]]:
    """A Prefect server for all runs: starting one for each would take most of the time."""
    PLACE.mkdir(parents=True, exist_ok=True)
    command, url = prefect_server(free_port())
    with running(command, f"{url}/health", PLACE / "prefect.log", {**QUIET, "PREFECT_HOME": str(PLACE / "home")}):
        yield {"PREFECT_API_URL": url, "PUZZLE_DEVICE_LOCKS": str(PLACE / "devices")}


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runner", choices=["threads", "dask", "ray"], default="threads")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="", help="cases whose name contains this word")
    options = parser.parse_args()
    there = known()
    wanted = cases(options.runner, options.kills)
    missing = [name for name in wanted if options.only in name and f"{options.runner}/{name}" not in there]
    if missing:
        with one_server() as environment:
            bench = Bench(runner=options.runner, environment=environment, reference={})
            bench.reference = there.get(f"{options.runner}/uninterrupted") or keep(
                options.runner, "uninterrupted", uninterrupted(bench)
            )
            for name in missing:
                started = time.monotonic()
                found = wanted[name](bench)
                keep(options.runner, name, {"took": time.monotonic() - started, **found})
    there = known()
    missing = {
        runner: [name for name in cases(runner, 20) if f"{runner}/{name}" not in there]
        for runner in ("threads", "dask", "ray")
    }
    write(list(there.values()), missing)


if __name__ == "__main__":
    main()
