"""Where runs stand in MLflow: names, inputs, the compare page, the saved query of the docs, tables of a whole run."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from blocks.records import BlockRecord, Cost, CostTable, LayerChoice, Ref, Score
from flows.finish import link_to_earlier_runs
from flows.tracked_run import TrackedRun
from profiles.load import load_profile
from profiles.schema import Hardware
from tasks.operating import experiment
from tasks.operating.run_figures import GLANCE, asked_params, input_params
from tasks.operating.run_tables import layer_rows, variant_rows
from tasks.operating.tracking import (
    Tracking,
    client_of,
    log_metrics,
    log_params,
    open_tracking,
    run_started,
)
from tests.chain import chosen
from tests.test_report import report_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return open_tracking(tmp_path_factory.mktemp("workspace"), "puzzle tiny-llama on a machine")


def test_an_experiment_is_named_after_parent_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "processor", lambda: "AMD EPYC")
    assert experiment.experiment_name(load_profile("tiny")) == "puzzle tiny-llama on AMD EPYC"
    named = load_profile("tiny", ["hardware.name=rack-7"])
    assert experiment.experiment_name(named) == "puzzle tiny-llama on rack-7"
    assert experiment.hardware_label(Hardware(name="h100", engine="roofline")) == "h100 (modelled)"
    monkeypatch.setattr(experiment, "processor", lambda: "")
    assert experiment.hardware_label(Hardware()) == "this-machine"  # a machine that does not tell


def test_parent_and_corpus_are_inputs_once(opened: Tracking) -> None:
    report, client = report_of(), client_of(opened)
    with run_started(opened, "tiny") as run_id:
        for _ in range(2):  # a run that goes on logs them again
            experiment.log_inputs(opened, run_id, report.parent, report.corpus)
    found = {one.tags[0].value: one.dataset for one in client.get_run(run_id).inputs.dataset_inputs}
    assert set(found) == {"parent", "corpus"} and len(client.get_run(run_id).inputs.dataset_inputs) == 2
    assert report.parent.fingerprint.startswith(found["parent"].digest)
    assert json.loads(found["parent"].profile)["sha256"] == report.parent.fingerprint
    assert json.loads(found["corpus"].source)["uri"] == str(opened.workspace / report.corpus.tokens.path)
    query = f"dataset.digest = '{found['corpus'].digest}'"
    assert [run.info.run_id for run in client.search_runs([opened.experiment_id], query)] == [run_id]


def asked_run(opened: Tracking, name: str, fraction: float, kl: float) -> str:
    report = report_of()
    profile = load_profile("tiny", [f"budget.layer_parameters_fraction={fraction}", f"name={name}"])
    with run_started(opened, name) as run_id:
        log_params(opened, run_id, asked_params(profile) | input_params(report.parent, report.corpus, "a machine"))
        log_metrics(opened, run_id, {f"{GLANCE}/kl": kl})
    with run_started(opened, "choose", run_id):  # a nested run has neither parameters nor these metrics
        pass
    return run_id


def test_the_saved_query_and_the_compare_page_of_the_docs(opened: Tracking) -> None:
    page = (ROOT / "docs" / "how-to" / "read-runs-in-mlflow.md").read_text()
    (query,) = re.findall(r"^    (params\.profile = .+)$", page, re.MULTILINE)
    assert query in page.split("search_runs(")[1]  # the same in the UI and in Python
    good, also = asked_run(opened, "tiny", 0.6, 0.2), asked_run(opened, "tiny", 0.6, 0.4)
    others = [
        asked_run(opened, "tiny", 0.6, 2.0),
        asked_run(opened, "tiny", 0.5, 0.2),
        asked_run(opened, "o", 0.6, 0.1),
    ]
    found = client_of(opened).search_runs([opened.experiment_id], query, order_by=[f"metrics.`{GLANCE}/kl`"])
    assert [run.info.run_id for run in found] == [good, also]
    assert set(experiment.finished_runs(opened, 10)) == {good, also, *others}
    assert experiment.finished_runs(opened, 2) == [others[2], others[1]]
    url = experiment.compare_url(opened, [good, also], 5001)
    where = f'runs=["{good}","{also}"]&experiments=["{opened.experiment_id}"]'
    assert unquote(url) == f"http://127.0.0.1:5001/#/compare-runs?{where}" and '"' not in url


def test_the_charts_that_a_link_opens_are_kept_with_the_experiment(opened: Tracking) -> None:
    url = experiment.charts_url(opened, 5001)
    page, _, asked = url.partition("?")
    assert page == f"http://127.0.0.1:5001/#/experiments/{opened.experiment_id}/runs"
    key = dict(part.split("=") for part in asked.split("&"))["viewStateShareKey"]
    client = client_of(opened)
    tag = f"mlflow.sharedViewState.{key}"
    state = json.loads(client.get_experiment(opened.experiment_id).tags[tag])
    first = state["compareRunCharts"][0]
    assert (first["xaxis"]["key"], first["yaxis"]["key"]) == (f"{GLANCE}/decode_speedup", f"{GLANCE}/kl")
    client.set_experiment_tag(opened.experiment_id, tag, "of an earlier version")
    open_tracking(opened.workspace, "puzzle tiny-llama on a machine")
    assert json.loads(client.get_experiment(opened.experiment_id).tags[tag]) == state


@pytest.mark.parametrize("broken", ["finished_runs", "compare_url"])
def test_a_finished_run_does_not_fail_for_a_link(
    opened: Tracking, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def refuse(*asked: Any) -> Any:
        raise experiment.mlflow_error()("500, try later")

    monkeypatch.setattr(experiment, "finished_runs", lambda *asked: ["another"])
    monkeypatch.setattr(experiment, broken, refuse)
    monkeypatch.setattr("flows.finish.say", told.append)
    monkeypatch.setattr("flows.finish.show_link", lambda *asked: told.append("a link"))
    own: dict[str, Any] = {
        "workspace": opened.workspace,
        "tracking": opened,
        "mlflow_run_id": "this",
        "prefect_run_id": "",
    }
    link_to_earlier_runs(TrackedRun(profile=load_profile("tiny"), **own))
    assert told == ["no link to earlier runs, MLflow did not name them: 500, try later"]


def test_a_run_does_not_wait_for_its_last_system_metrics(opened: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    told: list[str] = []
    down = threading.Event()
    monkeypatch.setattr(SystemMetricsMonitor, "finish", lambda self: down.wait(30))  # a server that is down
    monkeypatch.setattr(experiment, "FINISH_SECONDS", 0.1)
    monkeypatch.setattr(experiment, "say", told.append)
    started = time.monotonic()
    with run_started(opened, "tiny") as run_id, experiment.system_metrics(opened, run_id):
        pass
    assert not [name for name in client_of(opened).get_run(run_id).data.metrics if name.startswith("system/")]
    down.set()
    assert time.monotonic() - started < 15 and len(told) == 1 and "within 0.1 s: going on without them" in told[0]


def made(layer: int, subblock: Any, variant: str) -> tuple[BlockRecord, Score]:
    weights = Ref(path=f"library/{layer}{variant}", sha256=f"{layer}{variant}") if variant != "no_op" else None
    key = f"{layer}{subblock}{variant}"
    block = BlockRecord(key=key, layer=layer, subblock=subblock, variant=variant, status="trained", weights=weights)
    kl = 0.1 * (layer + 1) + (0.01 if subblock == "ffn" else 0)
    score = Score(
        layer=layer,
        subblock=subblock,
        variant=variant,
        kl=kl,
        kl_se=0.0,
        lm_loss=0.0,
        lm_loss_se=0.0,
        tokens=8,
        kl_per_sequence=(kl,),
        lm_loss_per_sequence=(0.0,),
    )
    return block, score


def test_tables_join_losses_scores_costs_and_the_choice() -> None:
    def cost(subblock: Any, variant: str, parameters: int, batch: int = 1) -> Cost:
        return Cost(
            subblock=subblock,
            variant=variant,
            scenario="chat",
            batch_size=batch,
            prefill_seconds=float(parameters * batch),
            decode_seconds_per_token=0.1,
            prefill_spread=0,
            decode_spread=0,
            parameters=parameters,
            weight_bytes=4 * parameters,
            kv_bytes_per_token=0,
        )

    pairs = [made(0, "attention", "kv1"), made(0, "ffn", "no_op"), made(1, "block", "kv1+ffn8"), made(1, "ffn", "ffn8")]
    blocks, scores = [block for block, _ in pairs], [score for _, score in pairs][:3]  # the last was not scored
    priced = [cost("attention", "parent", 9), cost("attention", "kv1", 5), cost("attention", "kv1", 5, 4)]
    priced += [cost("ffn", "parent", 20), cost("ffn", "ffn8", 8), cost("ffn", "no_op", 0)]
    costs = CostTable(hardware={"name": "x"}, costs=tuple(priced), non_block=(), num_hidden_layers=2, measured_at="")
    architecture = chosen((LayerChoice(ffn="no_op"), LayerChoice(attention="kv1", ffn="ffn8", coupled=True)), 0.31)
    variants = variant_rows(blocks, scores, costs, architecture)
    assert [row.chosen for row in variants] == [False, True, True, False]
    assert [row.parameters for row in variants] == [5, 0, None, 8]  # a coupled block is priced by its halves
    assert variants[0].prefill_seconds == 5 and variants[3].kl is None and variants[0].block == "0kv1"
    layers = layer_rows(blocks, scores, costs, architecture)
    assert sum(row.kl for row in layers) == pytest.approx(architecture.score)
    assert [row.parameters for row in layers] == [9, 13]
    assert (layers[0].attention_block, layers[0].ffn_block) == ("", "")
    assert (layers[1].attention_block, layers[1].ffn_block) == ("1kv1+ffn8", "1kv1+ffn8")


def test_the_last_metrics_that_mlflow_does_not_take_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    full = experiment.mlflow_error()("database or disk is full\n[SQL: UPDATE runs]")

    def end() -> None:
        raise full

    experiment._within(60, end)
    said = capsys.readouterr()
    assert "not taken the last system metrics: database or disk is full" in said.out + said.err
    assert "Traceback" not in said.out + said.err and "SQL" not in said.out + said.err
