"""Served runs that are killed: noticed and started again by what `puzzle serve` set up; itself killed with them."""

import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.operate import PROFILE, child_digest
from benchmarks.site import Site, served
from tasks.operating.watch import RESTART


def serving_process(root: Path) -> psutil.Process:
    """`puzzle serve` of a root; its servers are others."""
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"serve", str(root)} <= set(process.info["cmdline"] or ())
    ]
    return found


def runs_of(serving: psutil.Process) -> list[psutil.Process]:
    """The processes of its runs, each spawned by it."""
    return [each for each in serving.children() if "spawn_main" in " ".join(each.cmdline())]


def killed_in_mid_distillation(site: Site, workspace: str, serve_too: bool) -> tuple[str, dict[Path, int]]:
    """Start a run, kill -9 its process (and that of `puzzle serve`) when some variants are done; its id and those."""
    folder, run = site.root / workspace, site.start("optimize", workspace=workspace)
    while len(list(folder.glob("library/*.json"))) < 3:
        assert site.state(run)["type"] in ("SCHEDULED", "PENDING", "RUNNING"), site.state(run)
        time.sleep(0.05)
    serving = serving_process(site.root)
    assert (victims := runs_of(serving)), "the run's process was not found"
    for victim in [*victims, *([serving] if serve_too else [])]:
        victim.kill()
    return run, {path: path.stat().st_mtime_ns for path in folder.glob("library/*.json")}


def recovered(site: Site, run: str, workspace: str, before: dict[Path, int], since: float) -> dict[str, Any]:
    """Wait until a killed run is noticed, started again and done; what the servers say of it."""
    noticed = None
    while noticed is None:
        states = site.call(f"/flow_run_states/?flow_run_id={run}")[1]
        # what died together with `puzzle serve` is Running until the next one starts it again
        noticed = next((state for state in states if state["type"] == "CRASHED" or state["name"] == RESTART), None)
        assert time.monotonic() - since < 240, f"not noticed: {[state['name'] for state in states]}"
        time.sleep(0.3)
    seconds = time.monotonic() - since
    while (state := site.state(run))["type"] != "COMPLETED":
        assert state["type"] not in ("FAILED", "CANCELLED"), state
        # a server that was down too waits a quarter of an hour before it restarts a run this short
        # (docs/how-to/recover-from-failures.md)
        assert time.monotonic() - since < 1500, f"noticed, not done: {state}"
        time.sleep(0.5)
    names = [state["name"] for state in site.call(f"/flow_run_states/?flow_run_id={run}")[1]]
    assert names.count(RESTART) == 1, names
    tags = site.call(f"/flow_runs/{run}")[1]["tags"]
    (mlflow_run,) = [tag.removeprefix("mlflow.run_id:") for tag in tags if tag.startswith("mlflow.run_id:")]
    kept = site.ask_mlflow(f"/runs/get?run_id={mlflow_run}")["run"]
    assert kept["info"]["status"] == "FINISHED" and kept["info"]["start_time"] / 1000 < time.time() - (
        time.monotonic() - since
    ), "another MLflow run than the killed one's"
    again = sum(path.stat().st_mtime_ns != mark for path, mark in before.items())
    same = child_digest(site.root / workspace) == child_digest(site.root / "whole")
    assert same and not again, (same, again)
    return {
        "told": f"{noticed['message']} (after {seconds:.0f} s; {RESTART}, Completed after "
        f"{time.monotonic() - since:.0f} s, in the same MLflow run)",
        **{"same_child": same, "finished": len(before), "made_again": again},
    }


def served_run_killed(place: Path) -> dict[str, Any]:
    """The process of a served run is killed; `puzzle serve` lives."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with served(place, str(PROFILE)) as site:
        site.finished(site.start("optimize", workspace="whole"))
        run, before = killed_in_mid_distillation(site, "killed", False)
        return recovered(site, run, "killed", before, time.monotonic())


def serve_killed(place: Path) -> dict[str, Any]:
    """`puzzle serve` and the process of its run are killed; `puzzle serve` is started again on the same root."""
    assert (place / "whole").exists(), "served_run_killed comes first"
    shutil.rmtree(place / "both", ignore_errors=True)
    with served(place, str(PROFILE)) as site:
        run, before = killed_in_mid_distillation(site, "both", True)
        since = time.monotonic()
        left = [line for line in (place / "prefect-server.pid", place / "mlflow-server.pid") if line.exists()]
        servers = [psutil.Process(int(path.read_text().split()[0])) for path in left]
        printed = len((place / "serve.log").read_text())
        assert len(servers) == 2 and all(server.is_running() for server in servers), "nothing was left behind"
    with served(place, str(PROFILE)) as site:
        assert not any(server.is_running() and server.status() != "zombie" for server in servers)
        log = (place / "serve.log").read_text()[printed:]
        assert log.count("that a killed `puzzle serve` left behind") == 2, log[-2000:]
        found = recovered(site, run, "both", before, since)
        return {
            **found,
            "told": "stopped the prefect-server that a killed `puzzle serve` left behind; " + found["told"],
        }
