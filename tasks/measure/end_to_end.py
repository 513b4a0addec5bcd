"""Parent, child and baselines end to end in the engine that the costs come from, at every scenario of the profile.

torch runs them in this process. Another engine loads each from a temporary export, in a process of its own. In both
cases the models take turns, and a gain is over the parent's time in the same round. What the costs of single blocks add
up to is compared with these measurements (cost_sums.py). Speeds are stored with the load of the machine, and measured
again only where they were disturbed (blocks/disturbance.py).
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blocks.compute import HOST
from blocks.disturbance import is_better
from blocks.engine_limits import known_engine
from blocks.library import digest_of, keep, remember
from blocks.records import CostTable, ParentInfo, SpeedReport, Throughput, Totals
from profiles.schema import Hardware, Profile, Scenario
from tasks.engines.base import LoadOptions
from tasks.engines.timing_in_turns import is_unsure, measure_throughput
from tasks.evaluate.compare import SHIPPED, Contender, build
from tasks.evaluate.typed_file import is_typed, recipe_of
from tasks.export.folder import export_child
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.measure.bench import Point, at_work, time_in_turns
from tasks.measure.cost_sums import check_sums, clock_of
from tasks.measure.hardware_description import hardware_description, threads_of
from tasks.measure.llama_cpp_costs import rounded_noise
from tasks.running.progress import Progress, no_progress
from tasks.running.usage import Others, crowd_now

VERSION = 2  # unsure gains get more rounds


def speed_key(contenders: Sequence[Contender], parent: ParentInfo, profile: Profile) -> str:
    """Digest of all that the speeds depend on: the layers of every model whatever their weights are, the loads, the
    rounds, the engine and the machine.
    """
    heads = {which.name: which.architecture.head for which in contenders if which.architecture.head}
    return digest_of(
        **({"heads": heads} if heads else {}),
        parent=parent.fingerprint,
        models={which.name: which.architecture.layers for which in contenders},
        loads=loads_of(contenders, profile.scenarios),
        rounds=profile.evaluate.throughput_rounds,
        hardware=hardware_description(profile.hardware),
        version=VERSION,
    )


def stored_speed(
    contenders: Sequence[Contender],
    parent: ParentInfo,
    costs: CostTable,
    profile: Profile,
    workspace: Path,
    since: str = "",
) -> SpeedReport | None:
    """The stored speeds of these models. None where there are none, and where they were disturbed and could be measured
    better now: nobody else uses the machine.

    since: speeds that a choice hangs on. None of before that time is taken, and what was disturbed since then stays, so
    that a run that goes on after a kill makes the same choice.
    """
    found = remember(_path(contenders, parent, profile, workspace), SpeedReport, lambda _: [], workspace)
    if found is None or found.measured_at < since:
        return None
    if found.disturbed and not since and not _others_on(profile.hardware, crowd_now):
        return None
    return _with_sums(found, contenders, costs)


def measure_speed(
    contenders: Sequence[Contender],
    parent: ParentInfo,
    costs: CostTable,
    profile: Profile,
    workspace: Path,
    progress: Progress = no_progress,
    since: str = "",
) -> SpeedReport:
    """Speed of all contenders at the batch sizes that the child was chosen for, and the check of their sums.

    Speeds that are stored are not measured again unless `stored_speed` says so; the better measurement stays.
    """
    stored = stored_speed(contenders, parent, costs, profile, workspace, since)
    if stored is not None:
        return stored
    path, others = _path(contenders, parent, profile, workspace), Others()
    models = _measured(contenders, parent, profile, workspace, progress)
    found = SpeedReport(
        engine=costs.hardware["engine"],
        clock=clock_of(costs),
        busy=_others_on(profile.hardware, others.crowd),
        load=others.load(),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        models=models,
    )
    before = remember(path, SpeedReport, lambda _: [], workspace)
    if before is not None and before.measured_at >= since and not is_better(found, before):
        found = before
    keep(path, found, [], workspace)
    return _with_sums(found, contenders, costs)


def _path(contenders: Sequence[Contender], parent: ParentInfo, profile: Profile, workspace: Path) -> Path:
    return workspace / "speeds" / f"{speed_key(contenders, parent, profile)}.json"


def _others_on(hardware: Hardware, crowd: Callable[[int], str]) -> str:
    """Who else computes on the processors that models are timed on."""
    return crowd(threads_of(hardware)) if hardware.device == "cpu" else ""


def _with_sums(speed: SpeedReport, contenders: Sequence[Contender], costs: CostTable) -> SpeedReport:
    """What these costs add up to beside the measured speeds: costs may be measured again without them."""
    own = {which.name: which.architecture for which in contenders if which.name != SHIPPED}
    sums = check_sums(own, {name: measured for name, measured in speed.models.items() if name in own}, costs)
    return speed.model_copy(update={"sums": sums, "calibration": costs.calibration, "clock": clock_of(costs)})


def loads_of(contenders: Sequence[Contender], scenarios: Sequence[Scenario]) -> list[tuple[Scenario, int]]:
    """Every scenario with the batch size that the child was chosen for, at which all contenders' costs are summed up.
    Where several may become the child, it is that of the first.
    """
    child = next((which for which in contenders if which.name == "child"), contenders[1])
    batches: dict[str, Totals] = {totals.scenario: totals for totals in child.architecture.totals}
    return [(scenario, batches[scenario.name].batch_size) for scenario in scenarios]


def _measured(
    contenders: Sequence[Contender], parent: ParentInfo, profile: Profile, workspace: Path, progress: Progress
) -> dict[str, tuple[Throughput, ...]]:
    """Every model at every load, in turns."""
    loads, rounds = loads_of(contenders, profile.scenarios), profile.evaluate.throughput_rounds
    found = []
    with _timer(contenders, parent, loads, profile, workspace) as time_at:
        for done, (scenario, batch) in enumerate(loads, start=1):
            found.append(time_at(scenario, batch, rounds))
            progress(done, len(loads))
    return {which.name: tuple(at[which.name] for at in found) for which in contenders}


@contextmanager
def _timer(
    contenders: Sequence[Contender],
    parent: ParentInfo,
    loads: Sequence[tuple[Scenario, int]],
    profile: Profile,
    workspace: Path,
) -> Iterator[Callable[[Scenario, int, int], dict[str, Throughput]]]:
    """What times all models in a scenario, at a batch size, in so many rounds."""
    hardware = profile.hardware
    if hardware.engine == "torch":
        models: dict[str, Any] = {which.name: build(which, parent, workspace, HOST) for which in contenders}
        dtype = getattr(torch, hardware.precision)
        yield partial(measure_throughput, {name: model.to(hardware.device, dtype) for name, model in models.items()})
        return
    points = [Point.of(scenario, batch) for scenario, batch in loads]
    how = LoadOptions(
        precision=hardware.precision,
        threads=threads_of(hardware),
        kv_precision=hardware.kv_precision or LoadOptions.kv_precision,
    )
    with (
        _exported(contenders, parent, hardware, workspace) as files,
        at_work(files, hardware.engine, points, how) as workers,
    ):
        yield lambda scenario, batch, rounds: time_in_turns(
            workers,
            Point.of(scenario, batch),
            scenario,
            rounds,
            unsure=is_unsure(scenario.generated_tokens),
        )


@contextmanager
def _exported(
    contenders: Sequence[Contender], parent: ParentInfo, hardware: Hardware, workspace: Path
) -> Iterator[Mapping[str, Path]]:
    """Every contender as the engine loads it, in a folder of the workspace that is removed afterwards. One in types of
    number that has no file yet gets weights like noise, which take as long.
    """
    with tempfile.TemporaryDirectory(prefix=".speed-", suffix=".part", dir=workspace) as temporary:
        files = {}
        for which in contenders:
            if which.file:
                files[which.name] = workspace / which.file
                continue
            model, target = build(which, parent, workspace, HOST), Path(temporary) / which.name
            if known_engine(hardware.engine).format == "gguf":
                path = target.with_suffix(".gguf")
                stored = rounded_noise(model, recipe_of(which)) if is_typed(which) else {}
                files[which.name] = write_gguf(model, path, hardware.precision, NO_TOKENIZER, which.name, stored)
            else:
                files[which.name] = export_child(model, parent, workspace, target, f"# {which.name}\n")
            del model
        yield files
