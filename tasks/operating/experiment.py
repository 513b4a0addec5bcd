"""Where a run stands in MLflow, and what went into it: an experiment per parent and hardware, parent and corpus as
inputs, what the machine did meanwhile, and a link that shows runs side by side.
"""

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from blocks.records import CorpusInfo, ParentInfo
from profiles.schema import Hardware, Profile
from tasks.inputs.parent import name_of
from tasks.measure.hardware_description import accelerator, entry, processor
from tasks.operating.charts import OPTIMISATIONS, VIEW
from tasks.operating.run_figures import CHILDS_FIGURES
from tasks.operating.tracking import Tracking, client_of, open_tracking, page_url, resume_or_start
from tasks.running.progress import say

DIGEST = 32  # digits of a fingerprint; MLflow keeps 36 at most
SAMPLE_SECONDS = 10.0  # MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides it
FINISH_SECONDS = 15.0  # for the last sample to arrive


def hardware_label(hardware: Hardware) -> str:
    """The hardware target as runs name it."""
    described = {"name": hardware.name, "engine": hardware.engine, "processor": processor()}
    return label_of(described | entry("accelerator", accelerator(hardware.device)))


def label_of(described: Mapping[str, str]) -> str:
    """The same of a cost table's hardware; a machine without a name of its own is named by its processor."""
    name = described["name"]
    if described.get("engine") == "roofline":
        return f"{name} (modelled)"
    unnamed = name == Hardware().name
    return (described.get("accelerator") or described.get("processor") or name) if unnamed else name


def experiment_name(profile: Profile) -> str:
    """`puzzle <parent> on <hardware>`: runs that can be compared lie in one experiment."""
    return named(name_of(profile.parent), hardware_label(profile.hardware))


def named(parent: str, hardware: str) -> str:
    """The experiment of a parent on a hardware target."""
    return f"puzzle {parent} on {hardware}"


def open_experiment(profile: Profile, workspace: Path) -> Tracking:
    """The experiment of a profile's runs, made where it is missing."""
    return open_tracking(workspace, experiment_name(profile))


def log_inputs(tracking: Tracking, run_id: str, parent: ParentInfo, corpus: CorpusInfo) -> None:
    """Parent and corpus as inputs of a run, known by their fingerprints; a resumed run logs the same ones again."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    def made(context: str, name: str, fingerprint: str, place: str, facts: dict[str, object]) -> Any:
        source = json.dumps({"uri": str(tracking.workspace / place)})
        dataset = Dataset(name, fingerprint[:DIGEST], "local", source, profile=json.dumps(facts))
        return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])

    origin: dict[str, object] = {"source": parent.source, "revision": parent.revision, "sha256": parent.fingerprint}
    texts = corpus.model_dump(mode="json", exclude={"tokens", "fingerprint"}) | {"sha256": corpus.fingerprint}
    client_of(tracking).log_inputs(
        run_id,
        datasets=[
            made("parent", parent.name, parent.fingerprint, parent.folder, origin),
            made("corpus", corpus_name(corpus), corpus.fingerprint, corpus.tokens.path, texts),
        ],
    )


def corpus_name(corpus: CorpusInfo) -> str:
    """The corpus as MLflow lists it: what kinds of text it is made of."""
    return corpus.description.partition(";")[0] or "corpus"


@contextmanager
def system_metrics(tracking: Tracking, run_id: str) -> Iterator[None]:
    """CPU, memory, disk, network, and GPUs where there are any, as `system/...` metrics of a nested run `machine`: on
    the run itself they would stand among what is compared.
    """
    client = client_of(tracking)  # sets MLflow's environment before its first import
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # a sample less is no news
    own = resume_or_start(tracking, "machine", parent_run_id=run_id)
    monitor: Any = SystemMetricsMonitor(own, sampling_interval=SAMPLE_SECONDS, tracking_uri=tracking.uri)
    monitor.start()

    def end() -> None:
        monitor.finish()
        client.set_terminated(own)

    try:
        yield
    finally:
        _within(FINISH_SECONDS, end)


def _within(seconds: float, end: Callable[[], object]) -> None:
    """Wait for `end`, but not longer: MLflow's client asks a server that is down again for minutes."""

    def told() -> None:
        try:
            end()
        except mlflow_error() as error:  # of a full disk, which stops the run by itself
            say(f"MLflow has not taken the last system metrics: {str(error).splitlines()[0]}")

    ending = threading.Thread(target=told, daemon=True, name="end-of-system-metrics")
    ending.start()
    ending.join(seconds)
    if ending.is_alive():
        say(f"MLflow has not taken the last system metrics within {seconds:g} s: going on without them")


def mlflow_error() -> type[Exception]:
    """What MLflow's client raises, whatever the reason; named here because the package is imported late."""
    from mlflow.exceptions import MlflowException

    return MlflowException


def charts_url(tracking: Tracking, port: int = 5000) -> str:
    """MLflow's page of an experiment: all its optimisations in charts, speed against quality first."""
    view = f"viewStateShareKey={VIEW}&compareRunsMode=CHART"
    return page_url(f"experiments/{tracking.experiment_id}/runs?{view}", port)


def compare_url(tracking: Tracking, run_ids: Sequence[str], port: int = 5000) -> str:
    """MLflow's page that shows runs side by side: parameters, metrics, charts."""
    experiments = [client_of(tracking).get_run(run_id).info.experiment_id for run_id in run_ids]
    asked = f"runs={_listed(run_ids)}&experiments={_listed(list(dict.fromkeys(experiments)))}"
    return page_url(f"compare-runs?{asked}", port)


def _listed(words: Sequence[str]) -> str:
    return quote(json.dumps(list(words), separators=(",", ":")))  # it stands in Markdown links


def finished_runs(tracking: Tracking, count: int) -> list[str]:
    """The last finished optimisations of an experiment, newest first; nested runs have no parameters."""
    found = client_of(tracking).search_runs(
        [tracking.experiment_id],
        f"attributes.status = 'FINISHED' and {OPTIMISATIONS}",
        max_results=count,
        order_by=["attributes.start_time DESC"],
    )
    return [run.info.run_id for run in found]


def log_model_metrics(
    tracking: Tracking, run_id: str, model_id: str, metrics: dict[str, float], corpus: CorpusInfo
) -> None:
    """The figures of a child and its parent at a logged model too, with the corpus whose test split they hold for."""
    from mlflow.entities import Metric
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    points = [
        Metric(name, value, now, 0, model_id, corpus_name(corpus), corpus.fingerprint[:DIGEST], run_id)
        for name, value in metrics.items()
        if name.partition("/")[0] in CHILDS_FIGURES
    ]
    client_of(tracking).log_batch(run_id, metrics=points)
