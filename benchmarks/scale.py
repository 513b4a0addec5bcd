"""What 1,000 variant tasks cost on threads, Dask and Ray, through a Prefect server process with its own database.

    .venv/bin/python -m benchmarks.scale

Real distill tasks on a tiny parent: 8 layers of 125 FFN widths, the closed form alone (no steps), so that the work of a
task is some milliseconds. The same 1,000 in a plain loop are taken off; what is left is orchestration. Then the flow
again, with everything finished.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, table, write_page
from blocks.compute import HOST
from profiles.schema import Profile
from tasks.running.servers import QUIET, free_port, prefect_server, running

LAYERS, WORKERS = 8, 2


def profile_of(runner: str, tasks: int) -> Profile:
    """A tiny parent and so many FFN widths."""
    widths = [f"ffn{width}" for width in range(8, 8 + tasks // LAYERS)]
    parent = {"kind": "tiny", "hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": LAYERS}
    corpus = {"sources": [{"kind": "python_stdlib", "max_files": 60}], "sequence_length": 32, "train_sequences": 32}
    return Profile.model_validate(
        {
            "name": "scale",
            "parent": {**parent, "train_steps": 0},
            "corpus": {**corpus, "validation_sequences": 8, "test_sequences": 8},
            "search_space": {"attention": [], "ffn": widths},
            "record": {"statistics_sequences": 16, "hidden_sequences": 8, "validation_sequences": 4},
            "bld": {"steps": 0},
            "scoring": {"sequences": 4},
            "gkd": {"batch_sequences": 4, "validation_sequences": 4},
            "evaluate": {"sequences": 8},
            "budget": {"parameters_fraction": 0.9},
            "hardware": {"threads": 1},
            "orchestration": {"runner": runner, "max_workers": WORKERS},
        }
    )


def library_flow(profile: Profile, workspace: str) -> dict[str, float]:
    """Prepare, record, distil: seconds of the distill stage and of the whole."""
    from flows import stages
    from flows.run import Run

    started = time.perf_counter()
    run = Run(profile=profile, workspace=Path(workspace))
    parent, corpus, _ = stages.prepare(run)
    records = stages.record(run, parent, corpus)
    distilling = time.perf_counter()
    blocks = stages.distill_all(run, parent, corpus, records)
    ended = time.perf_counter()
    return {"blocks": len(blocks), "distill": ended - distilling, "flow": ended - started}


def one_run(runner: str, tasks: int, workspace: Path) -> None:
    """In a process of its own: the flow on a runner, or the plain loop; prints what it took as JSON."""
    from blocks.runtime import configure, configure_torch

    configure()
    from prefect import flow

    from flows import stages
    from flows.run import Run
    from tasks.distill import bld, record
    from tasks.distill.jobs import jobs_of
    from tasks.running.workers import task_runner

    profile = profile_of("threads" if runner == "loop" else runner, tasks)
    configure_torch(1)
    started = time.perf_counter()
    if runner == "loop":
        parent, corpus, _ = stages.prepare(Run(profile=profile, workspace=workspace))
        wanted = record.recording_of(profile, parent, corpus, HOST)
        layers = [record.record_layer(i, wanted, workspace, HOST) for i in range(LAYERS)]
        jobs = jobs_of(profile, wanted, layers, record.open_parent(workspace / parent.folder))
        distilling = time.perf_counter()
        done = [bld.distill(job, workspace, HOST) for job in jobs]
        took = {"blocks": len(done), "distill": time.perf_counter() - distilling}
    else:
        with task_runner(profile) as pool:
            took = flow(library_flow, name="scale", task_runner=pool)(profile, str(workspace))
    usage = psutil.Process().memory_info().rss
    print(json.dumps({**took, "whole": time.perf_counter() - started, "rss": usage}), flush=True)


class Watch(threading.Thread):
    """Peak resident memory of a process and of all below it, by name."""

    def __init__(self, own: int, server: int) -> None:
        super().__init__(daemon=True)
        self.roots, self.peak, self.over = (
            {"flow": own, "server": server},
            {"flow": 0, "workers": 0, "server": 0},
            False,
        )

    def run(self) -> None:
        """Look ten times a second."""
        while not self.over:
            flow, workers = _resident(self.roots["flow"])
            server = sum(_resident(self.roots["server"]))
            for name, now in (("flow", flow), ("workers", workers), ("server", server)):
                self.peak[name] = max(self.peak[name], now)
            time.sleep(0.1)


def _resident(pid: int) -> tuple[int, int]:
    """Bytes of a process, and of all below it."""
    try:
        process = psutil.Process(pid)
        below = 0
        for child in process.children(recursive=True):
            try:
                below += child.memory_info().rss
            except psutil.Error:
                continue
        return process.memory_info().rss, below
    except psutil.Error:
        return 0, 0


def measured(runner: str, tasks: int, workspace: Path, url: str, server: int) -> dict[str, Any]:
    """One run as a process of its own against the server; peaks in bytes."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", runner, "--tasks", str(tasks)]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "PREFECT_API_URL": url}
    environment |= {"PREFECT_LOGGING_LEVEL": "WARNING", "PREFECT_LOCAL_STORAGE_PATH": str(workspace / "results")}
    process = subprocess.Popen(
        [*command, "--workspace", str(workspace)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    watch = Watch(process.pid, server)
    watch.start()
    output, _ = process.communicate(timeout=3000)
    watch.over = True
    if process.returncode:
        raise SystemExit(f"{runner} failed")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return {**found, **{f"{name} peak": peak for name, peak in watch.peak.items()}}


def on_a_fresh_server(runner: str, tasks: int, place: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """First run, the same again, bytes of the database afterwards."""
    home, workspace = place / f"{runner}-prefect", place / runner
    home.mkdir(parents=True)
    command, url = prefect_server(free_port())
    with running(
        command, f"{url}/health", place / f"{runner}-server.log", {**QUIET, "PREFECT_HOME": str(home)}
    ) as server:
        first = measured(runner, tasks, workspace, url, server.pid)
        time.sleep(5)  # events are written in batches
        again = measured(runner, tasks, workspace, url, server.pid)
        size = sum(path.stat().st_size for path in home.glob("prefect.db*"))
    return first, again, size


def main() -> None:
    """Every runner on a server of its own; the plain loop first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--runners", nargs="+", default=["threads", "dask", "ray"])
    parser.add_argument("--one", help="one run in this process, for the benchmark itself")
    parser.add_argument("--workspace", type=Path)
    options = parser.parse_args()
    if options.one:
        one_run(options.one, options.tasks, options.workspace)
        return
    rows, again_rows = [], []
    with tempfile.TemporaryDirectory(prefix="puzzle-scale-") as folder:
        place = Path(folder)
        loop, _, _ = on_a_fresh_server("loop", options.tasks, place)
        plain = loop["distill"] / loop["blocks"]
        for runner in options.runners:
            first, again, size = on_a_fresh_server(runner, options.tasks, place)
            assert first["blocks"] == again["blocks"] == loop["blocks"]
            each = first["distill"] / first["blocks"]
            peaks = [f"{first[f'{name} peak'] / 2**30:.3f}" for name in ("flow", "workers", "server")]
            rows.append(
                [runner, f"{first['distill']:.1f}", f"{1000 * (each - plain):.0f}", *peaks, f"{size / 2**20:.1f}"]
            )
            again_rows.append([runner, f"{again['distill']:.2f}", f"{again['flow']:.1f}", f"{again['whole']:.1f}"])
            print(rows[-1], again_rows[-1], flush=True)
    write_page(
        "scale",
        f"{loop['blocks']} variant tasks",
        [
            f"Real distill tasks on a tiny parent ({LAYERS} layers, {options.tasks // LAYERS} FFN widths each, closed "
            f"form alone): {1000 * plain:.0f} ms each in a plain loop. {WORKERS} threads or local worker processes. "
            "*Orchestration*: wall time of the distill stage per task, less the plain loop's (two workers may work "
            "at a time, so it is a lower bound by at most that). Memory is the highest resident size of the flow's "
            "process, of all processes below it together (workers, Ray's daemons), and of the server; the database is "
            f"SQLite, both runs in it. Load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores.",
            table(
                [
                    "runner",
                    "distill, s",
                    "orchestration, ms a task",
                    "flow, GiB",
                    "workers, GiB",
                    "server, GiB",
                    "DB, MiB",
                ],
                rows,
            ),
            "The same again, everything finished: the library is asked first, and the task of each variant ends as "
            "`Cached` in the flow's process. *Flow*: parent, corpus and recordings found as well; *whole*: with "
            "the start of the cluster, without imports.",
            table(["runner", "distill, s", "flow, s", "whole, s"], again_rows),
        ],
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers and workers end with it
    main()
