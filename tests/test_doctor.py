"""Each check of `puzzle doctor` fails when its own thing is wrong, and says what to do."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from filelock import FileLock
from packaging.requirements import Requirement

from tasks.operating import doctor
from tasks.operating.doctor import GIB, Finding
from tasks.running.servers import LOOPBACK, ServerFailure, answer, free_port, is_free, running, stop
from tests.test_nvlabs import puzzle


def only(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    assert (finding.status == "ok") == (not finding.todo)
    return finding


def test_packages_outside_their_range_or_absent_are_wrong() -> None:
    asked = [
        Requirement(text)
        for text in ("fastapi<0.1", "no-such-package>=1", "torch>=2", "vllm>=1; extra == 'x'", "pydantic>=2")
    ]
    found = {finding.name: finding for finding in doctor.packages(asked)}
    assert set(found) == {"fastapi", "no-such-package"}
    assert all(finding.status == "wrong" for finding in found.values())
    assert "fastapi<0.1" in found["fastapi"].todo and "Prefect" in found["fastapi"].detail
    whole = only(doctor.packages([Requirement("torch>=2")]))
    assert whole.status == "ok" and "torch 2." in whole.detail
    assert only(doctor.packages([])).status == "wrong"


def test_a_version_over_its_cap_is_a_warning() -> None:
    over = only(doctor.caps("# tested\ntransformers<5  # older\ntorch>=2\nabsent-package<1\n"))
    assert over.status == "warn" and "transformers" in over.detail and "torch" not in over.detail
    assert only(doctor.caps("torch>=2\n")).status == "ok"
    assert list(doctor.caps("")) == []
    assert "transformers" in doctor.CONSTRAINTS.read_text()


@pytest.mark.parametrize(("free", "status"), [(0.5, "wrong"), (5, "warn"), (50, "ok")])
def test_disk_and_memory(free: float, status: str, tmp_path: Path) -> None:
    assert only(doctor.disk(int(free * GIB), tmp_path)).status == status
    assert only(doctor.memory(int(free * GIB), 64 * GIB)).status == status


def test_threads_tell_a_busy_machine() -> None:
    assert only(doctor.threads(4096, 1.0, {})).status == "ok"
    assert only(doctor.threads(2, 7.5, {})).status == "warn"
    assert "OMP_NUM_THREADS=1" in only(doctor.threads(4096, 0.0, {"OMP_NUM_THREADS": "1"})).detail


def test_extras_are_optional() -> None:
    missing = list(doctor.extras(lambda name: name in ("gensim", "pymoo", "ray")))
    assert {finding.status for finding in missing} == {"warn"}
    assert "lm_eval" in missing[0].detail and "gensim" not in missing[1].detail
    assert not [finding for finding in missing if "pymoo" in finding.detail]
    assert any("prefect_ray" in finding.detail and " ray (" not in finding.detail for finding in missing)
    assert only(doctor.extras(lambda name: True)).status == "ok"


def test_a_workspace_that_is_a_file_or_in_use(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert only(doctor.write_access(file)).status == "wrong"
    workspace = tmp_path / "workspace"
    assert only(doctor.write_access(workspace / "deeper")).status == "ok"
    assert not workspace.exists()
    workspace.mkdir()
    with FileLock(workspace / ".lock"):
        assert "a run is at work" in only(doctor.write_access(workspace)).detail
    assert "can be written" in only(doctor.write_access(workspace)).detail


class Healthy(BaseHTTPRequestHandler):
    """Answers as a Prefect server of another version."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'"2.1.0"' if self.path.endswith("version") else b"true")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_servers_that_do_not_answer_or_are_of_another_version(tmp_path: Path) -> None:
    nobody = f"http://{LOOPBACK}:{free_port()}"
    assert only(doctor.prefect_server({})).status == "ok"
    assert only(doctor.prefect_server({"PREFECT_API_URL": nobody + "/api"})).status == "wrong"
    assert only(doctor.mlflow_store(tmp_path, {"MLFLOW_TRACKING_URI": nobody})).status == "wrong"
    server = HTTPServer((LOOPBACK, 0), Healthy)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://{LOOPBACK}:{server.server_port}"
        assert not is_free(server.server_port)
        other = only(doctor.prefect_server({"PREFECT_API_URL": url + "/api"}))
        assert other.status == "warn" and "2.1.0" in other.detail
        assert only(doctor.mlflow_store(tmp_path, {"MLFLOW_TRACKING_URI": url})).status == "ok"
    finally:
        server.shutdown()
        server.server_close()


def test_damaged_and_unfinished_databases(tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    assert only(doctor.prefect_state(home)).status == "ok"
    home.mkdir()
    database = home / "prefect.db"
    with sqlite3.connect(database) as connection:
        connection.execute("create table flow_run (state_type text)")
        connection.executemany("insert into flow_run values (?)", [("RUNNING",), ("COMPLETED",)])
    connection.close()
    killed = only(doctor.prefect_state(home))
    assert killed.status == "warn" and "1 killed run" in killed.detail
    for place, check in ((database, lambda: doctor.prefect_state(home)), (tmp_path / "mlflow.db", None)):
        place.write_bytes(b"not a database" * 999)
        finding = only(check() if check else doctor.mlflow_store(tmp_path, {}))
        assert finding.status == "wrong" and str(place) in finding.todo


def test_a_server_is_gone_after_its_block_and_a_broken_one_names_its_log(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://{LOOPBACK}:{port}/"
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN); import http.server as h; "
    stubborn += f"h.ThreadingHTTPServer(('{LOOPBACK}', {port}), h.SimpleHTTPRequestHandler).serve_forever()"
    with running([sys.executable, "-c", stubborn], url, tmp_path / "log", {}, 30) as process:
        assert answer(url) is not None
        stop(process, 0.2)
    assert process.returncode == -9 and answer(url) is None
    with (
        pytest.raises(ServerFailure, match=r"log is .*log2, which ends: no users without flask"),
        running(
            [sys.executable, "-c", "print('starting'); raise SystemExit('no users without flask')"],
            url,
            tmp_path / "log2",
            {},
            30,
        ),
    ):
        pass


def test_the_command_tells_every_check_and_its_exit_code(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "from flows.cli import main; main()", "doctor", "--json"]
    ran = subprocess.run([*program, "--workspace", str(tmp_path)], capture_output=True, text=True, timeout=120)
    found = json.loads(ran.stdout)
    assert {"python", "disk", "memory", "workspace", "prefect server", "mlflow", "gpu", "orphans"} <= {
        finding["name"] for finding in found
    }
    assert ran.returncode == int(any(finding["status"] == "wrong" for finding in found))
    (tmp_path / "mlflow.db").write_bytes(b"broken" * 999)
    code, told, _ = puzzle("doctor", "--workspace", tmp_path)
    assert code == 1, told
