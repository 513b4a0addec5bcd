"""The end of an optimisation: the child is exported, the report written, logged in MLflow and printed."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.settings import PREFECT_HOME

from blocks.compute import HOST
from blocks.errors import PuzzleError
from blocks.library import digest_of, keep
from blocks.records import (
    PARENT,
    BlockRecord,
    ChildReport,
    CorpusInfo,
    Floor,
    HeldTime,
    LimitKept,
    ParentInfo,
    Racer,
    SeenItems,
    SpeedReport,
)
from blocks.resources import weight_bytes
from flows.run import task_of
from flows.tracked_run import TrackedRun
from flows.whole_models import Spoken, made_of
from profiles.schema import MINITRON, Profile
from tasks.distill.record import open_parent
from tasks.evaluate.budget import capability_limits, limits_of, with_predictions
from tasks.evaluate.compare import LINEAGE, Contender, Evaluation, Lineage, build, candidate, kl_on_each
from tasks.evaluate.floors import Look
from tasks.evaluate.seen import without_seen
from tasks.evaluate.standing import is_typed_parent
from tasks.evaluate.typed_file import GGUF_NAME, hand_over
from tasks.export.folder import export_child, model_card
from tasks.inputs.children import in_precision
from tasks.inputs.companions import terms_of
from tasks.inputs.precision import child_dtype, served_precision, why
from tasks.measure.cost_sums import warnings_of
from tasks.operating import experiment, tracking
from tasks.operating.artifacts import show_link, show_markdown, show_picture
from tasks.operating.shared import keep_run
from tasks.operating.study_runs import log_report
from tasks.pages.report import print_report, report_markdown, write_report
from tasks.pages.run_page import write_run_page
from tasks.pages.verdict import verdict, warnings
from tasks.running.progress import say, wide_console
from tasks.running.servers import answer, prefect_database
from tasks.running.sharing import TaskKey, exclusive
from tasks.search.concurrency import at_batch_sizes
from tasks.search.totals import Problem, as_asked, at_speed_of
from tasks.search.view import request_of

LOCAL_PREFECT = "http://127.0.0.1:4200"  # where the command below listens


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found of whole models: evaluations in the order of the contenders, speeds, what they said.

    looks: at the limits that the child was measured for before GKD.
    seen_items: the benchmarks' items in the text of the run; None where there were no benchmarks.
    """

    evaluations: Sequence[Evaluation]
    speed: SpeedReport
    spoken: Spoken
    race: tuple[Racer, ...]
    looks: tuple[Look, ...] = ()
    seen_items: SeenItems | None = None


def best_baseline(
    child: Contender, baselines: Sequence[Contender], contenders: Sequence[Contender], found: Sequence[Evaluation]
) -> Contender | None:
    """The baseline of another architecture that has the lowest measured KL; None without one.

    contenders, found: each baseline is taken as the last of its name, after GKD where it had any, in its file where it
    has one.
    """
    last = {one.name: (evaluation.quality.kl.value, one) for one, evaluation in zip(contenders, found, strict=True)}
    others = [last[one.name] for one in baselines if one.key != child.key]
    return min(others, key=lambda one: one[0])[1] if others else None


def to_distill(
    profile: Profile, child: Contender, baselines: Sequence[Contender], found: Sequence[Evaluation]
) -> list[Contender]:
    """The baselines that go through GKD too: the best, where the profile asks for it, and Minitron, which is nothing
    without.
    """
    best = best_baseline(child, baselines, baselines, found) if profile.evaluate.distill_best_baseline else None
    return [one for one in (best,) if one] + [one for one in baselines if one.name == MINITRON and one is not best]


def lineage_of(
    final: Contender,
    rival: Contender | None,
    source: tuple[ParentInfo, CorpusInfo],
    capabilities: Sequence[CorpusInfo],
) -> Lineage:
    """What the child and the best baseline are made of."""
    parent, corpus = source
    return Lineage(parent=parent, corpus=corpus, child=final, capabilities=tuple(capabilities), rival=rival)


def report_of(
    run: TrackedRun,
    final: Contender,
    contenders: Sequence[Contender],
    found: Findings,
    source: tuple[ParentInfo, CorpusInfo],
    library: tuple[Sequence[BlockRecord], Problem],
) -> ChildReport:
    """What the run came to. `contenders[0]` is the parent. library: all trained blocks, and the question that the child
    answers.
    """
    (parent, corpus), (blocks, problem) = source, library
    asked = as_asked(problem, run.profile)
    settled = asked if problem.within_score is None else at_speed_of(problem, asked)
    folder = run.workspace / "runs" / f"{run.profile.name}-{digest_of(child=final.key)[:12]}"
    speed, spoken, own = found.speed, found.spoken, found.evaluations[0]
    parents = speed.models.get(PARENT, ())
    size = weight_bytes(served_precision(run.profile.hardware, open_parent(run.workspace / parent.folder)))

    def limits(which: Contender, evaluation: Evaluation) -> tuple[LimitKept, ...]:
        if which.stage == "parent":
            return ()
        whose, times = settled if is_typed_parent(which.name) else asked, speed.models.get(which.name, ())
        kl = capability_limits(asked, which.architecture, kl_on_each(evaluation))
        return (*limits_of(whose, which.architecture, times, parents), *kl)

    return ChildReport(
        profile=run.profile.name,
        parent=parent,
        corpus=corpus,
        architecture=final.architecture,
        candidates=tuple(
            with_predictions(
                candidate(which, evaluation, own, speed.models, size, run.profile.scoring.metric, run.workspace),
                problem,
                which.architecture,
            ).model_copy(
                update={
                    "answers": spoken.answers.get((which.name, which.stage), ()),
                    "looping": spoken.looping.get((which.name, which.stage)),
                    "right_answers": spoken.right_answers.get((which.name, which.stage), {}),
                    "limits": limits(which, evaluation),
                    **without_seen(evaluation.benchmarks, own.benchmarks, found.seen_items),
                }
            )
            for which, evaluation in _ordered(contenders, found.evaluations, final)
        ),
        child_folder=str((folder / "child").relative_to(run.workspace)),
        speed=speed,
        failed_variants=tuple(
            f"layer {block.layer} {block.subblock} {block.variant}" for block in blocks if block.status == "failed"
        ),
        stages=tuple(run.usage.stages),
        seconds=run.usage.seconds(),
        cpu_seconds=run.usage.cpu_seconds(),
        peak_memory_bytes=run.usage.peak_memory_bytes(),
        request=request_of(problem).model_dump(mode="json"),
        race=found.race,
        floors=tuple(one for one in found.looks if isinstance(one, Floor)),
        held_times=tuple(one for one in found.looks if isinstance(one, HeldTime)),
        batch_sizes=at_batch_sizes(problem if problem.within_score is None else asked, final.architecture),
        seen_items=found.seen_items,
        rule=run.profile.champion.model_dump(mode="json"),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command_of_run(),
        prefect_run_id=run.prefect_run_id,
        mlflow_run_id=run.mlflow_run_id,
    )


def _ordered(
    contenders: Sequence[Contender], found: Sequence[Evaluation], final: Contender
) -> list[tuple[Contender, Evaluation]]:
    """Parent, then the child that is shipped, then all others: a narrow screen shows the first columns."""
    pairs = list(zip(contenders, found, strict=True))
    return sorted(pairs, key=lambda pair: (pair[0].stage != "parent", pair[0] is not final))


def finish(run: TrackedRun, lineage: Lineage, report: ChildReport) -> ChildReport:
    """Export the child, write and log the report, print the table."""
    folder, markdown = (run.workspace / report.child_folder).parent, report_markdown(report)
    needs = [name for name in run.task_runs if name.split()[0] in ("evaluation", "answers", "speed", "floor")]
    values = (lineage, run, report, markdown, folder)
    files = run.call(export_task, "child", *values, after=[made_of(lineage.child), *needs], limited=False)
    log_report(run.tracking, run.mlflow_run_id, report, files)
    link_to_earlier_runs(run)
    show_markdown("report", markdown, " ".join([*warnings(report), verdict(report)]))
    for name in ("architecture", "comparison"):
        show_picture(name, folder / f"{name}.png", f"{name} of {run.profile.name}'s child")
    for line in () if report.speed.disturbed else warnings_of(report.speed):  # a disturbance heads the report
        say(line)
    _print(run, report, folder)
    return report


@task_of("export", "export {lineage.child.name} and write the report")
def export_task(lineage: Lineage, run: TrackedRun, report: ChildReport, markdown: str, folder: Path) -> Any:
    """The folder of a finished run: the child, its report, pictures and page. Returns the files to log."""
    with exclusive(run.workspace, TaskKey(key=f"run-{folder.name}", what="the same child's folder")):
        _export(run, lineage, report, markdown, folder)
        files = [*write_report(report, folder), *_page(run, report, folder), folder / LINEAGE]
        keep_run(folder, run.workspace)
    return files


def _export(run: TrackedRun, lineage: Lineage, report: ChildReport, markdown: str, folder: Path) -> None:
    """The child's folder, and beside it what it was made of."""
    parent, corpus, final = lineage.parent, lineage.corpus, lineage.child
    hardware, reader = run.profile.hardware, open_parent(run.workspace / parent.folder)
    model: Any = in_precision(build(final, parent, run.workspace, HOST), child_dtype(hardware, reader))
    weights, terms = why(hardware, reader, run.profile.compute_precision), terms_of(reader.folder)
    card = model_card(parent, corpus, model.config, markdown, report.command, weights, terms)
    held = {"held_times": report.held_times, "floors": report.floors}
    keep(folder / LINEAGE, lineage.model_copy(update=held), [], run.workspace)
    export_child(model, parent, run.workspace, folder / "child", card)
    if final.file:
        say(hand_over(run.workspace / final.file, folder / GGUF_NAME))


def link_to_earlier_runs(run: TrackedRun) -> None:
    """MLflow's page of this run beside earlier ones; a run that has all its results does not fail for a link."""
    try:
        others = [one for one in experiment.finished_runs(run.tracking, 5) if one != run.mlflow_run_id]
        if not others:
            return
        pages = {
            "mlflow charts": (experiment.charts_url(run.tracking), "speed against quality, all of this experiment"),
            "mlflow compare": (
                experiment.compare_url(run.tracking, [run.mlflow_run_id, *others]),
                f"beside the last {len(others)} of this parent on this hardware, figure by figure",
            ),
        }
    except (PuzzleError, experiment.mlflow_error()) as error:
        say(f"no link to earlier runs, MLflow did not name them: {error}")
        return
    for name, (url, what) in pages.items():
        show_link(name, url, what)


def _page(run: TrackedRun, report: ChildReport, folder: Path) -> list[Path]:
    """The HTML page; a run that has all its results does not fail for a picture of them."""
    try:
        return write_run_page(run.workspace, report, folder / "report.html")
    except PuzzleError as error:
        say(f"no report.html: {error}")
        return []


def _print(run: TrackedRun, report: ChildReport, folder: Path) -> None:
    console = wide_console()
    print_report(report, console)
    console.print(
        f"took {report.seconds / 60:.1f} min, {report.cpu_seconds:,.0f} CPU-seconds of this process, "
        f"peak memory {report.peak_memory_bytes / 2**30:.1f} GiB",
        highlight=False,
    )
    for line in ui_commands(run):
        console.print(line, highlight=False, markup=False)
    console.print(f"report and pictures: {folder}", highlight=False, markup=False)
    if (folder / GGUF_NAME).exists():
        console.print(f"what serves it: {folder / GGUF_NAME}", highlight=False, markup=False)


def command_of_run() -> str:
    """The command that makes this child again; a served run's own is none that a person would type."""
    if runtime.deployment.name:
        return f"prefect deployment run '{runtime.flow_run.flow_name}/{runtime.deployment.name}'"
    return shlex.join(["puzzle", *sys.argv[1:]])


def ui_commands(run: TrackedRun) -> list[str]:
    """Where to see this very run in Prefect's and MLflow's UI, with the commands that open them where it takes any."""
    first, *more = tracking.page_lines(run.tracking, run.mlflow_run_id)
    mlflow = [f"MLflow:  {first}", *(f"         {line}" for line in more)]
    if os.environ.get("PREFECT_API_URL"):
        return [f"Prefect: {runtime.flow_run.ui_url}", *mlflow]
    page = f"{LOCAL_PREFECT}/runs/flow-run/{run.prefect_run_id}"
    if answer(f"{LOCAL_PREFECT}/api/flow_runs/{run.prefect_run_id}", timeout=2):
        return [f"Prefect: {page}", *mlflow]
    prefect = Path(sys.executable).parent / "prefect"
    home = PREFECT_HOME.value()
    settings = {"PREFECT_HOME": str(home), **prefect_database(home)}
    given = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    return [
        f"Prefect: {given} {prefect} server start",
        f"         {page}",
        *mlflow,
    ]
