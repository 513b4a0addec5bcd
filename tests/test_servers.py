"""Servers that a killed process left behind are found and stopped; one that is away is waited for."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.errors import disk_is_full
from tasks.running import servers
from tasks.running.servers import (
    LOOPBACK,
    ServerFailure,
    answer,
    free_port,
    is_up,
    running,
    stop_left_behind,
    wait_for_answer,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a child, as a server with its worker."""
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    process = subprocess.Popen([sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"], stdout=-1)
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
        assert is_up(f"http://{LOOPBACK}:{port}/nothing-there")  # an answer, if not a good one
    assert not (tmp_path / "web.pid").exists() and not is_up(f"http://{LOOPBACK}:{port}/")


def test_a_server_that_is_away_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(servers, "say", said.append)
    port = free_port()
    url = f"http://{LOOPBACK}:{port}"
    with pytest.raises(ServerFailure, match="has not answered"):
        wait_for_answer("MLflow", url, seconds=0.1)
    found: list[HTTPServer] = []

    def come_back() -> None:
        found.append(HTTPServer((LOOPBACK, port), SimpleHTTPRequestHandler))
        found[0].serve_forever()

    threading.Timer(0.5, come_back).start()
    said.clear()
    wait_for_answer("MLflow", url, seconds=20)
    found[0].shutdown()
    assert [line.split(url)[1] for line in said] == [
        " does not answer: waiting for it, 0 minutes at most",
        " answers again",
    ]


def test_a_server_that_answered_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    now = [100.0]

    def answers(url: str) -> bool:
        asked.append(url)
        return True

    monkeypatch.setattr(servers, "is_up", answers)
    monkeypatch.setattr(servers, "_ANSWERED", {})
    monkeypatch.setattr("tasks.running.servers.time.monotonic", lambda: now[0])
    for later in (0, 1, servers.FRESH_SECONDS - 1.5, 1):
        now[0] += later
        wait_for_answer("MLflow", "http://one")
    assert asked == ["http://one/health"] * 2
    wait_for_answer("MLflow", "http://other")
    assert asked[2:] == ["http://other/health"]


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
            for _ in range(2):
                with server.accept()[0] as one:
                    one.recv(1000)
                    one.sendall(b"SSH-2.0\r\n")

        thread = threading.Thread(target=talk)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        found: list[Any] = []
        for ask in (answer, is_up):
            try:
                found.append(ask(url))
            except Exception as error:
                found.append(error)
        thread.join()
    assert found == [None, False]
