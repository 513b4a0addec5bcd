"""Servers on this machine: start one and wait until it answers, stop it for certain, find those that a kill left.

Everything binds to loopback. A stop is bounded: SIGTERM, a few seconds, then SIGKILL to the whole process group, since
Prefect's workers have been seen to ignore the first.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from blocks.errors import PuzzleFailure

LOOPBACK = "127.0.0.1"
PREFECT_DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
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
        found = httpx.get(url, timeout=timeout, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL):  # refused, timed out, no HTTP, not a URL
        return None
    return found.text if found.status_code == httpx.codes.OK else None


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
    kept = log.with_suffix(".pid")
    if stop_left_behind(kept):
        logging.getLogger("puzzle").info("stopped the server that a killed process left behind (%s)", kept.stem)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    kept.write_text(" ".join(_identity(each) for each in (psutil.Process(process.pid), psutil.Process())))
    try:
        _wait_for(process, health_url, log, start_seconds)
        yield process
    finally:
        stop(process, grace_seconds)
        kept.unlink(missing_ok=True)


def _identity(process: psutil.Process) -> str:
    """Number and start time: numbers are used again."""
    return f"{process.pid} {process.create_time()}"


def _found(number: str, created: str) -> psutil.Process | None:
    """The living process of an identity."""
    try:
        process = psutil.Process(int(number))
        same = abs(process.create_time() - float(created)) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (ValueError, psutil.NoSuchProcess):
        return None


def stop_left_behind(kept: Path) -> bool:
    """End the server whose process a killed process kept in a file; True when there was one. One whose starter lives is
    somebody's, and left alone.
    """
    process, starter = _kept(kept)
    if process is None or starter is not None:
        return False
    stop(process)
    return True


def is_up(kept: Path) -> bool:
    """Whether the server whose process is kept in a file lives, and whoever started it."""
    return None not in _kept(kept)


def _kept(kept: Path) -> tuple[psutil.Process | None, psutil.Process | None]:
    """The server and its starter, as `running` wrote them into a file; None for one that is gone."""
    try:
        words = kept.read_text().split()
        return _found(*words[:2]), _found(*words[2:])
    except (OSError, TypeError):  # the second: not a file of ours
        return None, None


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while answer(url, timeout=2) is None:
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise ServerFailure(f"the server for {url} ended at once: its log is {log}, which ends: {said[:500]}")
        if time.monotonic() > deadline:
            raise ServerFailure(f"no answer at {url} after {seconds:.0f} s: the log is {log}.")
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes] | psutil.Process, grace_seconds: float = GRACE_SECONDS) -> None:
    """End a server and its process group, whatever it started; returns when they are gone."""
    workers: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        workers = psutil.Process(process.pid).children(recursive=True)
    for number, wait in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
            process.wait(wait)
    psutil.wait_procs(workers, timeout=GRACE_SECONDS)  # one may outlive its leader by a moment


def sqlite_url(path: Path, driver: str = "pysqlite") -> str:
    """The database in a file, as SQLAlchemy, MLflow and Prefect read it: a path may hold `?`, `%` and `#`.

    The driver is named: for a plain `sqlite:` MLflow would make a folder by the quoted name.
    """
    from sqlalchemy.engine import URL

    return URL.create(f"sqlite+{driver}", database=str(path.resolve())).render_as_string()


def sqlite_file(url: str) -> Path | None:
    """The file of the database at this URL; None when the database is not SQLite, or has no file."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        found = make_url(url)
    except (ArgumentError, ValueError):  # the second: a port that is no number
        return None
    return Path(found.database) if found.get_backend_name() == "sqlite" and found.database else None


def prefect_database(home: Path) -> dict[str, str]:
    """What Prefect is to be told about its database in this home: nothing where its own default names the file.

    Prefect writes the path into a URL as it is, so one with `?`, `%` or `#` would name another file.
    """
    file = home / "prefect.db"
    url = sqlite_url(file, "aiosqlite")
    return {} if url == f"sqlite+aiosqlite:///{file.resolve()}" else {PREFECT_DATABASE: url}


def prefect_server(port: int) -> tuple[list[str], str]:
    """Command of a Prefect server on loopback, and the URL of its API."""
    program = str(Path(sys.executable).parent / "prefect")
    command = [program, "server", "start", "--host", LOOPBACK, "--port", str(port)]
    return command, f"http://{LOOPBACK}:{port}/api"


def prefect_guards(port: int) -> dict[str, str]:
    """Environment of a Prefect server that pages of other sites can neither read nor write to.

    By default it lets every origin read, and a change needs no token: any page in a browser on this machine could start
    runs. What the environment says already stands, for a server behind a proxy.
    """
    wanted = {
        "PREFECT_UI_API_URL": f"http://{LOOPBACK}:{port}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": _origins(port),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",  # Prefect's clients and its UI ask for a token by themselves
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def mlflow_server(port: int, store: str, artifacts: str) -> tuple[list[str], str]:
    """Command of an MLflow server on loopback that hands out artifacts, and its URL. One worker: 490 MB, not 811.

    It answers to the names of this machine's loopback device alone, and pages of other sites cannot write to it. What
    MLflow's own variables say wins, and stays off the command line, where others could read a password.
    """
    options = {
        "MLFLOW_BACKEND_STORE_URI": ("--backend-store-uri", store),
        "MLFLOW_ARTIFACTS_DESTINATION": ("--artifacts-destination", artifacts),
        "MLFLOW_SERVER_ALLOWED_HOSTS": ("--allowed-hosts", f"{LOOPBACK}:*,localhost:*"),  # any port: of a tunnel
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ("--cors-allowed-origins", _origins(port)),
    }
    command = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        *(word for name, words in options.items() if not os.environ.get(name) for word in words),
        *(("--app-name", "basic-auth") if os.environ.get("MLFLOW_AUTH_CONFIG_PATH") else ()),
        *("--host", LOOPBACK, "--port", str(port), "--workers", "1"),
    ]
    return command, f"http://{LOOPBACK}:{port}"


def _origins(port: int) -> str:
    return f"http://{LOOPBACK}:{port},http://localhost:{port}"


# what every server of ours runs with: quiet, no telemetry, no job workers that nothing here uses, deaths remembered
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P30D",  # tasks/operating/watch.py says why
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
