"""What MLflow keeps beside the stages of an optimisation: reports, cost tables, sweeps, benches, studies."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.files import write_text
from blocks.library import digest_of, read_value, write_value
from blocks.records import ChildReport, CostTable, TruthPoint, Value
from profiles.schema import Hardware
from tasks.libraries.interchange import StoredLibrary, read_source
from tasks.operating import tracking
from tasks.operating.experiment import label_of, named
from tasks.operating.run_figures import bench_metrics, cost_metrics, doubt_tags, engine_tags, report_metrics
from tasks.operating.sweeping import SweepPoint
from tasks.probe.records import ProbeReport
from tasks.probe.words import figures as probe_figures

if TYPE_CHECKING:
    from tasks.measure.bench import BenchRow

# in report.json, too long for a table
PARTS = frozenset({"layers", "samples", "correct", "item_groups", "answers", "limits", "looping", "right_answers"})


def log_report(store: tracking.Tracking, run_id: str, report: ChildReport, files: Sequence[Path]) -> None:
    """Metrics of all candidates, their table, and the files that `write_report` made (pictures, Markdown, JSON)."""
    tracking.log_metrics(store, run_id, report_metrics(report))
    tracking.set_tags(store, run_id, doubt_tags([report.speed.disturbed]))
    tracking.log_tables(store, run_id, {"candidates": report.candidates}, PARTS)
    tracking.log_files(store, run_id, files, "report")


def log_costs(store: tracking.Tracking, table: CostTable, hardware: Hardware, parent_run_id: str | None = None) -> str:
    """A cost table as a run, one for each table: every cost is a metric. Nested in the optimisation that measured it,
    if one did. Returns the run's id.
    """
    digest = digest_of(costs=table.model_dump(mode="json", exclude={"measured_at"}))[:16]
    there = tracking.client_of(store).search_runs(
        [store.experiment_id], f"tags.`puzzle.costs` = '{digest}' and attributes.status = 'FINISHED'", max_results=1
    )
    if there:
        return str(there[0].info.run_id)
    threads = int(table.hardware.get("threads") or hardware.threads or 1)
    tags = engine_tags(hardware.engine, hardware.precision, threads, hardware.device) | doubt_tags([table.disturbed])
    name = f"costs {hardware.engine} {hardware.precision} {threads} threads {digest[:6]}"
    params = {f"hardware.{key}": value for key, value in table.hardware.items()} | {"measured_at": table.measured_at}
    if table.calibration is not None:
        params["calibration"] = table.calibration.model_dump_json()
    tables = {"costs": table.costs, "non_block": table.non_block, "parent": table.parent_measured}
    tags["puzzle.costs"] = digest
    return tracking.log_stage(store, name, parent_run_id, tags, cost_metrics(table), tables, params)


def log_sweep(workspace: Path, over: str, points: Sequence[SweepPoint]) -> str | None:
    """A front over the library of a workspace, as a run: a step for each limit. Returns its page; None where there is
    no experiment to put it in, since the library is none of puzzle's.
    """
    library = read_source(workspace)
    if not isinstance(library, StoredLibrary):
        return None
    described = library.description
    store = tracking.open_tracking(workspace, named(described.parent, label_of(described.hardware)))
    with tracking.run_started(store, f"sweep over {over} of {described.profile}") as run_id:
        tracking.log_params(store, run_id, {"over": over, "library": described.profile, "points": str(len(points))})
        figures = [point.model_dump(exclude={"status"}, exclude_none=True) for point in points]
        series = [(step, {f"sweep/{name}": value for name, value in own.items()}) for step, own in enumerate(figures)]
        tracking.log_series(store, run_id, series)
        tracking.log_tables(store, run_id, {"sweep": points})
    return "\n".join(tracking.page_lines(store, run_id))


def log_bench(child: Path, rows: "Sequence[BenchRow]", doubts: Sequence[str]) -> str | None:
    """A bench as a run nested in the one that made the child. Returns its page; None where no such run is known.

    doubts: why its speeds are not reliable.
    """
    made = _run_of(child)
    if made is None:
        return None
    of, run = made
    first = rows[0]
    tags = engine_tags(first.engine, first.precision, first.threads)
    tags |= doubt_tags(doubts)
    loads = ", ".join(dict.fromkeys(row.load for row in rows))
    params = {"engine": first.engine, "version": first.version, "precision": first.precision, "loads": loads}
    params |= {"kv_precision": first.kv_precision} if first.kv_precision else {}
    own = tracking.log_stage(
        of, f"bench {first.engine} {first.precision} {loads}", run, tags, bench_metrics(rows), {}, params
    )
    return "\n".join(tracking.page_lines(of, own))


def _run_of(child: Path) -> tuple[tracking.Tracking, str] | None:
    """The run that made a child, where MLflow has it."""
    report = child.resolve().parent / "report.json"
    workspace = report.parents[min(2, len(report.parents) - 1)]
    if not report.is_file() or not tracking.has_runs(workspace):
        return None
    return tracking.tracking_of(workspace, read_value(report, ChildReport).mlflow_run_id)


def log_probe(child: Path, report: ProbeReport) -> str | None:
    """A probe as a run nested in the one that made the child. Returns its page; None where no such run is known."""
    made = _run_of(child)
    if made is None:
        return None
    of, run = made
    metrics = {name: one.value for name, one in probe_figures(report)}
    metrics |= {f"{name}_se": one.se for name, one in probe_figures(report)}
    params = {name: str(value) for name, value in report.asked.model_dump().items()}
    params |= {f"text_{domain.name}": domain.about for domain in report.domains}
    own = tracking.log_stage(of, "probe", run, {}, metrics, {}, params)
    return "\n".join(tracking.page_lines(of, own))


def keep(
    store: tracking.Tracking,
    name: str,
    value: Value,
    text: str,
    figures: Mapping[str, float],
    points: Sequence[TruthPoint] = (),
) -> Path:
    """Write a study to `studies/<name>-<digest>/` and log it as an MLflow run of its own. Returns the folder.

    points: predicted and true KL of architectures, kept as data and drawn.
    """
    folder = store.workspace / "studies" / f"{name}-{digest_of(value=value)[:12]}"
    files = [write_value(folder / "study.json", value), write_text(folder / "study.txt", text + "\n")]
    if points:
        from tasks.pages.library_pictures import draw_truth
        from tasks.pages.report import save_figure

        dumped = [point.model_dump() for point in points]
        files.append(write_text(folder / "truth.json", json.dumps(dumped, indent=1) + "\n"))
        files.append(save_figure(draw_truth(points), folder / "predicted-against-true.png"))
    with tracking.run_started(store, name) as run_id:
        tracking.log_metrics(store, run_id, figures)
        tracking.log_files(store, run_id, files, "study")
    return folder
