"""What a model takes of its budget: the search's own sums in the profile's words, and measurements that decide."""

import pytest

from blocks.records import Architecture, Gains, LimitKept, Metric, Throughput
from profiles.schema import Budget, ScenarioBudget
from tasks.evaluate.budget import asked_words, limits_of, state_of
from tasks.search.choose import choose
from tasks.search.totals import Problem
from tests.test_choose import CHAT, LONG, random_problem
from tests.test_report import metric


def timed(architecture: Architecture, slower: float, parent: bool = False, error: float = 0.01) -> list[Throughput]:
    """Speeds as the sums say, but everything takes `slower` times as long. error: of the gains."""
    found = []
    for own, whole in zip(architecture.totals, architecture.parent_totals, strict=True):
        totals = whole if parent else own
        gain = metric(whole.runtime_seconds / own.runtime_seconds / slower, error)
        first = metric(whole.prefill_seconds / own.prefill_seconds / slower, error)
        runtime, rate = metric(slower * totals.runtime_seconds, 0.001), metric(1)
        found.append(
            Throughput(
                scenario=totals.scenario,
                batch_size=totals.batch_size,
                prefill_tokens_per_second=rate,
                decode_tokens_per_second=rate,
                first_token_seconds=metric(slower * totals.prefill_seconds, 0.001),
                output_token_seconds=rate,
                prefill_cpu_seconds=rate,
                step_cpu_seconds=rate,
                runtime_seconds=runtime,
                cpu_seconds=runtime,
                generated_tokens_per_second=rate,
                requests_per_second=rate,
                gains=None
                if parent
                else Gains(prefill=first, decode=gain, request=gain, prefill_cpu=first, decode_cpu=gain),
            )
        )
    return found


def by_name(problem: Problem, architecture: Architecture, slower: float = 1.0) -> dict[str, LimitKept]:
    own, parents = timed(architecture, slower), timed(architecture, 1.0, parent=True)
    return {limit.name: limit for limit in limits_of(problem, architecture, own, parents)}


@pytest.mark.parametrize(
    "budget",
    [
        Budget(speedup=1.2, memory_fraction=0.9, max_latency_seconds=1e3, parameters_fraction=0.9),
        Budget(min_tokens_per_second=1e-3, time_to_first_token_fraction=0.95, layer_parameters_fraction=0.85),
        Budget(max_time_to_first_token_seconds=1e3, memory_gib=1e3, parameters=10**12),
    ],
)
def test_every_limit_in_its_own_words(budget: Budget) -> None:
    """Shares, multiples and absolute limits; what was measured equals the sums when nothing is slower."""
    problem = random_problem(1, budget)
    architecture = choose(problem)
    child, parent = architecture.totals[0], architecture.parent_totals[0]
    found = by_name(problem, architecture)
    expected = {
        "speedup": parent.runtime_seconds / child.runtime_seconds,
        "memory_fraction": child.memory_bytes / parent.memory_bytes,
        "max_latency_seconds": child.runtime_seconds,
        "min_tokens_per_second": child.tokens_per_second,
        "max_time_to_first_token_seconds": child.prefill_seconds,
        "time_to_first_token_fraction": child.prefill_seconds / parent.prefill_seconds,
        "parameters_fraction": child.parameters / parent.parameters,
        "parameters": child.parameters,
        "memory_gib": child.memory_bytes / 2**30,
    }
    outside = problem.non_block_table["chat", 1].parameters
    expected["layer_parameters_fraction"] = (child.parameters - outside) / (parent.parameters - outside)
    expected = {name: expected[name] for name in budget.model_dump(exclude_none=True)}
    assert {name: limit.got for name, limit in found.items()} == pytest.approx(expected)
    assert {name: limit.asked for name, limit in found.items()} == budget.model_dump(exclude_none=True)
    measured = {name: limit.measured.value for name, limit in found.items() if limit.measured is not None}
    times = {name: value for name, value in expected.items() if "parameters" not in name and "memory" not in name}
    assert measured == pytest.approx(times)
    assert {state_of(limit, "") for limit in found.values()} == {"kept"}
    words = [asked_words(limit) for limit in found.values()]
    assert {"at least 1.2 times the parent's", "at least 0.001 tokens/s", "at most 1,000 GiB"} & set(words)


def test_scenarios_are_named_and_a_mix_is_one() -> None:
    scenarios = (CHAT, LONG.model_copy(update={"budget": ScenarioBudget(memory_fraction=0.95)}))
    problem = random_problem(2, Budget(speedup=1.1), scenarios=scenarios)
    found = by_name(problem, choose(problem))
    assert set(found) == {"speedup of chat", "speedup of long", "memory_fraction of long"}
    weighed = tuple(one.model_copy(update={"weight": 1.0}) for one in scenarios)
    problem = random_problem(2, Budget(speedup=1.1), scenarios=weighed)
    architecture = choose(problem)
    mixed = by_name(problem, architecture)["speedup"]
    sums = [sum(total.runtime_seconds for total in of) for of in (architecture.parent_totals, architecture.totals)]
    assert mixed.got == pytest.approx(sums[0] / sums[1])
    assert mixed.measured is not None and mixed.measured.value == pytest.approx(mixed.got)


def test_a_child_that_is_slower_than_predicted_breaks_its_speedup() -> None:
    problem = random_problem(1, Budget(speedup=1.2))
    late = by_name(problem, choose(problem), slower=2.0)["speedup"]
    assert late.got >= 1.2 - 1e-9 and state_of(late, "") == "not kept" and state_of(late, "others") == "not known"


@pytest.mark.parametrize(
    ("measured", "floor", "state"),
    [
        (metric(1.4, 0.06), True, "within the error"),
        (metric(1.4, 0.01), True, "not kept"),
        (metric(1.6, 0.01), True, "kept"),
        (metric(1.4, 0.01), False, "kept"),
        (None, True, "only predicted"),
    ],
)
def test_a_measured_time_decides_beyond_its_error(measured: Metric | None, floor: bool, state: str) -> None:
    limit = LimitKept(name="speedup", asked=1.5, floor=floor, got=1.5, timed=True, measured=measured)
    assert state_of(limit, "") == state
