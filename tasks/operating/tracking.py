"""MLflow: a run per `optimize`, a nested run per stage; in the workspace (SQLite, a folder of artifacts), or on the
server of MLFLOW_TRACKING_URI.

Everything goes through a client with explicit run ids: no active run, nothing global, so threads and Prefect tasks
do not meet. Figures go in batches: a batch of hundreds takes as long as two single ones.
run_figures.py names runs (`run_name`) and figures.
"""

import json
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from blocks.errors import PuzzleError
from blocks.records import Value
from tasks.operating.charts import shared_view
from tasks.operating.reach import quiet_mlflow, wait_for_mlflow
from tasks.running.servers import answer, sqlite_url

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
TABLES_TAG = "mlflow.loggedArtifacts"
FAILURE, MAX_TAG = "puzzle.failure", 8000  # why a run failed, in a sentence; MLflow takes so many characters
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else MLflow's UI takes runs for chats with a model
Tags = Mapping[str, str | None]
Tables = Mapping[str, Sequence[Value]]


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


LOCAL_MLFLOW = "http://127.0.0.1:5000"  # where `mlflow_ui_command` listens


def server_uri() -> str | None:
    """The MLflow server that the environment names, if any."""
    return os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/") or None


def has_runs(workspace: Path) -> bool:
    """Whether there is an MLflow that runs of this workspace go to."""
    return server_uri() is not None or (workspace / DATABASE).is_file()


def _uri(workspace: Path) -> str:
    return server_uri() or sqlite_url(workspace / DATABASE)


def _client(uri: str) -> Any:
    if uri.startswith("http"):
        wait_for_mlflow(uri)
    return _client_once(uri)


@lru_cache(maxsize=8)
def _client_once(uri: str) -> Any:
    return quiet_mlflow().MlflowClient(tracking_uri=uri)


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
        for key, value in shared_view().items():  # an earlier version's experiment has none
            if found.tags.get(key) != value:
                client.set_experiment_tag(found.experiment_id, key, value)
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
        made: str = client.create_experiment(experiment, place, tags=KIND | shared_view())
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
    left = None if run_id is None else _left(client, tracking, run_id)
    if run_id is not None and left is not None:
        _close_left_over(client, tracking, run_id)
        client.update_run(run_id, status="RUNNING", name=name)
        if FAILURE in left.data.tags:
            client.delete_tag(run_id, FAILURE)
        set_tags(tracking, run_id, kept)
        return run_id
    if parent_run_id is not None:
        kept["mlflow.parentRunId"] = parent_run_id
    started: str = client.create_run(tracking.experiment_id, tags=kept, run_name=name).info.run_id
    return started


def _left(client: Any, tracking: Tracking, run_id: str) -> Any:
    """The run of an id, where this experiment has it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    here = run.info.experiment_id == tracking.experiment_id and run.info.lifecycle_stage == "active"
    return run if here else None


def _close_left_over(client: Any, tracking: Tracking, run_id: str) -> None:
    nested = client.search_runs(
        [tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
    )
    for run in nested:
        client.set_terminated(run.info.run_id, status="KILLED")


def tracking_of(workspace: Path, run_id: str) -> tuple[Tracking, str] | None:
    """The experiment of a run, and the run, where the workspace's MLflow still has it."""
    from mlflow.exceptions import MlflowException

    try:
        info = _client(_uri(workspace)).get_run(run_id).info
    except MlflowException:
        return None
    return Tracking(workspace=workspace, experiment_id=info.experiment_id), info.run_id


def client_of(tracking: Tracking) -> Any:
    """A client of the store that a workspace logs to."""
    return _client(tracking.uri)


@contextmanager
def run_started(
    tracking: Tracking, name: str, parent_run_id: str | None = None, tags: Tags | None = None, run_id: str | None = None
) -> Iterator[str]:
    """A run that is open within the block; gives its id. Closed as FINISHED, FAILED, or KILLED when interrupted. Why a
    run failed stands on it as a tag.
    """
    own = resume_or_start(tracking, name, run_id, tags, parent_run_id)
    client, status = _client(tracking.uri), "KILLED"
    try:
        yield own
        status = "FINISHED"
    except Exception as error:
        status = "FAILED"
        client.set_tag(own, FAILURE, _reason(error)[:MAX_TAG])
        raise
    finally:
        client.set_terminated(own, status=status)


def _reason(error: Exception) -> str:
    """An error of puzzle's is a sentence already; any other says little without its name."""
    return str(error) if isinstance(error, PuzzleError) else f"{type(error).__name__}: {error}"


def log_stage(
    tracking: Tracking,
    name: str,
    parent_run_id: str | None,
    tags: Tags | None = None,
    metrics: Mapping[str, float] | None = None,
    tables: Tables | None = None,
    params: Mapping[str, str] | None = None,
) -> str:
    """A finished run with its figures and tables, nested in another where one is named. Returns its id."""
    marked = {**(tags or {}), **_marks(tables or {})}
    with run_started(tracking, name, parent_run_id, marked) as run_id:
        if params:
            log_params(tracking, run_id, params)
        log_metrics(tracking, run_id, metrics or {})
        _write_tables(tracking, run_id, tables or {})
    return run_id


def log_metrics(tracking: Tracking, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
    """Many metrics in one transaction, or a few: MLflow takes so many at a time."""
    log_series(tracking, run_id, [(step, metrics)])


def log_series(tracking: Tracking, run_id: str, series: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    """Metrics of several steps, each with its number."""
    from mlflow.entities import Metric as Point
    from mlflow.utils.time import get_current_time_millis
    from mlflow.utils.validation import MAX_METRICS_PER_BATCH

    client, now = _client(tracking.uri), get_current_time_millis()
    points = [Point(key, float(value), now, step) for step, metrics in series for key, value in metrics.items()]
    for some in _batches(points, MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=some)


def log_params(tracking: Tracking, run_id: str, params: Mapping[str, str]) -> None:
    """Parameters of a run, cut to the length that MLflow keeps. The same ones may be logged again when it resumes.
    TrackingError when they differ.
    """
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

    client = _client(tracking.uri)
    cut = {key: value[:MAX_PARAM_VAL_LENGTH] for key, value in params.items()}
    try:
        for some in _batches([Param(key, value) for key, value in cut.items()], MAX_PARAMS_TAGS_PER_BATCH):
            client.log_batch(run_id, params=some)
    except MlflowException as refused:
        there = client.get_run(run_id).data.params
        differ = sorted(key for key, value in cut.items() if there.get(key, value) != value)
        if not differ:
            raise
        raise TrackingError(
            f"MLflow run {run_id} was started with another {', '.join(differ)}: a run keeps its parameters; start "
            "a new run instead of resuming this one"
        ) from refused


def set_tags(tracking: Tracking, run_id: str, tags: Mapping[str, str]) -> None:
    """A few tags at once."""
    from mlflow.entities import RunTag

    if tags:
        _client(tracking.uri).log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def _batches(values: Sequence[Any], size: int) -> Iterator[list[Any]]:
    return (list(values[first : first + size]) for first in range(0, len(values), size))


def log_tables(tracking: Tracking, run_id: str, tables: Tables, without: frozenset[str] = frozenset()) -> None:
    """Contracts as tables `<name>.json` of a run (losses, scores, candidates). A resumed run replaces its own.

    without: fields that are no columns.
    """
    client = _client(tracking.uri)
    marked = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
    _write_tables(tracking, run_id, tables, without)
    for key, value in _marks(tables, marked).items():
        client.set_tag(run_id, key, value)


def _marks(tables: Tables, marked: Sequence[Mapping[str, str]] = ()) -> dict[str, str]:
    """The tag by which MLflow's UI knows that files are tables; no tag without a table."""
    marks = [{"path": f"{name}.json", "type": "table"} for name, rows in tables.items() if rows]
    every = [*marked, *(mark for mark in marks if mark not in marked)]
    return {TABLES_TAG: json.dumps(every)} if marks else {}


def _write_tables(tracking: Tracking, run_id: str, tables: Tables, without: frozenset[str] = frozenset()) -> None:
    """What MLflow's log_table writes, all at once; that one would append to a table that is there."""
    written = {}
    for name, rows in tables.items():
        dumped = [row.model_dump(mode="json", exclude=set(without)) for row in rows]
        if dumped:
            table = {"columns": list(dumped[0]), "data": [list(row.values()) for row in dumped]}
            written[f"{name}.json"] = json.dumps(table)
    log_texts(tracking, run_id, written)


def log_texts(tracking: Tracking, run_id: str, texts: Mapping[str, str]) -> None:
    """Texts by file name, as artifacts of a run."""
    if not texts:
        return
    with tempfile.TemporaryDirectory(prefix="puzzle-mlflow-") as folder:
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        _client(tracking.uri).log_artifacts(run_id, folder)


def log_files(tracking: Tracking, run_id: str, files: Sequence[Path], folder: str) -> None:
    """Files as artifacts of a run, in a folder of theirs."""
    with tempfile.TemporaryDirectory(prefix="puzzle-mlflow-") as together:
        for file in files:
            Path(together, file.name).symlink_to(file.resolve())
        _client(tracking.uri).log_artifacts(run_id, together, folder)


def mlflow_ui_command(workspace: Path, port: int = 5000) -> str:
    """The shell command that shows a workspace in the browser, on this machine only. One worker: 490 MB, not 811."""
    words = [
        str(Path(sys.executable).parent / "mlflow"),
        "server",
        *("--backend-store-uri", _uri(workspace)),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    return f"MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.join(words)}"


def page_lines(tracking: Tracking, run_id: str) -> list[str]:
    """A run's page; before it the command that opens MLflow on the workspace, where no server shows the run."""
    url = run_url(tracking, run_id)
    asked = f"{LOCAL_MLFLOW}/ajax-api/2.0/mlflow/runs/get?run_id={run_id}"
    if server_uri() or answer(asked, timeout=2):
        return [url]
    return [mlflow_ui_command(tracking.workspace), url]


def run_url(tracking: Tracking, run_id: str, port: int = 5000) -> str:
    """The address of a run's page."""
    return page_url(f"experiments/{tracking.experiment_id}/runs/{run_id}", port)


def page_url(place: str, port: int = 5000) -> str:
    """The address of a page of MLflow's UI: on the server that MLFLOW_TRACKING_URI names, or else on this machine.

    On this machine the page answers while the command of `mlflow_ui_command` runs.
    """
    return f"{server_uri() or f'http://127.0.0.1:{port}'}/#/{place}"
