"""`kill -9` at random moments: of the flow's process on threads, of a worker on Dask and Ray."""

import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults_runs import (
    PLACE,
    Bench,
    Case,
    digest,
    ended_well,
    finished_variants,
    fresh,
    log_of,
    variants_reach,
    verdict,
    wait_for,
)
from benchmarks.site import request
from tasks.running.sharing import SIGNED

DIED = "died at work on"


def uninterrupted(bench: Bench) -> dict[str, Any]:
    """A run that nobody disturbs. On a cluster the second one, which finds its workers warm, as the killed ones do."""
    found: list[str] = []
    for number in (1, 2) if bench.cluster else (1,):
        workspace = fresh(f"reference-{bench.runner}-{number}")
        started = time.monotonic()
        found.append(digest(ended_well(bench.start(workspace), workspace)))
        seconds = time.monotonic() - started
    assert len(set(found)) == 1, f"two uninterrupted runs, two children: {found}"
    return {"digest": found[0], "seconds": seconds, "stages": finished_stages(workspace)}


def finished_stages(workspace: Path) -> list[str]:
    """The stages that the run in a workspace has ended so far, in order."""
    return re.findall(r"^(\S.*?) +done in [\d:]+$", log_of(workspace).read_text(), re.MULTILINE)


def stage_of(bench: Bench, workspace: Path) -> str:
    """The stage that a run is in: the one after those that it has ended."""
    if not (workspace / "parent").exists():
        return "start"
    stages, done = bench.reference["stages"], len(finished_stages(workspace))
    return str(stages[done]) if done < len(stages) else "report"


def killed(number: int) -> Case:
    """`kill -9` of the flow's process (threads), or of a worker (dask, ray), at a random moment of the run."""

    def case(bench: Bench) -> dict[str, Any]:
        share = random.Random(f"{bench.runner}-{number}").uniform(0.05, 0.95)
        workspace = PLACE / f"kill-{bench.runner}-{number:02d}"
        while (struck := strike(bench, workspace, share)) is None:
            pass  # the run was over before the moment came
        process, victim, found = struck
        before, cut = finished_variants(workspace), signed_by(victim, workspace)
        if bench.cluster:
            child = ended_well(process, workspace)
        else:
            process.wait()
            child = bench.finish(workspace)
        told = told_of(victim, bench, workspace)
        assert told or len(cut) == len(signed_by(victim, workspace)), f"{cut}: taken up again, and nothing said"
        return {**found, "cut": len(cut), "told": told, **verdict(bench, child, before, workspace)}

    return case


def strike(
    bench: Bench, workspace: Path, share: float
) -> tuple[subprocess.Popen[str], psutil.Process, dict[str, Any]] | None:
    """A run whose process, or one of its workers, is killed; None when it was over before its moment came."""
    fresh(workspace.name)
    if bench.cluster:
        bench.cluster.mend()
    started, moment = time.monotonic(), share * bench.reference["seconds"]
    process = bench.start(workspace)
    while process.poll() is None:
        victim = victim_of(bench, process) if time.monotonic() - started > moment else None
        if victim is not None:
            found = {"moment": time.monotonic() - started, "stage": stage_of(bench, workspace)}
            victim.send_signal(signal.SIGKILL)
            return process, victim, found
        time.sleep(0.02)
    assert digest(ended_well(process, workspace)) == bench.reference["digest"]
    bench.reference["seconds"] = time.monotonic() - started  # the machine is faster than it was
    return None


def victim_of(bench: Bench, flow: subprocess.Popen[str]) -> psutil.Process | None:
    """The flow's process; of a cluster a worker that has a task, any where none has. None when Ray has started none."""
    if bench.cluster is None:
        return psutil.Process(flow.pid)
    return next(iter(bench.cluster.busy() or bench.cluster.workers()), None)


def signed_by(victim: psutil.Process, workspace: Path) -> list[str]:
    """What a process that was killed had begun, and nobody has taken up again."""
    signed = (workspace / "locks").glob(f"*{SIGNED}")
    return [path.stem for path in signed if path.read_text().startswith(f"process {victim.pid} on ")]


def told_of(victim: psutil.Process, bench: Bench, workspace: Path) -> str:
    """What the run said of the death of a process: on its console, or in Prefect, where workers log to."""
    sentence = rf"process {victim.pid} on \S+ ({DIED} .*)"
    asked = {"logs": {"text": {"query": f'"process {victim.pid} on"'}}, "limit": 50}
    status, lines = request(f"{bench.environment['PREFECT_API_URL']}/logs/filter", asked)
    assert status == 200, lines
    said = [log_of(workspace).read_text(), *(line["message"] for line in lines)]
    found = [match for text in said for match in re.findall(sentence, text)]
    return f"process {victim.pid} {found[0]}" if found else ""


def flow_of_a_cluster(bench: Bench) -> dict[str, Any]:
    """`kill -9` of the flow's process while workers of its cluster are at work; started again on the same cluster."""
    workspace = fresh(f"flow-{bench.runner}")
    process = bench.start(workspace)
    wait_for(process, variants_reach(workspace, 4), workspace)
    before = finished_variants(workspace)
    process.kill()
    process.wait()
    return verdict(bench, bench.finish(workspace), before, workspace)
