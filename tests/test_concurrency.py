"""Served to many: the most tokens a second under a latency and a memory limit, batch size and variants together."""

import itertools
import math
from dataclasses import replace

import pytest

from blocks.records import CostTable, LayerChoice
from flows.search import _summary
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import Budget, Search
from tasks.pages.report import batch_table
from tasks.pages.verdict import _served
from tasks.search.choose import choose, choose_several, with_most_tokens
from tasks.search.concurrency import at_batch_sizes
from tasks.search.request import Request, limits
from tasks.search.solve import choose_joint
from tasks.search.totals import Problem, broken_limits, predicted, totals_of
from tasks.search.view import library_of
from tasks.studies.peers import find
from tests import test_number_types
from tests.test_choose import CHAT, EXACT, LONG, every_architecture, random_problem
from tests.test_solve import Oracle, random_library

SIZES = (1, 2, 4, 8)
MANY = CHAT.model_copy(update={"batch_sizes": SIZES})


def served(seed: int, budget: Budget, within: float) -> Problem:
    problem = random_problem(seed, budget, scenarios=(MANY,))
    search = Search.model_validate(EXACT.model_dump() | {"fastest_within_score": within})
    return replace(problem, search=search)


def most_by_force(problem: Problem, budget: Budget, within: float) -> tuple[float, float, int]:
    """The most tokens a second within a score, the lowest score at that speed and its batch size, by trying all."""
    found = []
    for size in SIZES:
        scores, values = every_architecture(problem, (size,))
        keeps = scores <= within
        for field, asked in budget.model_dump(exclude_none=True).items():
            keeps &= values[field] <= asked
        pairs = zip(values["min_tokens_per_second"][keeps], -scores[keeps], strict=True)
        found += [(float(tokens), float(score), size) for tokens, score in pairs]
    most = max(tokens for tokens, _, _ in found)
    score, size = max((score, size) for tokens, score, size in found if tokens >= most * (1 - 1e-6))
    return most, -score, size


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "budget", [Budget(max_latency_seconds=0.22), Budget(max_latency_seconds=0.3, memory_gib=2.6e5 / 2**30)]
)
def test_most_tokens_under_a_latency_as_by_trying_everything(seed: int, budget: Budget) -> None:
    problem = served(seed, budget, 0.06)
    tokens, score, size = most_by_force(problem, budget, 0.06)
    child = choose(problem)
    (totals,) = child.totals
    assert totals.tokens_per_second == pytest.approx(tokens, rel=3e-6)
    assert totals.batch_size == size and child.score == pytest.approx(score) and child.score <= 0.06
    assert child.status == "optimal" and child.bound <= child.score  # in the scores' unit, at that speed
    assert totals.runtime_seconds <= (budget.max_latency_seconds or 0) * (1 + 1e-6)
    assert size > 1, "several at a time must serve more"


def test_every_limit_decides_the_batch_size() -> None:
    """More time lets more requests in; a KV cache that has to fit lets fewer in."""
    chosen = [choose(served(1, Budget(max_latency_seconds=most), 0.06)).totals[0] for most in (0.15, 0.2, 0.4)]
    assert [one.batch_size for one in chosen] == sorted({one.batch_size for one in chosen})
    speeds = [one.tokens_per_second for one in chosen]
    assert speeds == sorted(speeds)
    room = chosen[-1].memory_bytes * 0.7
    least = Budget(max_latency_seconds=0.4, memory_gib=room / 2**30)
    tight = choose(served(1, least, 0.06)).totals[0]
    assert tight.batch_size < chosen[-1].batch_size and tight.memory_bytes <= room * (1 + 1e-6)


def test_most_tokens_in_types_as_by_trying_everything() -> None:
    problem = test_number_types.problem_with(1.05, layers=1)
    scenario = problem.scenarios[0].model_copy(update={"batch_sizes": (1, 4)})
    costs = [at_four(one) for one in problem.costs.costs]
    table: CostTable = problem.costs.model_copy(
        update={
            "costs": (*problem.costs.costs, *costs),
            "non_block": (*problem.costs.non_block, *(at_four(one) for one in problem.costs.non_block)),
        }
    )
    search = Search(fastest_within_score=0.4)
    problem = replace(problem, costs=table, scenarios=(scenario,), search=search)
    options = {part: dict.fromkeys(["parent", *problem.score_table[0, part]]) for part in ("attention", "ffn")}
    best = 0.0
    pairs = itertools.product(options["attention"], options["ffn"])
    for (attention, ffn), head, size in itertools.product(pairs, problem.heads, (1, 4)):
        layers = (LayerChoice(attention=attention, ffn=ffn),)
        near = predicted(problem, layers, "all", (size,), head).score <= 0.4
        if near and not broken_limits(problem, layers, (size,), head):
            best = max(best, totals_of(problem, layers, (size,), head)[0].tokens_per_second)
    child = choose(problem)
    assert child.totals[0].tokens_per_second == pytest.approx(best, rel=3e-6) and child.totals[0].batch_size == 4
    assert child.score <= 0.4 and (child.head or any(one != one.bare for one in child.layers))


def at_four(cost):  # type: ignore[no-untyped-def]  # either kind of cost
    """Four requests at a time take twice as long."""
    times = {name: 2 * getattr(cost, name) for name in ("prefill_seconds", "decode_seconds_per_token")}
    return cost.model_copy(update={"batch_size": 4, **times})


@pytest.mark.parametrize("traffic", [{}, {"chat": 0.7, "long": 0.3}])
@pytest.mark.parametrize("seed", range(3))
def test_the_largest_throughput_of_a_library_is_over_all_batch_sizes(seed: int, traffic: dict[str, float]) -> None:
    """What `choose --minimise tokens_per_second` finds. Seconds of a batch would say that the smallest serves most."""
    library = random_library(seed)
    asked = limits(latency_seconds=260, score=8)
    request = Request(limits=asked, minimise="tokens_per_second", traffic=traffic, search=EXACT)
    oracle = Oracle(library, traffic)
    if not traffic:
        library = replace(library.measured_at("chat", None), layers=library.layers)
        oracle.batches, oracle.library = [(0,), (1,)], library  # type: ignore[list-item]  # one scenario
    best = max(
        oracle.values(chosen, batches, "tokens_per_second")[0]
        for chosen in oracle.all
        for batches in oracle.batches
        if all(oracle.keeps(chosen, batches, limit) for limit in asked)
    )
    (choice,) = choose_joint(library, request)
    assert 1 / choice.objective == pytest.approx(best, rel=1e-6)
    if not traffic:
        assert choice.scenarios[0].tokens_per_second == pytest.approx(best, rel=1e-6)


def test_a_throughput_without_tokens_is_not_said_in_tokens() -> None:
    library = random_library(1).measured_at("chat", None)
    request = Request(limits=limits(score=8), minimise="tokens_per_second", search=EXACT)
    for tokens, said in (
        (8, "(most tokens per second)"),
        (0, "(most tokens per second, as the seconds of one request)"),
    ):
        places = [one.model_copy(update={"prompt_tokens": tokens, "generated_tokens": 0}) for one in library.places]
        own = replace(library, places=tuple(places))
        (choice,) = choose_joint(own, request)
        figure = choice.scenarios[0].tokens_per_second or (choice.latency_seconds or 0) / choice.scenarios[0].batch_size
        assert _summary(choice, own, request).startswith(f"objective  {figure:.6f} {said}")


def test_baselines_search_at_the_childs_speed() -> None:
    problem = served(2, Budget(max_latency_seconds=0.3), 0.06)
    child, level = choose(problem), with_most_tokens(problem)
    assert with_most_tokens(level) is level and level.search.fastest_within_score is None
    rival = find("greedy", level)
    assert rival.totals[0].tokens_per_second >= child.totals[0].tokens_per_second * (1 - 1e-5)
    assert rival.score >= child.score - 1e-9
    assert choose(level).score == pytest.approx(child.score)


@pytest.mark.parametrize("settled", [False, True])
def test_nobody_races_whose_score_is_beyond_what_was_asked(settled: bool) -> None:
    """Of those that are as fast, at one size and within a score; without a limit there would be as many as asked."""
    problem = served(2, Budget(max_latency_seconds=0.3), 0.06)
    level = with_most_tokens(problem)
    found = choose_several(level if settled else problem, 4, 1)
    assert found and max(one.score for one in found) <= 0.06
    assert max(one.score for one in choose_several(replace(level, within_score=None), 4, 1)) > 0.06


def test_the_report_shows_every_batch_size_and_says_what_the_chosen_one_gives() -> None:
    budget = Budget(max_latency_seconds=0.3)
    problem = served(2, budget, 0.06)
    child = choose(problem)
    rows = at_batch_sizes(problem, child)
    assert [row.child.batch_size for row in rows] == list(SIZES)
    (chosen,) = [row for row in rows if row.chosen]
    assert chosen.child == child.totals[0] and not chosen.broken
    for row in rows:
        assert (row.parent.runtime_seconds > 0.3) == ("max_latency_seconds" in row.parent_broken)
        assert (row.child.runtime_seconds > 0.3) == ("max_latency_seconds" in row.broken)
    assert any(row.broken for row in rows) and not all(row.parent_broken for row in rows)

    class Report:
        batch_sizes = rows

    (line,) = [found.line for found in _served(Report)]  # type: ignore[arg-type]
    parent = max((row.parent for row in rows if not row.parent_broken), key=lambda one: one.tokens_per_second)
    assert f"predicted: chat, {chosen.child.batch_size} requests at a time" in line
    assert f"{parent.batch_size} requests at a time" in line
    assert f"{chosen.child.tokens_per_second / parent.tokens_per_second:.2f}"[:3] in line
    header, cells, _ = batch_table(Report)  # type: ignore[arg-type]
    assert all(len(row) == len(header) for row in cells) and sum("chosen" in row[0] for row in cells) == 1
    one = replace(problem, scenarios=(CHAT.model_copy(update={"batch_sizes": (child.totals[0].batch_size,)}),))
    assert at_batch_sizes(one, child) == ()


def test_a_parent_that_keeps_no_limit_is_not_compared() -> None:
    problem = served(2, Budget(max_latency_seconds=0.1), 1.0)

    class Report:
        batch_sizes = at_batch_sizes(problem, choose(problem))

    assert "the parent keeps the limits at none" in _served(Report)[0].line  # type: ignore[arg-type]


def test_several_scenarios_need_a_weight_each() -> None:
    two = "scenarios=[{name: a, prompt_tokens: 8}, {name: b, prompt_tokens: 16}]"
    with pytest.raises(ProfileError, match="give every scenario a weight"):
        load_profile("tiny", [two, "search.fastest_within_score=0.3"])
    weighed = two.replace("8}", "8, weight: 1}").replace("16}", "16, weight: 2}")
    assert load_profile("tiny", [weighed, "search.fastest_within_score=0.3"]).search.fastest_within_score == 0.3


def test_the_mean_request_of_a_mix_is_served_fastest() -> None:
    scenarios = [
        one.model_copy(update={"weight": weight, "batch_sizes": (1, 4)}) for one, weight in ((CHAT, 0.7), (LONG, 0.3))
    ]
    problem = random_problem(3, Budget(max_latency_seconds=0.4), scenarios=scenarios)
    problem = replace(problem, search=EXACT.model_copy(update={"fastest_within_score": 0.06}))
    child = choose(problem)

    def tokens(totals):  # type: ignore[no-untyped-def]
        each = [w * t.runtime_seconds / t.batch_size for w, t in zip((0.7, 0.3), totals, strict=True)]
        return sum(
            w * (s.prompt_tokens + s.generated_tokens) for w, s in zip((0.7, 0.3), scenarios, strict=True)
        ) / sum(each)

    library = library_of(problem)
    best = -math.inf
    rows = [every_architecture(replace(problem, scenarios=(one,)), (size,)) for one in scenarios for size in (1, 4)]
    for first, second in itertools.product((0, 1), (2, 3)):
        sizes = ((1, 4)[first], (1, 4)[second - 2])
        latency = [rows[place][1]["max_latency_seconds"] for place in (first, second)]
        keeps = (rows[0][0] <= 0.06) & (0.7 * latency[0] + 0.3 * latency[1] <= 0.4)
        asked = 0.7 * 48 + 0.3 * 136
        found = asked / (0.7 * latency[0] / sizes[0] + 0.3 * latency[1] / sizes[1])
        best = max(best, float(found[keeps].max()))
    assert len(library.places) == 4 and tokens(child.totals) == pytest.approx(best, rel=3e-6)
