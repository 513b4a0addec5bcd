"""What a workspace and MLflow keep of a study."""

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from blocks.files import atomic_path, write_text
from blocks.library import digest_of, write_value
from blocks.records import Value
from tasks.operating import tracking
from tasks.studies.additivity import Check
from tasks.studies.verdicts import truth_points


def keep(
    store: tracking.Tracking,
    name: str,
    value: Value,
    text: str,
    figures: Mapping[str, float],
    picture: Figure | None = None,
) -> Path:
    """Write a study to `studies/<name>-<digest>/` and log it as an MLflow run of its own. Returns the folder."""
    folder = store.workspace / "studies" / f"{name}-{digest_of(value=value)[:12]}"
    files = [write_value(folder / "study.json", value), write_text(folder / "study.txt", text + "\n")]
    if isinstance(value, Check):
        points = [point.model_dump() for point in truth_points(value)]
        files.append(write_text(folder / "truth.json", json.dumps(points, indent=1) + "\n"))
    if picture is not None:
        with atomic_path(folder / "predicted-against-true.png") as temporary:
            picture.savefig(temporary, format="png")
        files.append(folder / "predicted-against-true.png")
    with tracking.run_started(store, name) as run_id:
        tracking.log_metrics(store, run_id, figures)
        tracking.log_files(store, run_id, files, "study")
    return folder
