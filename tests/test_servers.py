"""Servers that a killed process left behind are found and stopped; one that is away is waited for."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from blocks.errors import disk_is_full
from flows import finish
from tasks.operating import tracking
from tasks.running.servers import (
    LOOPBACK,
    answer,
    free_port,
    running,
    stop_left_behind,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child, as a server with its worker."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    command = [sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=-1, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_server_left_behind_is_stopped_with_its_workers(sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
    kept, process = tmp_path / "server.pid", psutil.Process(sleeper.pid)
    (worker,) = process.children()
    gone, here = f"{sleeper.pid} 1.0", psutil.Process()
    kept.write_text(f"{sleeper.pid} {process.create_time() - 100} {gone}")
    assert not stop_left_behind(kept) and process.is_running(), "the number is another process's by now"
    kept.write_text(f"{sleeper.pid} {process.create_time()} {here.pid} {here.create_time()}")
    assert not stop_left_behind(kept) and process.is_running(), "its starter lives"
    kept.write_text(f"{sleeper.pid} {process.create_time()} {gone}")
    assert stop_left_behind(kept) and not process.is_running()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert not stop_left_behind(kept) and not stop_left_behind(tmp_path / "none.pid")


def test_a_server_is_known_by_its_pid_file_while_it_runs(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", "--bind", LOOPBACK, str(port)]
    with running(command, f"http://{LOOPBACK}:{port}/", tmp_path / "web.log", {}) as process:
        assert (tmp_path / "web.pid").read_text().split()[0] == str(process.pid)
        assert answer(f"http://{LOOPBACK}:{port}/") and answer(f"http://{LOOPBACK}:{port}/nothing-there") is None
    assert not (tmp_path / "web.pid").exists() and answer(f"http://{LOOPBACK}:{port}/") is None


def test_a_full_disk_is_known_whoever_says_it() -> None:
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error)"),
    ):
        assert disk_is_full(error)
    try:
        try:
            raise RuntimeError("database or disk is full")
        except RuntimeError as first:
            raise ValueError("the store failed") from first
    except ValueError as second:
        assert disk_is_full(second)
    assert not disk_is_full(OSError(2, "no such file")) and not disk_is_full(None)


def test_a_server_that_speaks_no_http_is_not_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            with server.accept()[0] as one:
                one.recv(1000)
                one.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        assert answer(f"http://127.0.0.1:{server.getsockname()[1]}") is None
        thread.join()
    assert answer("http://[") is None and answer("not a URL") is None


@pytest.mark.parametrize("runs", [True, False])
def test_a_server_that_runs_is_linked_to_and_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """Asked is for this very run: another server on the port does not know it."""
    asked = []

    def knows(url: str, timeout: float) -> str | None:
        asked.append(url)
        return "{}" if runs else None

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(finish, "answer", knows)
    monkeypatch.setattr(tracking, "answer", knows)
    tracked: Any = SimpleNamespace(
        prefect_run_id="p1",
        mlflow_run_id="m1",
        tracking=SimpleNamespace(workspace=tmp_path, experiment_id="7"),
    )
    told = "\n".join(finish.ui_commands(tracked))
    assert ("server" in told) != runs
    assert "http://127.0.0.1:4200/runs/flow-run/p1" in told and "http://127.0.0.1:5000/#/experiments/7/runs/m1" in told
    assert [url.rpartition("/")[2] for url in asked] == ["get?run_id=m1", "p1"]
