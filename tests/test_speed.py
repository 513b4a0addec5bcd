"""Speed in the engine of the costs, the sums beside it, the calibration: oracles on made-up costs, one small run."""

import math
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blocks.disturbance import is_better
from blocks.library import read_value, write_value
from blocks.records import (
    Architecture,
    Cost,
    CostTable,
    LayerChoice,
    Metric,
    NonBlockCost,
    SpeedReport,
    Throughput,
    Turn,
)
from flows.tracked_run import sum_beside_whole
from profiles.load import load_profile
from profiles.schema import Hardware, Scenario
from tasks.engines.timing_in_turns import ClockTooCoarse, in_turns, is_unsure, median_metric, summaries
from tasks.evaluate.compare import contender, parent_contender
from tasks.measure import end_to_end
from tasks.measure.calibration import bias_of, calibrated, drift
from tasks.measure.cost_sums import check_sums, error_of_sum, warnings_of
from tasks.measure.costs import CostRequest, measure_costs
from tasks.measure.end_to_end import measure_speed
from tasks.measure.torch_costs import summary
from tasks.running.usage import Others
from tasks.search.totals import make_problem, totals_of
from tests.chain import prepare
from tests.test_engines import needs_llama_cpp

SCENARIOS = (Scenario(prompt_tokens=10, generated_tokens=4),)
LAYERS = (LayerChoice(), LayerChoice(), LayerChoice(ffn="ffn32"))
PARENT = (LayerChoice(),) * 3
NAMES: tuple[tuple[Any, str], ...] = (("attention", "parent"), ("ffn", "parent"), ("ffn", "ffn32"))


def cost(part: Any, variant: str, prefill: float, decode: float, spread: float = 0.0) -> Cost:
    return Cost(
        subblock=part,
        variant=variant,
        scenario="chat",
        batch_size=1,
        prefill_seconds=prefill,
        decode_seconds_per_token=decode,
        prefill_spread=spread,
        decode_spread=spread,
        parameters=10,
        weight_bytes=40,
        kv_bytes_per_token=0,
    )


def outside(prefill: float, decode: float, spread: float = 0.0) -> NonBlockCost:
    return NonBlockCost(
        scenario="chat",
        batch_size=1,
        prefill_seconds=prefill,
        decode_seconds_per_token=decode,
        parameters=10,
        weight_bytes=40,
        prefill_spread=spread,
        decode_spread=spread,
    )


def table(whole: NonBlockCost | None = None, spread: float = 0.0, clock: str = "wall") -> CostTable:
    """The parent's sum: prefill 2 + 3 (1 + 5) = 20, decode .5 + 3 (.5 + 1) = 5."""
    return CostTable(
        hardware={"engine": "x", "clock": clock},
        costs=(
            cost("attention", "parent", 1, 0.5, spread),
            cost("ffn", "parent", 5, 1, spread),
            cost("ffn", "ffn32", 2, 0.5, spread),
        ),
        non_block=(outside(2, 0.5, spread),),
        num_hidden_layers=3,
        measured_at="now",
        parent_measured=() if whole is None else (whole,),
    )


def architecture(costs: CostTable, layers: tuple[LayerChoice, ...]) -> Architecture:
    problem = make_problem([], costs, load_profile("tiny", []).budget, SCENARIOS)
    return Architecture(
        method="mip",
        layers=layers,
        score=0,
        score_se=0,
        totals=totals_of(problem, layers, (1,)),
        parent_totals=totals_of(problem, PARENT, (1,)),
        status="optimal",
        bound=0,
        gap=0,
    )


def turn(prefill: float, step: float) -> Turn:
    return Turn(prefill=prefill, step=step, prefill_cpu=2 * prefill, step_cpu=2 * step)


def speeds(costs: CostTable, parents: list[Turn], children: list[Turn]) -> Any:
    found = summaries({"parent": parents, "child": children}, SCENARIOS[0], 1, {"parent": 1, "child": 2})
    models = {name: (own,) for name, own in found.items()}
    child = architecture(costs, LAYERS)
    return models, check_sums({"parent": parent_contender(child).architecture, "child": child}, models, costs)


@pytest.mark.parametrize("clock", ["wall", "CPU"])
def test_sums_stand_beside_whole_models_in_the_clock_of_the_costs(clock: str) -> None:
    """The child's sum: prefill 2 + 3 + 5 + 5 + 2 = 17, decode .5 + 1.5 + 1 + 1 + .5 = 4.5."""
    costs, times = table(clock=clock), 2 if clock == "CPU" else 1
    models, sums = speeds(costs, [turn(25, 5)] * 3, [turn(20, 3)] * 3)
    found = {(check.model, check.phase): check for check in sums}
    assert len(sums) == 4
    assert found["parent", "prefill"].off.value == pytest.approx(20 / (25 * times) - 1)
    assert found["parent", "decode"].off.value == pytest.approx(5 / (5 * times) - 1)
    assert found["parent", "decode"].gain_off is None
    assert found["child", "prefill"].off.value == pytest.approx(17 / (20 * times) - 1)
    assert found["child", "decode"].off.value == pytest.approx(4.5 / (3 * times) - 1)
    for phase, gain in (("prefill", (20 / 17) / (25 / 20)), ("decode", (5 / 4.5) / (5 / 3))):
        off = found["child", phase].gain_off
        assert off is not None and off.value == pytest.approx(gain - 1)
    assert models["child"][0].memory_bytes == 2 and models["child"][0].gains.request.value == pytest.approx(45 / 32)


def test_only_a_median_scenario_that_is_off_by_more_than_5_percent_is_told() -> None:
    for step, lines in ((4.5, 0), (4.4, 0), (4.0, 1), (5.5, 1)):
        models, sums = speeds(table(), [turn(20, 5)], [turn(17, step)])
        report = SpeedReport(engine="x 1", clock="wall", models=models, sums=sums)
        found = warnings_of(report)
        assert len(found) == lines, step
        assert all("decode" in line and "x 1" in line for line in found)
    assert warnings_of(SpeedReport()) == []


def test_what_disturbs_a_measurement_and_which_of_two_stays() -> None:
    """Even rounds; rounds so uneven that the error of the gain is above a quarter; even ones beside others."""

    def speed(steps: list[float], busy: str = "") -> SpeedReport:
        models, _ = speeds(table(), [turn(20, 5)] * len(steps), [turn(17, step) for step in steps])
        return SpeedReport(engine="x 1", models=models, busy=busy)

    steady, uneven, crowded = speed([3, 3, 3.1]), speed([1, 3, 9]), speed([3, 3, 3.1], "others took 2 of 2")
    assert steady.disturbed == ""
    assert uneven.disturbed.startswith("the machine was busy: not reliable (standard errors up to ")
    assert crowded.disturbed == "the machine was busy: not reliable (others took 2 of 2)"
    assert warnings_of(crowded) == [
        f"speeds: {crowded.disturbed}. Give the same command when it is quiet, and they are measured again"
    ]
    assert is_better(steady, uneven) and is_better(steady, crowded) and is_better(crowded, uneven)
    assert not (is_better(uneven, steady) or is_better(crowded, steady) or is_better(uneven, crowded))
    noisy = [table(outside(20, 5, spread=0.3)), table(outside(20, 5), spread=0.3)]
    assert table(outside(20, 5, spread=0.2), spread=0.2).disturbed == ""
    assert all(one.disturbed.startswith("the machine was busy") for one in noisy)


def test_copies_of_a_variant_share_their_error() -> None:
    found = error_of_sum(table(spread=0.1), LAYERS, ("chat", 1), "prefill")
    assert found == pytest.approx(math.hypot(0.1 * 2, 0.1 * 3 * 1, 0.1 * 2 * 5, 0.1 * 2))


def test_a_bias_beyond_its_error_is_calibrated_and_nothing_else() -> None:
    assert calibrated(table()) == table()  # no parent measured, nothing to say
    exact = table(outside(20, 5))
    assert calibrated(exact) == exact
    noisy = table(outside(21, 5.1, spread=0.2))
    assert bias_of(noisy, "prefill") is None and calibrated(noisy) == noisy
    found = calibrated(table(outside(22, 5)))
    assert found.calibration is not None and found.calibration.prefill == pytest.approx(1.1)
    assert found.calibration.decode == 1 and "prefill x 1.100" in found.hardware["calibrated"]
    assert [one.prefill_seconds for one in found.costs] == pytest.approx([1.1, 5.5, 2.2])
    assert [one.decode_seconds_per_token for one in found.costs] == [0.5, 1, 0.5]
    assert found.non_block[0].prefill_seconds == pytest.approx(2.2)
    assert architecture(found, PARENT).totals[0].prefill_seconds == pytest.approx(22)
    assert bias_of(found, "prefill") is None


TRUE = {"parent": (5.0, 1.0), "ffn32": (2.0, 0.5), "ffn16": (1.0, 0.25)}  # seconds of an FFN: prefill, a decode step


def measured(
    rng: np.random.Generator, whole_noise: float, scale: float = 1.0, block_noise: float = 0.02, bias: float = 0.1
) -> CostTable:
    """A table as 7 rounds of a noisy machine would give it: `bias` of the sum over the parent, relative noise of one
    round of the blocks, and of one round of the parent end to end.
    """

    def seconds(true: float, noise: float) -> tuple[float, float]:
        found = median_metric([scale * true * math.exp(noise * rng.standard_normal()) for _ in range(7)])
        return found.value, found.se / found.value

    def drawn(what: Any, pair: tuple[float, float], noise: float) -> Any:
        (prefill, prefill_spread), (decode, decode_spread) = (seconds(true, noise) for true in pair)
        return what.model_copy(
            update={
                **{"prefill_seconds": prefill, "decode_seconds_per_token": decode},
                **{"prefill_spread": prefill_spread, "decode_spread": decode_spread},
            }
        )

    ffns = tuple(drawn(cost("ffn", name, 0, 0), pair, block_noise) for name, pair in TRUE.items())
    attention = drawn(cost("attention", "parent", 0, 0), (1, 0.5), block_noise)
    whole = drawn(outside(0, 0), (20 / (1 + bias), 5 / (1 + bias)), whole_noise)
    found = table(whole).model_copy(update={"costs": (attention, *ffns)})
    return found.model_copy(update={"non_block": (drawn(outside(0, 0), (2, 0.5), block_noise),)})


def test_a_calibration_that_comes_and_goes_is_no_drift_and_a_tenth_is() -> None:
    """100 pairs of measurements of one machine, the parent end to end much noisier than the blocks, the sum biased by
    10 %. With calibrated seconds compared, 83 of them would count as moved; as measured 0 do. All of 100 machines that
    became 10 % slower are noticed.
    """
    rng = np.random.default_rng(0)
    before = [measured(rng, whole_noise=0.25) for _ in range(100)]
    again = [measured(rng, whole_noise=0.25) for _ in range(100)]
    slower = [measured(rng, whole_noise=0.25, scale=1.1) for _ in range(100)]

    def moved(others: list[CostTable]) -> int:
        return sum(bool(drift(calibrated(one), calibrated(other))) for one, other in zip(before, others, strict=True))

    def as_calibrated(costs: CostTable) -> CostTable:
        return calibrated(costs).model_copy(update={"calibration": None, "parent_measured": ()})

    flips = sum(bool(drift(as_calibrated(one), as_calibrated(two))) for one, two in zip(before, again, strict=True))
    assert (flips, moved(again), moved(slower)) == (83, 0, 100)


def test_a_parent_that_moved_alone_is_drift() -> None:
    before, now = table(outside(20, 5, spread=0.01)), table(outside(23, 5, spread=0.01))
    assert drift(calibrated(before), calibrated(now)) == ["the parent end to end prefill (chat, batch 1): +15%"]
    assert drift(before, table(outside(23, 5, spread=0.05))) == []


@pytest.mark.parametrize("clock", ["wall", "CPU"])
def test_a_clock_that_shows_no_time_gives_no_sums_and_no_calibration(clock: str) -> None:
    nothing = table(outside(0, 0), clock=clock)
    assert calibrated(nothing) == nothing and "decode takes no time" in sum_beside_whole(nothing, outside(0, 0))
    zero = nothing.model_copy(update={"costs": (cost("attention", "parent", 0, 0), cost("ffn", "parent", 0, 0))})
    zero = zero.model_copy(update={"non_block": (outside(0, 0),), "parent_measured": (outside(1, 0),)})
    assert calibrated(zero) == zero
    empty = table(clock=clock).model_copy(update={"costs": tuple(cost(*name, 0, 0) for name in NAMES)})
    _, sums = speeds(empty.model_copy(update={"non_block": (outside(0, 0),)}), [turn(25, 5)], [turn(20, 3)])
    assert sums == ()
    assert summary([(0.0, 0.25), (0.0, 0.25)]).prefill_spread == 0


def test_a_request_that_takes_no_time_is_a_sentence() -> None:
    for request, named in ((turn(0, 5), "prefill and prefill_cpu"), (turn(5, 0), "step and step_cpu")):
        with pytest.raises(ClockTooCoarse, match=f"no time for {named} of a request of child: .*prompt_tokens"):
            in_turns({"parent": lambda: turn(1, 1), "child": lambda request=request: request}, 1)  # type: ignore[misc]


@pytest.mark.parametrize(("noise", "rounds"), [([1.0], 4), ([1.0, 1.1], 20), ([1.04, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 6)])
def test_rounds_go_on_until_a_gain_is_known(noise: list[float], rounds: int) -> None:
    """Four rounds are asked: a steady model gets no more, one that is never sure five times as many."""
    for asked, made in ((None, 4), (is_unsure(3), rounds)):
        own = (turn(5 * more, 5 * more) for more in cycle(noise))
        found = in_turns({"parent": partial(turn, 10, 10), "child": partial(next, own)}, 4, unsure=asked)
        assert [len(turns) for turns in found.values()] == [made] * 2


SMALL = [
    "search_space.attention=[linear]",
    "search_space.ffn=[ffn32]",
    "scenarios=[{name: chat, batch_sizes: [2], prompt_tokens: 8, generated_tokens: 6}, "
    "{name: long, batch_sizes: [1], prompt_tokens: 6, generated_tokens: 40}]",
    "measure={rounds: 3, decode_steps: 2}",
    "evaluate.throughput_rounds=2",
]


@pytest.mark.parametrize(
    "hardware",
    ["{threads: 1}", pytest.param("{engine: llama.cpp, precision: q8_0, threads: 1}", marks=needs_llama_cpp)],
)
def test_models_are_measured_in_the_engine_of_the_costs(
    hardware: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parent, child and a baseline at two scenarios; nothing is left behind."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    profile = load_profile("tiny", [*SMALL, f"hardware={hardware}"])
    parent, _ = prepare(tmp_path, train_steps=0)
    costs = measure_costs(CostRequest.of(profile, parent), tmp_path)
    problem = make_problem([], costs, profile.budget, profile.scenarios)
    child = architecture(table(), PARENT).model_copy(
        update={
            "totals": totals_of(problem, PARENT, (2, 1)),
            "parent_totals": totals_of(problem, PARENT, (2, 1)),
        }
    )
    own = [parent_contender(child), contender("child", child, []), contender("uniform", child, [])]
    report = measure_speed(own, parent, costs, profile, tmp_path)
    _measured_once_and_again_when_disturbed(own, parent, costs, profile, tmp_path, report, monkeypatch)
    torch.set_num_threads(threads)
    assert report.engine == costs.hardware["engine"] and report.clock == "CPU"
    assert set(report.models) == {"parent", "child", "uniform"}
    for name, every in report.models.items():
        assert [(one.scenario, one.batch_size) for one in every] == [("chat", 2), ("long", 1)]
        assert all((one.gains is None) == (name == "parent") for one in every)
        assert all(one.memory_bytes is None or one.memory_bytes > 2**16 for one in every)
    assert len(report.sums) == 3 * 2 * 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".speed")]
    assert SpeedReport.model_validate_json(report.model_dump_json()) == report


def _measured_once_and_again_when_disturbed(
    own: Any, parent: Any, costs: Any, profile: Any, workspace: Path, first: SpeedReport, monkeypatch: Any
) -> None:
    """Stored speeds are read. Disturbed ones stay while others are at work, or while a new measurement is worse."""
    (path,) = (workspace / "speeds").iterdir()
    steady = {name: tuple(_steady(one) for one in every) for name, every in first.models.items()}
    write_value(path, first.model_copy(update={"models": steady, "busy": ""}))
    crowd, asked = [""], (own, parent, costs, profile, workspace)
    monkeypatch.setattr(end_to_end, "crowd_now", lambda _: crowd[0])
    monkeypatch.setattr(Others, "crowd", lambda *_: crowd[0])
    monkeypatch.setattr(end_to_end, "_measured", lambda *_: pytest.fail("measured"))
    assert measure_speed(*asked).models == steady
    write_value(path, first.model_copy(update={"models": steady, "busy": "others"}))
    crowd[0] = "others"
    assert measure_speed(*asked).busy == "others"  # no use while they are still there
    crowd[0] = ""
    with pytest.raises(pytest.fail.Exception, match="measured"):
        measure_speed(*asked)

    def then_others(*_: Any) -> Any:
        crowd[0] = "even more"
        return first.models

    monkeypatch.setattr(end_to_end, "_measured", then_others)
    assert measure_speed(*asked).models == steady and read_value(path, SpeedReport).busy == "others"
    crowd[0] = ""
    monkeypatch.setattr(end_to_end, "_measured", lambda *_: steady)
    assert measure_speed(*asked).disturbed == "" and read_value(path, SpeedReport).busy == ""


def _steady(one: Throughput) -> Throughput:
    exact = {name: {"se": 0.0} for name, value in one if isinstance(value, Metric)}
    found = one.model_copy(update={name: getattr(one, name).model_copy(update=how) for name, how in exact.items()})
    return found.model_copy(update={"gains": None})


def test_precisions_that_an_engine_does_not_have_are_refused() -> None:
    assert Hardware(engine="llama.cpp", precision="q8_0").precision == "q8_0"
    for wrong in ({"precision": "q8_0"}, {"engine": "roofline", "kv_precision": "q8_0"}):
        with pytest.raises(ValueError, match=r"set engine: llama\.cpp"):
            Hardware.model_validate(wrong)
    with pytest.raises(ValueError, match="not measured in llama.cpp"):
        Hardware(engine="llama.cpp", precision="float8")
