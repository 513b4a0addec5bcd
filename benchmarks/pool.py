"""The deployments of `prefect.yaml` on a process worker, for benchmarks/operate.py; the worker killed with its run."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from benchmarks.site import (
    PATIENCE,
    PROFILE,
    ROOT,
    Site,
    blocks_of,
    both_servers,
    child_digest,
    distilling,
    environment_of,
    same_child,
)
from tasks.operating.watch import RESTART, SILENCE_SECONDS
from tasks.running.servers import stop


@contextmanager
def pool(root: Path) -> Iterator[Site]:
    """Both servers; the first step, `deployed`, makes the pool and its worker, which is stopped at the end."""
    started = time.monotonic()
    with both_servers(root) as named:
        site = Site(
            root=root,
            prefect=named["PREFECT_API_URL"].removesuffix("/api"),
            mlflow=named["MLFLOW_TRACKING_URI"],
            name="puzzle",
            start_seconds=time.monotonic() - started,
        )
        try:
            yield site
        except BaseException:
            if site.workers:
                print((root / "worker.log").read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            for worker in site.workers:
                stop(worker, 30)


def start_worker(site: Site) -> None:
    """`prefect worker start`."""
    command = [str(Path(sys.executable).parent / "prefect"), "worker", "start", "--pool", "local", "--limit", "1"]
    with (site.root / "worker.log").open("ab") as log:
        site.workers.append(
            subprocess.Popen(
                command, cwd=ROOT, env=worker_environment(site), stdout=log, stderr=log, start_new_session=True
            )
        )


def deployed(site: Site) -> str:
    """`prefect work-pool create`, `prefect deploy --all`, `prefect worker start`."""
    said = [
        prefect(site, *words) for words in (("work-pool", "create", "local", "--type", "process"), ("deploy", "--all"))
    ]
    start_worker(site)
    flows = ("optimize", "reoptimize", "sweep", "measure-hardware")
    assert all(site.deployment(flow)["work_pool_name"] == "local" for flow in flows), said
    return f"4 deployments in the work pool: {', '.join(f'{flow}/{site.name}' for flow in flows)}"


def prefect(site: Site, *words: str) -> str:
    """A command of Prefect's, in the repository."""
    command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", *words]
    ran = subprocess.run(
        command, cwd=ROOT, env=worker_environment(site), capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def worked(site: Site) -> str:
    """A run of `optimize` that the worker picked up."""
    run = site.start("optimize", workspace="pool")
    site.finished(run)
    found = site.run(run)
    site.kept["first"] = child_digest(site.root / "pool")
    assert found["work_pool_name"] == "local" and list((site.root / "pool" / "runs").glob("*/child/model.safetensors"))
    return (
        f"Completed in {found['total_run_time']:.0f} s, {len(site.artifacts(run))} artifacts, a child in its workspace"
    )


def shipped(site: Site) -> str:
    """`optimize/tiny`, the deployment of a shipped profile, started as it is."""
    run = replace(site, name="tiny").start("optimize")
    site.finished(run)
    return f"Completed in {site.run(run)['total_run_time']:.0f} s, child {child_digest(site.root / 'tiny')[:12]}"


def measured(site: Site) -> str:
    """`measure-hardware` through the pool, in a workspace of its own."""
    run = site.start("measure-hardware", workspace="fresh")
    site.finished(run)
    (stored,) = (site.root / "fresh" / "costs").glob("*.json")
    costs, shown = json.loads(stored.read_text())["costs"], json.loads(site.artifacts(run)["costs"]["data"])
    assert len(costs) == len(shown) and all(cost["prefill_seconds"] >= 0 for cost in costs)
    return f"{len(costs)} costs stored and shown as a table"


def swept(site: Site) -> str:
    """`sweep` through the pool, on the library of the run above; then on a workspace without one."""
    run = site.start("sweep", workspace="pool", over="parameters", points=12, memory_gib="95%")
    site.finished(run)
    found = json.loads(site.artifacts(run)["sweep"]["data"])
    scores = [row["score"] for row in found if row["score"] is not None]
    assert len(found) == 12 and scores == sorted(scores, reverse=True), found
    state = site.wait(site.start("sweep", workspace="nowhere"))
    assert state["type"] == "FAILED", state
    without = f"on a workspace without a library: {state['message']}"
    return f"12 limits, {len(scores)} with a child, score {scores[0]:.3f} to {scores[-1]:.3f}; {without}"


def worker_environment(site: Site) -> dict[str, str]:
    """What the deployments and the worker are given, as docs/how-to/operate.md says."""
    profiles = f"operate={PROFILE}:tiny=tiny:smollm2-cpu=smollm2-cpu"
    named = {"PUZZLE_HOME": str(ROOT), "PUZZLE_ROOT": str(site.root), "PUZZLE_PROFILES": profiles}
    quiet = {
        "PREFECT_HOME": str(site.root / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    return {**environment_of(site), **named, **quiet, "PYTHONPATH": str(ROOT), "MLFLOW_DISABLE_TELEMETRY": "true"}


def killed(site: Site) -> str:
    """The worker and its run killed with `kill -9` in mid-distillation; a worker started again after it was noticed."""
    workspace = site.root / "killed"
    run = distilling(site, workspace)
    (worker,) = site.workers
    victims = psutil.Process(worker.pid).children(recursive=True)
    assert any(each.environ().get("PREFECT__FLOW_RUN_ID") == run for each in victims), "the run's process was not found"
    for victim in (psutil.Process(worker.pid), *victims):
        victim.kill()
    since, done = time.monotonic(), blocks_of(workspace)
    site.workers.remove(worker)
    worker.wait()
    while "Crashed" not in (names := site.state_names(run)):
        assert time.monotonic() - since < SILENCE_SECONDS + 60, f"not noticed: {names}"
        time.sleep(0.5)
    noticed = time.monotonic() - since
    start_worker(site)
    while site.state(run)["type"] != "COMPLETED":
        assert time.monotonic() - since < PATIENCE and site.state(run)["type"] != "FAILED", site.state(run)
        time.sleep(0.5)
    names = site.state_names(run)
    assert names.count(RESTART) == 1, names
    return (
        f"Crashed {noticed:.0f} s after the kill, {RESTART}, Completed {time.monotonic() - since:.0f} s after it: "
        + same_child(site, workspace, done)
    )
