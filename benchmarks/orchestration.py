"""What Prefect and MLflow cost: the flow against the same plain functions in a loop, over a finished library.

    .venv/bin/python -m benchmarks.orchestration

Both find every block, score, cost, GKD and evaluation stored, so what differs is orchestration alone: the server's
start, task runs and their persisted results, tracking. Each runs on a copy without Prefect's state: no task is cached.
The difference is set against the wall time of the run that made the library.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import ROOT, Bench, arguments, last_report, open_bench, table, write_page
from blocks.compute import HOST
from blocks.records import BlockRecord, Score
from profiles.load import load_profile
from profiles.schema import Profile


def main() -> None:
    """Time both as processes of their own, in turns."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="run the plain loop in this process and end")
    options = parser.parse_args()
    profile = load_profile(options.profile, options.set)
    workspace = (options.workspace or ROOT / "workspace" / profile.name).resolve()
    if options.plain:
        plain(profile, workspace, options)
        return
    whole = last_report(workspace).seconds
    took: dict[str, list[float]] = {"flow": [], "plain loop": []}
    for _ in range(options.rounds):
        for name, seconds in took.items():
            with tempfile.TemporaryDirectory(dir=workspace.parent) as place:
                copy = copy_of(workspace, Path(place) / "copy")
                where = ["--workspace", str(copy), *(word for item in options.set for word in ("--set", item))]
                started = time.perf_counter()
                subprocess.run(command_of(name, options.profile, where), cwd=ROOT, check=True, capture_output=True)
                seconds.append(time.perf_counter() - started)
    medians = {name: sorted(values)[len(values) // 2] for name, values in took.items()}
    more = medians["flow"] - medians["plain loop"]
    rows = [[name, f"{medians[name]:.1f}", " ".join(f"{v:.1f}" for v in took[name])] for name in took]
    tasks = sum(1 for _ in (workspace / "library").glob("*.json"))
    write_page(
        "orchestration",
        "What orchestration costs",
        [
            f"Profile {profile.name}, {tasks} blocks in the library, everything stored. Seconds of wall time, "
            "process start and imports included; median of the rounds.",
            table(["way", "median", "rounds"], rows),
            f"The flow takes {more:.1f} s more. The run that made this library took {whole:.0f} s: "
            f"{100 * more / (whole - more):.1f} % more than the same functions in a plain loop, if the server and "
            "the threads take nothing from the computation while it runs, which this does not measure.",
        ],
    )


def copy_of(workspace: Path, target: Path) -> Path:
    """The finished stages as hard links (files are replaced, never changed in place); no Prefect or MLflow state."""
    left_out = shutil.ignore_patterns("prefect", "mlflow*", "mlartifacts", "runs", ".lock", "*.log")
    shutil.copytree(workspace, target, copy_function=os.link, ignore=left_out)
    return target


def command_of(name: str, profile: str, where: list[str]) -> list[str]:
    """The flow as a user starts it, or the plain loop, each a process of its own."""
    if name == "flow":
        return [sys.executable, "-c", "from flows.cli import main; main()", "optimize", profile, *where]
    return [sys.executable, "-m", "benchmarks.orchestration", "--plain", "--profile", profile, *where]


def plain(profile: Profile, workspace: Path, options: argparse.Namespace) -> None:
    """The chain of flows/optimize.py without Prefect and MLflow."""
    from tasks.distill import gkd_targets
    from tasks.evaluate import compare
    from tasks.export.folder import export_child, model_card
    from tasks.measure.costs import CostRequest, measure_costs
    from tasks.measure.end_to_end import measure_speed
    from tasks.search.choose import choose
    from tasks.search.totals import make_problem
    from tasks.studies.peers import find

    bench = open_bench(options)
    blocks, scores = library(bench)
    costs = measure_costs(CostRequest.of(profile, bench.parent), workspace)
    problem = make_problem(scores, costs, profile.budget, profile.scenarios, profile.search, profile.scoring.metric)
    best = choose(problem)
    child = compare.contender("child", best, blocks)
    rivals = [compare.contender(name, find(name, problem, profile.seed), blocks) for name in profile.evaluate.baselines]
    everyone = [compare.parent_contender(best), child, *rivals]
    found = [
        compare.evaluate_contender(which, bench.parent, bench.corpus, profile.evaluate, workspace, HOST)
        for which in everyone
    ]
    second = min(zip(rivals, found[2:], strict=True), key=lambda pair: pair[1].quality.kl.value)[0]
    teacher = gkd_targets.record_teacher(bench.parent, bench.corpus, profile.gkd, workspace, HOST)
    distilled = [compare.distill_contender(which, teacher, profile.gkd, workspace, HOST) for which in (child, second)]
    for which in distilled:
        compare.evaluate_contender(which, bench.parent, bench.corpus, profile.evaluate, workspace, HOST)
    measure_speed(everyone, bench.parent, problem.costs, profile, workspace)
    model = compare.build(distilled[0], bench.parent, workspace, HOST)
    card = model_card(bench.parent, bench.corpus, model.config, "", "plain loop")  # type: ignore[arg-type]
    export_child(model, bench.parent, workspace, workspace / "plain-child", card)
    shutil.rmtree(workspace / "plain-child")


def library(bench: Bench) -> tuple[list[BlockRecord], list[Score]]:
    """All blocks and scores of the profile's space."""
    from tasks.distill.bld import distill
    from tasks.distill.jobs import jobs_of
    from tasks.score.scoring import score_sequences

    jobs = jobs_of(bench.profile, bench.recording, bench.records, bench.reader)
    blocks = [distill(job, bench.workspace, HOST) for job in jobs]
    scores: list[Score] = []
    for layer, record in enumerate(bench.records):
        work = [(block, tuple(range(bench.scored.count))) for block in blocks if block.layer == layer]
        if work:
            scores += score_sequences(work, record, bench.scored, bench.parent, bench.workspace, HOST)
    return blocks, scores


if __name__ == "__main__":
    main()
