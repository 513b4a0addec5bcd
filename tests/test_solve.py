"""Every kind of limit and constraint against trying everything, on small libraries with two scenarios and batches."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from blocks.errors import InfeasibleBudget, PuzzleError
from profiles.schema import Search
from tasks.search import solve
from tasks.search.joint import JointLibrary, JointOption, LibraryFileError, MeasuredAt, at
from tasks.search.mip import Answer, SolverStopped, minimise
from tasks.search.program import Program
from tasks.search.request import Limit, Request, limit_of, limits
from tasks.search.solve import JointChoice, choose_joint, front, front_values, prices
from tests.test_choose import EXACT

LAYERS, LABELS = 4, ("parent", "half", "quarter", "gone")
PLACES = tuple(
    MeasuredAt(scenario=name, batch_size=batch, prompt_tokens=prompt, generated_tokens=generated)
    for name, prompt, generated in (("chat", 32, 16), ("long", 128, 8))
    for batch in (1, 4)
)


def random_library(seed: int = 0, layers: int = LAYERS) -> JointLibrary:
    """Costs fall with the label, never in proportion; one batch is quick for a request, the other small."""
    draw = np.random.default_rng(seed)
    options = []
    for layer, (index, label) in itertools.product(range(layers), enumerate(LABELS)):
        share = (1 - index / 3) * draw.uniform(0.8, 1.2)
        heavy = 20 * (1 - index / 3) * draw.uniform(0.5, 1.6)
        prefill = tuple(p.prompt_tokens * p.batch_size**0.6 * share * draw.uniform(0.8, 1.2) for p in PLACES)
        decode = tuple(p.generated_tokens * p.batch_size**0.3 * share * draw.uniform(0.8, 1.2) for p in PLACES)
        options.append(
            JointOption(
                layer=f"layer_{layer}",
                label=label,
                metrics={"kl": index**2 * draw.uniform(0.5, 1.5)},
                costs={
                    "memory_gib": tuple(heavy + p.batch_size * share * draw.uniform(1, 4) for p in PLACES),
                    "latency_seconds": tuple(p + d for p, d in zip(prefill, decode, strict=True)),
                    "time_to_first_token_seconds": prefill,
                    "parameters": 100 * share,
                    "layer_parameters": 100 * share,
                },
                is_parent=index == 0,
                sizes={} if label == "gone" else {"intermediate_size": (96, 48, 20)[index]},
            )
        )
    fixed: Any = {
        "memory_gib": 5.0,
        "latency_seconds": (3.0, 6.0, 4.0, 9.0),
        "time_to_first_token_seconds": (1.0, 2.0, 3.0, 4.0),
    }
    fixed |= {"parameters": 30.0}
    names = tuple(f"layer_{layer}" for layer in range(layers))
    return JointLibrary(layers=names, options=tuple(options), fixed=fixed, places=PLACES)


class Oracle:
    """Tries every architecture at every combination of batch sizes; written without tasks/search/solve.py."""

    def __init__(self, library: JointLibrary, traffic: dict[str, float]) -> None:
        by_layer = [[o for o in library.options if o.layer == layer] for layer in library.layers]
        self.library, self.traffic = library, traffic
        self.all = list(itertools.product(*by_layer))
        self.batches = list(itertools.product((0, 1), (2, 3)))

    def cost(self, chosen: Any, name: str, place: int) -> float:
        def of(value: Any) -> float:
            return float(value[place] if isinstance(value, tuple) else value)

        return of(self.library.fixed.get(name, 0.0)) + sum(of(option.costs[name]) for option in chosen)

    def values(self, chosen: Any, batches: Any, quantity: str) -> list[float]:
        """The quantity in every scenario, or once over the traffic."""
        if quantity == "score":
            return [sum(option.metrics["kl"] for option in chosen)]
        if quantity.endswith("parameters"):
            return [self.cost(chosen, quantity, 0)]
        name = "latency_seconds" if quantity == "tokens_per_second" else quantity
        cost = {PLACES[i].scenario: self.cost(chosen, name, i) for i in batches}
        place = {PLACES[i].scenario: PLACES[i] for i in batches}
        request = {n: p.prompt_tokens + p.generated_tokens for n, p in place.items()}
        if self.traffic and quantity in ("latency_seconds", "time_to_first_token_seconds"):
            return [sum(share * cost[n] for n, share in self.traffic.items())]
        if self.traffic and quantity == "tokens_per_second":
            tokens = sum(share * request[n] for n, share in self.traffic.items())
            return [tokens / sum(s * cost[n] / place[n].batch_size for n, s in self.traffic.items())]
        if quantity == "tokens_per_second":
            return [request[n] * place[n].batch_size / cost[n] for n in cost]
        return list(cost.values())

    def keeps(self, chosen: Any, batches: Any, limit: Limit) -> bool:
        values = self.values(chosen, batches, limit.quantity)
        if limit.scenario is not None:
            alone = Oracle(self.library, {})
            values = [alone.values(chosen, batches, limit.quantity)[("chat", "long").index(limit.scenario)]]
        if limit.share:
            parents = [option for option in self.library.options if option.is_parent]
            alone = self if limit.scenario is None else Oracle(self.library, {})
            of_parent = alone.values(parents, batches, limit.quantity)
            if limit.scenario is not None:
                of_parent = [of_parent[("chat", "long").index(limit.scenario)]]
            values = [value / base for value, base in zip(values, of_parent, strict=True)]
        if limit.quantity == "tokens_per_second":
            return all(value >= limit.asked - 1e-9 for value in values)
        return all(value <= limit.asked + 1e-9 for value in values)

    def best(self, request: Request, minimise: str = "score") -> float:
        found = math.inf
        for chosen in self.all:
            labels = [option.label for option in chosen]
            search = request.search
            if len(set(labels)) > (search.max_block_types or LAYERS):
                continue
            if any(name in search.forbid for name in labels) or any(labels[i] != "parent" for i in search.keep_layers):
                continue
            if any(o.sizes.get("intermediate_size", 0) % search.width_multiple and not o.is_parent for o in chosen):
                continue
            for batches in self.batches:
                if all(self.keeps(chosen, batches, limit) for limit in request.limits):
                    found = min(found, self.values(chosen, batches, minimise)[0])
        return found


ASKED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]] = {
    "memory": ({"memory_gib": 75}, {}, {}),
    "memory share": ({"memory_gib": "60%"}, {}, {}),
    "latency": ({"latency_seconds": 300}, {}, {}),
    "first token": ({"time_to_first_token_seconds": 250}, {}, {}),
    "first token share": ({"time_to_first_token_seconds": "60%"}, {}, {}),
    "throughput": ({"tokens_per_second": 0.7}, {}, {}),
    "throughput share": ({"tokens_per_second": "170%"}, {}, {}),
    "parameters": ({"parameters": 250}, {}, {}),
    "layer parameters": ({"layer_parameters": "50%"}, {}, {}),
    "one scenario": ({"latency_seconds": "long=260"}, {}, {}),
    "one scenario, share": ({"time_to_first_token_seconds": "chat=40%", "memory_gib": "80%"}, {}, {}),
    "several": ({"memory_gib": 80, "tokens_per_second": 0.6, "parameters": 330}, {}, {}),
    "latency of a mix": ({"latency_seconds": 190}, {}, {"chat": 0.7, "long": 0.3}),
    "first token of a mix": ({"time_to_first_token_seconds": "55%"}, {}, {"chat": 0.7, "long": 0.3}),
    "throughput of a mix": ({"tokens_per_second": 0.85, "memory_gib": 85}, {}, {"chat": 0.7, "long": 0.3}),
    "throughput of a mix, share": ({"tokens_per_second": "180%"}, {}, {"chat": 0.2, "long": 0.8}),
    "types": ({"parameters": 285}, {"max_block_types": 2}, {}),
    "one type": ({"parameters": 255}, {"max_block_types": 1}, {}),
    "forbidden": ({"parameters": 195}, {"forbid": ("gone",)}, {}),
    "kept layers": ({"parameters": 285}, {"keep_layers": (0, 2)}, {}),
    "widths": ({"parameters": 255}, {"width_multiple": 16}, {}),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("seed", range(2))
def test_like_trying_everything(name: str, seed: int) -> None:
    budgets, constraints, traffic = ASKED[name]
    library, search = random_library(seed), EXACT.model_copy(update=constraints)
    request = Request(limits=limits(**budgets), traffic=traffic, search=search)
    oracle = Oracle(library, traffic)
    best = oracle.best(request)
    assert 0 < best < math.inf, "the budget must bind, and must be reachable"
    (choice,) = choose_joint(library, request)
    assert choice.objective == pytest.approx(best, rel=1e-9)
    assert choice.status == "optimal" and choice.gap <= 1e-9
    if constraints:
        free = Request(limits=request.limits, search=EXACT)
        assert oracle.best(free) < best, "the constraint must bind"


@pytest.mark.parametrize(
    ("over", "minimise"),
    [
        ("memory_gib", "score"),
        ("tokens_per_second", "memory_gib"),
        ("latency_seconds", "memory_gib"),
        ("score", "latency_seconds"),
    ],
)
def test_a_front_of_any_two(over: str, minimise: str) -> None:
    """In one scenario, at one batch size: every point is the best of all, and the front falls."""
    library = random_library(1).measured_at("long", 4)
    most = 6.0 if "score" not in (over, minimise) else math.inf  # else the empty child wins on every cost
    kept = limits(score=most) if math.isfinite(most) else limits(layer_parameters=1e9)
    request = Request(limits=kept, minimise=minimise, search=EXACT)
    values = front_values(library, request, over, 6)
    found = front(library, request, over, values)

    def summed(chosen: Any, cost: str) -> float:
        return sum(at(option.costs[cost], 0) for option in chosen)

    everything = Oracle(library, {}).all
    totals = [(chosen, summed(chosen, "memory_gib"), summed(chosen, "latency_seconds")) for chosen in everything]
    place, fixed = library.places[0], library.fixed
    objectives = []
    for value, choice in zip(values, found, strict=True):
        assert choice is not None
        fitting = []
        for chosen, memory, runtime in totals:
            figures = {
                "score": sum(option.metrics["kl"] for option in chosen),
                "memory_gib": memory + 5.0,
                "latency_seconds": runtime + at(fixed["latency_seconds"], 0),
                "tokens_per_second": place.tokens / (runtime + at(fixed["latency_seconds"], 0)),
            }
            floor = over == "tokens_per_second"
            if figures["score"] > most:
                continue
            if figures[over] >= value - 1e-9 if floor else figures[over] <= value + 1e-9:
                fitting.append(figures[minimise])
        assert choice.objective == pytest.approx(min(fitting), rel=1e-9)
        objectives.append(choice.objective)
    assert objectives == sorted(objectives, reverse=over != "tokens_per_second") and len(set(objectives)) > 1


def test_the_batch_size_is_chosen() -> None:
    """Throughput wants the large batch, memory the small one: both are found by their limits, and shown."""
    library = random_library(0).measured_at("chat", None)

    def batch(**budgets: Any) -> int:
        return choose_joint(library, Request(limits=limits(**budgets)))[0].scenarios[0].batch_size

    parents = [option for option in library.options if option.is_parent]
    memory = [5 + sum(at(option.costs["memory_gib"], i) for option in parents) for i in (0, 1)]
    assert memory[0] < memory[1]
    assert batch(memory_gib=(memory[0] + memory[1]) / 2) == 1
    assert batch(memory_gib=memory[1] + 1) == 4
    assert batch(tokens_per_second=1) == 4


def test_prices_of_a_floor_and_a_ceiling() -> None:
    """More memory buys score, more throughput costs it; solved again at both sides."""
    library = random_library(3).measured_at("long", 1)
    request = Request(limits=limits(memory_gib=70, tokens_per_second="150%"), search=EXACT)
    memory, speed = prices(library, request, choose_joint(library, request)[0])
    best = choose_joint(library, request)[0].objective
    assert memory.per_unit <= 0 <= speed.per_unit and memory.per_unit + speed.per_unit != 0
    assert memory.resolved["-5%"] is None or memory.resolved["-5%"] >= best >= (memory.resolved["+5%"] or 0)
    assert speed.share and speed.resolved["+5%"] is None or (speed.resolved["+5%"] or 9) >= best
    for price, limit in zip((memory, speed), request.limits, strict=True):
        assert price.used <= limit.asked if limit is request.limits[0] else price.used >= limit.asked
        moved = request.model_copy(
            update={"limits": tuple(x.scaled(0.95) if x is limit else x for x in request.limits)}
        )
        if price.resolved["-5%"] is not None:
            assert choose_joint(library, moved)[0].objective == pytest.approx(price.resolved["-5%"])


def test_the_conflict_names_those_that_clash_and_no_others() -> None:
    """Small variants are slow: memory against latency; the parameters have nothing to do with it."""
    library = random_library(0).measured_at("chat", 1)
    slow = [
        replace(option, costs={**option.costs, "latency_seconds": (200 - 2 * at(option.costs["memory_gib"], 0),)})
        for option in library.options
    ]
    library = replace(library, options=tuple(slow), places=library.places)
    request = Request(limits=limits(memory_gib=45, latency_seconds=680, parameters=1e6))
    with pytest.raises(InfeasibleBudget, match="keeps memory_gib and latency_seconds together") as error:
        choose_joint(library, request)
    for name, asked in (("memory_gib", 45.0), ("latency_seconds", 680.0)):
        named = float(str(error.value).partition(f"{name}: ")[2].partition("at least ")[2].split()[0])
        assert named > asked
        eased = {"memory_gib": 45.0, "latency_seconds": 680.0, name: named}
        assert isinstance(choose_joint(library, Request(limits=limits(**eased)))[0], JointChoice)
        with pytest.raises(InfeasibleBudget):
            choose_joint(library, Request(limits=limits(**{**eased, name: named * 0.999})))


def test_a_floor_out_of_reach_names_the_most() -> None:
    library = random_library(0)
    with pytest.raises(InfeasibleBudget) as error:
        choose_joint(library, Request(limits=limits(tokens_per_second="99000%")))
    named = float(str(error.value).partition("at most ")[2].split("%")[0])
    choose_joint(library, Request(limits=limits(tokens_per_second=f"{named}%")))
    with pytest.raises(InfeasibleBudget):
        choose_joint(library, Request(limits=limits(tokens_per_second=f"{named * 1.001}%")))


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (Request(), "a budget is needed"),
        (Request(limits=limits(latency_seconds="short=5")), "no scenario 'short'; it has chat, long"),
        (Request(limits=limits(parameters="chat=5")), "is the same in every scenario"),
        (Request(limits=limits(parameters=5), traffic={"short": 1}), "no scenario 'short'"),
        (Request(limits=limits(parameters=5), minimise="latency_seconds"), "differs between the scenarios chat, long"),
        (Request(limits=limits(parameters=5), search=Search(keep_layers=(9,))), "no layer 9 to keep"),
    ],
)
def test_what_cannot_be_asked(request_: Request, told: str) -> None:
    with pytest.raises(LibraryFileError, match=told):
        choose_joint(random_library(), request_)


@pytest.mark.parametrize("text", ["x", "chat=", "-1", "0", "nan", "inf%", "chat=x%"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(PuzzleError, match="--memory-gib: a "):
        limit_of("memory_gib", text)


def test_a_limit_as_it_is_written() -> None:
    assert limit_of("latency_seconds", "chat=75%") == Limit(
        quantity="latency_seconds", asked=0.75, share=True, scenario="chat", name="latency_seconds of chat"
    )
    with pytest.raises(ValueError, match="memory_gib is limited twice"):
        Request(limits=limits(memory_gib=3) * 2)


def several_batches() -> tuple[JointLibrary, Request]:
    """Three batch sizes; the larger, the less time a request takes and the more memory."""
    places = tuple(MeasuredAt(batch_size=size, prompt_tokens=8, generated_tokens=8) for size in (1, 2, 4))
    generator = np.random.default_rng(0)
    options = []
    for layer in range(6):
        for share in (1.0, 0.7, 0.3):
            runtime = tuple(share * time * generator.uniform(0.9, 1.1) for time in (1.0, 1.5, 2.5))
            options.append(
                JointOption(
                    layer=f"layer_{layer}",
                    label=f"{share}",
                    metrics={"kl": (1 - share) * generator.uniform(0.5, 1.5)},
                    costs={"latency_seconds": runtime, "memory_gib": tuple(share * m for m in (1.0, 2.0, 4.0))},
                )
            )
    library = JointLibrary(layers=tuple(f"layer_{i}" for i in range(6)), options=tuple(options), places=places)
    return library, Request(limits=limits(tokens_per_second=4.5, memory_gib=9))


def test_a_batch_size_that_cannot_win_is_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The LP's bound rules it out; the answer and its bound are those of all batch sizes."""
    library, request = several_batches()
    alone = []
    for size in (1, 2, 4):
        try:
            alone.append(choose_joint(library.measured_at(None, size), request)[0].objective)
        except InfeasibleBudget:
            alone.append(math.inf)
    solved: list[Program] = []

    def counted(program: Program, search: Search) -> Answer | None:
        solved.append(program)
        return minimise(program, search)

    monkeypatch.setattr(solve, "minimise", counted)
    (choice,) = choose_joint(library, request)
    assert sum(math.isfinite(one) for one in alone) >= 2, "several batch sizes must have an answer"
    assert choice.objective == pytest.approx(min(alone)) and choice.bound <= min(alone) + 1e-9
    assert 1 <= len(solved) < 3
    assert choice.status == "optimal" and choice.gap <= 1e-6 and choice.solved_by.startswith("cvxpy/highs")


def test_optimal_is_said_of_all_batch_sizes_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A combination that was stopped with a low bound: the other's answer is no proven optimum."""
    library, request = several_batches()
    stopped: list[Program] = []

    def some_stop(program: Program, search: Search) -> Answer | None:
        answer = minimise(program, search)
        if answer is None or stopped:
            return answer
        stopped.append(program)
        return replace(answer, bound=0.5 * answer.objective, status="time_limit")

    monkeypatch.setattr(solve, "minimise", some_stop)
    (choice,) = choose_joint(library, request)
    assert stopped and choice.status == "time_limit" and choice.gap > 0.1


def test_a_batch_size_without_an_answer_in_time_spoils_only_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    library, request = several_batches()

    def stopped_once(program: Program, search: Search) -> Answer | None:
        calls.append(program)
        if len(calls) == 1:
            raise SolverStopped("no time")
        return minimise(program, search)

    calls: list[Program] = []
    monkeypatch.setattr(solve, "minimise", stopped_once)
    (choice,) = choose_joint(library, request)
    assert len(calls) > 1 and choice.status == "time_limit" and choice.bound < choice.objective
    calls.clear()
    with pytest.raises(SolverStopped):
        choose_joint(library.measured_at(None, choice.scenarios[0].batch_size), request)


def test_equal_answers_go_to_the_larger_batch_though_its_bound_is_worse() -> None:
    """Batch 1 has the lower LP bound and is solved first; at batch 4 the same architecture fits."""
    options = [
        JointOption(
            layer=f"layer_{layer}",
            label=label,
            metrics={"kl": score},
            costs={"memory_gib": memory},
        )
        for layer in range(2)
        for label, score, memory in (("parent", 0.0, (2.0, 2.1)), ("half", 1.0, (1.0, 1.0)))
    ]
    places = (MeasuredAt(batch_size=1), MeasuredAt(batch_size=4))
    library = JointLibrary(layers=("layer_0", "layer_1"), options=tuple(options), places=places)
    (choice,) = choose_joint(library, Request(limits=limits(memory_gib=3.5)))
    assert choice.objective == 1.0 and choice.scenarios[0].batch_size == 4
