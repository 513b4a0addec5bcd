"""An optimisation in MLflow: its run is opened with the whole profile, or the one that a killed process left goes on;
the library and the choice are logged as tables, each stage as a nested run, and the costs as a run of their own.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.client.orchestration import get_client

from blocks.errors import PuzzleFailure
from blocks.library import digest_of
from blocks.records import (
    Architecture,
    BlockRecord,
    CorpusInfo,
    CostTable,
    NonBlockCost,
    ParentInfo,
    Score,
    Value,
)
from blocks.typed_labels import type_in
from flows.run import Run
from profiles.load import in_yaml
from profiles.schema import Profile
from tasks.libraries.interchange import StoredLibrary, describe, sizes_of, write_library
from tasks.measure.calibration import parent_bias
from tasks.measure.cost_sums import PHASES
from tasks.measure.hardware_description import threads_of
from tasks.operating import experiment, tracking
from tasks.operating.artifacts import show_link, show_table
from tasks.operating.run_figures import asked_params, engine_tags, input_params, run_name, search_metrics
from tasks.operating.run_tables import layer_rows, variant_rows
from tasks.operating.study_runs import log_costs
from tasks.running.progress import say
from tasks.running.recording import all_are_recorded
from tasks.running.sharing import TaskKey, exclusive, try_exclusive

BLOCK_COLUMNS = ("layer", "subblock", "variant", "status", "nmse_closed_form", "nmse_after", "steps", "seconds")
LAYER_COLUMNS = ("layer", "attention", "ffn", "kl", "parameters")
SCORE_COLUMNS = ("layer", "subblock", "variant", "kl", "kl_se", "lm_loss", "lm_loss_se")
MLFLOW_TAG = "mlflow.run_id:"
COST_COLUMNS = (
    *("subblock", "variant", "scenario", "batch_size", "prefill_seconds", "decode_seconds_per_token"),
    *("prefill_spread", "decode_spread", "parameters"),
)


@dataclass(frozen=True, kw_only=True)
class TrackedRun(Run):
    """An optimisation under way, with its MLflow run and its Prefect run."""

    tracking: tracking.Tracking
    mlflow_run_id: str
    prefect_run_id: str

    def log_inputs(self, parent: ParentInfo, corpus: CorpusInfo) -> None:
        """Parent and corpus, by their fingerprints. A run that goes on must have been started with the same ones."""
        params = input_params(parent, corpus, experiment.hardware_label(self.profile.hardware))
        try:
            tracking.log_params(self.tracking, self.mlflow_run_id, params)
        except tracking.TrackingError as error:
            kept_run(self.profile, self.workspace).unlink(missing_ok=True)
            raise PuzzleFailure(
                f"parent or corpus changed since the run that was killed ({error}). Start again, as a new MLflow run."
            ) from error
        experiment.log_inputs(self.tracking, self.mlflow_run_id, parent, corpus)

    def log_costs(self, costs: CostTable) -> None:
        """The costs as a run of their own, to which the tag and the note of this run lead."""
        own = log_costs(self.tracking, costs, self.profile.hardware, self.mlflow_run_id)
        page = f"#/experiments/{self.tracking.experiment_id}/runs/{own}"
        notes = [*filter(None, [prefect_note()]), f"[The costs that the child was chosen by]({page})"]
        tags = {"puzzle.costs_run": own, "mlflow.note.content": "\n\n".join(notes)}
        tracking.set_tags(self.tracking, self.mlflow_run_id, tags)
        show_link("mlflow costs", tracking.run_url(self.tracking, own), "what every variant costs, in MLflow")

    def log_library(
        self,
        parent: ParentInfo,
        corpus: CorpusInfo,
        blocks: Sequence[BlockRecord],
        scores: Sequence[Score],
        costs: CostTable,
    ) -> None:
        """Log the block library, with a nested run for distillation and scoring.

        The library is also written as tables to the workspace, and shown as artifacts in Prefect's UI.
        """
        self.keep_tables(parent, corpus, blocks, scores, costs)
        figures = {
            "distill/variants": len(blocks),
            "distill/failed": sum(block.status == "failed" for block in blocks),
            "distill/seconds": sum(block.seconds for block in blocks),
        }
        self._log_stage("distill", figures, {"bld_losses": blocks})
        self._log_stage("score", {"score/variants": len(scores)}, {"scores": scores})
        show_table("block library", blocks, BLOCK_COLUMNS, f"BLD of {len(blocks)} variants, nMSE on held-out tokens")
        show_table("scores", scores, SCORE_COLUMNS, "replace-1-block scores, nats per token")
        show_costs(costs)
        for line in left_out(blocks, scores):
            say(line)

    def keep_tables(
        self,
        parent: ParentInfo,
        corpus: CorpusInfo,
        blocks: Sequence[BlockRecord],
        scores: Sequence[Score],
        costs: CostTable,
    ) -> None:
        """Write the block library as tables to the workspace."""
        sizes = sizes_of(self.workspace / parent.folder / "config.json")
        described = describe(self.profile, parent, corpus, costs, sizes)
        library = StoredLibrary(description=described, variants=tuple(blocks), scores=tuple(scores), costs=costs)
        tables = TaskKey(key=f"tables-{self.profile.name}", what="the tables of this profile")
        with exclusive(self.workspace, tables):
            write_library(self.workspace / "tables" / self.profile.name, library)

    def log_architecture(
        self, architecture: Architecture, blocks: Sequence[BlockRecord], scores: Sequence[Score], costs: CostTable
    ) -> None:
        """The solver's answer; what every variant and every layer came to, as tables of the run itself."""
        self._log_stage("choose", search_metrics(architecture), {"architecture": architecture.layers})
        found = (blocks, scores, costs, architecture)
        tables: dict[str, Sequence[Value]] = {"variants": variant_rows(*found), "layers": layer_rows(*found)}
        tracking.log_tables(self.tracking, self.mlflow_run_id, tables)
        text = f"predicted score {architecture.score:.4g} nats, {architecture.status}, gap {architecture.gap:.2g}"
        show_table("chosen", tables["layers"], LAYER_COLUMNS, f"layer by layer: {text}")

    def log_curves(self, name: str, step: int, figures: dict[str, float]) -> None:
        """Points of curves of the run itself, `<name>/<figure>`, while a stage is at work."""
        points = {f"{name}/{figure}": value for figure, value in figures.items()}
        tracking.log_metrics(self.tracking, self.mlflow_run_id, points, step)

    def _log_stage(self, name: str, metrics: dict[str, float], tables: dict[str, Any]) -> None:
        tags = {"prefect.flow_run_id": self.prefect_run_id}
        tracking.log_stage(self.tracking, name, self.mlflow_run_id, tags, metrics, tables)


def show_costs(costs: CostTable) -> None:
    """Every variant's costs as a table in Prefect's UI, and what to know about them as lines."""
    how = "modelled for" if costs.modelled else "measured on"
    show_table("costs", costs.costs, COST_COLUMNS, f"{how} {costs.hardware['name']}, {costs.measured_at}")
    for line in remarks_on_costs(costs):
        say(line)


def remarks_on_costs(costs: CostTable) -> Iterator[str]:
    """What somebody who reads the costs should know about them."""
    if costs.modelled:
        yield f"costs of {costs.hardware['name']} are modelled by the roofline, not measured; nor is any speed"
    if costs.disturbed:
        yield (
            f"costs: {costs.disturbed}. Measure again when it is quiet (puzzle reoptimize --remeasure), or with "
            "hardware.threads: 1, where CPU time counts"
        )
    for whole in costs.parent_measured:
        yield sum_beside_whole(costs, whole)


def sum_beside_whole(costs: CostTable, whole: NonBlockCost) -> str:
    """A line for one scenario and batch size: the sum of the parent's measured blocks over the parent measured end to
    end in the same rounds, with its standard error, for prefill and for decode.
    """
    found = {phase: parent_bias(costs, whole, phase) for phase in PHASES}
    ratios = ", ".join(
        f"{phase} {bias[0]:.3f} ±{bias[1]:.3f}" if bias else f"{phase} takes no time that the clock shows"
        for phase, bias in found.items()
    )
    factors = f" (calibrated: {costs.hardware['calibrated']})" if costs.calibration else ""
    return (
        f"{whole.scenario}, batch {whole.batch_size}: sum of the parent's blocks / parent end to end: {ratios}{factors}"
    )


def left_out(blocks: Sequence[BlockRecord], scores: Sequence[Score]) -> Iterator[str]:
    """The variants that the search cannot choose, and why: no score that is a number, or BLD failed."""
    failed = [block for block in blocks if block.status == "failed"]
    trained = {(block.layer, block.subblock, block.variant) for block in blocks if block.status != "failed"}
    scored = {(s.layer, s.subblock, s.variant) for s in scores if not type_in(s.variant)}
    for layer, subblock, variant in sorted(scored ^ trained):
        yield f"left out: layer {layer} {subblock} {variant}: its score is not a number"
    for block in failed:
        yield f"left out: layer {block.layer} {block.subblock} {block.variant}: {block.reason}"


def kept_run(profile: Profile, workspace: Path) -> Path:
    """Holds the id of the MLflow run of a profile while it is not finished."""
    return workspace / "mlflow-runs" / digest_of(profile=profile)


def prefect_tags() -> dict[str, str | None]:
    """The flow run as tags of its MLflow run; its page as the note that MLflow shows on top."""
    run = runtime.flow_run
    return {
        "prefect.flow_run_id": str(run.id or ""),
        "prefect.flow_run_name": run.name,
        "prefect.deployment_id": runtime.deployment.id,
        "prefect.flow_run_url": run.ui_url if prefect_note() else None,
        "mlflow.note.content": prefect_note(),
    }


def prefect_note() -> str | None:
    """A link to the page of this flow run, where there is a server that shows it."""
    run = runtime.flow_run
    return f"Prefect flow run [{run.name}]({run.ui_url})" if os.environ.get("PREFECT_API_URL") and run.id else None


def with_mlflow_tag(tags: Sequence[str], mlflow_run_id: str) -> list[str]:
    """The tags of a flow run, those of whoever started it among them, and its MLflow run in place of an earlier one."""
    return [*(tag for tag in tags if not tag.startswith(MLFLOW_TAG)), MLFLOW_TAG + mlflow_run_id]


@contextmanager
def open_run(profile: Profile, workspace: Path) -> Iterator[TrackedRun]:
    """Open the MLflow run of this profile, or go on with the one a killed process left; closed at the end.

    Of two at work on the same profile the second has a run of its own, which nobody goes on with.
    """
    with try_exclusive(workspace, f"mlflow-run-{digest_of(profile=profile)}") as first:
        kept = kept_run(profile, workspace) if first else kept_run(profile, workspace).with_suffix(f".{os.getpid()}")
        with _opened_run(profile, workspace, kept) as run:
            yield run
        if not all_are_recorded(run.prefect_run_id, len({*run.task_runs.values()})):
            say("Prefect's server did not keep up: its record of this run lacks some tasks")


@contextmanager
def _opened_run(profile: Profile, workspace: Path, kept: Path) -> Iterator[TrackedRun]:
    """The MLflow run whose id is kept in a file until it is finished."""
    store = experiment.open_experiment(profile, workspace)
    left = kept.read_text() if kept.exists() else None
    prefect_run_id = str(runtime.flow_run.id or "")
    hardware = profile.hardware
    engine = engine_tags(hardware.engine, hardware.precision, threads_of(hardware), hardware.device)
    with (
        tracking.run_started(store, run_name(profile), tags=prefect_tags() | engine, run_id=left) as mlflow_run_id,
        experiment.system_metrics(store, mlflow_run_id),
    ):
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(mlflow_run_id)
        tracking.log_params(store, mlflow_run_id, asked_params(profile))
        tracking.log_texts(store, mlflow_run_id, {"profile.yaml": in_yaml(profile)})
        if prefect_run_id:
            with get_client(sync_client=True) as client:
                client.update_flow_run(runtime.flow_run.id, tags=with_mlflow_tag(runtime.flow_run.tags, mlflow_run_id))
        show_link("mlflow run", tracking.run_url(store, mlflow_run_id), "this run in MLflow")
        yield TrackedRun(
            profile=profile,
            workspace=workspace,
            tracking=store,
            mlflow_run_id=mlflow_run_id,
            prefect_run_id=prefect_run_id,
        )
    kept.unlink(missing_ok=True)
