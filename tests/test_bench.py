"""Bench in worker processes, costs measured in llama.cpp, and a search that keeps to what its engine can run."""

import importlib.util
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blocks.compute import HOST
from blocks.errors import PuzzleError
from blocks.kinds import parse_labels
from blocks.records import LayerRecord, Metric, Ref, Turn
from profiles.load import load_profile
from profiles.schema import Hardware, Measure, Scenario, SearchSpace
from tasks.distill.jobs import jobs_of
from tasks.distill.record import open_parent
from tasks.engines.base import LoadOptions
from tasks.engines.timing_in_turns import gains_of, summaries
from tasks.gguf.writer import UnknownPrecision
from tasks.inputs.space import check_search_space
from tasks.loadtest.bench_table import bench_table, cells
from tasks.measure import costs
from tasks.measure.bench import BenchRow, Point, bench, doubts_of, fitting
from tasks.measure.costs import CostRequest, measure_costs
from tasks.measure.llama_cpp_costs import LlamaCppTimer
from tasks.measure.variant_timing import Load
from tasks.measure.whole_model_costs import FIRST, models_to_time
from tests.chain import prepare, recording
from tests.test_engines import folders, needs_llama_cpp, run
from tests.test_gguf import child_of, written

__all__ = ["folders"]  # a fixture


def turn(prefill: float, step: float) -> Turn:
    return Turn(prefill=prefill, step=step, prefill_cpu=prefill / 2, step_cpu=step / 2)


def test_gains_are_of_pairs() -> None:
    parents, own = [turn(2, 1), turn(40, 20), turn(4, 2)], [turn(1, 1), turn(20, 20), turn(2, 1)]
    gains = gains_of(parents, own, generated=2)
    assert (gains.prefill.value, gains.prefill.se) == (2, 0)
    assert gains.decode.value == 1
    assert gains.request.value == pytest.approx(4 / 3)


def rows_of(turns: Sequence[Turn], busy: str = "") -> list[BenchRow]:
    scenario = Scenario(prompt_tokens=8, generated_tokens=4)
    found = summaries({"parent": turns, "child": turns}, scenario, 1, {"parent": None, "child": None})
    said: dict[str, Any] = {"engine": "torch", "version": "1", "precision": "float32", "threads": 1, "busy": busy}
    load: dict[str, Any] = {"batch_size": 1, "prompt_tokens": 8, "generated_tokens": 4}
    return [BenchRow(model=name, throughput=own, **said, **load) for name, own in found.items()]


def test_what_makes_a_bench_unreliable_is_said() -> None:
    steady = [turn(2, 1), turn(2, 1)]
    assert doubts_of(rows_of(steady)) == []
    assert doubts_of(rows_of(steady, "others took 2.0"))[0].startswith(
        "1x8x4: the machine was busy: not reliable (others"
    )
    assert "standard errors up to" in doubts_of(rows_of([turn(1, 1), turn(9, 1)]))[0]


def test_a_single_round_shows_no_error() -> None:
    assert not any("±" in cell for row in rows_of([turn(2, 1)]) for cell in cells(row))
    assert cells(rows_of([turn(2, 1), turn(2, 1)])[1])[2:4] == ["4.0 ±0.0", "1.00 ±0.00 (1.00 ±0.00)"]


def test_loads_are_read() -> None:
    assert Point.parse("2x8x4").label == "2x8x4"
    for wrong in ("2x8", "0x8x4", "axbxc"):
        with pytest.raises(PuzzleError, match="1x256x64"):
            Point.parse(wrong)


@pytest.mark.parametrize("engine", ["torch", pytest.param("llama.cpp", marks=needs_llama_cpp)])
def test_bench_measures_parent_and_child_in_turns(engine: str, folders: dict[str, Path]) -> None:
    told: list[tuple[int, int]] = []
    points = [Point.parse("1x8x4"), Point.parse("2x8x3")]
    rows = bench(folders, engine, points, rounds=2, progress=lambda done, total, text="": told.append((done, total)))
    assert [(row.model, row.batch_size) for row in rows] == [("child", 1), ("parent", 1), ("child", 2), ("parent", 2)]
    assert told == [(done, 8) for done in range(1, 9)]
    for row in rows:
        assert (row.gains is None) == (row.model == "parent")
        assert row.throughput.memory_bytes and row.throughput.memory_bytes > 2**20 and engine in row.version
        assert row.throughput.decode_tokens_per_second.n == 2
    if engine == "llama.cpp":
        kept = bench(folders, engine, points[:1], LoadOptions(kv_precision="bfloat16"), rounds=1)
        assert str(bench_table(kept).title).split(", ")[2] == "KV cache in bfloat16"
    assert "KV cache" not in str(bench_table(rows).title)
    assert {row.kv_precision for row in rows} == {"float16" if engine == "llama.cpp" else ""}  # torch's is its weights'
    table = Console(width=110, file=StringIO(), record=True)
    table.print(bench_table(rows))
    assert bench_table(rows).row_count == 4 and "…" not in table.export_text()  # no figure is cut
    assert BenchRow.model_validate_json(rows[0].model_dump_json()) == rows[0]


def test_bench_refuses_what_it_cannot_run(folders: dict[str, Path]) -> None:
    alone = run("bench", str(folders["child"]))
    assert alone.exit_code != 0 and "Traceback" not in alone.output
    assert "--parent" in str(alone.exception)
    ignored = run("bench", str(folders["child"]), "--engine", "torch", "--kv-precision", "f16")
    assert "--kv-precision is for llama.cpp alone, not for torch" in str(ignored.exception)
    with pytest.raises(PuzzleError, match="longer than the child's context of 128"):
        bench({"child": folders["child"]}, "torch", [Point.parse("1x128x8")])
    with pytest.raises(UnknownPrecision, match="float32, float16, bfloat16"):
        bench({"child": folders["child"]}, "torch", [Point.parse("1x8x8")], LoadOptions(precision="q8_0"))
    with pytest.raises(
        UnknownPrecision, match="iq4_nl is written by `puzzle export` alone"
    ):  # it would be q8_0's speed
        bench({"child": folders["child"]}, "llama.cpp", [Point.parse("1x8x8")], LoadOptions(precision="iq4_nl"))
    for engine, kept, said in (
        ("torch", "q8_0", "with torch it is for llama.cpp alone"),
        ("llama.cpp", "q3", "one of float32, bfloat16, float16, q8_0"),
        ("llama.cpp", "q8_0", "a head of the child has [0-9]+ channels"),
    ):
        with pytest.raises(PuzzleError, match=said):
            bench({"child": folders["child"]}, engine, [Point.parse("1x8x8")], LoadOptions(kv_precision=kept))


def test_a_gguf_file_is_held_to_its_context(tmp_path: Path) -> None:
    file = written(child_of(max_position_embeddings=64), tmp_path)
    with pytest.raises(PuzzleError, match="72 tokens is longer than the child's context of 64"):
        bench({"child": file}, "torch", [Point.parse("1x8x8"), Point.parse("1x64x8")])


def test_the_usual_load_is_shortened_to_the_shortest_context(tmp_path: Path) -> None:
    usual, (long, short) = Point.parse("1x256x64"), (tmp_path / "long", tmp_path / "short")
    for folder, context in ((long, 320), (short, 64)):
        folder.mkdir()
        child_of(max_position_embeddings=context).config.save_pretrained(folder)
    assert fitting(usual, [long]) == usual
    assert fitting(usual, [long, short]).label == "1x52x12"


class Exact(LlamaCppTimer):
    """Times that are sums of made-up costs, so that taking them apart must give these back."""

    made_up = {"parent": 8.0, "kv1": 5.0, "linear": 2.0, "no_op": 0.0}
    widths = {"parent": 6.0, "ffn32": 3.0, "linear": 2.5, "no_op": 0.25}

    def seconds(self, repeated: Any) -> float:
        whole = 100.0 + self.made_up["parent"] + self.widths["parent"]
        if repeated is None:
            return whole
        return whole + (self.reader.depth - 1) * (self.made_up[repeated.attention] + self.widths[repeated.ffn])


class Timed(Exact):
    """Loads nothing; counts the models that it times, and is killed before one of them."""

    def _open(self, folder: Path, layers: Any, load: Load) -> Any:
        return layers

    def _release(self, model: Any) -> None:
        pass

    def _turns(self, models: Any, load: Load, rounds: int, unsure: Any = None) -> Any:
        counts["timed"] += 1
        if counts["timed"] == counts["killed at"]:
            raise KeyboardInterrupt
        seconds = {name: self.seconds(layers[1] if len(layers) > 1 else None) for name, layers in models.items()}
        return {
            name: [Turn(prefill=time, step=time, prefill_cpu=time, step_cpu=time)] * 3 for name, time in seconds.items()
        }


counts = {"timed": 0, "killed at": 0}
SPACE = SearchSpace(attention=("kv1", "linear", "no_op"), ffn=("ffn32", "linear", "no_op"))


def test_whole_models_are_taken_apart_exactly(tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path, train_steps=0)
    reader = open_parent(tmp_path / parent.folder, HOST)
    variants = [v for part in ("attention", "ffn") for v in parse_labels(part, getattr(SPACE, part), reader.config)]
    exact = Exact(reader, variants, Hardware(engine="llama.cpp", threads=1), Measure(rounds=3))
    wholes = models_to_time(reader, variants)
    assert FIRST in {whole.name for whole in wholes}
    times = {whole.name: Metric(value=exact.seconds(whole.repeated), se=0.0, n=3) for whole in wholes}
    found = exact._one_phase(times, Metric(value=1.0, se=0.0, n=3))
    for label, seconds in exact.made_up.items():
        assert found[f"attention {label}"].value == pytest.approx(seconds)
    for label, seconds in exact.widths.items():
        assert found[f"ffn {label}"].value == pytest.approx(seconds)
    assert found["non_block"].value == pytest.approx(100.0)


def test_after_a_kill_one_model_is_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    monkeypatch.setattr(costs, "LlamaCppTimer", Timed)
    monkeypatch.setattr(costs, "hardware_description", lambda _: {"engine": "x", "threads": "1", "clock": "CPU"})
    asked = CostRequest(
        parent=parent,
        space=SPACE,
        scenarios=(Scenario(batch_sizes=(1, 2), prompt_tokens=8, generated_tokens=6),),
        hardware=Hardware(threads=1, engine="llama.cpp"),
        measure=Measure(rounds=3),
    )
    models = len(asked.parts(open_parent(tmp_path / parent.folder)))
    counts["killed at"] = models - 2
    with pytest.raises(KeyboardInterrupt):
        measure_costs(asked, tmp_path)
    table = measure_costs(asked, tmp_path)
    assert counts["timed"] == models + 1
    found = {(one.variant, one.batch_size): one.prefill_seconds for one in table.costs if one.subblock == "ffn"}
    assert {label: found[label, 2] for label in Exact.widths} == pytest.approx(Exact.widths)


class Swaying:
    """A model whose requests take more or less time than the time before."""

    def __init__(self, seconds: float, sway: float) -> None:
        self.seconds, self.sway, self.made = seconds, sway, 0

    def request(self, *_: Any) -> Turn:
        self.made += 1
        time = self.seconds * (1 + self.sway * (-1) ** self.made)
        return Turn(prefill=time, step=time, prefill_cpu=time, step_cpu=time)


class Beside(LlamaCppTimer):
    """Opens the model that it was given."""

    model = Swaying(1.0, 0.0)

    def _open(self, folder: Path, layers: Any, load: Load) -> Any:
        return self.model

    def _release(self, model: Any) -> None:
        pass


@pytest.mark.parametrize(("sway", "rounds"), [(0.0, 3), (0.2, 15)])
def test_the_ratio_of_two_types_is_timed_until_it_is_sure(tmp_path: Path, sway: float, rounds: int) -> None:
    parent, _ = prepare(tmp_path, train_steps=0)
    reader = open_parent(tmp_path / parent.folder, HOST)
    pair = [Beside(reader, [], Hardware(engine="llama.cpp", threads=1), Measure(rounds=3)) for _ in range(2)]
    pair[1].model = Swaying(0.5, sway)
    load = Load(scenario=Scenario(batch_sizes=(1,), prompt_tokens=8, generated_tokens=6), batch=1)
    prefill, decode = pair[0].beside(pair[1], load)
    assert pair[1].model.made == 1 + rounds and prefill.n == decode.n == rounds
    assert prefill.value == pytest.approx(0.5, rel=0.25)


@needs_llama_cpp
def test_costs_in_llama_cpp_are_a_cost_table(tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path, train_steps=0)
    scenarios = (Scenario(batch_sizes=(1, 2), prompt_tokens=8, generated_tokens=6),)
    hardware = Hardware(threads=1, engine="llama.cpp")
    measure = Measure(rounds=3, decode_steps=2)
    asked = CostRequest(parent=parent, space=SPACE, scenarios=scenarios, hardware=hardware, measure=measure)
    table = measure_costs(asked, tmp_path)
    assert "llama.cpp" in table.hardware["engine"] and table.hardware["threads"] == "1"
    assert len(table.costs) == 2 * 8 and len(table.parent_measured) == 2
    costs = {(cost.subblock, cost.variant, cost.batch_size): cost for cost in table.costs}
    assert costs["attention", "no_op", 1].prefill_seconds == 0
    assert all(cost.prefill_seconds >= 0 for cost in table.costs)  # at these sizes noise, cut at 0
    assert all(one.prefill_seconds > 0 for one in table.parent_measured)
    assert measure_costs(asked, tmp_path) == table


def test_a_search_for_an_engine_leaves_out_what_it_cannot_run(tmp_path: Path) -> None:
    parent, corpus = prepare(tmp_path, train_steps=0)
    reader = open_parent(tmp_path / parent.folder, HOST)
    root = Path(importlib.util.find_spec("profiles").submodule_search_locations[0])  # type: ignore[union-attr,index]
    wanted = ['search_space.attention=["linear","no_op"]', 'search_space.ffn=["linear","ffn32"]']
    ref = Ref(path="x", sha256="0")
    records = [LayerRecord(layer=layer, boundary=ref, statistics=ref, seconds=0) for layer in range(reader.depth)]
    found = {}
    for must in ("[]", '["vllm"]'):
        profile = load_profile(root / "tiny.yaml", [*wanted, f"hardware.must_run={must}"])
        check_search_space(profile, reader)
        jobs = jobs_of(profile, recording(parent, corpus), records, reader)
        found[must] = {(job.layer, job.subblock, job.variant) for job in jobs}
    assert len(found["[]"]) == 4 * reader.depth
    kept = {(layer, "attention", "no_op") for layer in range(1, reader.depth)}
    assert found['["vllm"]'] == kept | {(layer, "ffn", "ffn32") for layer in range(reader.depth)}
