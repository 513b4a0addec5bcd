"""The roofline's laws, hardware targets that load, modelled costs that never pass for measured ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hardware import BLOCKS, FITTED, LLAMA_70B, nemotron, unit_of_work
from blocks.compute import HOST
from blocks.kinds import parse_label
from blocks.parent import Parent
from blocks.records import SUBBLOCKS, LayerChoice, Subblock
from blocks.resources import non_block_parameters, parameters_of
from flows.tracked_run import show_costs
from profiles.errors import ProfileError
from profiles.hardware import FOLDER, HardwareTarget, load_target, shipped_targets
from profiles.load import load_profile
from profiles.schema import Budget, Hardware, Scenario, SearchSpace
from tasks.measure.roofline import (
    Pass,
    Setting,
    kv_bytes_per_device,
    modelled_costs,
    setting_of,
    subblock_seconds,
)
from tasks.search.totals import make_problem, totals_of

SCENARIO = Scenario(name="chat", batch_sizes=(1, 64), prompt_tokens=128, generated_tokens=256)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Parent:
    folder = tmp_path_factory.mktemp("llama-70b")
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    return Parent(folder, HOST)


def setting(devices: int = 1, precision: Any = "float8", **changes: Any) -> Setting:
    target = load_target("h100").model_copy(update=changes)
    return setting_of(Hardware(name="h100", engine="roofline", precision=precision, tensor_parallel=devices), target)


def seconds(parent: Parent, part: Subblock, label: str, work: Pass, at: Setting) -> float:
    return subblock_seconds(parent, parse_label(part, label, parent.config), work, at)


DECODE = Pass(sequences=8, tokens=1, context=1000)
PREFILL = Pass(sequences=8, tokens=1000, context=500)


@pytest.mark.parametrize("name", shipped_targets())
def test_every_shipped_target_loads_and_serves(name: str, llama: Parent) -> None:
    target = load_target(name)
    assert target.name == name and "float32" in target.peak_tflops
    at = setting_of(Hardware(name=name, engine="roofline"), target)
    assert seconds(llama, "ffn", "parent", DECODE, at) > 0


def test_a_group_needs_a_link_and_an_unknown_target_names_the_known() -> None:
    with pytest.raises(ValueError, match="interconnect"):
        HardwareTarget.model_validate(load_target("m4_max").model_dump() | {"max_tensor_parallel": 2})
    with pytest.raises(ProfileError, match="h100"):
        load_target("h1000")
    with pytest.raises(ProfileError, match="no float8: set hardware.precision to float32"):
        setting_of(Hardware(name="a100", engine="roofline", precision="float8"), load_target("a100"))
    with pytest.raises(ProfileError, match="at most 8"):
        setting(devices=16)
    with pytest.raises(ProfileError, match="name one of a100"):  # told before anything is computed
        load_profile("tiny", ["hardware={name: h1000, engine: roofline}"])
    assert load_profile("tiny", ["hardware={name: h100, engine: roofline}"]).hardware.name == "h100"
    with pytest.raises(ValueError, match="engine: roofline"):
        Hardware(precision="float8")


@pytest.mark.parametrize("work", [DECODE, PREFILL], ids=["decode", "prefill"])
@pytest.mark.parametrize("devices", [1, 4])
def test_more_costs_more(work: Pass, devices: int, llama: Parent) -> None:
    at = setting(devices)
    widths = [seconds(llama, "ffn", label, work, at) for label in ("ffn2816", "ffn7168", "ffn21504", "parent")]
    assert widths == sorted(set(widths))
    heads = [seconds(llama, "attention", label, work, at) for label in ("no_op", "linear", "kv1", "parent")]
    assert heads == sorted(set(heads)) and heads[0] == 0
    for part in SUBBLOCKS:
        more = Pass(sequences=4 * work.sequences, tokens=work.tokens, context=work.context)
        assert seconds(llama, part, "parent", more, at) > seconds(llama, part, "parent", work, at)


def test_decoding_is_bytes_over_bandwidth_where_floor_and_batch_vanish(llama: Parent) -> None:
    at = setting(kernel_floor_microseconds=1e-9)
    one = Pass(sequences=1, tokens=1, context=100_000)
    weights = parameters_of(llama, parse_label("ffn", "parent", llama.config))
    assert seconds(llama, "ffn", "parent", one, at) == pytest.approx(weights / 3.35e12 / 0.8, rel=1e-3)
    weights = parameters_of(llama, parse_label("attention", "parent", llama.config))
    cache = 2 * 8 * 128 * 100_000
    assert seconds(llama, "attention", "parent", one, at) == pytest.approx((weights + cache) / 3.35e12 / 0.8, rel=1e-3)


def test_prefill_is_flops_over_compute_where_the_batch_is_large(llama: Parent) -> None:
    many = Pass(sequences=512, tokens=1000, context=500)
    flops = 2 * 3 * 8192 * 28672 * 512_000
    states = 512_000 * 2 * (4 * 8192 + 3 * 28672)  # 16 bits, passed by norm and activation, which wait for products
    expected = flops / load_target("h100").flops_per_second("float8") + states / 3.35e12 / 0.8
    assert seconds(llama, "ffn", "parent", many, setting()) == pytest.approx(expected, rel=1e-3)


def test_kernel_floors_are_a_lower_bound(llama: Parent) -> None:
    at = setting(kernel_floor_microseconds=1e6, precision="float32")
    tiny = Pass(sequences=1, tokens=1, context=1)
    assert 5 <= seconds(llama, "ffn", "parent", tiny, at) < 5.1  # norm, gate, up, activation, down
    assert 6 <= seconds(llama, "attention", "parent", tiny, at) < 6.1  # norm, q, k, v, o, scores
    assert 2 <= seconds(llama, "ffn", "linear", tiny, at) < 2.1


def test_two_devices_halve_weights_and_pay_for_the_sum(llama: Parent) -> None:
    space = SearchSpace(attention=("kv1",), ffn=())
    one, two = (modelled_costs(llama, space, [SCENARIO], setting(n)) for n in (1, 2))
    for a, b in zip(one.costs, two.costs, strict=True):
        assert b.weight_bytes == a.weight_bytes / 2 and b.parameters == a.parameters
    kv1 = parse_label("attention", "kv1", llama.config)
    own = parse_label("attention", "parent", llama.config)
    assert kv_bytes_per_device(llama, kv1, setting(2)) == kv_bytes_per_device(llama, kv1, setting(1))  # never cut
    assert kv_bytes_per_device(llama, own, setting(2)) * 2 == kv_bytes_per_device(llama, own, setting(1))
    linked, free = setting(2), setting(2, interconnect_gb_per_second=1e12)
    hidden = PREFILL.count * 8192 * 2
    paid = seconds(llama, "ffn", "parent", PREFILL, linked) - seconds(llama, "ffn", "parent", PREFILL, free)
    assert paid == pytest.approx(hidden / 450e9 / 0.7, rel=1e-3)  # 2 (n - 1) / n = 1 for two


def test_element_wise_work_is_not_hidden_behind_products_and_inner_states_are_split(llama: Parent) -> None:
    slow = {"memory_gb_per_second": 1675.0, "kernel_floor_microseconds": 1e-9, "interconnect_gb_per_second": 1e12}
    fast = slow | {"memory_gb_per_second": 3350.0}

    def more(devices: int, label: str) -> float:
        """Seconds that half the memory's speed costs a prefill whose products are bound by FLOPs."""
        both = (seconds(llama, "ffn", label, PREFILL, setting(devices, **speed)) for speed in (slow, fast))
        return next(both) - next(both)

    for devices in (1, 4):
        for label, inner in (("parent", 28672), ("ffn2816", 2816), ("linear", 0)):
            states = PREFILL.count * 2 * (4 * 8192 + 3 * inner / devices)  # hidden states are whole on every device
            assert more(devices, label) == pytest.approx(states / 3.35e12 / 0.8, rel=1e-6), (devices, label)


def test_kv_cache_has_a_precision_of_its_own(llama: Parent) -> None:
    own = parse_label("attention", "parent", llama.config)
    hardware = Hardware(name="h100", engine="roofline", precision="float8", kv_precision="bfloat16")
    half = setting_of(hardware, load_target("h100"))
    assert kv_bytes_per_device(llama, own, half) == 2 * kv_bytes_per_device(llama, own, setting())
    assert seconds(llama, "attention", "parent", DECODE, half) > seconds(
        llama, "attention", "parent", DECODE, setting()
    )


def test_the_parent_is_the_sum_of_its_blocks_and_the_table_says_it_is_modelled(
    llama: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = modelled_costs(llama, SearchSpace(attention=(), ffn=()), [SCENARIO], setting())
    assert table.modelled and table.hardware["costs"] == "modelled, not measured"
    told: list[str] = []
    monkeypatch.setattr("flows.tracked_run.show_table", lambda *shown: told.append(shown[-1]))
    monkeypatch.setattr("flows.tracked_run.say", told.append)
    show_costs(table)
    assert told[0].startswith("modelled for h100, ") and "not measured" in told[1]
    problem = make_problem([], table, Budget(speedup=1.1), [SCENARIO])
    (total,) = totals_of(problem, problem.parent, (64,))
    blocks = [cost for cost in table.costs if cost.batch_size == 64]
    outside = problem.non_block_table["chat", 64]
    assert total.prefill_seconds == pytest.approx(outside.prefill_seconds + 80 * sum(c.prefill_seconds for c in blocks))
    assert total.parameters == 70_553_706_496  # Llama-3.1-70B's own
    weights = outside.weight_bytes + 80 * sum(c.weight_bytes for c in blocks)
    assert total.memory_bytes == weights + 80 * 2 * 8 * 128 * 64 * (128 + 256)


def test_nemotron_51b_has_its_published_size(llama: Parent) -> None:
    layers = nemotron()
    assert len(layers) == 80 and layers[0] == LayerChoice(ffn="ffn7168") and layers[43].attention == "no_op"
    own = [parse_label(part, getattr(layer, part), llama.config) for layer in layers for part in SUBBLOCKS]
    total = sum(parameters_of(llama, variant) for variant in own) + non_block_parameters(llama.config)
    assert total == 51_501_015_040


def test_the_one_fitted_constant_gives_the_row_it_was_fitted_to(llama: Parent) -> None:
    assert unit_of_work(llama, FITTED, 128, 1072, setting()) == pytest.approx(BLOCKS[FITTED], rel=0.01)


def test_a_target_of_ones_own(tmp_path: Path) -> None:
    text = (FOLDER / "h100.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("name: h100", "name: mine"))
    assert load_target(str(tmp_path / "mine.yaml")).name == "mine"
    (tmp_path / "bad.yaml").write_text(text.replace("memory_gib", "memory_gb"))
    with pytest.raises(ProfileError, match="memory_gb"):
        load_target(str(tmp_path / "bad.yaml"))
