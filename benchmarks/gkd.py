"""GKD as a trainer: two processes against one, kills at random moments, and does it help at every budget.

.venv/bin/python -m benchmarks.gkd
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.bld import job as bld_job
from benchmarks.common import Bench, arguments, open_bench, table, write_page
from blocks.compute import HOST
from blocks.library import read_value, write_value
from blocks.records import BlockRecord, LayerChoice
from blocks.runtime import configure_torch
from profiles.schema import BLD, GKD
from tasks.distill.bld import distill
from tasks.distill.gkd import Seen, finished
from tasks.distill.gkd_job import JOB, Job, distill_globally, job_of
from tasks.distill.gkd_targets import record_teacher
from tasks.running.progress import say

# share of the layers' parameters -> (share of the FFN's width that is taken out, in which share of the layers)
BUDGETS = {"90 %": (0.17, 0.8), "80 %": (0.33, 0.8), "70 %": (0.5, 0.8), "50 %": (0.83, 0.8)}
LOG, DEVICES = "steps.txt", ("cpu:0", "cpu:1")


def main() -> None:
    """Write benchmarks/gkd.md; --worker trains a job, to be killed."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=48, help="of GKD at each budget")
    parser.add_argument("--budgets", nargs="*", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--worker", nargs=3, metavar=("WORKSPACE", "FOLDER", "PROCESSES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train(Path(options.worker[0]), options.worker[1], int(options.worker[2]))
        return
    tiny = open_bench(parser.parse_args(["--profile", "profiles/tiny.yaml"]))
    parts = [curves(tiny), *(killed(tiny, processes, options.kills) for processes in (1, 2))]
    if options.budgets:
        parts.append(helps(open_bench(options), options.budgets, options.steps))
    write_page("gkd", "GKD: several processes, kills, budgets", parts)


def child(bench: Bench, removed: float, among: float) -> tuple[tuple[LayerChoice, ...], list[BlockRecord]]:
    """A child whose FFN is narrower by `removed`, by its closed form alone, in the middle `among` of the layers."""
    depth, width = bench.reader.depth, bench.reader.config.intermediate_size
    edge = round(depth * (1 - among) / 2)
    label, layers = f"ffn{round(width * (1 - removed) / 8) * 8}", range(edge, depth - edge)
    jobs = [bld_job(bench, layer, "ffn", label, BLD(steps=0)) for layer in layers]
    blocks = [distill(job, bench.workspace, HOST) for job in jobs]
    return tuple(LayerChoice(ffn=label) if i in layers else LayerChoice() for i in range(depth)), blocks


def fresh(bench: Bench, settings: GKD, removed: float = 0.5, among: float = 0.8) -> Job:
    """A job that nobody has begun."""
    teacher = record_teacher(bench.parent, bench.corpus, settings, bench.workspace, HOST)
    job = job_of(*child(bench, removed, among), teacher, settings, HOST)
    shutil.rmtree(bench.workspace / job.folder, ignore_errors=True)
    return job


def curves(bench: Bench) -> str:
    """50 steps in one process and in two."""
    settings = GKD(steps=50, learning_rate=1e-4, recorded_gib=0)
    one, two = (distill_globally(fresh(bench, settings), bench.workspace, HOST, DEVICES[:count]) for count in (1, 2))
    off = max(abs(a - b) / a for a, b in zip(one.losses, two.losses, strict=True))
    held = " and ".join(f"{held / 2**20:.1f}" for held in two.held_bytes)
    assert off < 1e-4 and max(two.held_bytes) < 0.55 * one.held_bytes[0]
    return (
        f"**Two gloo processes.** {bench.parent.name}, {settings.steps} steps in float32, the parent beside the child: "
        f"losses differ from one process's by at most {off:.1e} (relative). What is trained and its AdamW state: "
        f"{one.held_bytes[0] / 2**20:.1f} MiB in one process, {held} MiB in each of two. "
        f"{one.cpu_seconds:.0f} and {two.cpu_seconds:.0f} CPU-seconds."
    )


def train(workspace: Path, folder: str, processes: int) -> None:
    """Train the job of a folder, with torch as every process of puzzle has it; every step becomes a line of a file."""
    configure_torch(None)
    with (workspace / folder / LOG).open("a", buffering=1) as log:

        def watch(seen: Seen) -> None:
            log.write(f"{seen.step}\n")

        distill_globally(read_value(workspace / folder / JOB, Job), workspace, HOST, DEVICES[:processes], watch)


def killed(bench: Bench, processes: int, kills: int) -> str:
    """A training that is killed at random moments, against one that is left alone; a checkpoint after every step."""
    settings = GKD(
        steps=6 * kills,
        batch_sequences=8,
        learning_rate=1e-4,
        evaluate_every=10,
        checkpoint_minutes=0,
        seed=processes,  # a folder of its own
    )
    alone = distill_globally(fresh(bench, settings), bench.workspace, HOST, DEVICES[:processes])
    job, chance, done, seen = fresh(bench, settings), random.Random(processes), 0, 0
    folder = bench.workspace / job.folder
    write_value(folder / JOB, job)
    words = ["--worker", str(bench.workspace), job.folder, str(processes)]
    while (found := finished(bench.workspace, job.folder)) is None:
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.gkd", *words], stderr=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(chance.random() * 0.2)
            if done < kills and len(steps_of(folder)) >= seen + 2:
                with suppress(psutil.Error):  # it has ended
                    chance.choice(victims(process.pid, processes)).kill()
                    done += 1
                seen = len(steps_of(folder))
                say(f"{processes} processes, kill {done} after step {steps_of(folder)[-1]}")
    steps = steps_of(folder)
    twice, equal = len(steps) - len(set(steps)), found.weights.sha256 == alone.weights.sha256
    off = max(abs(a - b) / a for a, b in zip(alone.losses, found.losses, strict=True))
    assert (equal or processes > 1) and off < 1e-3 and max(map(steps.count, steps)) <= 2
    who = "One process" if processes == 1 else "Either of two processes, or the one that started them"
    end = "the same weights bit for bit" if equal else f"the same losses within {off:.1e} (relative)"
    return (
        f"**{who}, killed {done} times** (SIGKILL, at random moments of {settings.steps} steps, a checkpoint after "
        f"every step): {end} as where nobody was killed. {twice} steps were done twice, none three times."
    )


def steps_of(folder: Path) -> list[int]:
    """The steps that were done so far, in order."""
    path = folder / LOG
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def victims(pid: int, processes: int) -> list[psutil.Process]:
    """The process that trains, or those that train and the one that started them."""
    starter = psutil.Process(pid)
    if processes == 1:
        return [starter]
    below = starter.children(recursive=True)
    workers = [each for each in below if "tasks.distill.gkd_worker" in " ".join(each.cmdline()) and _has_rank(each)]
    return [starter, *workers]


def _has_rank(process: psutil.Process) -> bool:
    return "RANK" in process.environ()


def helps(bench: Bench, shares: Sequence[str], steps: int) -> str:
    """GKD with default settings at several budgets."""
    rows = []
    for share in shares:
        settings = GKD(steps=steps)
        result = distill_globally(fresh(bench, settings, *BUDGETS[share]), bench.workspace, HOST)
        tried = ", ".join(f"{rate:g}: {kl:.3f}" for rate, kl in result.tried)
        before = result.curve[0][1]
        figures = [f"{before:.3f}", tried, f"{result.learning_rate:g}", f"{result.best_kl:.3f}"]
        rows.append([share, *figures, f"{result.best_kl / before - 1:+.0%}", f"{result.cpu_seconds:.0f}"])
        say(" ".join(rows[-1]))
    header = ["parameters of layers", "KL before", "KL after each trial", "rate", "KL after", "change", "CPU-seconds"]
    return (
        f"**Does it help at every budget.** {bench.parent.name}, children with narrower FFNs in the middle 80 % of the "
        f"layers (closed form alone), {steps} steps of 4 sequences of {bench.corpus.sequence_length} tokens, default "
        f"settings. KL on {GKD().validation_sequences} validation sequences.\n\n{table(header, rows)}"
    )


if __name__ == "__main__":
    main()
