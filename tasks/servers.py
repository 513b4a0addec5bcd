"""Servers on this machine: start one and wait until it answers, stop it for certain, find those that a kill left.

Everything binds to loopback. A stop is bounded: SIGTERM, a few seconds, then SIGKILL to the whole process group, since
Prefect's workers have been seen to ignore the first.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from blocks.errors import PuzzleFailure

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 8.0


class ServerFailure(PuzzleFailure):
    """A server that did not come up."""


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


def is_free(port: int) -> bool:
    """True when a server could listen on this port of the loopback device."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def answer(url: str, timeout: float = 5.0) -> str | None:
    """Body of a GET, or None when nobody answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            text: str = response.read().decode("utf-8", errors="replace")
            return text if response.status == 200 else None
    except (OSError, ValueError):  # refused, timed out, an error status, not a URL
        return None


@contextmanager
def running(
    command: Sequence[str],
    health_url: str,
    log: Path,
    environment: Mapping[str, str],
    start_seconds: float = 180,
    grace_seconds: float = GRACE_SECONDS,
    stdin: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server for the length of the block, in a process group of its own. ServerFailure when it does not answer."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        _wait_for(process, health_url, log, start_seconds)
        yield process
    finally:
        stop(process, grace_seconds)


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while answer(url, timeout=2) is None:
        if process.poll() is not None:
            raise ServerFailure(f"the server for {url} ended at once: its log is {log}.")
        if time.monotonic() > deadline:
            raise ServerFailure(f"no answer at {url} after {seconds:.0f} s: the log is {log}.")
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """End a server and whatever it started; returns when it is gone."""
    for number, wait in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
    # a worker in the same group may outlive the leader by a moment


def prefect_server(port: int) -> tuple[list[str], str]:
    """Command of a Prefect server on loopback, and the URL of its API."""
    program = str(Path(sys.executable).parent / "prefect")
    command = [program, "server", "start", "--host", LOOPBACK, "--port", str(port)]
    return command, f"http://{LOOPBACK}:{port}/api"


def mlflow_server(port: int, store: str, artifacts: Path) -> tuple[list[str], str]:
    """Command of an MLflow server on loopback that hands out artifacts, and its URL. One worker: 490 MB, not 811."""
    command = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        *("--backend-store-uri", store),
        *("--artifacts-destination", str(artifacts)),
        *("--host", LOOPBACK, "--port", str(port), "--workers", "1"),
    ]
    return command, f"http://{LOOPBACK}:{port}"


# what every server of ours runs with: quiet, no telemetry, no job workers that nothing here uses
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "WARNING",  # a line for every finished task says nothing
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def orphaned_servers(prefect_home: Path | None = None) -> list[psutil.Process]:
    """Ephemeral Prefect servers whose run was killed: all that are ours to see, or those of one PREFECT_HOME."""
    found = []
    for process in psutil.process_iter(["ppid", "cmdline"]):
        if process.info["ppid"] != 1 or "prefect.server" not in " ".join(process.info["cmdline"] or []):
            continue
        try:
            own = process.environ()
        except psutil.Error:  # gone already, or somebody else's
            continue
        home = own.get("PREFECT_HOME")
        if own.get("PREFECT__SERVER_EPHEMERAL") and (prefect_home is None or home == str(prefect_home)):
            found.append(process)
    return found


def stop_orphaned_servers(prefect_home: Path) -> int:
    """End the ephemeral Prefect servers that a killed process of this workspace left behind. Returns how many."""
    orphans = orphaned_servers(prefect_home)
    for process in orphans:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(orphans)
