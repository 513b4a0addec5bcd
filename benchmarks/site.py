"""A Prefect and an MLflow server of our own, `puzzle serve` in front of them, and their APIs as the UIs call them.

For benchmarks/operate.py and tests/test_end_to_end.py.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.running.servers import LOOPBACK, QUIET, free_port, mlflow_server, prefect_server, running

ROOT = Path(__file__).resolve().parent.parent
PROFILE = ROOT / "benchmarks" / "operate.yaml"
OVER = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
PATIENCE = 900.0  # seconds; a busy machine takes ten times as long as an idle one
Changes = Mapping[str, Any]


@dataclass
class Site:
    """Where served runs keep their workspaces, the addresses of both servers, and the deployments' common name."""

    root: Path
    prefect: str
    mlflow: str
    name: str
    start_seconds: float = 0.0
    rows: list[list[object]] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def call(self, path: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
        """Status and JSON of a request to Prefect's API."""
        return request(f"{self.prefect}/api{path}", body, method)

    def ask_mlflow(self, path: str) -> Any:
        """JSON of a GET of MLflow's API."""
        status, found = request(f"{self.mlflow}/api/2.0/mlflow{path}")
        assert status == 200, (path, found)
        return found

    def deployment(self, flow: str) -> Any:
        """The deployment of a flow."""
        status, found = self.call(f"/deployments/name/{flow}/{self.name}")
        assert status == 200, found
        return found

    def start(self, flow: str, changes: Changes | None = None, **parameters: Any) -> str:
        """Start a deployment as the UI does. `changes`: values of the profile's form by dotted path. The run's id."""
        deployment = self.deployment(flow)
        body = {"parameters": changed(deployment["parameters"], changes or {}) | parameters}
        status, run = self.call(f"/deployments/{deployment['id']}/create_flow_run", body)
        assert status == 201, run
        return str(run["id"])

    def run(self, run: str) -> Any:
        """A flow run."""
        return self.call(f"/flow_runs/{run}")[1]

    def state(self, run: str) -> Any:
        """The state of a run."""
        return self.run(run)["state"]

    def state_names(self, run: str) -> list[str]:
        """The names of all states that a run has been in, oldest first."""
        found = self.call(f"/flow_run_states/?flow_run_id={run}")[1]
        return [state["name"] for state in sorted(found, key=lambda state: state["timestamp"])]

    def wait(self, run: str, seconds: float = PATIENCE) -> Any:
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

    def artifacts(self, run: str) -> dict[str, Any]:
        """The artifacts of a run by key."""
        _, found = self.call("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in found}

    def mlflow_run_of(self, run: str) -> str:
        """The MLflow run that a flow run names."""
        (own,) = [tag for tag in self.run(run)["tags"] if tag.startswith("mlflow.run_id:")]
        return str(own.removeprefix("mlflow.run_id:"))

    def fired(self, flow: str, schedule: Changes, parameters: Changes) -> Any:
        """The first run that a schedule of a deployment starts, finished; the schedule is taken away again."""
        deployment = self.deployment(flow)
        body = [{"active": True, "schedule": dict(schedule), "parameters": dict(parameters)}]
        status, made = self.call(f"/deployments/{deployment['id']}/schedules", body)
        assert status == 201, made
        asked = {"flow_runs": {"deployment_id": {"any_": [deployment["id"]]}}}
        deadline = time.monotonic() + PATIENCE
        own: list[Any] = []
        while not own:
            assert time.monotonic() < deadline, "the schedule did not fire"
            time.sleep(0.5)
            runs = self.call("/flow_runs/filter", asked)[1]
            own = [run for run in runs if run["auto_scheduled"] and run["state_type"] not in ("SCHEDULED", "PENDING")]
        self.call(f"/deployments/{deployment['id']}/schedules/{made[0]['id']}", method="DELETE")
        self.finished(own[0]["id"])
        return self.run(own[0]["id"])


def changed(parameters: Changes, changes: Changes) -> dict[str, Any]:
    """Parameters of a deployment with some values of the profile filled in, as a form hands them over."""
    made: dict[str, Any] = json.loads(json.dumps(dict(parameters)))
    for path, value in changes.items():
        part, *rest = path.split(".")
        node = made if part in ("budget", "hardware") else made.setdefault("more", {})
        for key in (part, *rest)[:-1]:
            node = node.setdefault(key, {})
        node[rest[-1] if rest else part] = value
    return made


def request(url: str, body: Any = None, method: str | None = None) -> tuple[int, Any]:
    """Status and JSON; asked again while the server says that it is busy."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if (method or data) and "/api/" in url:  # Prefect's changes need a token
        api, client = url.partition("/api/")[0], str(uuid.uuid4())
        status, found = request(f"{api}/api/csrf-token?client={client}")
        headers |= {"Prefect-Csrf-Token": found["token"], "Prefect-Csrf-Client": client} if status == 200 else {}
    asked = urllib.request.Request(url, data=data, headers=headers, method=method)
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
def both_servers(root: Path) -> Iterator[dict[str, str]]:
    """A Prefect and an MLflow server, started at the same time; gives the environment that names them."""
    command, api = prefect_server(free_port())
    own = {**QUIET, "PREFECT_HOME": str(root / ".prefect"), "PREFECT_UI_API_URL": api}
    logger, mlflow = mlflow_server(free_port(), f"sqlite:///{root / 'mlflow.db'}", str(root / "mlartifacts"))
    wanted = [
        running(command, f"{api}/health", root / "prefect-server.log", own, PATIENCE),
        running(logger, f"{mlflow}/health", root / "mlflow-server.log", dict(QUIET), PATIENCE),
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(wanted)) as pool:
            list(pool.map(stack.enter_context, wanted))
        yield {"PREFECT_API_URL": api, "MLFLOW_TRACKING_URI": mlflow}


@contextmanager
def served(
    root: Path, profile: str, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[Site]:
    """`puzzle serve` for the length of the block, on free ports, or before the servers that the environment names."""
    port, mlflow_port = free_port(), free_port()
    given = {"PYTHONPATH": str(ROOT), **(environment or {})}
    prefect = given.get("PREFECT_API_URL", f"http://{LOOPBACK}:{port}/api").removesuffix("/api")
    mlflow = given.get("MLFLOW_TRACKING_URI", f"http://{LOOPBACK}:{mlflow_port}")
    site = Site(root=root, prefect=prefect, mlflow=mlflow, name=Path(profile).stem)
    command = [sys.executable, "-c", "from flows.cli import main; main()", "serve", profile, "--root", str(root)]
    command += ["--port", str(port), "--mlflow-port", str(mlflow_port), *options]
    started, log = time.monotonic(), root / "serve.log"
    try:
        with running(command, f"{prefect}/api/health", log, given, PATIENCE, 60) as process:
            while request(f"{prefect}/api/deployments/name/sweep/{site.name}")[0] != 200:
                assert process.poll() is None and time.monotonic() < started + PATIENCE, "no deployments"
                time.sleep(0.3)
            site.start_seconds = time.monotonic() - started
            yield site
    except BaseException:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise


def environment_of(site: Site) -> dict[str, str]:
    """What a command needs to reach the servers of a site."""
    return {**os.environ, "PREFECT_API_URL": f"{site.prefect}/api", "MLFLOW_TRACKING_URI": site.mlflow}


def child_digest(workspace: Path) -> str:
    """sha256 of the only child of a workspace."""
    (child,) = workspace.glob("runs/*/child/model.safetensors")
    return hashlib.sha256(child.read_bytes()).hexdigest()


def distilling(site: Site, workspace: Path) -> str:
    """A run of `optimize` that has its first block."""
    run = site.start("optimize", workspace=workspace.name)
    while not list(workspace.glob("library/*.json")):
        assert site.state(run)["type"] not in OVER
        time.sleep(0.05)
    return run


def blocks_of(workspace: Path) -> dict[Path, int]:
    """When each block record was written; every one must have its weights, with their digest."""
    for path in workspace.glob("library/*.json"):
        weights = json.loads(path.read_text())["weights"]
        assert (
            not weights or hashlib.sha256((workspace / weights["path"]).read_bytes()).hexdigest() == weights["sha256"]
        )
    return {path: path.stat().st_mtime_ns for path in workspace.glob("library/*.json")}


def same_child(site: Site, workspace: Path, done: dict[Path, int]) -> str:
    """After an interruption: the uninterrupted run's child, no block made anew."""
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert child_digest(workspace) == site.kept["first"]
    assert not list(workspace.rglob("*.part"))
    return f"{len(done)} whole blocks, none of them made anew, the child is the uninterrupted run's bit for bit"
