"""MLflow round trip on a SQLite file in a temporary workspace: what was logged is found again."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocks.records import Cost
from profiles.schema import Budget, Corpus, Profile, PythonStdlibSource, TinyParent
from tasks.operating import tracking
from tasks.operating.tracking import (
    Tracking,
    TrackingError,
    log_params,
    log_report,
    log_stage,
    log_table,
    mlflow_ui_command,
    open_tracking,
    report_metrics,
    resume_or_start,
    run_params,
    run_started,
    run_url,
)
from tasks.pages.report import write_report
from tasks.running.servers import sqlite_file, sqlite_url
from tests.test_report import report_of


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's global default is a database in the current folder: nothing of ours may end there."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    assert not list(here.iterdir())


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    workspace = tmp_path_factory.mktemp("workspace") / "a?b%20c#d [1]"
    return open_tracking(workspace, "puzzle")  # seconds of migrations: once for the module


def client(opened: Tracking) -> Any:
    return tracking._client(opened.uri)


def test_opening_twice_is_one_experiment(opened: Tracking) -> None:
    assert open_tracking(opened.workspace, "puzzle") == opened
    assert client(opened).get_experiment(opened.experiment_id).tags == tracking.KIND


def test_report_is_found_again(opened: Tracking, tmp_path: Path) -> None:
    report = report_of()
    with run_started(opened, "optimize", tags={"prefect.flow_run_id": "flow-1", "prefect.task_run_id": None}) as run_id:
        log_report(opened, run_id, report, write_report(report, tmp_path))
    query = "tags.`prefect.flow_run_id` = 'flow-1' and metrics.`child/kl` < 0.5"
    (run,) = client(opened).search_runs([opened.experiment_id], query)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(report_metrics(report))
    assert "prefect.task_run_id" not in run.data.tags
    files = {item.path for item in client(opened).list_artifacts(run_id, "report")}
    assert {"report/report.json", "report/architecture.png"} <= files
    assert (opened.workspace / "mlartifacts" / run_id).is_dir()


def test_metric_names_tell_last_stages_from_assembled_ones() -> None:
    metrics = report_metrics(report_of())
    assert metrics["child/kl"] == 0.4
    assert metrics["child_assembled/kl"] == 1.1
    assert metrics["baseline_greedy/kl"] == 0.8
    assert metrics["baseline_uniform/kl"] == 2.5  # never distilled: its only stage is its last
    assert metrics["child/speedup_prefill"] == pytest.approx(1.3)
    assert metrics["child/retention"] == 0.9
    assert metrics["parent/prefill_tokens_per_second"] == 400
    assert metrics["parent/benchmark_piqa"] == 0.7
    assert metrics["child/parameters_fraction"] == 0.75
    assert "parent/speedup_prefill" not in metrics


def cost(variant: str) -> Cost:
    return Cost(
        subblock="ffn",
        variant=variant,
        scenario="chat",
        batch_size=1,
        prefill_seconds=0.1,
        decode_seconds_per_token=0.01,
        prefill_spread=0,
        decode_spread=0,
        parameters=10,
        weight_bytes=40,
        kv_bytes_per_token=0,
    )


def test_stages_are_nested_with_their_tables(opened: Tracking) -> None:
    with run_started(opened, "optimize") as run_id:
        stage = log_stage(opened, "costs", run_id, metrics={"variants": 2}, tables={"costs": [cost("a"), cost("b")]})
        log_table(opened, stage, "costs", [cost("c")])  # a second attempt replaces, MLflow alone would append
        log_table(opened, stage, "nothing", [])
    (run,) = client(opened).search_runs([opened.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert (run.info.run_id, run.info.run_name, run.info.status) == (stage, "costs", "FINISHED")
    assert run.data.metrics == {"variants": 2}
    assert '"costs.json"' in run.data.tags["mlflow.loggedArtifacts"]  # so the UI shows it as a table
    # not client.load_table: in mlflow 3.17 it looks in the global database
    table = json.loads(Path(client(opened).download_artifacts(stage, "costs.json")).read_text())
    assert table["data"][0][table["columns"].index("variant")] == "c"
    assert len(table["data"]) == 1


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_ends_as_it_ended(opened: Tracking, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), run_started(opened, "optimize") as run_id:
        raise error
    assert client(opened).get_run(run_id).info.status == status


def test_a_killed_run_goes_on_under_its_id(opened: Tracking) -> None:
    killed = resume_or_start(opened, "optimize", tags={"prefect.run_count": "1"})
    stage = resume_or_start(opened, "bld", parent_run_id=killed)
    with run_started(opened, "optimize", run_id=killed, tags={"prefect.run_count": "2"}) as run_id:
        assert run_id == killed
        assert client(opened).get_run(killed).info.status == "RUNNING"
        assert client(opened).get_run(stage).info.status == "KILLED"
    run = client(opened).get_run(killed)
    assert (run.info.status, run.data.tags["prefect.run_count"]) == ("FINISHED", "2")
    assert resume_or_start(opened, "optimize", run_id="0" * 32) != "0" * 32  # unknown here: a new run


def test_params_stay_what_they_were(opened: Tracking) -> None:
    profile = Profile(
        name="tiny",
        parent=TinyParent(),
        corpus=Corpus(sources=(PythonStdlibSource(kind="python_stdlib"),)),
        budget=Budget(speedup=1.5),
    )
    report = report_of()
    params = run_params(profile, report.parent, report.corpus, "this-machine")
    assert params["budget/speedup"] == "1.5"
    assert params["scenario_chat/prompt_tokens"] == "256"
    assert params["parent_fingerprint"] == report.parent.fingerprint
    with run_started(opened, "optimize") as run_id:
        log_params(opened, run_id, params)
        log_params(opened, run_id, params)
        with pytest.raises(TrackingError, match="another budget/speedup"):
            log_params(opened, run_id, params | {"budget/speedup": "2"})
    assert client(opened).get_run(run_id).data.params == params


def test_what_a_person_types(opened: Tracking) -> None:
    command = mlflow_ui_command(opened.workspace, port=5001)
    assert shlex.quote(sqlite_url(opened.workspace / "mlflow.db")) in command
    assert list(opened.workspace.parent.iterdir()) == [opened.workspace], "no database and no folder beside it"
    assert "--host 127.0.0.1 --port 5001" in command
    assert run_url(opened, "abc", 5001) == f"http://127.0.0.1:5001/#/experiments/{opened.experiment_id}/runs/abc"


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow refuses a half-migrated file for ever: the file has its name once it is whole."""
    workspace, made = tmp_path / "workspace", tracking._client

    def killed(uri: str) -> Any:
        place = sqlite_file(uri)
        assert place
        made(uri).search_experiments(max_results=1)
        whole = place.read_bytes()
        place.write_bytes(whole[: len(whole) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking, "_client", killed)
    with pytest.raises(KeyboardInterrupt):
        open_tracking(workspace, "puzzle")
    assert not (workspace / tracking.DATABASE).exists()
    monkeypatch.setattr(tracking, "_client", made)
    again = open_tracking(workspace, "puzzle")
    assert resume_or_start(again, "a run") and (workspace / tracking.DATABASE).is_file()
    assert len(list(workspace.glob(".*.part"))) == 1, "a killed run's, cleared when the next one enters the workspace"
