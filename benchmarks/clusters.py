"""The same child on threads, Dask and Ray; then again with a worker killed (kill -9) in mid-task.

    .venv/bin/python -m benchmarks.clusters

Clusters are two real worker processes (Dask) or two nodes (Ray). Anything that is not as it should be ends it.
"""

import argparse
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cluster import CLUSTERS, Cluster
from benchmarks.common import ROOT, table, write_page

PUZZLE = [sys.executable, "-c", "from flows.cli import main; main()"]
SMALL = (
    *("corpus.sources=[{kind: python_stdlib, max_files: 80}]", "evaluate.throughput_rounds=1", "gkd.steps=0"),
    *("search_space.ffn=[ffn96, ffn48, no_op]", "hardware.threads=1", "bld.steps=60"),
)


def start(workspace: Path, cluster: Cluster | None) -> subprocess.Popen[str]:
    """The flow as a user starts it."""
    words = [word for item in SMALL for word in ("--set", item)]
    command = [*PUZZLE, "optimize", "profiles/tiny.yaml", "--workspace", str(workspace), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(cluster.environment if cluster else {})}
    return subprocess.Popen(
        [*command, *(cluster.settings if cluster else [])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def child_digest(workspace: Path, process: subprocess.Popen[str]) -> str:
    """sha256 of the weights of the child when the flow has ended well."""
    output, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise SystemExit(output[-3000:])
    (weights,) = workspace.glob("runs/*/child/model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def blocks(workspace: Path) -> dict[Path, int]:
    """The finished variants, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in workspace.glob("library/*.json")}


def tried_twice(workspace: Path) -> list[str]:
    """Names of the task runs whose log names more than one process."""
    with sqlite3.connect(workspace / "prefect" / "prefect.db") as database:
        found = database.execute(
            "select task_run.name from log join task_run on task_run.id = log.task_run_id "
            "where log.message like 'on cpu%' group by task_run.id having count(distinct log.message) > 1"
        ).fetchall()
    return [name for (name,) in found]


def undisturbed(runner: str, place: Path, expected: str) -> list[str]:
    """One run on a cluster."""
    with CLUSTERS[runner](place / f"{runner}-logs") as cluster:
        workspace, started = place / runner, time.monotonic()
        same = child_digest(workspace, start(workspace, cluster)) == expected
    assert same, f"{runner}: another child"
    return [runner, "no", f"{time.monotonic() - started:.0f}", f"{len(blocks(workspace))}", "0", "yes", ""]


def killed(runner: str, place: Path, expected: str) -> list[str]:
    """One run on a cluster whose first busy worker is killed once three variants are finished."""
    with CLUSTERS[runner](place / f"{runner}-killed-logs", 2) as cluster:
        workspace, started = place / f"{runner}-killed", time.monotonic()
        process = start(workspace, cluster)
        while len(blocks(workspace)) < 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        pid = cluster.kill_a_busy_worker()
        finished = blocks(workspace)
        same = child_digest(workspace, process) == expected
    again = sum(blocks(workspace)[path] != when for path, when in finished.items())
    assert same and not again, f"{runner}: same child {same}, trained again {again}"
    told = ", ".join(tried_twice(workspace)) or "not in the log: a killed process's last lines are lost"
    return [runner, f"process {pid}", f"{time.monotonic() - started:.0f}", f"{len(finished)}", str(again), "yes", told]


def main() -> None:
    """Threads first; every cluster against that child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runners", nargs="+", default=list(CLUSTERS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="puzzle-clusters-") as folder:
        place = Path(folder)
        started = time.monotonic()
        expected = child_digest(place / "threads", start(place / "threads", None))
        rows = [
            ["threads", "no", f"{time.monotonic() - started:.0f}", f"{len(blocks(place / 'threads'))}", "0", "-", ""]
        ]
        for runner in options.runners:
            for run in (undisturbed, killed):
                rows.append(run(runner, place, expected))
                print(rows[-1], flush=True)
    columns = ["runner", "killed", "seconds", "finished before", "trained again", "same child", "run again elsewhere"]
    write_page(
        "clusters",
        "The same child on threads, Dask and Ray",
        [
            "Tiny profile, two workers, each a process of its own on one machine. *Finished before*: variants in the "
            "library when the worker was killed (all of them, where none was). *Run again elsewhere*: task runs whose "
            f"log names two processes. Seconds of wall time, Prefect's start included, load {os.getloadavg()[0]:.0f}.",
            table(columns, rows),
            f"Child {expected[:16]} by the sha256 of its weights, every time.",
        ],
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and workers end with it
    main()
