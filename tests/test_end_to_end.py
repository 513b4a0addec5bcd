"""Everything for real: a Prefect and an MLflow server, `puzzle serve`, runs started through the API as the UI does, a
schedule that fires, a champion that changes and one that does not. What both servers keep afterwards is read back.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from benchmarks.site import Site, both_servers, changed, served
from blocks.files import sha256_of
from flows.reoptimize import run_reoptimize
from profiles.load import load_profile
from tasks.evaluate.compare import Lineage
from tasks.operating.champion import Judgement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # a minute on an idle machine, ten on one that is shared
EVERY = {"interval": 30}  # seconds
# values of the form that a person lowers for a quick look
QUICK = {
    "corpus.sources": [{"kind": "python_stdlib", "max_files": 40}],
    "parent.train_steps": 40,
    "search_space.attention": ["kv1", "no_op"],
    "search_space.ffn": ["ffn48", "no_op"],
    "hardware.threads": 1,
    "gkd.steps": 8,
    "evaluate.baselines": ["uniform"],
    "evaluate.distill_best_baseline": False,
    "evaluate.throughput_rounds": 1,
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Both servers and the served tiny profile; two runs at a time."""
    root = tmp_path_factory.mktemp("site")
    sampled = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
    with both_servers(root) as named, served(root, "tiny", ("--runs", "2"), {**named, **sampled}) as made:
        yield made


@pytest.fixture(scope="module")
def optimized(site: Site) -> str:
    """A run of `optimize`, started by its form; meanwhile a schedule of `measure-hardware` fires."""
    run = site.start("optimize", QUICK)
    measured = changed(site.deployment("measure-hardware")["parameters"], QUICK)
    fired = site.fired("measure-hardware", EVERY, measured | {"workspace": "measured"})
    site.kept["fired"] = fired["id"]
    site.finished(run)
    return run


def test_the_schedule_fired(site: Site, optimized: str) -> None:
    run = site.run(site.kept["fired"])
    assert run["auto_scheduled"] and run["state_type"] == "COMPLETED" and run["parameters"]["workspace"] == "measured"
    (table,) = (site.root / "measured" / "costs").glob("*.json")
    costs = json.loads(site.artifacts(run["id"])["costs"]["data"])
    assert len(costs) == len(json.loads(table.read_text())["costs"]) > 0


def test_prefect_tells_the_run(site: Site, optimized: str) -> None:
    artifacts = site.artifacts(optimized)
    bars = {key: found for key, found in artifacts.items() if found["type"] == "progress"}
    assert {"report", "architecture", "comparison", "block-library", "scores", "costs", "chosen"} <= set(artifacts)
    assert {"stage-record", "stage-distill", "stage-score"} <= set(bars)
    assert all(bar["data"] == 100 and "done in" in bar["description"] for bar in bars.values())
    _, tasks = site.call("/task_runs/filter", {"flow_runs": {"id": {"any_": [optimized]}}})
    assert "distill layer 03 ffn ffn48" in {task["name"] for task in tasks}
    assert site.mlflow_run_of(optimized) in artifacts["mlflow-run"]["data"]


def test_mlflow_tells_the_same_run(site: Site, optimized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", site.mlflow)
    client: Any = mlflow.MlflowClient(tracking_uri=site.mlflow)
    run = client.get_run(site.mlflow_run_of(optimized))
    data, (report,) = run.data, site.root.glob("tiny/runs/*/report.json")
    told = json.loads(report.read_text())
    assert run.info.status == "FINISHED" and data.tags["prefect.flow_run_id"] == optimized
    assert optimized in data.tags["prefect.flow_run_url"]
    experiment = client.get_experiment(run.info.experiment_id).name
    assert experiment == f"puzzle tiny-llama on {data.params['hardware']}"
    child = next(c for c in told["candidates"] if (c["name"], c["stage"]) == ("child", "distilled"))
    assert data.metrics["child_gkd/kl"] == data.metrics["at_a_glance/kl"] == pytest.approx(child["kl"]["value"])
    assert data.params["budget.layer_parameters_fraction"] == "0.6" and data.params["bld.steps"] == "8"
    assert not any(name.startswith("system/") for name in data.metrics)
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"profile.yaml", "report"}

    inputs = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert told["parent"]["fingerprint"].startswith(inputs["parent"].digest)
    assert told["corpus"]["fingerprint"].startswith(inputs["corpus"].digest)
    assert Path(json.loads(inputs["parent"].source)["uri"], "config.json").is_file()
    found = client.search_runs([run.info.experiment_id], f"dataset.digest = '{inputs['parent'].digest}'")
    assert [one.info.run_id for one in found] == [run.info.run_id]

    mlflow.set_tracking_uri(site.mlflow)
    try:
        variants = client.load_table(run.info.experiment_id, "variants.json")  # of all runs of the experiment
        layers = client.load_table(run.info.experiment_id, "layers.json", [run.info.run_id])
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    assert len(variants) == 4 * 4 and variants["kl"].notna().all()
    assert [(row.attention, row.ffn) for row in layers.itertuples()] == [
        (choice["attention"], choice["ffn"]) for choice in told["architecture"]["layers"]
    ]
    assert layers["kl"].sum() == pytest.approx(data.metrics["search/score"])
    nested = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert {one.info.run_name.split()[0] for one in nested} == {"costs", "distill", "score", "choose", "machine"}
    (machine,) = (one for one in nested if one.info.run_name == "machine")
    used = {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"}
    assert used <= set(machine.data.metrics) and machine.info.status == "FINISHED"
    costs = client.get_run(data.tags["puzzle.costs_run"]).data
    assert costs.metrics["cost/ffn48/decode_ms"] > 0 and costs.tags["puzzle.engine"] == "torch"


def reoptimized(site: Site, **changes: Any) -> Judgement:
    """`puzzle reoptimize` on the workspace of the run above, against the same servers."""
    words = [f"{path}={json.dumps(value)}" for path, value in (QUICK | changes).items()]
    with temporary_settings({PREFECT_API_URL: f"{site.prefect}/api", PREFECT_HOME: site.root / ".prefect"}):
        try:
            return run_reoptimize(load_profile("tiny", words), site.root / "tiny", remeasure=False)
        finally:  # while their server is there: later each event is tried for a minute by whoever drains next
            EventsWorker.drain_all()


def test_a_champion_stays_and_changes(site: Site, optimized: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", site.mlflow)
    client: Any = mlflow.MlflowClient(tracking_uri=site.mlflow)
    assert reoptimized(site).outcome == "first"
    first = client.get_model_version_by_alias("puzzle-tiny", "champion")
    found = reoptimized(site)
    assert found.outcome == "unchanged" and "nothing changed" in found.reason
    found = reoptimized(site, **{"budget.layer_parameters_fraction": 0.4})
    assert found.outcome == "moved" and "no longer keeps the budget" in found.reason and found.changed == ("budget",)
    now = client.get_model_version_by_alias("puzzle-tiny", "champion")
    assert (first.version, now.version) == ("1", "2")
    assert "replaced version 1. Why: version 1 no longer keeps the budget" in now.description

    assert now.source.startswith("models:/")
    model = client.get_logged_model(now.source.removeprefix("models:/"))
    metrics = {metric.key: metric.value for metric in model.metrics}
    assert metrics["at_a_glance/kl"] == client.get_run(now.run_id).data.metrics["child_gkd/kl"]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/puzzle-tiny/{now.version}", tracking_uri=site.mlflow))
    assert not list(folder.rglob("*.pkl"))
    lineage = Lineage.model_validate_json((folder / "artifacts" / "lineage.json").read_text())
    trained = [block for block in lineage.child.blocks if block.weights]
    assert trained and model.tags["puzzle.parent_fingerprint"] == lineage.parent.fingerprint
    for block in trained:
        assert block.weights is not None
        assert sha256_of(site.root / "tiny" / block.weights.path) == block.weights.sha256
    (text,) = mlflow.pyfunc.load_model(str(folder)).predict([{"prompt": "import", "max_new_tokens": 3}])
    assert isinstance(text, str)
