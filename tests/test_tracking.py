"""MLflow round trip on a SQLite file in a temporary workspace: what was logged is found again."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blocks.errors import PuzzleError
from blocks.library import write_value
from blocks.records import Cost, CostTable, SpeedReport, TruthPoint
from profiles.schema import (
    BLD,
    Budget,
    Chat,
    Corpus,
    Evaluate,
    Hardware,
    Profile,
    PythonStdlibSource,
    Scenario,
    ScenarioBudget,
    TinyParent,
)
from tasks.libraries.interchange import Description, StoredLibrary
from tasks.measure.bench import BenchRow
from tasks.operating import tracking
from tasks.operating.charts import shared_view
from tasks.operating.run_figures import (
    GLANCE,
    HEADLINES,
    asked_params,
    cost_metrics,
    input_params,
    report_metrics,
    run_name,
)
from tasks.operating.study_runs import keep, log_bench, log_costs, log_probe, log_report, log_sweep
from tasks.operating.sweeping import SweepPoint
from tasks.operating.tracking import (
    Tracking,
    TrackingError,
    log_params,
    log_series,
    log_stage,
    log_tables,
    mlflow_ui_command,
    open_tracking,
    resume_or_start,
    run_started,
    run_url,
)
from tasks.pages.page import read_truth
from tasks.pages.report import write_report
from tasks.running.servers import sqlite_file, sqlite_url
from tests.test_probe import probe_report
from tests.test_report import report_of, with_speed


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
    assert client(opened).get_experiment(opened.experiment_id).tags == tracking.KIND | shared_view()


def test_report_is_found_again(opened: Tracking, tmp_path: Path) -> None:
    report = report_of()
    with run_started(opened, "optimize", tags={"prefect.flow_run_id": "flow-1", "prefect.task_run_id": None}) as run_id:
        log_report(opened, run_id, report, write_report(report, tmp_path))
    query = "tags.`prefect.flow_run_id` = 'flow-1' and metrics.`child_gkd/kl` < 0.5"
    (run,) = client(opened).search_runs([opened.experiment_id], query)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(report_metrics(report))
    assert "prefect.task_run_id" not in run.data.tags
    files = {item.path for item in client(opened).list_artifacts(run_id, "report")}
    assert {"report/report.json", "report/architecture.png"} <= files
    assert (opened.workspace / "mlartifacts" / run_id).is_dir()


def test_a_run_says_why_its_times_are_not_reliable(opened: Tracking) -> None:
    for busy in ("", "others took 2.0 of 2 processors"):
        with run_started(opened, "optimize") as run_id:
            log_report(opened, run_id, report_of().model_copy(update={"speed": SpeedReport(busy=busy)}), [])
        tags = client(opened).get_run(run_id).data.tags
        assert (busy in tags["puzzle.not_reliable"]) if busy else "puzzle.not_reliable" not in tags


def test_one_suffix_tells_models_after_gkd_from_those_before() -> None:
    metrics = report_metrics(report_of())
    assert (metrics["child/kl"], metrics["child_gkd/kl"]) == (1.1, 0.4)
    assert metrics["baseline_greedy_gkd/kl"] == 0.8
    assert metrics["baseline_uniform/kl"] == 2.5 and "baseline_uniform_gkd/kl" not in metrics  # never distilled
    assert metrics["child_gkd/speedup_prefill"] == pytest.approx(1.3)
    assert metrics["child_gkd/retention"] == 0.9
    assert metrics["parent/prefill_tokens_per_second"] == 400
    assert metrics["parent/benchmark_piqa"] == 0.7
    assert metrics["child/parameters_fraction"] == 0.75
    assert "parent/speedup_prefill" not in metrics


def test_headlines_are_of_the_finished_child_and_come_first() -> None:
    metrics = report_metrics(report_of())
    first = sorted(metrics)[:7]
    assert set(first) <= {f"{GLANCE}/{name}" for name in HEADLINES} and list(HEADLINES) == sorted(HEADLINES)
    assert first[0] == f"{GLANCE}/decode_speedup"  # MLflow's compare page opens on the first metric
    assert metrics[f"{GLANCE}/kl"] == 0.4 and metrics[f"{GLANCE}/memory_fraction"] == 0.8


def cost(variant: str, subblock: Any = "ffn", scenario: str = "chat", batch: int = 1) -> Cost:
    return Cost(
        subblock=subblock,
        variant=variant,
        scenario=scenario,
        batch_size=batch,
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
        log_tables(opened, stage, {"costs": [cost("c")], "nothing": []})  # replaces, MLflow alone would append
        log_tables(opened, run_id, {"more": [cost("a")]})
    (run,) = client(opened).search_runs([opened.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert (run.info.run_id, run.info.run_name, run.info.status) == (stage, "costs", "FINISHED")
    assert run.data.metrics == {"variants": 2}
    assert '"costs.json"' in run.data.tags["mlflow.loggedArtifacts"]  # so the UI shows it as a table
    # not client.load_table: in mlflow 3.17 it looks in the global database
    table = json.loads(Path(client(opened).download_artifacts(stage, "costs.json")).read_text())
    assert table["data"][0][table["columns"].index("variant")] == "c"
    assert len(table["data"]) == 1


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("no such layer"), "FAILED", "ValueError: no such layer"),
        (PuzzleError("the corpus is too small."), "FAILED", "the corpus is too small."),
        (ValueError("x" * 9000), "FAILED", f"ValueError: {'x' * 7988}"),  # as much as MLflow keeps of a tag
        (KeyboardInterrupt(), "KILLED", None),
    ],
)
def test_a_run_ends_as_it_ended_and_says_why(
    opened: Tracking, error: BaseException, status: str, reason: str | None
) -> None:
    with pytest.raises(type(error)), run_started(opened, "optimize") as run_id:
        raise error
    run = client(opened).get_run(run_id)
    assert (run.info.status, run.data.tags.get(tracking.FAILURE)) == (status, reason)
    with run_started(opened, "optimize", run_id=run_id):  # goes on, and this time it ends well
        pass
    run = client(opened).get_run(run_id)
    assert run.info.status == "FINISHED" and tracking.FAILURE not in run.data.tags


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


def profile_with(**changes: Any) -> Profile:
    corpus = Corpus(sources=(PythonStdlibSource(kind="python_stdlib"),))
    base = {"name": "tiny", "parent": TinyParent(), "corpus": corpus, "budget": Budget(speedup=1.5)}
    return Profile(**{**base, **changes})


def test_params_stay_what_they_were(opened: Tracking) -> None:
    report = report_of()
    long = Chat(chat="y" * 4000)
    profile = profile_with(evaluate=Evaluate(prompts=(long, "z" * 3000)))
    params = asked_params(profile) | input_params(report.parent, report.corpus, "this-machine")
    assert params["budget.speedup"] == "1.5" and params["bld.steps"] == "16" and params["hardware.engine"] == "torch"
    assert params["hardware.precision"] == "float32"  # though nobody named it
    assert params["scenarios.chat.prompt_tokens"] == "256" and params["corpus.sources.0.kind"] == "python_stdlib"
    assert params["search_space.ffn"] == '["ffn50pct", "ffn25pct", "linear", "no_op"]'
    assert params["parent_fingerprint"] == report.parent.fingerprint
    assert 70 < len(params) < 130  # more than MLflow takes at once, if scenarios are added
    many = params | {f"scenarios.s{number}.prompt_tokens": "1" for number in range(100)}
    with run_started(opened, "optimize") as run_id:
        log_params(opened, run_id, many)
        log_params(opened, run_id, many)
        with pytest.raises(TrackingError, match="another budget.speedup"):
            log_params(opened, run_id, many | {"budget.speedup": "2"})
    assert client(opened).get_run(run_id).data.params == {key: value[:6000] for key, value in many.items()}


def test_a_run_is_named_by_what_differs() -> None:
    plain, other = profile_with(), profile_with(bld=BLD(steps=60))
    assert run_name(plain).startswith("tiny speedup=1.5 ") and run_name(plain) == run_name(profile_with())
    assert run_name(other).rpartition(" ")[0] == run_name(plain).rpartition(" ")[0] != run_name(other)
    chat = Scenario(name="chat", budget=ScenarioBudget(memory_gib=2))
    named = profile_with(hardware=Hardware(engine="llama.cpp", precision="q8_0"), scenarios=(chat,))
    assert run_name(named).startswith("tiny chat.memory_gib=2.0 speedup=1.5 llama.cpp q8_0 ")


def table(*costs: Cost) -> CostTable:
    hardware = {"name": "x", "engine": "torch 9", "threads": "2"}
    return CostTable(hardware=hardware, costs=costs, non_block=(), num_hidden_layers=2, measured_at="now")


def test_every_cost_has_a_name_of_its_own() -> None:
    one = cost_metrics(table(cost("ffn768"), cost("kv1", "attention"), cost("no_op"), cost("no_op", "attention")))
    assert one["cost/ffn768/decode_ms"] == pytest.approx(10) and one["cost/ffn768/prefill_ms"] == pytest.approx(100)
    assert one["cost/ffn768/weight_bytes"] == 40 and one["cost/kv1/kv_bytes_per_token"] == 0
    assert "cost/ffn768/kv_bytes_per_token" not in one
    assert {name.split("/")[1] for name in one} == {"ffn768", "kv1", "ffn_no_op", "attention_no_op"}
    every = [cost("ffn768", "ffn", scenario, batch) for scenario in ("chat", "rag") for batch in (1, 4)]
    names = [name for name in cost_metrics(table(*every)) if "decode_ms" in name]
    ends = ["decode_ms_chat", "decode_ms_chat_b4", "decode_ms_rag", "decode_ms_rag_b4"]
    assert names == [f"cost/ffn768/{end}" for end in ends]


def test_a_cost_table_is_one_run(opened: Tracking) -> None:
    hardware = Hardware(engine="torch", precision="float32")
    first = log_costs(opened, table(cost("ffn768")), hardware)
    again = table(cost("ffn768")).model_copy(update={"measured_at": "later"})
    assert log_costs(opened, again, hardware) == first != log_costs(opened, table(cost("ffn8")), hardware)
    run = client(opened).get_run(first)
    assert (run.data.tags["puzzle.engine"], run.data.tags["puzzle.threads"]) == ("torch", "2")
    assert run.data.params["hardware.engine"] == "torch 9" and run.data.metrics["cost/ffn768/parameters"] == 10


def test_a_sweep_is_a_series_of_its_limits(opened: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    described = Description(
        profile="tiny",
        parent="tiny-llama",
        parent_fingerprint="f",
        corpus="c",
        num_hidden_layers=2,
        hardware={"name": "this-machine", "processor": "AMD EPYC"},
        measured_at="now",
        scenarios=(Scenario(),),
    )
    library = StoredLibrary(description=described, variants=(), scores=(), costs=table())
    monkeypatch.setattr("tasks.operating.study_runs.read_source", lambda _: library)
    points = [SweepPoint(limit=1.0, status="infeasible"), SweepPoint(limit=2.0, status="optimal", score=0.5)]
    page = log_sweep(opened.workspace, "memory_gib", points)
    found = client(opened).get_experiment_by_name("puzzle tiny-llama on AMD EPYC")
    assert page and f"/experiments/{found.experiment_id}/runs/" in page
    series = client(opened).get_metric_history(page.rpartition("/")[2], "sweep/limit")
    assert [(point.step, point.value) for point in series] == [(0, 1.0), (1, 2.0)]
    assert [point.step for point in client(opened).get_metric_history(page.rpartition("/")[2], "sweep/score")] == [1]


def test_a_bench_lies_under_the_run_that_made_the_child(opened: Tracking, tmp_path: Path) -> None:
    child = opened.workspace / "runs" / "tiny-1" / "child"
    with run_started(opened, "tiny") as run_id:
        pass
    write_value(child.parent / "report.json", report_of().model_copy(update={"mlflow_run_id": run_id}))
    load = {"batch_size": 1, "prompt_tokens": 256, "generated_tokens": 64}
    row: dict[str, Any] = {"engine": "torch", "version": "torch 9", "precision": "float32", "threads": 2, **load}
    speeds = {name: speed for name, (speed,) in with_speed().speed.models.items()}
    rows = [BenchRow(model=name, throughput=speed, **row) for name, speed in speeds.items()]
    page = log_bench(child, rows, ["1x256x64: the machine was busy"])
    assert page and page.startswith("MLFLOW_DISABLE_TELEMETRY")  # no server shows it: the command that opens it
    run = client(opened).get_run(page.rpartition("/")[2])
    assert run.data.tags["mlflow.parentRunId"] == run_id and run.data.params["loads"] == "1x256x64"
    assert run.data.metrics["bench_1x256x64/child_prefill_speedup"] == pytest.approx(2)
    assert run.data.tags["puzzle.not_reliable"] == "1x256x64: the machine was busy"
    assert log_bench(tmp_path / "child.gguf", [], []) is None  # of no workspace


def test_a_probe_lies_under_the_run_that_made_the_child(opened: Tracking, tmp_path: Path) -> None:
    child = opened.workspace / "runs" / "tiny-2" / "child"
    with run_started(opened, "tiny") as run_id:
        pass
    made = report_of().model_copy(update={"mlflow_run_id": run_id})
    write_value(child.parent / "report.json", made)
    found = probe_report(made)
    page = log_probe(child, found)
    assert page
    run = client(opened).get_run(page.rpartition("/")[2])
    assert run.data.tags["mlflow.parentRunId"] == run_id and run.data.params["text_upper"] == found.domains[1].about
    assert run.data.metrics["probe_upper/child_times"] == 2.5
    assert run.data.metrics["probe_upper/child_times_se"] == 0.2
    assert log_probe(tmp_path / "child", found) is None  # of no run


def test_a_study_keeps_its_points_as_data_and_as_a_picture(opened: Tracking) -> None:
    points = [TruthPoint(name=str(true), predicted=1.0, true=true, true_se=0.1) for true in (0.9, 1.2)]
    folder = keep(opened, "check-tiny", points[0], "as a table", {"check/rank": 1.0}, points)
    assert list(read_truth(folder / "truth.json")) == points
    found = client(opened).search_runs([opened.experiment_id], "metrics.`check/rank` = 1")[0].info.run_id
    logged = {item.path.removeprefix("study/") for item in client(opened).list_artifacts(found, "study")}
    assert logged == {"study.json", "study.txt", "truth.json", "predicted-against-true.png"}
    assert {path.name for path in keep(opened, "peers-tiny", points[1], "", {}).iterdir()} == {
        "study.json",
        "study.txt",
    }


def test_more_metrics_than_mlflow_takes_at_once(opened: Tracking) -> None:
    with run_started(opened, "sweep") as run_id:
        log_series(opened, run_id, [(step, {f"m{number}": step}) for number in range(600) for step in (0, 1)])
    found = client(opened).get_run(run_id).data.metrics
    assert len(found) == 600 and set(found.values()) == {1}  # the last step


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
