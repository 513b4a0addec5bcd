"""Parent, child and baselines end to end in the engine that the costs come from, at every scenario of the profile.

torch runs them in this process. Another engine loads each from a temporary export, in a process of its own. In both
cases the models take turns, and a gain is over the parent's time in the same round. What the costs of single blocks add
up to is compared with these measurements (cost_sums.py).
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from blocks.compute import HOST
from blocks.engine_limits import known_engine
from blocks.records import CostTable, ParentInfo, SpeedReport, Throughput, Totals
from profiles.schema import Hardware, Profile, Scenario
from tasks.engines.timing_in_turns import measure_throughput
from tasks.evaluate.compare import Contender, build
from tasks.export.folder import export_child
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.measure.bench import Point, bench
from tasks.measure.cost_sums import check_sums, clock_of
from tasks.running.progress import Progress, no_progress
from tasks.running.usage import Others


def measure_speed(
    contenders: Sequence[Contender],
    parent: ParentInfo,
    costs: CostTable,
    profile: Profile,
    workspace: Path,
    progress: Progress = no_progress,
) -> SpeedReport:
    """Speed of all contenders at the batch sizes that the child was chosen for, and the check of their sums."""
    measure = _in_torch if profile.hardware.engine == "torch" else _in_engine
    others = Others()
    models = measure(contenders, parent, loads_of(contenders, profile.scenarios), profile, workspace, progress)
    crowd = others.crowd(profile.hardware.threads or torch.get_num_threads())
    return SpeedReport(
        engine=costs.hardware["engine"],
        clock=clock_of(costs),
        busy=crowd if profile.hardware.device == "cpu" else "",
        calibration=costs.calibration,
        models=models,
        sums=check_sums({which.name: which.architecture for which in contenders}, models, costs),
    )


def loads_of(contenders: Sequence[Contender], scenarios: Sequence[Scenario]) -> list[tuple[Scenario, int]]:
    """Every scenario with the batch size that the child was chosen for; all contenders' costs are summed up at it."""
    child = next(which for which in contenders if which.name == "child")
    batches: dict[str, Totals] = {totals.scenario: totals for totals in child.architecture.totals}
    return [(scenario, batches[scenario.name].batch_size) for scenario in scenarios]


def _in_torch(
    contenders: Sequence[Contender],
    parent: ParentInfo,
    loads: Sequence[tuple[Scenario, int]],
    profile: Profile,
    workspace: Path,
    progress: Progress,
) -> dict[str, tuple[Throughput, ...]]:
    hardware = profile.hardware
    models: dict[str, Any] = {which.name: build(which, parent, workspace, HOST) for which in contenders}
    models = {name: model.to(hardware.device, getattr(torch, hardware.precision)) for name, model in models.items()}
    found = []
    for done, (scenario, batch) in enumerate(loads, start=1):
        found.append(measure_throughput(models, scenario, batch, profile.evaluate.throughput_rounds))
        progress(done, len(loads))
    return {name: tuple(at[name] for at in found) for name in models}


def _in_engine(
    contenders: Sequence[Contender],
    parent: ParentInfo,
    loads: Sequence[tuple[Scenario, int]],
    profile: Profile,
    workspace: Path,
    progress: Progress,
) -> dict[str, tuple[Throughput, ...]]:
    hardware, rounds = profile.hardware, profile.evaluate.throughput_rounds
    points = [
        Point(batch_size=batch, prompt_tokens=scenario.prompt_tokens, generated_tokens=scenario.generated_tokens)
        for scenario, batch in loads
    ]
    threads = hardware.threads or torch.get_num_threads()
    with _exported(contenders, parent, hardware, workspace) as files:
        rows = bench(files, hardware.engine, points, hardware.precision, rounds, threads, progress)
    names = [scenario.name for scenario, _ in loads for _ in contenders]  # rows are in the order of the loads
    found: dict[str, list[Throughput]] = {which.name: [] for which in contenders}
    for name, row in zip(names, rows, strict=True):
        found[row.model].append(row.throughput.model_copy(update={"scenario": name}))
    return {name: tuple(own) for name, own in found.items()}


@contextmanager
def _exported(
    contenders: Sequence[Contender], parent: ParentInfo, hardware: Hardware, workspace: Path
) -> Iterator[Mapping[str, Path]]:
    """Every contender as the engine loads it, in a folder of the workspace that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=".speed-", suffix=".part", dir=workspace) as temporary:
        files = {}
        for which in contenders:
            model, target = build(which, parent, workspace, HOST), Path(temporary) / which.name
            if known_engine(hardware.engine).format == "gguf":
                path = target.with_suffix(".gguf")
                files[which.name] = write_gguf(model, path, hardware.precision, NO_TOKENIZER, which.name)
            else:
                files[which.name] = export_child(model, parent, workspace, target, f"# {which.name}\n")
            del model
        yield files
