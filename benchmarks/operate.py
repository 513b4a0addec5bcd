"""Operated for real: `puzzle serve` with its Prefect and MLflow servers, everything asked for through their APIs.

    .venv/bin/python -m benchmarks.operate

Each row is a thing that a person would do in the UI, the seconds until it was done, and what both servers said of it
afterwards. Any answer that is not the expected one ends the benchmark with an error and the log of the servers.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import ROOT, table, write_page
from tasks.presence import others_at_work
from tasks.servers import LOOPBACK, free_port, running

PROFILE = ROOT / "benchmarks" / "operate.yaml"
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def main() -> None:
    """Serve, operate, stop; write benchmarks/operate.md."""
    with tempfile.TemporaryDirectory(prefix="puzzle-operate-") as place, served(Path(place)) as site:
        for step in (refused, optimized, escaped, cancelled, suspended, crowned, completed, scheduled):
            started = time.monotonic()
            said = step(site)
            site.rows.append(
                [(step.__doc__ or "").split("\n")[0].rstrip("."), f"{time.monotonic() - started:.0f}", said]
            )
            print(site.rows[-1], flush=True)
    left = [
        process.pid for process in psutil.process_iter(["cmdline"]) if place in " ".join(process.info["cmdline"] or [])
    ]
    assert not left, f"processes survive `puzzle serve`: {left}"
    load = os.getloadavg()[0]
    write_page(
        "operate",
        "Operated through the servers",
        [
            f"`puzzle serve benchmarks/operate.yaml` in a fresh folder: up and deployments registered after "
            f"{site.start_seconds:.0f} s, nothing left running when stopped. Seconds of wall time, load {load:.0f} "
            "on 2 cores; the start of each run's process and its imports are most of them.",
            table(["step", "seconds", "what the servers said"], site.rows),
        ],
    )


@dataclass
class Site:
    """The serving process and how to reach what it started."""

    root: Path
    prefect: str
    mlflow: str
    start_seconds: float = 0.0
    rows: list[list[object]] = field(default_factory=list)
    children: dict[str, str] = field(default_factory=dict)

    def call(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and JSON of a request to Prefect's API."""
        return request(f"{self.prefect}/api{path}", body, method)

    def ask_mlflow(self, path: str) -> Any:
        """JSON of a GET of MLflow's API."""
        status, found = request(f"{self.mlflow}/api/2.0/mlflow{path}")
        assert status == 200, (path, found)
        return found

    def start(self, flow: str, workspace: str, **more: Any) -> str:
        """Start a deployment as the UI does; `profile__a__b=...` changes a value of its form. Returns the run's id."""
        _, deployment = self.call(f"/deployments/name/{flow}/operate")
        parameters = {**deployment["parameters"], "workspace": workspace}
        for path, value in more.items():
            node: Any = parameters
            *above, last = path.split("__")
            for key in above:
                node = node[key]
            node[last] = value
        status, run = self.call(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
        assert status == 201, run
        return str(run["id"])

    def state(self, run: str) -> Any:
        """The state of a run."""
        return self.call(f"/flow_runs/{run}")[1]["state"]

    def wait(self, run: str, seconds: float = 400) -> Any:
        """The final state of a run."""
        deadline = time.monotonic() + seconds
        while (state := self.state(run))["type"] not in OVER:
            assert time.monotonic() < deadline, f"run {run} is {state['name']} after {seconds:.0f} s"
            time.sleep(0.3)
        return state

    def finished(self, run: str) -> Any:
        """The state of a run that must complete."""
        state = self.wait(run)
        assert state["type"] == "COMPLETED", state["message"]
        return state


def request(url: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """Status and JSON; asked again while the server says that it is busy."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data=data, headers={"content-type": "application/json"}, method=method)
    for _ in range(20):
        try:
            with urllib.request.urlopen(asked, timeout=120) as response:
                text = response.read()
                return response.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            if error.code != 503:  # SQLite is busy: Prefect's own client asks again too
                return error.code, error.read().decode()
            time.sleep(0.5)
    return 503, "still busy"


@contextmanager
def served(root: Path) -> Iterator[Site]:
    """`puzzle serve` on free ports for the length of the block."""
    port, mlflow_port = free_port(), free_port()
    site = Site(root=root, prefect=f"http://{LOOPBACK}:{port}", mlflow=f"http://{LOOPBACK}:{mlflow_port}")
    command = [sys.executable, "-c", "from flows.cli import main; main()", "serve", str(PROFILE), "--root", str(root)]
    command += ["--port", str(port), "--mlflow-port", str(mlflow_port)]
    started = time.monotonic()
    log = root / "serve.log"
    try:
        with running(command, f"{site.prefect}/api/health", log, {"PYTHONPATH": str(ROOT)}, 240, 60) as process:
            while request(f"{site.prefect}/api/deployments/name/sweep/operate")[0] != 200:
                assert process.poll() is None and time.monotonic() < started + 300, "no deployments"
                time.sleep(0.5)
            site.start_seconds = time.monotonic() - started
            yield site
    except BaseException:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise


def refused(site: Site) -> str:
    """A form with a wrong value, an unknown field, a workspace that is a path."""
    _, deployment = site.call("/deployments/name/optimize/operate")
    reasons = []
    for change in ({"budget": {"layer_parameters_fraction": 7}}, {"sped_up": 2}, "../elsewhere"):
        profile, workspace = deployment["parameters"]["profile"], "w"
        if isinstance(change, dict):
            profile = {**profile, **change}
        else:
            workspace = change
        body = {"parameters": {"profile": profile, "workspace": workspace}}
        status, said = site.call(f"/deployments/{deployment['id']}/create_flow_run", body)
        assert status == 409, said
        reasons.append(said.split("Failure reason: ")[1].split('"}')[0])
    return "409: " + "; ".join(reasons)


def child_digest(workspace: Path) -> str:
    """sha256 of the only child of a workspace."""
    (child,) = workspace.glob("runs/*/child/model.safetensors")
    return hashlib.sha256(child.read_bytes()).hexdigest()


def optimized(site: Site) -> str:
    """The deployment `optimize`, started and waited for."""
    run = site.start("optimize", "first")
    site.finished(run)
    _, found = site.call(f"/flow_runs/{run}")
    (mlflow_run,) = [tag.removeprefix("mlflow.run_id:") for tag in found["tags"] if tag.startswith("mlflow.run_id:")]
    _, artifacts = site.call("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    keys = {artifact["key"] for artifact in artifacts}
    assert {"report", "architecture", "block-library", "costs", "chosen", "stage-distill", "mlflow-run"} <= keys, keys
    bars = [artifact for artifact in artifacts if artifact["type"] == "progress"]
    assert all(bar["data"] == 100 and "done in" in bar["description"] for bar in bars)
    logged = site.ask_mlflow(f"/runs/get?run_id={mlflow_run}")["run"]
    tags = {tag["key"]: tag["value"] for tag in logged["data"]["tags"]}
    metrics = {metric["key"]: metric["value"] for metric in logged["data"]["metrics"]}
    assert tags["prefect.flow_run_id"] == run and run in tags["prefect.flow_run_url"]
    assert logged["info"]["status"] == "FINISHED" and metrics["child/kl"] >= 0
    site.children["first"] = child_digest(site.root / "first")
    return (
        f"Prefect: Completed, {len(bars)} progress bars, {len(keys)} artifacts; MLflow: {logged['info']['status']}, "
        f"child/kl {metrics['child/kl']:.4f}, {len(metrics)} metrics, each names the other"
    )


def escaped(site: Site) -> str:
    """A corpus outside the folders that served runs may read."""
    sources = [{"kind": "text", "path": "/etc/passwd"}]
    state = site.wait(site.start("optimize", "escape", profile__corpus__sources=sources))
    assert state["type"] == "FAILED" and "is not below a folder" in state["message"], state
    assert not (site.root / "escape").exists()
    return f"Failed: {state['message'].split(': ', 1)[-1]}; nothing was written"


def cancelled(site: Site) -> str:
    """Cancelled through the API in mid-distillation, then started again."""
    workspace = site.root / "cancelled"
    run = site.start("optimize", "cancelled")
    while not list(workspace.glob("library/*.json")):
        assert site.state(run)["type"] not in OVER
        time.sleep(0.05)
    asked = time.monotonic()
    site.call(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    state = site.wait(run)
    took = time.monotonic() - asked
    assert state["type"] == "CANCELLED", state
    done = {path: path.stat().st_mtime_ns for path in workspace.glob("library/*.json")}
    for path in done:
        weights = json.loads(path.read_text())["weights"]
        if weights:
            assert hashlib.sha256((workspace / weights["path"]).read_bytes()).hexdigest() == weights["sha256"]
    assert not list(workspace.glob("runs/*/child"))
    site.finished(site.start("optimize", "cancelled"))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert child_digest(workspace) == site.children["first"]
    return (
        f"Cancelled after {took:.0f} s with {len(done)} whole blocks; started again none of them was made anew, the "
        "child is the uninterrupted run's bit for bit"
    )


def suspended(site: Site) -> str:
    """Suspended through the API in mid-distillation, then resumed."""
    workspace = site.root / "suspended"
    run = site.start("optimize", "suspended")
    while not list(workspace.glob("library/*.json")):
        assert site.state(run)["type"] not in OVER
        time.sleep(0.05)
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    details = {"pause_reschedule": True, "pause_timeout": until}
    site.call(
        f"/flow_runs/{run}/set_state", {"state": {"type": "PAUSED", "name": "Suspended", "state_details": details}}
    )
    asked = time.monotonic()
    while others_at_work(workspace):
        assert time.monotonic() < asked + 120, "the suspended run holds its workspace"
        time.sleep(0.2)
    took = time.monotonic() - asked
    done = {path: path.stat().st_mtime_ns for path in workspace.glob("library/*.json")}
    assert site.state(run)["type"] == "PAUSED"
    status, said = site.call(f"/flow_runs/{run}/resume", {})
    assert status in (200, 201), said
    site.finished(run)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert child_digest(workspace) == site.children["first"]
    return f"its process was gone after {took:.0f} s with {len(done)} whole blocks; resumed, the same child bit for bit"


def crowned(site: Site) -> str:
    """`reoptimize`: the first champion, nothing changed, a worse challenger, a tighter budget, a rollback."""
    said = []
    worse = {"profile__gkd__steps": 0, "profile__bld__steps": 0, "profile__bld__closed_form": False}
    tighter = {"profile__budget__layer_parameters_fraction": 0.45}
    for more, expected, version in (({}, "First", 1), ({}, "Unchanged", 1), (worse, "Kept", 1), (tighter, "Moved", 3)):
        run = site.start("reoptimize", "first", **more)
        state = site.finished(run)
        found = site.ask_mlflow("/registered-models/alias?name=puzzle-operate&alias=champion")["model_version"]
        assert state["name"] == expected and int(found["version"]) == version, (state, found)
        seconds = site.call(f"/flow_runs/{run}")[1]["total_run_time"]
        said.append(f"{expected} ({seconds:.1f} s of run): {state['message']}; champion is version {version}")
    command = [sys.executable, "-c", "from flows.cli import main; main()", "rollback", str(PROFILE)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": site.mlflow}
    ran = subprocess.run(
        [*command, "--workspace", str(site.root / "first")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return "; ".join([*said, ran.stdout.strip()])


def completed(site: Site) -> str:
    """`mlflow models serve` on the champion, in a process that knows no puzzle."""
    port = free_port()
    bin_folder = Path(sys.executable).parent
    command = [str(bin_folder / "mlflow"), "models", "serve", "-m", "models:/puzzle-operate@champion"]
    command += ["--env-manager", "local", "--host", LOOPBACK, "--port", str(port)]
    environment = {"MLFLOW_TRACKING_URI": site.mlflow, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    with running(command, f"http://{LOOPBACK}:{port}/ping", site.root / "models.log", environment):
        body = {"inputs": [{"prompt": "import ", "max_new_tokens": 8}, {"prompt": "def "}]}
        status, found = request(f"http://{LOOPBACK}:{port}/invocations", body)
    assert status == 200 and [len(text) > 0 for text in found["predictions"]] == [True, True], found
    return f"200, completions of {[len(text) for text in found['predictions']]} characters"


def scheduled(site: Site) -> str:
    """A cron schedule of `reoptimize` that fires."""
    _, deployment = site.call("/deployments/name/reoptimize/operate")
    tight = {**deployment["parameters"], "workspace": "first"}
    tight["profile"]["budget"]["layer_parameters_fraction"] = 0.45
    schedule = {"active": True, "schedule": {"cron": "* * * * *", "timezone": "UTC"}, "parameters": tight}
    status, made = site.call(f"/deployments/{deployment['id']}/schedules", [schedule])
    assert status == 201, made
    wanted = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}, "sort": "START_TIME_DESC"}
    deadline = time.monotonic() + 300
    fired: list[Any] = []
    while not fired:
        assert time.monotonic() < deadline, "the schedule did not fire"
        time.sleep(1)
        runs = site.call("/flow_runs/filter", wanted)[1]
        fired = [run for run in runs if run["auto_scheduled"] and run["state_type"] in OVER]
    with contextlib.suppress(AssertionError):
        site.call(f"/deployments/{deployment['id']}/schedules/{made[0]['id']}", method="DELETE")
    run = fired[0]
    assert run["state"]["name"] == "Unchanged", run["state"]
    return f"{run['state']['name']}, {run['total_run_time']:.1f} s of run, created by the scheduler"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
