"""Operated for real: `puzzle serve` and a worker of `prefect.yaml`, everything asked for through the servers' APIs.

    .venv/bin/python -m benchmarks.operate                      # all, a quarter of an hour on an idle machine
    .venv/bin/python -m benchmarks.operate champion             # one of them again; the others' rows are kept

Each row is a thing that a person would do in the UI, the seconds until it was done, and what both servers said of it
afterwards. Any answer that is not the expected one ends the benchmark with an error and the log of the servers. A
section that is finished is kept in workspace/operate/ and not run again: delete it there, or name it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import PUZZLE, ROOT, commit, table, write_page
from benchmarks.pool import deployed, killed, measured, pool, shipped, swept, worked
from benchmarks.site import (
    PATIENCE,
    PROFILE,
    Site,
    blocks_of,
    changed,
    child_digest,
    distilling,
    environment_of,
    request,
    same_child,
    served,
)
from tasks.running.at_work import others_at_work
from tasks.running.servers import LOOPBACK, free_port, running

KEPT = ROOT / "workspace" / "operate"
TIGHT = {"budget.layer_parameters_fraction": 0.45}
WORSE = {"gkd.steps": 0, "bld.steps": 0, "bld.closed_form": False}


def refused(site: Site) -> str:
    """A form with a wrong value, an unknown field, a workspace that is a path."""
    deployment = site.deployment("optimize")
    reasons = []
    for given in ({"budget": {"layer_parameters_fraction": 7}}, {"budget": {"sped_up": 2}}, {"workspace": "../w"}):
        body = {"parameters": {**deployment["parameters"], **given}}
        status, said = site.call(f"/deployments/{deployment['id']}/create_flow_run", body)
        assert status == 409, said
        reasons.append(said.split("Failure reason: ")[1].split('"}')[0])
    return "409: " + "; ".join(reasons)


def optimized(site: Site) -> str:
    """The deployment `optimize`, started and waited for."""
    run = site.start("optimize", workspace="first")
    site.finished(run)
    artifacts = site.artifacts(run)
    assert {"report", "architecture", "block-library", "costs", "chosen", "stage-distill", "mlflow-run"} <= set(
        artifacts
    )
    bars = [artifact for artifact in artifacts.values() if artifact["type"] == "progress"]
    assert all(bar["data"] == 100 and "done in" in bar["description"] for bar in bars)
    logged = site.ask_mlflow(f"/runs/get?run_id={site.mlflow_run_of(run)}")["run"]
    tags = {tag["key"]: tag["value"] for tag in logged["data"]["tags"]}
    metrics = {metric["key"]: metric["value"] for metric in logged["data"]["metrics"]}
    inputs = [found["dataset"]["name"] for found in logged["inputs"]["dataset_inputs"]]
    assert tags["prefect.flow_run_id"] == run and run in tags["prefect.flow_run_url"]
    assert logged["info"]["status"] == "FINISHED" and metrics["at_a_glance/kl"] >= 0 and len(inputs) == 2
    site.kept["first"] = child_digest(site.root / "first")
    return (
        f"Prefect: Completed, {len(bars)} progress bars, {len(artifacts)} artifacts; "
        f"MLflow: {logged['info']['status']}, KL "
        f"{metrics['at_a_glance/kl']:.4f}, {len(metrics)} metrics, inputs {', '.join(inputs)}; each names the other"
    )


def escaped(site: Site) -> str:
    """A corpus in a folder that nobody declared."""
    sources = [{"kind": "text", "path": "etc/passwd"}]
    state = site.wait(site.start("optimize", {"corpus.sources": sources}, workspace="escape"))
    assert state["type"] == "FAILED" and "begins with no name of a folder" in state["message"], state
    assert not (site.root / "escape").exists()
    return f"Failed: {state['message'].split(': ', 1)[-1]}; nothing was written"


def cancelled(site: Site) -> str:
    """Cancelled through the API in mid-distillation, then started again."""
    workspace = site.root / "cancelled"
    run, asked = distilling(site, workspace), time.monotonic()
    site.call(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    state = site.wait(run)
    took = time.monotonic() - asked
    assert state["type"] == "CANCELLED" and not list(workspace.glob("runs/*/child")), state
    done = blocks_of(workspace)
    site.finished(site.start("optimize", workspace="cancelled"))
    return f"Cancelled after {took:.0f} s; started again: {same_child(site, workspace, done)}"


def suspended(site: Site) -> str:
    """Suspended through the API in mid-distillation, then resumed."""
    workspace = site.root / "suspended"
    run = distilling(site, workspace)
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    details = {"pause_reschedule": True, "pause_timeout": until}
    paused = {"state": {"type": "PAUSED", "name": "Suspended", "state_details": details}}
    site.call(f"/flow_runs/{run}/set_state", paused)
    asked = time.monotonic()
    while others_at_work(workspace):
        assert time.monotonic() < asked + PATIENCE, "the suspended run holds its workspace"
        time.sleep(0.2)
    took, done = time.monotonic() - asked, blocks_of(workspace)
    assert site.state(run)["type"] == "PAUSED"
    status, said = site.call(f"/flow_runs/{run}/resume", {})
    assert status in (200, 201), said
    site.finished(run)
    return f"its process was gone after {took:.0f} s; resumed: {same_child(site, workspace, done)}"


def judged(site: Site, expected: str, version: int, changes: dict[str, Any], **parameters: Any) -> str:
    """A run of `reoptimize` that must end with an outcome and a champion."""
    run = site.start("reoptimize", changes, workspace="first", **parameters)
    state = site.finished(run)
    found = site.ask_mlflow("/registered-models/alias?name=puzzle-operate&alias=champion")["model_version"]
    assert state["name"] == expected and int(found["version"]) == version, (state, found)
    return (
        f"{expected} ({site.run(run)['total_run_time']:.1f} s of run): {state['message']}; champion: version {version}"
    )


def crowned(site: Site) -> str:
    """`reoptimize`: the first champion, nothing changed, a worse challenger, a tighter budget."""
    wanted = (("First", 1, {}), ("Unchanged", 1, {}), ("Kept", 1, WORSE), ("Moved", 3, TIGHT))
    return "; ".join(judged(site, outcome, version, changes) for outcome, version, changes in wanted)


def remeasured(site: Site) -> str:
    """`reoptimize` with `remeasure`: costs that moved are a change, costs that did not are none."""
    run = site.start("reoptimize", TIGHT, workspace="first", remeasure=True)
    state = site.finished(run)
    logs = site.call("/logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200})[1]
    moved = [line["message"] for line in logs if line["message"].startswith("cost moved")]
    assert (state["name"] == "Unchanged") == (not moved), (state, moved)
    return f"{len(moved)} costs moved by 10 % and three times their spread: {state['name']}: {state['message']}"


def rolled_back(site: Site) -> str:
    """`puzzle rollback`."""
    command = [*PUZZLE, "rollback", str(PROFILE), "--workspace", str(site.root / "first")]
    ran = subprocess.run(command, cwd=ROOT, env=environment_of(site), capture_output=True, text=True)
    assert ran.returncode == 0 and "version 1 again" in ran.stdout, ran.stderr
    return ran.stdout.strip()


def completed(site: Site) -> str:
    """`mlflow models serve` on the champion, in a process that knows no puzzle."""
    port = free_port()
    bin_folder = Path(sys.executable).parent
    command = [str(bin_folder / "mlflow"), "models", "serve", "-m", "models:/puzzle-operate@champion"]
    command += ["--env-manager", "local", "--host", LOOPBACK, "--port", str(port)]
    environment = {"MLFLOW_TRACKING_URI": site.mlflow, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    with running(command, f"http://{LOOPBACK}:{port}/ping", site.root / "models.log", environment, PATIENCE):
        body = {"inputs": [{"prompt": "import ", "max_new_tokens": 8}, {"prompt": "def "}]}
        status, found = request(f"http://{LOOPBACK}:{port}/invocations", body)
    assert status == 200 and [len(text) > 0 for text in found["predictions"]] == [True, True], found
    return f"200, completions of {[len(text) for text in found['predictions']]} characters"


def scheduled(site: Site) -> str:
    """A cron schedule of `reoptimize` that fires."""
    tight = changed(site.deployment("reoptimize")["parameters"], TIGHT) | {"workspace": "first"}
    run = site.fired("reoptimize", {"cron": "* * * * *", "timezone": "UTC"}, tight)
    return f"{run['state']['name']}, {run['total_run_time']:.1f} s of run, created by the scheduler"


@contextmanager
def behind_serve(root: Path) -> Iterator[Site]:
    """`puzzle serve` with servers of its own."""
    with served(root, str(PROFILE)) as site:
        yield site


Step = Callable[[Site], str]
Place = Callable[[Path], Any]
SECTIONS: dict[str, tuple[str, Place, tuple[Step, ...]]] = {
    "runs": ("Forms and runs", behind_serve, (refused, optimized, escaped, cancelled, suspended)),
    "champion": (
        "The champion",
        behind_serve,
        (optimized, crowned, remeasured, rolled_back, completed, scheduled),
    ),
    "pool": ("`prefect.yaml` on a process worker", pool, (deployed, worked, shipped, killed, measured, swept)),
}


def row(site: Site, step: Step) -> list[object]:
    """What a step did, how long it took, what was said."""
    started = time.monotonic()
    said = step(site).replace(f"{site.root}/", "")  # no path of this machine on the page
    words = (step.__doc__ or "").split("\n")[0].rstrip(".")
    print(words, f"{time.monotonic() - started:.0f} s:", said, flush=True)
    return [words, f"{time.monotonic() - started:.0f}", said]


def run_section(name: str) -> str:
    """A section in a fresh folder, as Markdown."""
    title, place, steps = SECTIONS[name]
    began, _ = commit()
    with tempfile.TemporaryDirectory(prefix="puzzle-operate-") as folder:
        with place(Path(folder)) as site:
            for step in steps:
                site.rows.append(row(site, step))
        left = [each.pid for each in psutil.process_iter(["cmdline"]) if folder in " ".join(each.info["cmdline"] or [])]
    assert not left, f"processes survive: {left}"
    how = (
        f"Ready after {site.start_seconds:.0f} s, nothing left running when stopped; commit {began}, "
        f"{datetime.now(UTC):%Y-%m-%d}, load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores. Seconds of wall time; "
        "the start of each run's process and its imports are most of them."
    )
    return "\n\n".join([f"## {title}", how, table(["step", "seconds", "what the servers said"], site.rows)])


def main() -> None:
    """Run what is asked for, or what is not there yet; write benchmarks/operate.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} [those not run yet]")
    asked = parser.parse_args().sections
    if unknown := set(asked) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in SECTIONS:
        file = KEPT / f"{name}.md"
        if name in asked or not (asked or file.exists()):
            file.write_text(run_section(name))
    parts = [(KEPT / f"{name}.md") for name in SECTIONS]
    write_page("operate", "Operated through the servers", [part.read_text() for part in parts if part.exists()])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
