"""Measured costs on tiny parents: every family, nothing missing, stored once; the sum of blocks beside the whole."""

import gc
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch
from gguf import GGUFReader

from blocks import runtime
from blocks.compute import HOST
from blocks.engine_limits import runnable
from blocks.export_code.modeling_decilm import DeciLMForCausalLM
from blocks.kinds import parse_label
from blocks.library import read_value, write_value
from blocks.records import CostTable, LayerChoice, ParentInfo
from blocks.resources import non_block_parameters
from blocks.runtime import imports_left_alone
from flows import stages
from flows.run import Run
from flows.tracked_run import sum_beside_whole
from profiles.load import load_profile
from profiles.schema import Hardware, Measure, Scenario
from tasks.distill.record import open_parent
from tasks.engines.timing_in_turns import ClockTooCoarse
from tasks.gguf.tokenizer_writer import NO_TOKENIZER
from tasks.gguf.writer import write_gguf
from tasks.measure import costs, torch_costs
from tasks.measure import hardware_description as timings
from tasks.measure.calibration import drift
from tasks.measure.costs import CostRequest, measure_costs
from tasks.measure.hardware_description import hardware_description
from tasks.measure.torch_costs import TorchTimer
from tasks.measure.variant_timing import KeptFigures, Load, Timing
from tasks.running.sharing import TaskKey
from tasks.running.workers import WorkerSlot, in_slot
from tests.chain import SPACE, prepare

SCENARIOS = (Scenario(name="chat", batch_sizes=(1, 3), prompt_tokens=8, generated_tokens=6),)
HARDWARE = Hardware(threads=1)
MEASURE = Measure(rounds=3, stack=2, decode_steps=2)  # a stack below the depth of 3


def asked_of(parent: ParentInfo, hardware: Hardware = HARDWARE, measure: Measure = MEASURE) -> CostRequest:
    return CostRequest(parent=parent, space=SPACE, scenarios=SCENARIOS, hardware=hardware, measure=measure)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_every_variant_of_every_family_has_a_cost_at_every_batch(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, _ = prepare(tmp_path, family, train_steps=0)
    table = measure_costs(asked_of(parent), tmp_path)
    found = {(cost.subblock, cost.variant, cost.batch_size) for cost in table.costs}
    labels = {("attention", label) for label in ("parent", *SPACE.attention)}
    labels |= {("ffn", label) for label in ("parent", *SPACE.ffn)}
    assert found == {(subblock, label, batch) for subblock, label in labels for batch in (1, 3)}
    for cost in table.costs:
        assert (cost.prefill_seconds > 0) == (cost.variant != "no_op")
        assert (cost.kv_bytes_per_token > 0) == (cost.variant in ("parent", "kv1") and cost.subblock == "attention")
    assert table.num_hidden_layers == 3 and len(table.parent_measured) == 2
    assert "prefill" in sum_beside_whole(table, table.parent_measured[0])
    monkeypatch.setattr(costs, "TorchTimer", lambda *_: pytest.fail("measured twice"))
    assert measure_costs(asked_of(parent), tmp_path) == table


def test_non_block_parameters_are_what_is_outside_the_layers(tmp_path: Path) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    reader = open_parent(tmp_path / parent.folder, HOST)
    outside = sum(p.numel() for name, p in reader.model().named_parameters() if ".layers." not in name)
    assert non_block_parameters(reader.config) == outside


STALE: dict[str, tuple[str | None, dict[str, Any]]] = {
    "nothing": (None, {}),
    "machine": ("platform.machine", {}),
    "processor": ("tasks.measure.hardware_description.processor", {}),
    "engine": ("tasks.measure.hardware_description._engine_description", {}),
    "name": (None, {"name": "another"}),
    "precision": (None, {"precision": "bfloat16"}),
    "threads": (None, {"threads": 2}),
    "age": (None, {}),
}


@pytest.mark.parametrize("field", STALE)
def test_stale_costs_are_measured_again(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that a table carries, changed alone: another machine, version, precision, threads, an old date."""
    parent, _ = prepare(tmp_path, train_steps=0)
    now = Hardware(threads=1)
    first = CostTable(
        hardware=hardware_description(now),
        costs=(),
        non_block=(),
        num_hidden_layers=3,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = asked_of(parent, now).path(tmp_path)
    write_value(path, first)
    where: Any
    changes: Any
    where, changes = STALE[field]
    if where is not None:
        value: Any = {**timings._engine_description(now), "engine": "torch 99"} if field == "engine" else "another"
        monkeypatch.setattr(where, lambda *_: value)
    if field == "age":
        old = datetime.now(UTC) - timedelta(days=91)
        write_value(path, first.model_copy(update={"measured_at": old.isoformat(timespec="seconds")}))
    monkeypatch.setattr(costs, "TorchTimer", lambda *_: pytest.fail("measured"))
    hardware = now.model_copy(update=changes)
    if field == "nothing":
        assert measure_costs(asked_of(parent, hardware), tmp_path) == first
        patient = MEASURE.model_copy(update={"max_age_days": 9})
        assert measure_costs(asked_of(parent, hardware, patient), tmp_path) == read_value(path, CostTable)
    else:
        with pytest.raises(pytest.fail.Exception, match="measured"):
            measure_costs(asked_of(parent, hardware), tmp_path)


def test_q8_0_weighs_what_the_file_does(tmp_path: Path) -> None:
    """The sum over the layers and the rest against the tensors of the GGUF file; widths that q8_0 cannot hold."""
    parent, _ = prepare(tmp_path, train_steps=0)
    reader = open_parent(tmp_path / parent.folder, HOST)
    choice = LayerChoice(attention="linear", ffn="ffn32")
    with torch.device("cpu"):
        model: Any = DeciLMForCausalLM(reader.child_config([LayerChoice(), LayerChoice(), choice]))
    file = write_gguf(model, tmp_path / "x.gguf", "q8_0", NO_TOKENIZER, "x")
    inside = sum(tensor.n_bytes for tensor in GGUFReader(file).tensors)
    hardware = Hardware(engine="llama.cpp", precision="q8_0", threads=1)
    still = Timing(prefill=1, decode=1, prefill_spread=0, decode_spread=0)
    labels = [("attention", "parent"), ("ffn", "parent")] * 2 + [("attention", "linear"), ("ffn", "ffn32")]
    parts: list[Any] = [
        costs._cost(reader, parse_label(part, label, reader.config), SCENARIOS[0], 1, still, hardware)  # type: ignore[arg-type]
        for part, label in labels
    ]
    parts.append(costs._non_block(reader, SCENARIOS[0], 1, still, hardware))
    assert sum(cost.weight_bytes for cost in parts) == inside
    for label, refused in (("ffn32", False), ("ffn48", True)):
        found = runnable("llama.cpp", reader.config, 1, "parent", label, "q8_0")
        assert (found is not None) == refused and (found is None or "multiple of 32 in q8_0" in found)
        assert runnable("llama.cpp", reader.config, 1, "parent", label) is None


def test_costs_of_another_gpu_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("H100", "H200"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        found.append(hardware_description(Hardware(device="cuda")))
    assert found[0] != found[1]


class Fake:
    """A bench on which everything takes `seconds[0]`, and which is killed where that is negative."""

    def __init__(self, seconds: list[float], reader: Any, variants: Any, *_: Any) -> None:
        self.seconds = seconds
        self.names = [f"{one.subblock} {one.label}" for one in variants] + ["non_block", "parent"]

    def time(self, what: str, load: Load, kept: KeptFigures, progress: Any) -> None:
        if not kept.of(load, what):
            if self.seconds[-1] < 0:
                raise KeyboardInterrupt
            kept.add(load, what, seconds=self.seconds.pop() if len(self.seconds) > 2 else self.seconds[-1])

    def timings(self, load: Load, kept: KeptFigures) -> dict[str, Timing]:
        seconds = kept.of(load)[0]["seconds"]
        spread = self.seconds[0] if len(self.seconds) > 1 else 0.01
        timing = Timing(prefill=seconds, decode=seconds, prefill_spread=spread, decode_spread=spread)
        return dict.fromkeys(self.names, timing)

    def close(self) -> None:
        pass


def test_costs_stand_until_new_ones_are_whole_and_are_replaced_if_they_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    asked, seconds, spread = asked_of(parent), [1.0], 0.01
    monkeypatch.setattr(costs, "TorchTimer", partial(Fake, seconds))

    def measured(value: float, error: float = spread) -> CostTable:
        seconds[:] = [error, value]
        return measure_costs(asked, tmp_path, again=True)

    before = measured(1.0)
    assert measure_costs(asked, tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        measured(-1.0)
    assert measure_costs(asked, tmp_path) == before
    assert measured(1.05) == before  # no cost has moved
    assert measured(1.5, error=0.3) == before == measure_costs(asked, tmp_path)  # disturbed: it does not tell
    after = measured(1.5)
    assert after != before and measure_costs(asked, tmp_path) == after
    assert "attention parent prefill (chat, batch 1): +50%" in drift(before, after)
    with pytest.raises(ClockTooCoarse, match="no time for the parent.*decode_steps"):
        measured(0.0)
    assert measured(1.5) == after


def test_a_reliable_table_takes_the_place_of_a_disturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    asked, seconds = asked_of(parent), [0.4, 1.0]
    monkeypatch.setattr(costs, "TorchTimer", partial(Fake, seconds))
    worst = measure_costs(asked, tmp_path)
    assert worst.disturbed.startswith("the machine was busy: not reliable")
    seconds[0] = 0.5
    assert measure_costs(asked, tmp_path, again=True) == worst
    for spread in (0.3, 0.01):  # nothing has moved
        seconds[0] = spread
        assert measure_costs(asked, tmp_path, again=True).costs[0].prefill_spread == spread


class Counted(TorchTimer):
    """The real one; it counts its turns, and is killed before one of them."""

    turns: ClassVar[list[int]] = [0, 0]  # so far, and the one that is not begun

    def _time(self, *what: Any) -> tuple[float, float]:
        super()._time(*what)
        return 1.0, 1.0

    def time(self, what: str, load: Load, kept: KeptFigures, progress: Any) -> None:
        def add(*values: Any, **figures: Any) -> None:
            self.turns[0] += 1
            if self.turns[0] == self.turns[1]:
                raise KeyboardInterrupt
            KeptFigures.add(kept, *values, **figures)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kept, "add", add)
            super().time(what, load, kept, progress)


@pytest.mark.parametrize("killed_at", [2, 5, 25, 40])
def test_after_a_kill_one_turn_is_measured_again(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 parts, 3 rounds, 2 batch sizes: 48 turns. The one that was interrupted is measured again, and once the parent,
    by which the turns of the two processes are compared.
    """
    parent, _ = prepare(tmp_path, train_steps=0)
    monkeypatch.setattr(costs, "TorchTimer", Counted)
    Counted.turns[:] = [0, killed_at]
    with pytest.raises(KeyboardInterrupt):
        measure_costs(asked_of(parent), tmp_path)
    (left,) = (tmp_path / "costs").iterdir()
    with left.open("a") as file:
        file.write('{"load": "chat x1", "wh')  # a line that was not written whole
    table = measure_costs(asked_of(parent), tmp_path)
    assert Counted.turns[0] == 48 + 1 + ((killed_at - 1) % 24 > 0)
    assert len(table.costs) == 2 * 8 and [path.suffix for path in (tmp_path / "costs").iterdir()] == [".json"]


def test_turns_of_two_processes_are_compared_by_the_parent() -> None:
    """The second process finds the machine half as fast: seconds of both count as those of one machine."""
    rows = [
        {"what": what, "sitting": sitting, "round": number, "prefill": slow * seconds, "decode": slow * seconds}
        for number, sitting, slow in ((1, 0, 1.0), (2, 0, 1.0), (0, 1, 2.0), (3, 1, 2.0))
        for what, seconds in (("parent", 10.0), ("ffn ffn32", 1.0))
        if number or what == "parent"
    ]
    found = torch_costs._at_one_speed(rows)
    assert len(set(found["ffn ffn32"])) == 1 and len(found["ffn ffn32"]) == len(found["parent"]) == 3
    assert found["ffn ffn32"][0][0] / found["parent"][0][0] == pytest.approx(0.1)
    first = [row for row in rows if row["sitting"] == 0]
    assert torch_costs._at_one_speed(first)["ffn ffn32"] == [(1.0, 1.0)] * 2


def test_figures_of_another_day_are_not_gone_on_with(tmp_path: Path) -> None:
    load = Load(scenario=SCENARIOS[0], batch=1)
    kept = KeptFigures(tmp_path / "x.unfinished")
    kept.add(load, "ffn parent", seconds=1.0)
    assert KeptFigures(kept.path).of(load) == kept.of(load) and KeptFigures(kept.path).sitting == 1
    old = kept.path.stat().st_mtime - 25 * 3600
    os.utime(kept.path, (old, old))
    assert KeptFigures(kept.path).rows == []


def test_the_stage_measures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    small = "search_space={attention: [linear], ffn: [ffn32]}"
    profile, seconds = load_profile("tiny", [small]), [1.0]
    monkeypatch.setattr(costs, "TorchTimer", partial(Fake, seconds))
    entered: list[str] = []

    def stage(_: Run, name: str) -> Any:
        entered.append(name)
        return nullcontext(lambda done, total: None)

    monkeypatch.setattr(Run, "stage", stage)
    called: list[str] = []

    def call(_: Run, task: Any, makes: str, *values: Any, **how: Any) -> Any:
        called.append(f"{task.name} {values[0].label}")
        return task.fn(*values)

    monkeypatch.setattr(Run, "call", call)
    run = Run(profile=profile, workspace=tmp_path)
    first = stages.measure(run, parent)
    assert stages.measure_again(run, parent) == []
    seconds[0] = 2.0
    assert all("+100%" in one for one in stages.measure_again(run, parent))
    now = costs.costs_of(profile, parent, tmp_path)
    assert now is not None and now != first and entered == ["measure"] * 3
    assert {name for name in called if "ffn32" in name} == {"measure ffn ffn32 chat x1", "measure ffn ffn32 chat x4"}
    assert stages.measure(run, parent) == now
    assert entered == ["measure"] * 3  # whoever only reads the table waits for no device, and lets others in
    modelled = load_profile("tiny", [small, "hardware={name: h100, engine: roofline}"])
    assert stages.measure_again(Run(profile=modelled, workspace=tmp_path), parent) == []


def test_collections_leave_imports_alone_for_the_length_of_a_run() -> None:
    gc.unfreeze()
    often = gc.get_threshold()
    with imports_left_alone():
        assert gc.get_freeze_count() > 10_000 and gc.get_threshold()[0] < often[0]
    assert gc.get_freeze_count() == 0 and gc.get_threshold() == often
    gc.freeze()  # as the suite keeps it
    with imports_left_alone():
        pass
    assert gc.get_freeze_count() > 10_000


@pytest.mark.parametrize(("grown", "released"), [(0, 0), (65 << 20, 1)])
def test_memory_is_given_back_where_a_stage_took_some(
    grown: int, released: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    monkeypatch.setattr(runtime, "release_memory", lambda: calls.append("released"))
    monkeypatch.setattr(runtime, "_RESIDENT", [psutil.Process().memory_info().rss - grown])
    runtime.release_what_grew()
    assert len(calls) == released and (not grown or runtime._RESIDENT[0] > psutil.Process().memory_info().rss - grown)


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_an_idle_worker_holds_no_threads_that_slow_the_products_of_others(tmp_path: Path) -> None:
    """libgomp counts the threads that stand ready for every thread: beyond the processors, each barrier is a switch."""
    slot = WorkerSlot(devices=("cpu",), threads=2, compute=HOST)

    def work() -> set[int]:
        with in_slot(slot, tmp_path, TaskKey(key="work", what="work")):
            (torch.randn(512, 512) @ torch.randn(512, 512)).exp()
            return {thread.id for thread in psutil.Process().threads()}

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as worker:
            worker.submit(torch.get_num_threads).result()
            before = {thread.id for thread in psutil.Process().threads()}
            assert len(worker.submit(work).result() - before) == 1
            deadline = time.monotonic() + 5
            while {thread.id for thread in psutil.Process().threads()} - before and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not {thread.id for thread in psutil.Process().threads()} - before
    finally:
        torch.set_num_threads(threads)
