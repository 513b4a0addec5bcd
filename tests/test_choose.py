"""The MIP against brute force, against scipy's MILP, and against laws; every budget here binds."""

import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from blocks import estimates
from blocks.errors import InfeasibleBudget
from blocks.records import SUBBLOCKS, Architecture, Cost, CostTable, LayerChoice, NonBlockCost, Score
from profiles.schema import Budget, Scenario, ScenarioBudget, Search
from tasks.search.capabilities import InconsistentTables
from tasks.search.choose import choose
from tasks.search.grid import grids_of, make_grid
from tasks.search.mip import SolverStopped, minimise
from tasks.search.totals import (
    Problem,
    batch_choices,
    broken_limits,
    make_problem,
    predicted,
    score_of,
    totals_of,
    within_budget,
)

ATTENTIONS = ("parent", "kv1", "no_op")
FFNS = ("parent", "ffn50", "no_op")
CHAT = Scenario(name="chat", batch_sizes=(1,), prompt_tokens=32, generated_tokens=16)
LONG = Scenario(name="long", batch_sizes=(1,), prompt_tokens=128, generated_tokens=8)
EXACT = Search(gap=1e-9, time_limit_seconds=200)  # never met: a machine that is shared may stand still for a while
SEQUENCES = 5


def score(layer: int, subblock: Any, variant: str, generator: np.random.Generator, mean: float | None = None) -> Score:
    kl = generator.gamma(2.0, 0.01 if mean is None else mean / 2, SEQUENCES)
    loss = kl + generator.normal(-0.02, 0.02, SEQUENCES)
    return Score(
        layer=layer,
        subblock=subblock,
        variant=variant,
        kl=float(kl.mean()),
        kl_se=float(kl.std(ddof=1) / math.sqrt(SEQUENCES)),
        lm_loss=float(loss.mean()),
        lm_loss_se=float(loss.std(ddof=1) / math.sqrt(SEQUENCES)),
        tokens=SEQUENCES * 8,
        kl_per_sequence=tuple(kl.tolist()),
        lm_loss_per_sequence=tuple(loss.tolist()),
    )


def costs_of(labels: Mapping[Any, Sequence[str]], scenarios: Sequence[Scenario], layers: int, seed: int) -> CostTable:
    """Random costs, falling from the parent's (the first label) to near nothing, never in proportion to each other."""
    generator = np.random.default_rng(seed)
    size = {(part, name): generator.uniform(0.8, 1.2) * (1 - i / len(names)) for part, names in labels.items()
            for i, name in enumerate(names)}  # fmt: skip
    places = [(scenario, batch) for scenario in scenarios for batch in scenario.batch_sizes]
    costs = [
        Cost(
            subblock=part,
            variant=name,
            scenario=scenario.name,
            batch_size=batch,
            prefill_seconds=0.01 * batch * share * generator.uniform(0.5, 1.5),
            decode_seconds_per_token=0.001 * batch**0.5 * share * generator.uniform(0.5, 1.5),
            prefill_spread=0.0,
            decode_spread=0.0,
            parameters=int(10_000 * share),
            weight_bytes=int(40_000 * share),
            kv_bytes_per_token=int(256 * share) if part == "attention" else 0,
        )
        for scenario, batch in places
        for (part, name), share in size.items()
    ]
    outside = [
        NonBlockCost(
            scenario=scenario.name,
            batch_size=batch,
            prefill_seconds=0.004 * batch,
            decode_seconds_per_token=0.0005,
            parameters=7_000,
            weight_bytes=28_000,
        )
        for scenario, batch in places
    ]
    return CostTable(
        hardware={}, costs=tuple(costs), non_block=tuple(outside), num_hidden_layers=layers, measured_at="never"
    )


def random_problem(
    seed: int,
    budget: Budget,
    layers: int = 3,
    scenarios: Sequence[Scenario] = (CHAT,),
    coupled: bool = False,
    metric: Any = "kl",
) -> Problem:
    generator = np.random.default_rng(seed)
    labels = {"attention": ATTENTIONS, "ffn": FFNS}
    scores = [score(i, part, name, generator) for i in range(layers) for part in SUBBLOCKS for name in labels[part][1:]]
    if coupled:
        scores += [score(i, "block", f"{a}+{f}", generator, 0.02) for i in range(layers - 1)
                   for a in ATTENTIONS[1:] for f in FFNS[1:]]  # fmt: skip
    costs = costs_of(labels, scenarios, layers, seed)
    return make_problem(scores, costs, budget, scenarios, EXACT, metric)


def brute_force(problem: Problem) -> tuple[float, dict[str, float]]:
    """Best score, and the nearest value of every budget field over the whole library, by trying everything.

    Written anew on purpose: shares nothing with tasks/search/totals.py but the tables.
    """
    best, nearest = math.inf, dict[str, float]()
    for batches in itertools.product(*(scenario.batch_sizes for scenario in problem.scenarios)):
        scores, values = every_architecture(problem, batches)
        keeps = np.ones(len(scores), dtype=bool)
        for field, asked in problem.budget.model_dump(exclude_none=True).items():
            floor = field in ("speedup", "min_tokens_per_second")
            keeps &= values[field] >= asked if floor else values[field] <= asked
            reach = values[field].max() if floor else values[field].min()
            nearest[field] = (max if floor else min)(nearest.get(field, reach), reach)
        best = min(best, scores[keeps].min(initial=math.inf))
    return best, nearest


def every_architecture(problem: Problem, batches: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """Scores and budget values of all architectures; over several scenarios the hardest value counts."""
    number = problem.costs.num_hidden_layers
    options = [layer_options(problem, layer) for layer in range(number)]
    picks = np.array(list(itertools.product(*(range(len(pairs)) for pairs in options))))
    scores = sum(np.array([value for _, _, value in options[i]])[picks[:, i]] for i in range(number))
    values: dict[str, list[Any]] = {}
    for scenario, batch in zip(problem.scenarios, batches, strict=True):
        cost = {
            (c.subblock, c.variant): c
            for c in problem.costs.costs
            if (c.scenario, c.batch_size) == (scenario.name, batch)
        }
        out = next(c for c in problem.costs.non_block if (c.scenario, c.batch_size) == (scenario.name, batch))
        tokens = batch * (scenario.prompt_tokens + scenario.generated_tokens)

        def total(of: Any, cost: Any = cost) -> Any:
            per_layer = [
                np.array([of(cost["attention", a]) + of(cost["ffn", f]) for a, f, _ in pairs]) for pairs in options
            ]
            return sum(per_layer[i][picks[:, i]] for i in range(number))

        def parent(of: Any, cost: Any = cost) -> Any:
            return number * (of(cost["attention", "parent"]) + of(cost["ffn", "parent"]))

        def seconds(c: Any, scenario: Any = scenario) -> Any:
            return c.prefill_seconds + scenario.generated_tokens * c.decode_seconds_per_token

        def size(c: Any, tokens: Any = tokens) -> Any:
            return c.weight_bytes + tokens * c.kv_bytes_per_token

        runtime, memory = seconds(out) + total(seconds), out.weight_bytes + total(size)
        parameters = total(lambda c: c.parameters)
        of_parent = parent(lambda c: c.parameters)
        for field, value in {
            "speedup": (seconds(out) + parent(seconds)) / runtime,
            "min_tokens_per_second": tokens / runtime,
            "max_latency_seconds": runtime,
            "max_time_to_first_token_seconds": out.prefill_seconds + total(lambda c: c.prefill_seconds),
            "time_to_first_token_fraction": (out.prefill_seconds + total(lambda c: c.prefill_seconds))
            / (out.prefill_seconds + parent(lambda c: c.prefill_seconds)),
            "memory_fraction": memory / (out.weight_bytes + parent(size)),
            "memory_gib": memory / 2**30,
            "parameters": out.parameters + parameters,
            "parameters_fraction": (out.parameters + parameters) / (out.parameters + of_parent),
            "layer_parameters_fraction": parameters / of_parent,
        }.items():
            values.setdefault(field, []).append(value)
    floors = ("speedup", "min_tokens_per_second")
    return scores, {k: (np.min if k in floors else np.max)(v, axis=0) for k, v in values.items()}


def layer_options(problem: Problem, layer: int) -> list[tuple[str, str, float]]:
    known = {(s.subblock, s.variant): getattr(s, problem.metric) for s in problem.scores if s.layer == layer}
    pairs = [
        (a, f, known.get(("attention", a), 0.0) + known.get(("ffn", f), 0.0))
        for a, f in itertools.product(ATTENTIONS, FFNS)
        if (a == "parent" or ("attention", a) in known) and (f == "parent" or ("ffn", f) in known)
    ]
    return pairs + [(*name.split("+"), value) for (part, name), value in known.items() if part == "block"]


BUDGETS: dict[str, dict[str, Any]] = {
    "speedup": {"speedup": 1.4},
    "memory_fraction": {"memory_fraction": 0.6},
    "memory_gib": {"memory_gib": 0.000_15},
    "parameters": {"parameters": 35_000},
    "parameters_fraction": {"parameters_fraction": 0.6},
    "layer_parameters_fraction": {"layer_parameters_fraction": 0.55},
    "min_tokens_per_second": {"min_tokens_per_second": 400.0},
    "max_latency_seconds": {"max_latency_seconds": 0.11},
    "max_time_to_first_token_seconds": {"max_time_to_first_token_seconds": 0.04},
    "time_to_first_token_fraction": {"time_to_first_token_fraction": 0.6},
    "two": {"speedup": 1.3, "parameters_fraction": 0.7},
    "three": {"speedup": 1.3, "memory_fraction": 0.6, "layer_parameters_fraction": 0.6},
}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("coupled", [False, True])
def test_mip_equals_brute_force(name: str, coupled: bool) -> None:
    problem = random_problem(3, Budget(**BUDGETS[name]), coupled=coupled)
    best, _ = brute_force(problem)
    assert not within_budget(problem, problem.parent), "the budget does not bind"
    architecture = choose(problem)
    assert math.isfinite(best)
    assert architecture.score == pytest.approx(best, rel=1e-6)
    assert architecture.status == "optimal"
    assert architecture.bound <= architecture.score
    assert architecture.gap <= 1e-6
    assert within_budget(problem, architecture.layers)


@pytest.mark.parametrize("seed", range(6))
def test_mip_equals_brute_force_over_scenarios_and_batches(seed: int) -> None:
    scenarios = [CHAT.model_copy(update={"batch_sizes": (1, 4)}), LONG.model_copy(update={"batch_sizes": (2, 8)})]
    budget = Budget(speedup=1.3, memory_fraction=0.7)
    problem = random_problem(seed, budget, scenarios=scenarios, coupled=bool(seed % 2))
    assert choose(problem).score == pytest.approx(brute_force(problem)[0], rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_limits_of_one_scenario_and_of_the_traffic(seed: int) -> None:
    """Seven of ten requests are chats: mean latency and throughput of the mix; memory in the long scenario alone."""
    sizes = (1, 4)
    asked = ScenarioBudget(memory_fraction=0.55)
    chat = CHAT.model_copy(update={"weight": 7.0, "batch_sizes": sizes})
    long = LONG.model_copy(update={"weight": 3.0, "batch_sizes": sizes, "budget": asked})
    problem = random_problem(seed, Budget(speedup=1.6, max_latency_seconds=0.3), scenarios=(chat, long))
    best = math.inf
    for batches in itertools.product(sizes, sizes):
        one = [
            scenario.model_copy(update={"batch_sizes": (b,)}) for scenario, b in zip((chat, long), batches, strict=True)
        ]
        values = [every_architecture(replace(problem, scenarios=(s,)), (b,)) for s, b in zip(one, batches, strict=True)]
        scores = values[0][0]
        latency = [v["max_latency_seconds"] for _, v in values]
        parent = [v["speedup"] * v["max_latency_seconds"] for _, v in values]
        weights = [0.7, 0.3]
        each = [weight / batch for weight, batch in zip(weights, batches, strict=True)]
        speedup = sum(e * p for e, p in zip(each, parent, strict=True)) / sum(
            e * x for e, x in zip(each, latency, strict=True)
        )
        keeps = (speedup >= 1.6) & (0.7 * latency[0] + 0.3 * latency[1] <= 0.3)
        keeps &= values[1][1]["memory_fraction"] <= 0.55
        best = min(best, scores[keeps].min(initial=math.inf))
    assert 0 < best < math.inf
    architecture = choose(problem)
    assert architecture.score == pytest.approx(best, rel=1e-6)
    assert within_budget(problem, architecture.layers)
    without = choose(replace(problem, scenarios=(chat, long.model_copy(update={"budget": ScenarioBudget()}))))
    assert without.score <= architecture.score


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_the_program_of_the_studies_is_the_same(coupled: bool, joint: bool) -> None:
    """A slot per subblock or per layer: the optimum of brute force, under limits that totals.py keeps too."""
    scenarios = [CHAT.model_copy(update={"batch_sizes": (1, 4)}), LONG]
    problem = random_problem(4, Budget(**BUDGETS["three"]), scenarios=scenarios, coupled=coupled)
    found = []
    for grid in grids_of(problem, joint=joint):
        assert len(grid.starts) == (3 if joint else 4 if coupled else 6)
        answer = minimise(grid.program, EXACT)
        if answer is not None:
            layers = grid.choice(answer.selection)
            assert not broken_limits(problem, layers, grid.batches)
            assert score_of(problem, layers)[0] == pytest.approx(answer.objective)
            found.append(answer.objective)
    assert min(found) == pytest.approx(brute_force(problem)[0], rel=1e-6)


def test_constraints_of_the_profile_hold() -> None:
    """Widths of 64, layer 0 kept, no no-op attention, two kinds of blocks: against the plain optimum."""
    budget = Budget(layer_parameters_fraction=0.75)
    free = choose(random_problem(3, budget))
    search = EXACT.model_copy(update={"forbid": ("attention=no_op",), "keep_layers": (0,), "max_block_types": 2})
    architecture = choose(replace(random_problem(3, budget), search=search))
    assert architecture.layers[0] == LayerChoice() != free.layers[0]
    assert all(choice.attention != "no_op" for choice in architecture.layers)
    assert len({(choice.attention, choice.ffn) for choice in architecture.layers}) <= 2
    assert architecture.score > free.score
    tight = Budget(layer_parameters_fraction=0.55)
    assert any(choice.ffn == "ffn50" for choice in choose(random_problem(3, tight)).layers)
    narrow = choose(replace(random_problem(3, tight), search=EXACT.model_copy(update={"width_multiple": 64})))
    assert all(choice.ffn != "ffn50" for choice in narrow.layers)


def test_unconstrained_optimum_of_lm_loss_breaks_the_budget() -> None:
    """LM loss may fall when a block is replaced, so here the free optimum is not the parent."""
    free = random_problem(5, Budget(speedup=1.000_001, parameters_fraction=1.0), metric="lm_loss")
    bound = random_problem(5, Budget(layer_parameters_fraction=0.4), metric="lm_loss")
    optimum = choose(free)
    assert not within_budget(bound, optimum.layers)
    architecture = choose(bound)
    assert architecture.score == pytest.approx(brute_force(bound)[0], rel=1e-6)
    assert architecture.score > optimum.score


def test_coupled_pair_is_another_choice_than_the_decoupled_one() -> None:
    """The joint score counts, not the sum, and only where it is the better of the two."""
    generator = np.random.default_rng(0)
    scores = [score(i, part, "no_op", generator, 0.5) for i in range(2) for part in SUBBLOCKS]
    scores += [score(0, "block", "no_op+no_op", generator, 0.01), score(1, "block", "no_op+no_op", generator, 9.0)]
    labels = {"attention": ("parent", "no_op"), "ffn": ("parent", "no_op")}
    costs = costs_of(labels, [CHAT], 2, 0)
    least = sum(c.parameters for c in costs.costs if c.variant == "no_op") * 2 + 7_000
    problem = make_problem(scores, costs, Budget(parameters=least), [CHAT], EXACT)
    gone = LayerChoice(attention="no_op", ffn="no_op")
    architecture = choose(problem)
    assert architecture.layers == (gone.model_copy(update={"coupled": True}), gone)
    assert architecture.score == pytest.approx(scores[4].kl + scores[2].kl + scores[3].kl)


def test_equal_scores_go_to_the_larger_batch() -> None:
    scenario = CHAT.model_copy(update={"batch_sizes": (1, 2, 4)})
    problem = random_problem(1, Budget(layer_parameters_fraction=0.5), scenarios=[scenario])
    assert choose(problem).totals[0].batch_size == 4


def test_bigger_budget_is_never_worse() -> None:
    problem = random_problem(2, Budget(parameters_fraction=1.0), layers=4)
    scores = [
        choose(replace(problem, budget=Budget(parameters_fraction=fraction))).score
        for fraction in (0.48, 0.55, 0.65, 0.75, 0.85, 1.0)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[3] > scores[-1] == 0


def test_a_layer_that_was_not_searched_keeps_the_parent() -> None:
    problem = random_problem(4, Budget(speedup=1.2))
    searched = replace(problem, scores=tuple(s for s in problem.scores if s.layer != 1))
    assert choose(searched).layers[1] == LayerChoice()


def test_variant_without_cost_or_score_is_not_a_choice() -> None:
    problem = random_problem(4, Budget(layer_parameters_fraction=0.4))
    assert any(choice.ffn == "no_op" for choice in choose(problem).layers)
    kept = tuple(cost for cost in problem.costs.costs if (cost.subblock, cost.variant) != ("ffn", "no_op"))
    without_cost = replace(problem, costs=problem.costs.model_copy(update={"costs": kept}))
    without_score = replace(
        problem, scores=tuple(s for s in problem.scores if (s.subblock, s.variant) != ("ffn", "no_op"))
    )
    for changed in (without_cost, without_score):
        labels = {option.ffn for option in make_grid(changed, (1,)).options}
        assert labels == {None, "parent", "ffn50"}


def named_value(error: pytest.ExceptionInfo[InfeasibleBudget], field: str) -> float:
    found = re.search(rf"{field}: \S+ asked, at (?:most|least) (\S+) ", str(error.value))
    assert found, str(error.value)
    return float(found[1])


@pytest.mark.parametrize(
    "asked",
    [
        {"speedup": 50.0},
        {"min_tokens_per_second": 1e6},
        {"max_latency_seconds": 1e-4},
        {"memory_fraction": 0.01},
        {"memory_gib": 1e-6},
        {"parameters": 7_001},
        {"parameters_fraction": 0.01},
        {"layer_parameters_fraction": 0.01},
        {"speedup": 50.0, "layer_parameters_fraction": 0.8},
    ],
)
def test_infeasible_names_the_nearest_reachable_value(asked: dict[str, Any]) -> None:
    scenarios = [CHAT.model_copy(update={"batch_sizes": (1, 4)}), LONG]
    problem = random_problem(3, Budget(**asked), scenarios=scenarios)
    field = next(iter(asked))
    with pytest.raises(InfeasibleBudget) as error:
        choose(problem)
    value = named_value(error, field)
    assert value == pytest.approx(brute_force(problem)[1][field], rel=1e-3)
    choose(replace(problem, budget=Budget(**{**asked, field: int(value) if field == "parameters" else value})))


def test_infeasible_together_names_the_least_relaxation() -> None:
    """A fast library that is big and a small one that is slow: each limit is reachable, both are not."""
    problem = random_problem(3, Budget(layer_parameters_fraction=0.4, max_latency_seconds=0.09))
    slow = tuple(
        cost.model_copy(update={"prefill_seconds": 0.05}) if cost.variant != "parent" else cost
        for cost in problem.costs.costs
    )
    fast = replace(problem, costs=problem.costs.model_copy(update={"costs": slow}))
    scores, values = every_architecture(fast, (1,))
    small = values["layer_parameters_fraction"] <= 0.4
    latency = values["max_latency_seconds"]
    asked = float((latency.min() + latency[small].min()) / 2)
    clash = replace(fast, budget=Budget(layer_parameters_fraction=0.4, max_latency_seconds=asked))
    with pytest.raises(InfeasibleBudget, match="together, though each alone is reachable") as error:
        choose(clash)
    assert named_value(error, "max_latency_seconds") == pytest.approx(latency[small].min(), rel=1e-3)
    smallest = values["layer_parameters_fraction"][latency <= asked].min()
    assert named_value(error, "layer_parameters_fraction") == pytest.approx(smallest, rel=1e-3)


def big_problem(layers: int, choices: int, budget: Budget, search: Search) -> Problem:
    generator = np.random.default_rng(11)
    names = [f"v{i}" for i in range(choices - 1)]
    labels = {part: ("parent", *names) for part in SUBBLOCKS}
    scores = [score(i, part, name, generator) for i in range(layers) for part in SUBBLOCKS for name in names]
    return make_problem(scores, costs_of(labels, [CHAT], layers, 1), budget, [CHAT], search)


def test_mip_equals_scipy_on_a_larger_library() -> None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    problem = big_problem(12, 10, Budget(speedup=1.5, memory_fraction=0.7, layer_parameters_fraction=0.6), EXACT)
    cost = {(c.subblock, c.variant): c for c in problem.costs.costs}
    names = [("parent", *(f"v{i}" for i in range(9)))] * 24
    parts = [SUBBLOCKS[i % 2] for i in range(24)]
    known = {(s.layer, s.subblock, s.variant): s.kl for s in problem.scores}
    columns = [
        (i // 2, part, name) for i, (part, labels) in enumerate(zip(parts, names, strict=True)) for name in labels
    ]
    objective = np.array([known.get(column, 0.0) for column in columns])
    chosen = [cost[part, name] for _, part, name in columns]
    parents = 12 * np.array([1.0, 1.0])
    rows, most = [], []
    for of, outside, factor in (
        (lambda c: c.prefill_seconds + 16 * c.decode_seconds_per_token, 0.004 + 16 * 0.0005, 1 / 1.5),
        (lambda c: c.weight_bytes + 48 * c.kv_bytes_per_token, 28_000, 0.7),
        (lambda c: c.parameters, 0, 0.6),
    ):
        parent = outside + parents @ [of(cost[part, "parent"]) for part in SUBBLOCKS]
        rows.append(np.array([of(c) for c in chosen]) / parent)
        most.append(factor - outside / parent)
    slots = np.kron(np.eye(24), np.ones(10))
    oracle = milp(
        objective,
        integrality=np.ones(240),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(slots, 1, 1), LinearConstraint(np.array(rows), ub=most)],
        options={"mip_rel_gap": 1e-9},
    )
    assert choose(problem).score == pytest.approx(oracle.fun, rel=1e-6)


def test_time_limit_without_an_answer_raises() -> None:
    problem = big_problem(40, 20, Budget(speedup=1.7, layer_parameters_fraction=0.5), Search(time_limit_seconds=1e-6))
    with pytest.raises(SolverStopped, match="time_limit_seconds"):
        choose(problem)


def test_standard_error_sums_sequences_first() -> None:
    problem = random_problem(6, Budget(speedup=1.2))
    layers = (LayerChoice(attention="kv1"), LayerChoice(ffn="no_op"), LayerChoice(attention="no_op", ffn="ffn50"))
    known = {(s.layer, s.subblock, s.variant): s for s in problem.scores}
    chosen = [known[0, "attention", "kv1"], known[1, "ffn", "no_op"],
              known[2, "attention", "no_op"], known[2, "ffn", "ffn50"]]  # fmt: skip
    sums = []
    for sequence in range(SEQUENCES):
        total = 0.0
        for one in chosen:
            total += one.kl_per_sequence[sequence]
        sums.append(total)
    mean = sum(sums) / SEQUENCES
    error = math.sqrt(sum((value - mean) ** 2 for value in sums) / (SEQUENCES - 1) / SEQUENCES)
    assert score_of(problem, layers) == pytest.approx((mean, error), rel=1e-12)
    assert score_of(problem, problem.parent) == (0.0, 0.0)
    documents = tuple(sequence // 2 for sequence in range(SEQUENCES))
    told = tuple(score.model_copy(update={"documents": documents}) for score in problem.scores)
    assert score_of(replace(problem, scores=told), layers)[1] == pytest.approx(estimates.mean(sums, documents).error)


def test_totals_add_up_by_hand() -> None:
    problem = random_problem(
        7, Budget(speedup=1.2), layers=2, scenarios=[CHAT.model_copy(update={"batch_sizes": (4,)})]
    )
    cost = problem.cost_table
    layers = (LayerChoice(attention="kv1"), LayerChoice(ffn="no_op"))
    picked = [cost[part, name, "chat", 4] for part, name in
              (("attention", "kv1"), ("ffn", "parent"), ("attention", "parent"), ("ffn", "no_op"))]  # fmt: skip
    (total,) = totals_of(problem, layers, (4,))
    assert total.prefill_seconds == pytest.approx(0.016 + sum(c.prefill_seconds for c in picked))
    decode = 0.0005 + sum(c.decode_seconds_per_token for c in picked)
    assert total.runtime_seconds == pytest.approx(total.prefill_seconds + 16 * decode)
    assert total.tokens_per_second == pytest.approx(4 * 48 / total.runtime_seconds)
    kv_bytes = 4 * 48 * (picked[0].kv_bytes_per_token + picked[2].kv_bytes_per_token)
    assert total.memory_bytes == 28_000 + sum(c.weight_bytes for c in picked) + kv_bytes
    assert total.parameters == 7_000 + sum(c.parameters for c in picked)


def test_predicted_bound_is_below_every_score_and_the_parent_scores_zero() -> None:
    problem = random_problem(8, Budget(speedup=1.2), metric="lm_loss")
    architecture = predicted(problem, problem.parent, "parent")
    assert architecture.score == 0
    assert architecture.bound == pytest.approx(every_architecture(problem, (1,))[0].min())


def test_architecture_survives_json() -> None:
    architecture = choose(random_problem(9, Budget(speedup=1.2)))
    assert Architecture.model_validate_json(architecture.model_dump_json()) == architecture


def test_tables_that_do_not_fit_are_refused() -> None:
    problem = random_problem(1, Budget(speedup=1.2))
    with pytest.raises(
        InconsistentTables, match="lacks parent attention and parent ffn and non-block part at scenario long"
    ):
        make_problem(problem.scores, problem.costs, problem.budget, [CHAT, LONG])
    beyond = problem.scores[0].model_copy(update={"layer": 3})
    with pytest.raises(InconsistentTables, match=r"scores of layers \[3\]"):
        make_problem([beyond], problem.costs, problem.budget, [CHAT])
    shorter = problem.scores[0].model_copy(update={"kl_per_sequence": (0.1,)})
    with pytest.raises(InconsistentTables, match="different numbers of sequences"):
        make_problem([*problem.scores, shorter], problem.costs, problem.budget, [CHAT])
    many = CHAT.model_copy(update={"batch_sizes": tuple(range(1, 258))})
    costs = costs_of({"attention": ATTENTIONS, "ffn": FFNS}, [many], 3, 0)
    with pytest.raises(InconsistentTables, match="257 combinations"):
        make_problem(problem.scores, costs, problem.budget, [many])


def test_batch_choices_start_with_the_largest() -> None:
    scenarios = [CHAT.model_copy(update={"batch_sizes": (1, 4)}), LONG.model_copy(update={"batch_sizes": (2, 1)})]
    problem = random_problem(1, Budget(speedup=1.2), scenarios=scenarios)
    assert batch_choices(problem) == [(4, 2), (4, 1), (1, 2), (1, 1)]


def test_eighty_layers_solve_while_one_waits() -> None:
    """Not a timing: a size check with a limit far above the second or so that it takes."""
    started = time.perf_counter()
    budget = Budget(speedup=1.4, memory_fraction=0.7, layer_parameters_fraction=0.7)
    architecture = choose(big_problem(80, 7, budget, Search(gap=1e-4)))
    assert time.perf_counter() - started < 25
    assert architecture.gap <= 1e-4
