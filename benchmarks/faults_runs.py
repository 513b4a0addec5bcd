"""A run that faults happen to: started, watched, compared with the uninterrupted one."""

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cluster import Cluster
from benchmarks.common import PUZZLE, ROOT

PROFILE = ROOT / "profiles" / "tiny.yaml"
# a third of the run or more is distillation; the rest is made short
SMALLER = (
    *("corpus.sources=[{kind: python_stdlib, max_files: 80}]", "parent.train_steps=100", "hardware.threads=1"),
    *("search_space.ffn=[ffn96, ffn48, no_op]", "bld.steps=400", "gkd.steps=12", "gkd.evaluate_every=4"),
    *("measure.stack=1", "measure.decode_steps=2", "evaluate.baselines=[]", "evaluate.throughput_rounds=1"),
)
PLACE = ROOT / "workspace" / "faults"
LIMIT_SECONDS = 900
Case = Callable[["Bench"], dict[str, Any]]


@dataclass(kw_only=True)
class Bench:
    """Where cases run, on what, and what the uninterrupted run left."""

    runner: str
    environment: dict[str, str]
    reference: dict[str, Any]
    cluster: Cluster | None = None  # the same for all cases: it is mended after each

    def start(self, workspace: Path, **environment: str) -> subprocess.Popen[str]:
        """`puzzle optimize` on the tiny profile; its output goes to a file in the workspace's parent."""
        words = [*PUZZLE, "optimize", str(PROFILE), "--workspace", str(workspace)]
        for change in SMALLER:
            words += ["--set", change]
        words += self.cluster.settings if self.cluster else ["--set", "orchestration.max_workers=2"]
        own = self.cluster.environment if self.cluster else {}
        PLACE.mkdir(parents=True, exist_ok=True)
        with log_of(workspace).open("a") as log:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **self.environment, **own, "PYTHONPATH": str(ROOT), **environment},
            )

    def finish(self, workspace: Path, **environment: str) -> Path:
        """Run to the end; the child's folder."""
        return ended_well(self.start(workspace, **environment), workspace)


def log_of(workspace: Path) -> Path:
    """What runs on a workspace printed."""
    return PLACE / f"{workspace.name}.out"


def ended_well(process: subprocess.Popen[str], workspace: Path) -> Path:
    """The child of a run that must end with 0."""
    code = process.wait(LIMIT_SECONDS)
    printed = log_of(workspace).read_text()
    assert code == 0, f"{workspace}: exit code {code}\n{printed[-3000:]}"
    (workspace_child,) = re.findall(r"^child: (.*)$", printed, re.MULTILINE)[-1:]
    return Path(workspace_child)


def digest(child: Path) -> str:
    """sha256 over the weights and the config of a child."""
    found = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        found.update((child / name).read_bytes())
    return found.hexdigest()


def finished_variants(workspace: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files of every finished variant."""
    made = {}
    for record in (workspace / "library").glob("*.json"):
        for path in (record, record.with_suffix(".safetensors")):
            if path.exists():
                made[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return made


def changed(before: dict[str, tuple[int, int]], workspace: Path) -> int:
    """How many finished variants were made again."""
    now = finished_variants(workspace)
    return len({Path(name).stem for name, mark in before.items() if now.get(name) != mark})


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool], workspace: Path) -> None:
    """Until the moment comes."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not ready():
        assert process.poll() is None, f"ended before the moment came\n{log_of(workspace).read_text()[-3000:]}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)


def variants_reach(workspace: Path, count: int) -> Callable[[], bool]:
    """True once so many variants are finished."""
    return lambda: len(list((workspace / "library").glob("*.json"))) >= count


def fresh(name: str) -> Path:
    """An empty workspace."""
    workspace = PLACE / name
    shutil.rmtree(workspace, ignore_errors=True)
    log_of(workspace).unlink(missing_ok=True)
    return workspace


def told(workspace: Path, pattern: str) -> str:
    """The sentence that a run printed; it must be there."""
    found = re.findall(pattern, log_of(workspace).read_text())
    assert found, f"{workspace}: nothing like {pattern!r} in\n{log_of(workspace).read_text()[-3000:]}"
    return str(found[-1]).strip()


def verdict(bench: Bench, child: Path, before: dict[str, tuple[int, int]], workspace: Path) -> dict[str, Any]:
    """What every case ends with; the workspace is not needed any more."""
    same, again = digest(child) == bench.reference["digest"], changed(before, workspace)
    assert same and not again, f"{workspace}: same child {same}, {again} finished variants made again"
    shutil.rmtree(workspace, ignore_errors=True)
    return {"same_child": same, "finished": len({Path(name).stem for name in before}), "made_again": again}
