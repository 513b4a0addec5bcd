"""One optimisation in MLflow and on the console: opened first, told what each stage left, closed with the report."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.client.orchestration import get_client

from blocks.errors import PuzzleError, PuzzleFailure
from blocks.library import digest_of, keep
from blocks.records import (
    Answer,
    Architecture,
    BlockRecord,
    ChildReport,
    CorpusInfo,
    CostTable,
    NonBlockCost,
    ParentInfo,
    Score,
    SpeedReport,
    Value,
)
from blocks.resources import weight_bytes
from profiles.schema import Profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import LINEAGE, Contender, Evaluation, Lineage, build, candidate
from tasks.export.folder import export_child, model_card
from tasks.inputs.children import in_precision
from tasks.inputs.companions import terms_of
from tasks.inputs.precision import child_dtype, served_precision, why
from tasks.libraries.interchange import StoredLibrary, describe, sizes_of, write_library
from tasks.measure.calibration import parent_bias
from tasks.measure.cost_sums import PHASES, warnings_of
from tasks.operating import experiment, tracking
from tasks.operating.artifacts import show_link, show_markdown, show_picture, show_table
from tasks.operating.run_tables import layer_rows, variant_rows
from tasks.operating.shared import keep_run
from tasks.pages.report import headlines, print_report, report_markdown, write_report
from tasks.pages.run_page import write_run_page
from tasks.running.progress import say, wide_console
from tasks.running.servers import prefect_database
from tasks.running.sharing import Piece, alone, made_once
from tasks.running.usage import Usage
from tasks.search.view import request_of

BLOCK_COLUMNS = ("layer", "subblock", "variant", "status", "nmse_closed_form", "nmse_after", "steps", "seconds")
SCORE_COLUMNS = ("layer", "subblock", "variant", "kl", "kl_se", "lm_loss", "lm_loss_se")
COST_COLUMNS = (
    *("subblock", "variant", "scenario", "batch_size", "prefill_seconds", "decode_seconds_per_token"),
    *("prefill_spread", "decode_spread", "parameters"),
)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found of whole models: evaluations in the order of the contenders, speeds, answers by name and stage."""

    evaluations: Sequence[Evaluation]
    speed: SpeedReport
    answers: Mapping[tuple[str, str], tuple[Answer, ...]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """An optimisation under way: its profile, its MLflow run, its Prefect run."""

    profile: Profile
    workspace: Path
    tracking: tracking.Tracking
    mlflow_run_id: str
    prefect_run_id: str
    usage: Usage = field(default_factory=Usage.start)

    def log_library(
        self,
        parent: ParentInfo,
        corpus: CorpusInfo,
        blocks: Sequence[BlockRecord],
        scores: Sequence[Score],
        costs: CostTable,
    ) -> None:
        """What was asked, and the block library as tables: BLD losses, scores, costs; a nested run per stage."""
        hardware = experiment.hardware_label(self.profile.hardware)
        params = tracking.run_params(self.profile, parent, corpus, hardware)
        try:
            tracking.log_params(self.tracking, self.mlflow_run_id, params)
        except tracking.TrackingError as error:
            kept_run(self.profile, self.workspace).unlink(missing_ok=True)
            raise PuzzleFailure(
                f"parent or corpus changed since the run that was killed ({error}). Start again, as a new MLflow run."
            ) from error
        experiment.log_inputs(self.tracking, self.mlflow_run_id, parent, corpus)
        sizes = sizes_of(self.workspace / parent.folder / "config.json")
        described = describe(self.profile, parent, corpus, costs, sizes)
        library = StoredLibrary(description=described, variants=tuple(blocks), scores=tuple(scores), costs=costs)
        with made_once(self.workspace, Piece(key=f"tables-{self.profile.name}", what="the tables of this profile")):
            write_library(self.workspace / "tables" / self.profile.name, library)
        failed = [block for block in blocks if block.status == "failed"]
        self._stage(
            "distill",
            {
                "distill/variants": len(blocks),
                "distill/failed": len(failed),
                "distill/seconds": sum(block.seconds for block in blocks),
            },
            {"bld_losses": blocks},
        )
        self._stage("score", {"score/variants": len(scores)}, {"scores": scores})
        tables = {"costs": costs.costs, "non_block": costs.non_block}
        self._stage("measure", {"measure/variants": len(costs.costs)}, tables)
        if costs.modelled:
            say(f"costs of {costs.hardware['name']} are modelled by the roofline, not measured; nor is any speed")
        if "busy" in costs.hardware:
            say(
                f"the costs are of a busy machine: {costs.hardware['busy']}; measure again when it is quiet (puzzle "
                "reoptimize --remeasure), or with hardware.threads: 1, where CPU time counts"
            )
        show_table("block library", blocks, BLOCK_COLUMNS, f"BLD of {len(blocks)} variants, nMSE on held-out tokens")
        show_table("scores", scores, SCORE_COLUMNS, "replace-1-block scores, nats per token")
        how = "modelled for" if costs.modelled else "measured on"
        show_table("costs", costs.costs, COST_COLUMNS, f"{how} {costs.hardware['name']}, {costs.measured_at}")
        for whole in costs.parent_measured:
            say(sum_beside_whole(costs, whole))
        missing = {where(score) for score in scores} ^ {where(block) for block in blocks if block not in failed}
        for place in sorted(missing):
            say(f"left out: layer {place[0]} {place[1]} {place[2]}: its score is not a number")
        for block in failed:
            say(f"left out: layer {block.layer} {block.subblock} {block.variant}: {block.reason}")

    def log_architecture(
        self, architecture: Architecture, blocks: Sequence[BlockRecord], scores: Sequence[Score], costs: CostTable
    ) -> None:
        """The solver's answer; what every variant and every layer came to, as tables of the run itself."""
        self._stage("choose", tracking.search_metrics(architecture), {"architecture": architecture.layers})
        for table, rows in (("variants", variant_rows), ("layers", layer_rows)):
            found: Sequence[Value] = rows(blocks, scores, costs, architecture)
            tracking.log_table(self.tracking, self.mlflow_run_id, table, found)
        text = f"predicted score {architecture.score:.4g} nats, {architecture.status}, gap {architecture.gap:.2g}"
        show_table("chosen", architecture.layers, ("attention", "ffn", "coupled"), f"layer by layer: {text}")

    def _stage(self, name: str, metrics: dict[str, float], tables: dict[str, Any]) -> None:
        tags = {"prefect.flow_run_id": self.prefect_run_id}
        tracking.log_stage(self.tracking, name, self.mlflow_run_id, tags, metrics, tables)

    def finish(
        self,
        final: Contender,
        contenders: Sequence[Contender],
        found: Findings,
        source: tuple[ParentInfo, CorpusInfo],
        blocks: Sequence[BlockRecord],
    ) -> ChildReport:
        """Export the child, write and log the report, print the table. `contenders[0]` is the parent."""
        parent, corpus = source
        speed, parents = found.speed, found.evaluations[0]
        folder = self.workspace / "runs" / f"{self.profile.name}-{digest_of(child=final.key)[:12]}"
        reader = open_parent(self.workspace / parent.folder)
        size = weight_bytes(served_precision(self.profile.hardware, reader))
        report = ChildReport(
            profile=self.profile.name,
            parent=parent,
            corpus=corpus,
            architecture=final.architecture,
            candidates=tuple(
                candidate(which, evaluation, parents, speed.models, size, self.profile.scoring.metric).model_copy(
                    update={"answers": found.answers.get((which.name, which.stage), ())}
                )
                for which, evaluation in zip(contenders, found.evaluations, strict=True)
            ),
            child_folder=str((folder / "child").relative_to(self.workspace)),
            speed=speed,
            failed_variants=tuple(
                f"layer {block.layer} {block.subblock} {block.variant}" for block in blocks if block.status == "failed"
            ),
            stages=tuple(self.usage.stages),
            seconds=self.usage.seconds(),
            cpu_seconds=self.usage.cpu_seconds(),
            peak_memory_bytes=self.usage.peak_memory_bytes(),
            request=request_of(self.profile).model_dump(mode="json"),
            prefect_run_id=self.prefect_run_id,
            mlflow_run_id=self.mlflow_run_id,
        )
        markdown = report_markdown(report)
        model: Any = in_precision(build(final, parent, self.workspace), child_dtype(self.profile.hardware, reader))
        weights = why(self.profile.hardware, reader)
        card = model_card(
            parent, corpus, model.config, markdown, command_of(self.profile), weights, terms_of(reader.folder)
        )
        with made_once(self.workspace, Piece(key=f"run-{folder.name}", what="the same child's folder")):
            keep(folder / LINEAGE, Lineage(parent=parent, corpus=corpus, child=final), [], self.workspace)
            export_child(model, parent, self.workspace, folder / "child", card)
            files = [*write_report(report, folder), *self._page(report, folder), folder / LINEAGE]
            keep_run(folder, self.workspace)
        tracking.log_report(self.tracking, self.mlflow_run_id, report, files)
        self._link_to_others()
        show_markdown("report", markdown, " ".join(headlines(report)))
        for name in ("architecture", "comparison"):
            show_picture(name, folder / f"{name}.png", f"{name} of {self.profile.name}'s child")
        for line in warnings_of(speed):
            say(line)
        self._print(report, folder)
        return report

    def _link_to_others(self) -> None:
        """MLflow's page of this run beside earlier ones; a run that has all its results does not fail for a link."""
        try:
            others = [run for run in experiment.finished_runs(self.tracking, 5) if run != self.mlflow_run_id]
            if not others:
                return
            url = experiment.compare_url(self.tracking, [self.mlflow_run_id, *others])
        except (PuzzleError, experiment.mlflow_error()) as error:
            say(f"no link to earlier runs, MLflow did not name them: {error}")
            return
        show_link("mlflow compare", url, f"beside the last {len(others)} of this parent on this hardware")

    def _page(self, report: ChildReport, folder: Path) -> list[Path]:
        """The HTML page; a run that has all its results does not fail for a picture of them."""
        try:
            return write_run_page(self.workspace, report, folder / "report.html")
        except PuzzleError as error:
            say(f"no report.html: {error}")
            return []

    def _print(self, report: ChildReport, folder: Path) -> None:
        console = wide_console()
        print_report(report, console)
        console.print(
            f"took {report.seconds / 60:.1f} min, {report.cpu_seconds:,.0f} CPU-seconds of this process, "
            f"peak memory {report.peak_memory_bytes / 2**30:.1f} GiB",
            highlight=False,
        )
        for line in ui_commands(self):
            console.print(line, highlight=False, markup=False)
        console.print(f"report and pictures: {folder}", highlight=False, markup=False)


def where(item: BlockRecord | Score) -> tuple[int, str, str]:
    """Layer, subblock and variant."""
    return item.layer, item.subblock, item.variant


def sum_beside_whole(costs: CostTable, whole: NonBlockCost) -> str:
    """The parent as the sum of its measured blocks, beside the parent measured end to end in the same rounds."""
    found = {phase: parent_bias(costs, whole, phase) for phase in PHASES}
    ratios = ", ".join(
        f"{phase} {bias[0]:.3f} ±{bias[1]:.3f}" if bias else f"{phase} takes no time that the clock shows"
        for phase, bias in found.items()
    )
    factors = f" (calibrated: {costs.hardware['calibrated']})" if costs.calibration else ""
    return (
        f"{whole.scenario}, batch {whole.batch_size}: sum of the parent's blocks / parent end to end: {ratios}{factors}"
    )


def command_of(profile: Profile) -> str:
    """The command that makes this child again; a served run's own is none that a person would type."""
    if runtime.deployment.name:
        return f"prefect deployment run '{runtime.flow_run.flow_name}/{runtime.deployment.name}'"
    return shlex.join(["puzzle", *sys.argv[1:]])


def ui_commands(run: Run) -> list[str]:
    """Where to see this very run in Prefect's and MLflow's UI, with the commands that open them where it takes any."""
    mlflow = [f"MLflow:  {tracking.run_url(run.tracking, run.mlflow_run_id)}"]
    if not tracking.server_uri():
        mlflow = [f"MLflow:  {tracking.mlflow_ui_command(run.workspace)}", f"         {mlflow[0].split()[1]}"]
    if os.environ.get("PREFECT_API_URL"):
        return [f"Prefect: {runtime.flow_run.ui_url}", *mlflow]
    prefect = Path(sys.executable).parent / "prefect"
    home = Path(os.environ.get("PREFECT_HOME") or run.workspace / "prefect")
    settings = {"PREFECT_HOME": str(home), **prefect_database(home)}
    told = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
    return [
        f"Prefect: {told} {prefect} server start",
        f"         http://127.0.0.1:4200/runs/flow-run/{run.prefect_run_id}",
        *mlflow,
    ]


def kept_run(profile: Profile, workspace: Path) -> Path:
    """Holds the id of the MLflow run of a profile while it is not finished."""
    return workspace / "mlflow-runs" / digest_of(profile=profile)


def prefect_tags() -> dict[str, str | None]:
    """The flow run as tags of its MLflow run; its page as the note that MLflow shows on top."""
    run = runtime.flow_run
    tags: dict[str, str | None] = {
        "prefect.flow_run_id": str(run.id or ""),
        "prefect.flow_run_name": run.name,
        "prefect.deployment_id": runtime.deployment.id,
    }
    if os.environ.get("PREFECT_API_URL") and run.id:
        tags["prefect.flow_run_url"] = run.ui_url
        tags["mlflow.note.content"] = f"Prefect flow run [{run.name}]({run.ui_url})"
    return tags


@contextmanager
def open_run(profile: Profile, workspace: Path) -> Iterator[Run]:
    """Open the MLflow run of this profile, or go on with the one a killed process left; closed at the end.

    Of two at work on the same profile the second has a run of its own, which nobody goes on with.
    """
    with alone(workspace, f"mlflow-run-{digest_of(profile=profile)}") as first:
        kept = kept_run(profile, workspace) if first else kept_run(profile, workspace).with_suffix(f".{os.getpid()}")
        with _opened_run(profile, workspace, kept) as run:
            yield run


@contextmanager
def _opened_run(profile: Profile, workspace: Path, kept: Path) -> Iterator[Run]:
    """The MLflow run whose id is kept in a file until it is finished."""
    store = experiment.open_experiment(profile, workspace)
    left = kept.read_text() if kept.exists() else None
    prefect_run_id = str(runtime.flow_run.id or "")
    tags = prefect_tags()
    with (
        tracking.run_started(store, profile.name, tags=tags, run_id=left) as mlflow_run_id,
        experiment.system_metrics(store, mlflow_run_id),
    ):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(mlflow_run_id)
        if prefect_run_id:
            with get_client(sync_client=True) as client:
                client.update_flow_run(runtime.flow_run.id, tags=[f"mlflow.run_id:{mlflow_run_id}"])
        show_link("mlflow run", tracking.run_url(store, mlflow_run_id), "this run in MLflow")
        yield Run(
            profile=profile,
            workspace=workspace,
            tracking=store,
            mlflow_run_id=mlflow_run_id,
            prefect_run_id=prefect_run_id,
        )
    kept.unlink(missing_ok=True)


def best_baseline(child: Contender, baselines: Sequence[Contender], found: Sequence[Evaluation]) -> list[Contender]:
    """The baseline with the lowest measured KL that is another model than the child, in a list; empty without one."""
    pairs = [pair for pair in zip(baselines, found, strict=True) if pair[0].key != child.key]
    ranked = sorted(pairs, key=lambda pair: pair[1].quality.kl.value)
    return [ranked[0][0]] if ranked else []
