"""The charts on which MLflow's page of an experiment opens when puzzle links to it: speed against quality first.

MLflow's own page that compares runs takes no wish for a chart. The page of an experiment does: a view that somebody
shared is a tag of the experiment, with the charts as JSON, and its link names the tag (MLflow 3.17).
"""

import json

from tasks.operating.run_figures import GLANCE, HEADLINES

VIEW = "speed-against-quality"
OPTIMISATIONS = "params.profile LIKE '%'"  # runs beside them, such as cost tables, have other parameters
ENGINE_TAGS = ("tags.`puzzle.engine`", "tags.`puzzle.precision`", "tags.`puzzle.threads`")


def shared_view() -> dict[str, str]:
    """The view, as a tag of an experiment."""
    return {f"mlflow.sharedViewState.{VIEW}": json.dumps(_state())}


def _state() -> dict[str, object]:
    def chart(kind: str, name: str, **own: object) -> dict[str, object]:
        base = {"type": kind, "uuid": f"{kind}-{name}", "metricSectionId": GLANCE, "displayName": name}
        return {**base, "isGenerated": True, "deleted": False, "runsCountToCompare": 20, **own}

    def against(speed: str) -> dict[str, object]:
        axes = {"xaxis": _axis(speed), "yaxis": _axis("kl")}
        return chart("SCATTER", speed, **axes)

    bars = [chart("BAR", name, metricKey=f"{GLANCE}/{name}") for name in HEADLINES]
    return {
        "searchFilter": OPTIMISATIONS,
        "compareRunCharts": [against("decode_speedup"), against("prefill_speedup"), *bars],
        "compareRunSections": [{"uuid": GLANCE, "name": GLANCE, "display": True, "isReordered": False}],
        "selectedColumns": [*ENGINE_TAGS, *(f"metrics.`{GLANCE}/{name}`" for name in HEADLINES)],
    }


def _axis(name: str) -> dict[str, str]:
    return {"key": f"{GLANCE}/{name}", "type": "METRIC"}
