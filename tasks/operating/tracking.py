"""MLflow: a run per `optimize`, a nested run per stage; in the workspace (SQLite, a folder of artifacts), or on the
server of MLFLOW_TRACKING_URI.

Everything goes through a client with explicit run ids: no active run, nothing global, so threads and Prefect tasks
do not meet. Metric names are the same in every run (`report_metrics`), so runs compare.
"""

import json
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from blocks.errors import PuzzleError
from blocks.records import Architecture, Candidate, ChildReport, CorpusInfo, Metric, ParentInfo, Value
from profiles.schema import Profile
from tasks.evaluate.standing import final_of, parent_of
from tasks.operating.reach import quiet_mlflow, wait_for_mlflow
from tasks.pages.picture import gain_of
from tasks.running.servers import sqlite_url

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
TABLES_TAG = "mlflow.loggedArtifacts"
SPEED_FIELDS = (
    "first_token_seconds",
    "output_token_seconds",
    "generated_tokens_per_second",
    "requests_per_second",
)
PARTS = frozenset(
    {"layers", "samples", "correct", "item_groups", "answers", "limits"}
)  # in report.json, too long for a table
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's UI takes runs for chats with a model
Tags = Mapping[str, str | None]


class TrackingError(PuzzleError):
    """An MLflow run that cannot go on as asked."""


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """An experiment in the database of a workspace (absolute path)."""

    workspace: Path
    experiment_id: str

    @property
    def uri(self) -> str:
        """Where MLflow finds the database."""
        return _uri(self.workspace)


def server_uri() -> str | None:
    """The MLflow server that the environment names, if any."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/") or None


def _uri(workspace: Path) -> str:
    return server_uri() or sqlite_url(workspace / DATABASE)


def _client(uri: str) -> Any:
    mlflow = quiet_mlflow()
    if uri.startswith("http"):
        wait_for_mlflow(uri)
    return mlflow.MlflowClient(tracking_uri=uri)


def open_tracking(workspace: Path, experiment: str) -> Tracking:
    """Make the database and the experiment where they are missing. Call it before any thread or worker logs."""
    workspace = workspace.resolve()
    workspace.mkdir(parents=True, exist_ok=True)
    # two processes that migrate a fresh SQLite file at once break it for good
    with FileLock(workspace / f"{DATABASE}.lock"):
        if server_uri() is None and not (workspace / DATABASE).exists():
            _make_database(workspace)
        client = _client(_uri(workspace))
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return Tracking(workspace=workspace, experiment_id=_create(client, experiment, workspace))
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
    return Tracking(workspace=workspace, experiment_id=found.experiment_id)


def _make_database(workspace: Path) -> None:
    """Whole or not at all: one that a kill left half migrated is refused by MLflow for ever."""
    part = workspace / f".{DATABASE}-{secrets.token_hex(4)}.part"  # MLflow keeps a file that it opened open
    _client(sqlite_url(part)).search_experiments(max_results=1)
    part.rename(workspace / DATABASE)


def _create(client: Any, experiment: str, workspace: Path) -> str:
    from mlflow.exceptions import MlflowException

    place = None if server_uri() else (workspace / ARTIFACTS).as_uri()
    try:
        made: str = client.create_experiment(experiment, place, tags=KIND)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # on a server, a run in another workspace may be faster
            raise
        made = client.get_experiment_by_name(experiment).experiment_id
    return made


def resume_or_start(
    tracking: Tracking, name: str, run_id: str | None = None, tags: Tags | None = None, parent_run_id: str | None = None
) -> str:
    """The id of a RUNNING MLflow run: the one of `run_id` if the database knows it, else a new one.

    Resuming closes the nested runs that a killed process left RUNNING as KILLED. Tags that are None are dropped.
    """
    client = _client(tracking.uri)
    kept = {key: value for key, value in (tags or {}).items() if value is not None}
    if run_id is not None and _knows(client, tracking, run_id):
        _close_left_over(client, tracking, run_id)
        client.update_run(run_id, status="RUNNING", name=name)
        for key, value in kept.items():
            client.set_tag(run_id, key, value)
        return run_id
    if parent_run_id is not None:
        kept["mlflow.parentRunId"] = parent_run_id
    started: str = client.create_run(tracking.experiment_id, tags=kept, run_name=name).info.run_id
    return started


def _knows(client: Any, tracking: Tracking, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        info = client.get_run(run_id).info
    except MlflowException:
        return False
    return bool(info.experiment_id == tracking.experiment_id and info.lifecycle_stage == "active")


def _close_left_over(client: Any, tracking: Tracking, run_id: str) -> None:
    nested = client.search_runs(
        [tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
    )
    for run in nested:
        client.set_terminated(run.info.run_id, status="KILLED")


def client_of(tracking: Tracking) -> Any:
    """A client of the store that a workspace logs to."""
    return _client(tracking.uri)


@contextmanager
def run_started(
    tracking: Tracking, name: str, parent_run_id: str | None = None, tags: Tags | None = None, run_id: str | None = None
) -> Iterator[str]:
    """A run that is open within the block; gives its id. Closed as FINISHED, FAILED, or KILLED when interrupted."""
    own = resume_or_start(tracking, name, run_id, tags, parent_run_id)
    client, status = _client(tracking.uri), "KILLED"
    try:
        yield own
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(own, status=status)


def log_stage(
    tracking: Tracking,
    name: str,
    parent_run_id: str,
    tags: Tags | None = None,
    metrics: Mapping[str, float] | None = None,
    tables: Mapping[str, Sequence[Value]] | None = None,
) -> str:
    """A finished nested run of one stage, with its metrics and one table per name. Returns its id."""
    with run_started(tracking, name, parent_run_id, tags) as run_id:
        log_metrics(tracking, run_id, metrics or {})
        for table, rows in (tables or {}).items():
            log_table(tracking, run_id, table, rows)
    return run_id


def log_metrics(tracking: Tracking, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Many metrics in one transaction."""
    from mlflow.entities import Metric as Point
    from mlflow.utils.time import get_current_time_millis

    client, now = _client(tracking.uri), get_current_time_millis()
    client.log_batch(run_id, metrics=[Point(key, float(value), now, step) for key, value in metrics.items()])


def log_params(tracking: Tracking, run_id: str, params: Mapping[str, str]) -> None:
    """Parameters of a run; the same ones may be logged again when it resumes. TrackingError when they differ."""
    from mlflow.entities import Param

    client = _client(tracking.uri)
    there = client.get_run(run_id).data.params
    differ = sorted(key for key, value in params.items() if there.get(key, value) != value)
    if differ:
        raise TrackingError(
            f"MLflow run {run_id} was started with another {', '.join(differ)}: a run keeps its parameters; start "
            "a new run instead of resuming this one"
        )
    client.log_batch(run_id, params=[Param(key, value) for key, value in params.items() if key not in there])


def log_table(
    tracking: Tracking, run_id: str, name: str, rows: Sequence[Value], without: frozenset[str] = frozenset()
) -> None:
    """Contracts as the table `<name>.json` of a run (BLD losses, scores, costs). A resumed run replaces it.

    without: fields that are no columns.
    """
    if not rows:
        return
    client, file = _client(tracking.uri), f"{name}.json"
    dumped = [row.model_dump(mode="json", exclude=set(without)) for row in rows]
    # MLflow's log_table appends to a table that is there; so write what it writes, and mark it as it does
    table = {"columns": list(dumped[0]), "data": [list(row.values()) for row in dumped]}
    client.log_dict(run_id, table, file)
    marked = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
    mark = {"path": file, "type": "table"}
    if mark not in marked:
        client.set_tag(run_id, TABLES_TAG, json.dumps([*marked, mark]))


def log_report(tracking: Tracking, run_id: str, report: ChildReport, files: Sequence[Path]) -> None:
    """Metrics of all candidates, their table, and the files that `write_report` made (pictures, Markdown, JSON)."""
    log_metrics(tracking, run_id, report_metrics(report))
    log_table(tracking, run_id, "candidates", report.candidates, PARTS)
    log_files(tracking, run_id, files, "report")


def log_files(tracking: Tracking, run_id: str, files: Sequence[Path], folder: str) -> None:
    """Files as artifacts of a run, in a folder of theirs."""
    client = _client(tracking.uri)
    for file in files:
        client.log_artifact(run_id, str(file), folder)


def run_params(profile: Profile, parent: ParentInfo, corpus: CorpusInfo, hardware: str) -> dict[str, str]:
    """What a run was asked for: profile, seed, budget, scenarios, hardware, and fingerprints of parent and corpus.

    The same names in every run: `budget/<limit>`, `scenario_<name>/<field>`, `scenario_<name>/budget/<limit>`.
    """
    params = {
        "profile": profile.name,
        "seed": profile.seed,
        "parent": parent.name,
        "parent_fingerprint": parent.fingerprint,
        "corpus_fingerprint": corpus.fingerprint,
        "hardware": hardware,
    }
    params |= {f"budget/{key}": value for key, value in profile.budget.model_dump(exclude_none=True).items()}
    for scenario in profile.scenarios:
        fields = scenario.model_dump(mode="json", exclude={"name", "budget"}, exclude_none=True)
        limits = scenario.budget.model_dump(exclude_none=True)
        fields |= {f"budget/{key}": value for key, value in limits.items()}
        params |= {f"scenario_{scenario.name}/{key}": value for key, value in fields.items()}
    return {key: str(value) for key, value in params.items()}


def report_metrics(report: ChildReport) -> dict[str, float]:
    """Figures of a report by name: `child/kl`, `child/speedup_prefill`, `parent/loss`, `baseline_greedy/kl_se`, ...

    `child` and `baseline_<name>` are the last stage; `child_assembled` and so on stand beside them where GKD followed.
    """
    parent = parent_of(report)
    figures = {
        "run/seconds": report.seconds,
        "run/cpu_seconds": report.cpu_seconds,
        "run/peak_memory_gib": report.peak_memory_bytes / 2**30,
        **search_metrics(report.architecture),
    }
    for stage in report.stages:
        name = f"stage/{stage.name.replace(' ', '_')}_seconds"
        figures[name] = figures.get(name, 0.0) + stage.seconds
    for candidate in report.candidates:
        prefix = candidate.name if candidate.name in ("parent", "child") else f"baseline_{candidate.name}"
        if candidate.stage != "parent" and candidate is not final_of(report.candidates, candidate.name):
            prefix += "_assembled"
        figures |= {f"{prefix}/{key}": value for key, value in _candidate_figures(candidate, parent).items()}
    return figures | speed_figures(report)


def speed_figures(report: ChildReport) -> dict[str, float]:
    """Speed and sums of every model per scenario: `speed_chat/child_first_token_seconds`, `sum_chat/child_decode_off`
    (predicted / measured - 1), with `_se` beside each.
    """
    measured: dict[str, Metric] = {}
    figures: dict[str, float] = {}
    for name, every in report.speed.models.items():
        for own in every:
            prefix = f"speed_{own.scenario}/{name}"
            for field in SPEED_FIELDS:
                measured[f"{prefix}_{field}"] = getattr(own, field)
            if own.memory_bytes is not None:
                figures[f"{prefix}_peak_memory_gib"] = own.memory_bytes / 2**30
    for check in report.speed.sums:
        prefix = f"sum_{check.scenario}/{check.model}_{check.phase}"
        measured[f"{prefix}_off"] = check.off
        if check.gain_off is not None:
            measured[f"{prefix}_gain_off"] = check.gain_off
    for name, metric in measured.items():
        figures |= {name: metric.value, f"{name}_se": metric.se}
    return figures


def search_metrics(architecture: Architecture) -> dict[str, float]:
    """The solver's answer in figures."""
    return {f"search/{name}": getattr(architecture, name) for name in ("score", "score_se", "gap")}


def _candidate_figures(candidate: Candidate, parent: Candidate | None) -> dict[str, float]:
    figures = {
        "parameters": float(candidate.parameters),
        "weight_bytes": float(candidate.weight_bytes),
        "memory_gib": candidate.memory_bytes / 2**30,
        "gkd_tokens": float(candidate.gkd_tokens),
    }
    if candidate.predicted_kl is not None:
        figures["predicted_kl"] = candidate.predicted_kl
    if candidate.answers:
        figures["answers"] = float(len(candidate.answers))
        figures["looping_answers"] = float(sum(answer.loops for answer in candidate.answers))
    measured: dict[str, Metric | None] = {
        name: getattr(candidate, name)
        for name in (
            "prefill_tokens_per_second",
            "decode_tokens_per_second",
            "runtime_seconds",
            "loss",
            "kl",
            "top1_agreement",
            "retention",
        )
    }
    measured |= {f"benchmark_{name}": metric for name, metric in candidate.benchmarks.items()}
    if parent is not None:
        figures["parameters_fraction"] = candidate.parameters / parent.parameters
        figures["memory_fraction"] = candidate.memory_bytes / parent.memory_bytes
        if candidate is not parent:
            for kind in ("prefill", "decode"):
                measured[f"speedup_{kind}"] = gain_of(candidate, parent, kind)
    for name, metric in measured.items():
        if metric is not None:
            figures |= {name: metric.value, f"{name}_se": metric.se}
    return figures


def mlflow_ui_command(workspace: Path, port: int = 5000) -> str:
    """The shell command that shows a workspace in the browser, on this machine only. One worker: 490 MB, not 811."""
    words = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        *("--backend-store-uri", _uri(workspace)),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    return f"MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(words)}"


def run_url(tracking: Tracking, run_id: str, port: int = 5000) -> str:
    """The page of a run: of the server that is set, else while `mlflow_ui_command` runs."""
    return f"{server_uri() or f'http://127.0.0.1:{port}'}/#/experiments/{tracking.experiment_id}/runs/{run_id}"
