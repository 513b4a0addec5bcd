"""Real Dask and Ray clusters on this machine for tests and benchmarks: every worker a process of its own.

Workers are killed and counted by pid; nothing is left behind when the block ends.
"""

import importlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil

from benchmarks.common import ROOT
from tasks.running.servers import LOOPBACK, free_port, stop

BIN = Path(sys.executable).parent


@dataclass
class Cluster:
    """A running cluster: what a profile says to use it, and its worker processes."""

    runner: str
    address: str
    workers: Callable[[], list[psutil.Process]]
    busy: Callable[[], list[psutil.Process]]  # those that have a task right now
    environment: dict[str, str] = field(default_factory=dict)  # the flow's process needs this
    mend: Callable[[], None] = lambda: None  # new workers for those that were killed; Ray starts its own

    @property
    def settings(self) -> list[str]:
        """`--set` of the command line."""
        return [
            *("--set", f"orchestration.runner={self.runner}"),
            *("--set", f"orchestration.address={self.address}"),
        ]

    def kill_a_busy_worker(self, seconds: float = 120) -> int:
        """kill -9 a worker in mid-task; returns its pid. TimeoutError when none has any."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process in self.busy():
                process.send_signal(signal.SIGKILL)
                return int(process.pid)
            time.sleep(0.02)
        raise TimeoutError(f"no worker was busy within {seconds} s")


def _started(
    command: list[str], log: Path, stack: ExitStack, more: Mapping[str, str] = MappingProxyType({})
) -> psutil.Process:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1", **more}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=ROOT, start_new_session=True
        )
    stack.callback(stop, process, 3.0)
    return psutil.Process(process.pid)


def _until(ready: Callable[[], bool], what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} within {seconds} s")
        time.sleep(0.1)


@contextmanager
def dask_cluster(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """A scheduler and so many `dask worker` processes, one thread each, no nanny: a killed one stays dead."""
    from distributed import Client

    folder.mkdir(parents=True, exist_ok=True)
    address = f"tcp://{LOOPBACK}:{(port := free_port())}"
    with ExitStack() as stack:
        command = [str(BIN / "dask"), "scheduler", "--host", LOOPBACK, "--port", str(port), "--no-dashboard"]
        _started(command, folder / "scheduler.log", stack)
        command = [str(BIN / "dask"), "worker", address, "--nthreads", "1", "--no-nanny", "--memory-limit", "0"]
        command += ["--no-dashboard", "--local-directory", str(folder)]
        started: list[psutil.Process] = []
        pids: dict[str, int] = {}
        client = stack.enter_context(Client(address, timeout=180, set_as_default=False))

        def alive() -> list[psutil.Process]:
            return [process for process in started if _lives(process)]

        def mend() -> None:
            for _ in range(workers - len(alive())):
                started.append(_started(command, folder / f"worker-{len(started)}.log", stack))
            _until(lambda: {p.pid for p in alive()} == set(client.run(os.getpid).values()), "no workers")
            pids.update(client.run(_warm))

        mend()

        def busy() -> list[psutil.Process]:
            found = {pids[address] for address, tasks in client.processing().items() if tasks and address in pids}
            return [process for process in alive() if process.pid in found]

        yield Cluster(runner="dask", address=address, workers=alive, busy=busy, mend=mend)


@contextmanager
def ray_cluster(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """A head and one more node, each a raylet of its own with half of `workers` places for tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # Ray listens beyond loopback
    sooner = {"RAY_worker_register_timeout_seconds": "30"}  # else a worker killed at its start is missed after a minute
    with ExitStack() as stack:
        nodes: list[psutil.Process] = []

        def start_node(words: list[str], places: int) -> None:
            command = [str(BIN / "ray"), "start", *words, "--num-cpus", str(places), "--block", "--disable-usage-stats"]
            command += ["--object-store-memory", str(80 << 20)]
            nodes.append(_started(command, folder / f"node-{len(nodes)}.log", stack, {**token, **sooner}))
            _until(lambda: any("raylet/raylet" in _title(child) for child in _below(nodes[-1])), "no raylet")

        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        head = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", temporary]
        start_node(head, workers - workers // 2)
        start_node(["--address", f"{LOOPBACK}:{port}"], workers // 2)

        def named(prefix: str) -> list[psutil.Process]:
            return [p for node in nodes for p in _below(node) if _title(p).startswith(prefix)]

        def all_workers() -> list[psutil.Process]:
            return [p for p in named("ray::") if "Agent" not in _title(p)]

        def busy() -> list[psutil.Process]:
            return [p for p in all_workers() if "IDLE" not in _title(p)]  # Ray writes the task into the title

        yield Cluster(runner="ray", address=f"{LOOPBACK}:{port}", workers=all_workers, busy=busy, environment=token)


def _warm() -> int:
    """In a worker: the imports of the tasks, which take longer than a short task; its process's number."""
    importlib.import_module("flows.stages")
    return os.getpid()


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children(recursive=True) if _lives(child)]
    except psutil.Error:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


CLUSTERS = {"dask": dask_cluster, "ray": ray_cluster}
