"""The same child on threads, Dask and Ray; again with a worker killed (kill -9) in mid-task; on a cluster that a run
starts for itself; and a mistake that only a worker finds.

    .venv/bin/python -m benchmarks.clusters

Clusters are two real worker processes (Dask) or two nodes (Ray). Anything that is not as it should be ends it.
"""

import argparse
import hashlib
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import psutil

from benchmarks.cluster import CLUSTERS
from benchmarks.common import PUZZLE, ROOT, table, write_page

SMALL = (
    *("corpus.sources=[{kind: python_stdlib, max_files: 80}]", "evaluate.throughput_rounds=1", "gkd.steps=0"),
    *("search_space.ffn=[ffn96, ffn48, no_op]", "hardware.threads=1", "bld.steps=60"),
)


def start(
    workspace: Path, settings: Sequence[str] = (), environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[str]:
    """The flow as a user starts it, without Prefect and MLflow servers of others."""
    words = [word for item in SMALL for word in ("--set", item)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "RAY_"))}
    locks = {"PUZZLE_DEVICE_LOCKS": str(workspace.parent / "devices")}
    return subprocess.Popen(
        [*PUZZLE, "optimize", "profiles/tiny.yaml", "--workspace", str(workspace), *words, *settings],
        cwd=ROOT,
        env={**kept, **locks, "PYTHONPATH": str(ROOT), **environment},
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


def told_of_death(workspace: Path, pid: int) -> str:
    """What Prefect's log says of a process that was killed; whoever took over has said it."""
    with sqlite3.connect(workspace / "prefect" / "prefect.db") as database:
        found = database.execute("select message from log where message like ?", (f"process {pid} on % died%",))
        said = [re.sub(r" on \S+ died", " died", message) for (message,) in found.fetchall()]
    return said[0] if said else "it was between two tasks"  # benchmarks/faults.py holds that what is cut short is told


def row(runner: str, killed: str, started: float, before: int, told: str = "") -> list[str]:
    """A run whose child was the expected one, and which trained nothing again."""
    return [runner, killed, f"{time.monotonic() - started:.0f}", str(before), "0", "yes", told]


def undisturbed(runner: str, place: Path, expected: str) -> list[str]:
    """One run on a cluster."""
    with CLUSTERS[runner](place / f"{runner}-logs") as cluster:
        workspace, started = place / runner, time.monotonic()
        same = child_digest(workspace, start(workspace, cluster.settings, cluster.environment)) == expected
    assert same, f"{runner}: another child"
    return row(f"{runner}, two workers", "no", started, len(blocks(workspace)))


def killed(runner: str, place: Path, expected: str) -> list[str]:
    """One run on a cluster, of which a busy worker is killed once three variants are finished."""
    with CLUSTERS[runner](place / f"{runner}-killed-logs", 2) as cluster:
        workspace, started = place / f"{runner}-killed", time.monotonic()
        process = start(workspace, cluster.settings, cluster.environment)
        while len(blocks(workspace)) < 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        pid = cluster.kill_a_busy_worker()
        finished = blocks(workspace)
        same = child_digest(workspace, process) == expected
    again = sum(blocks(workspace)[path] != when for path, when in finished.items())
    assert same and not again, f"{runner}: same child {same}, trained again {again}"
    return row(f"{runner}, two workers", "a worker", started, len(finished), told_of_death(workspace, pid))


def local(runner: str, place: Path, expected: str) -> list[str]:
    """A cluster that the run starts for itself; a Ray one leaves no token in the home of its user."""
    workspace, home, started = place / f"{runner}-local", place / f"{runner}-home", time.monotonic()
    home.mkdir()
    settings = ["--set", f"orchestration.runner={runner}", "--set", "orchestration.max_workers=2"]
    process, told = start(workspace, settings, {"HOME": str(home)}), ""
    if runner == "ray":
        told = token_of(process)
    same = child_digest(workspace, process) == expected
    assert same, f"{runner}, local: another child"
    assert not (home / ".ray" / "auth_token").exists(), "a token was left in the home of its user"
    return row(f"{runner}, its own", "no", started, len(blocks(workspace)), told)


def token_of(flow: subprocess.Popen[str]) -> str:
    """Where the nodes of a flow's own Ray cluster have their token from: nobody else may read it."""
    while flow.poll() is None:
        for child in psutil.Process(flow.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "raylet/raylet" in " ".join(child.cmdline()):
                    given = child.environ()
                    path = Path(given["RAY_AUTH_TOKEN_PATH"])
                    mode = stat.S_IMODE(path.parent.stat().st_mode)
                    assert given["RAY_AUTH_MODE"] == "token" and len(path.read_text()) == 64 and mode == 0o700
                    return "its nodes ask for a token, from a folder of mode 700; none was left in ~/.ray"
        time.sleep(0.1)
    raise SystemExit((flow.communicate()[0])[-3000:])


def mistaken(runner: str, place: Path) -> list[str]:
    """A device that the workers do not have: only they can tell."""
    workspace = place / f"{runner}-mistaken"
    settings = ["--set", f"orchestration.runner={runner}", "--set", "orchestration.devices=[mps]"]
    process = start(workspace, settings)
    said, _ = process.communicate(timeout=600)
    sentences = [line for line in said.splitlines() if line.startswith("puzzle: ")]
    assert process.returncode == 2 and len(sentences) == 1 and "Traceback" not in said, said[-3000:]
    return [runner, str(process.returncode), sentences[0]]


def main() -> None:
    """Threads first; every cluster against that child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runners", nargs="+", default=list(CLUSTERS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="puzzle-clusters-") as folder:
        place = Path(folder)
        started = time.monotonic()
        expected = child_digest(place / "threads", start(place / "threads"))
        rows = [row("threads", "no", started, len(blocks(place / "threads")))]
        mistakes = []
        for runner in options.runners:
            for run in (undisturbed, killed, local):
                rows.append(run(runner, place, expected))
                print(rows[-1], flush=True)
            mistakes.append(mistaken(runner, place))
            print(mistakes[-1], flush=True)
    columns = ["runner", "killed", "seconds", "finished before", "trained again", "same child", "told"]
    write_page(
        "clusters",
        "The same child on threads, Dask and Ray",
        [
            "Tiny profile, two workers, each a process of its own on one machine, or a cluster that the run started "
            "for itself. *Finished before*: variants in the library when the worker was killed (all, where none "
            "was). *Told*: of a killed worker, in Prefect's log of the task that took over. Seconds of wall time, "
            f"Prefect's start included, load {os.getloadavg()[0]:.0f}.",
            table(columns, rows),
            f"Child {expected[:16]} by the sha256 of its weights, every time.",
            "A mistake that only a worker finds (`orchestration.devices: [mps]` where there is none), no traceback:",
            table(["runner", "exit code", "told"], mistakes),
        ],
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and workers end with it
    main()
