"""What an architecture costs and scores: the sums of the MIP (Puzzle, appendix B), written once without a solver.

    runtime = prefill + generated tokens x decode per token            seconds for one batch
    memory  = weights + batch x (KV bytes per token x tokens kept + state); kept: of prompt + generated, what a window
              leaves; state: what a recurrent attention keeps of any text
    score   = sum of replace-1-block scores

The non-block part (embedding, final norm, head) stands in every total. The limits of a budget are derived from the
parent's totals *at the same scenario and batch size*. tasks/search/view.py hands the same limits to the solver; here
they are written a second time, as the check of its answers and for the searches that do without it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from blocks.estimates import mean
from blocks.records import (
    SUBBLOCKS,
    Architecture,
    Cost,
    CostTable,
    LayerChoice,
    NonBlockCost,
    Score,
    Subblock,
    Totals,
)
from blocks.typed_labels import type_in
from profiles.schema import Budget, Profile, Scenario, ScenarioBudget, Search
from tasks.search.capabilities import NONE, Capabilities, InconsistentTables, weighed

ScoreMetric = Literal["kl", "lm_loss"]
Quantity = Literal["runtime", "prefill", "memory", "parameters", "layer_parameters"]
Batches = tuple[int, ...]
Weights = tuple[float, ...]

MAX_BATCH_CHOICES = 256
TOLERANCE = 1e-6  # relative: what a sum of measured floats may differ by before a limit counts as broken


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything the search needs: scores and costs of one library, the budget, the scenarios, the solver's limits.

    reference: the problem whose parent the budget's shares are taken of, where it is not this one's. within_score: the
    highest summed score of what `choose` may take; other searches show what they reach without it. capabilities: what
    the scores are weighed by already, and the highest KL that `choose` may take on each; other searches know no such
    limit.
    """

    scores: tuple[Score, ...]
    costs: CostTable
    budget: Budget
    scenarios: tuple[Scenario, ...]
    search: Search = Search()
    metric: ScoreMetric = "kl"
    reference: "Problem | None" = None
    within_score: float | None = None
    capabilities: Capabilities = NONE

    @cached_property
    def cost_table(self) -> dict[tuple[str, str, str, int], Cost]:
        """Costs by (subblock, variant, scenario, batch size)."""
        return {(cost.subblock, cost.variant, cost.scenario, cost.batch_size): cost for cost in self.costs.costs}

    @cached_property
    def non_block_table(self) -> dict[tuple[str, int], NonBlockCost]:
        """Costs of the non-block part in the profile's precision, by (scenario, batch size)."""
        return {(cost.scenario, cost.batch_size): cost for cost in self.costs.non_block if not cost.head}

    @cached_property
    def head_table(self) -> dict[tuple[str, str, int], NonBlockCost]:
        """Costs of the non-block part by (type of the head, scenario, batch size)."""
        return {(cost.head, cost.scenario, cost.batch_size): cost for cost in self.costs.non_block}

    @cached_property
    def heads(self) -> dict[str, Score | None]:
        """Types that embedding and head may have, with their scores; "" is the profile's precision, and scores 0."""
        scored = self.score_table.get((0, "head"), {})
        return {"": None, **{type_in(label): score for label, score in scored.items()}}

    @cached_property
    def score_table(self) -> dict[tuple[int, str], dict[str, Score]]:
        """Scores by (layer, subblock or "block"), then variant."""
        table: dict[tuple[int, str], dict[str, Score]] = {}
        for score in self.scores:
            table.setdefault((score.layer, score.subblock), {})[score.variant] = score
        return table

    @cached_property
    def sequences(self) -> int:
        """How many sequences every score covers."""
        return max((len(score.kl_per_sequence) for score in self.scores), default=0)

    @cached_property
    def documents(self) -> tuple[int, ...]:
        """The document of each scored sequence, the same sequences for every score; empty where they are not known."""
        return next((score.documents for score in self.scores if score.documents), ())

    @property
    def traffic(self) -> tuple[float, ...]:
        """(S,) shares of the requests, where scenarios have weights; else nothing."""
        weights = [scenario.weight or 0.0 for scenario in self.scenarios]
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights) if total else ()

    @property
    def parent(self) -> tuple[LayerChoice, ...]:
        """The parent as a choice: its own subblocks in every layer."""
        return (LayerChoice(),) * self.costs.num_hidden_layers


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """One row of the budget: a quantity, summed over the scenarios with `weights` (S,), that may not pass `most`."""

    field: str
    quantity: Quantity
    weights: tuple[float, ...]
    most: float


def make_problem(
    scores: Iterable[Score],
    costs: CostTable,
    budget: Budget,
    scenarios: Iterable[Scenario],
    search: Search | None = None,
    metric: ScoreMetric = "kl",
    capabilities: Capabilities = NONE,
) -> Problem:
    """Gather and check the inputs of the search, and weigh the scores on capabilities.

    Raises InconsistentTables when the parent or the non-block part lacks a cost, when scores name layers the parent
    does not have or cover different numbers of sequences, or when there are too many combinations of batch sizes.
    """
    problem = Problem(
        scores=weighed(scores, capabilities),
        costs=costs,
        budget=budget,
        scenarios=tuple(scenarios),
        search=search or Search(),
        metric=metric,
        capabilities=capabilities,
    )
    _check_scores(problem)
    _check_parent_costs(problem)
    combinations = math.prod(len(set(scenario.batch_sizes)) for scenario in problem.scenarios)
    if combinations > MAX_BATCH_CHOICES:
        raise InconsistentTables(
            f"the scenarios have {combinations} combinations of batch sizes, at most {MAX_BATCH_CHOICES} are searched: "
            "name fewer batch_sizes per scenario."
        )
    return problem


def problem_of(profile: Profile, scores: Iterable[Score], costs: CostTable) -> Problem:
    """The search problem of a profile; raises as `make_problem`."""
    asked = (profile.budget, profile.scenarios, profile.search, profile.scoring.metric)
    kept = Capabilities(weights=profile.capability_weights, most=profile.capability_limits)
    return make_problem(scores, costs, *asked, capabilities=kept)


def as_asked(problem: Problem, profile: Profile) -> Problem:
    """A problem with the limits of the profile, whatever the search was asked for instead."""
    kept = replace(problem.capabilities, most=profile.capability_limits)
    return replace(problem, budget=profile.budget, scenarios=profile.scenarios, capabilities=kept)


def at_speed_of(problem: Problem, asked: Problem) -> Problem:
    """What was asked, at the tokens a second of the fastest child within a score."""
    found = {"min_tokens_per_second": problem.budget.min_tokens_per_second, "speedup": None}
    return replace(asked, budget=asked.budget.model_copy(update=found))


def _check_scores(problem: Problem) -> None:
    layers = problem.costs.num_hidden_layers
    beyond = sorted({score.layer for score in problem.scores if not 0 <= score.layer < layers})
    if beyond:
        raise InconsistentTables(f"there are scores of layers {beyond}, but the costs are of a parent with {layers}.")
    lengths = sorted({len(getattr(score, f"{problem.metric}_per_sequence")) for score in problem.scores})
    if len(lengths) > 1:
        raise InconsistentTables(f"scores cover different numbers of sequences ({lengths}): score the library again.")


def _check_parent_costs(problem: Problem) -> None:
    for scenario in problem.scenarios:
        for batch_size in scenario.batch_sizes:
            place = (scenario.name, batch_size)
            missing = [f"parent {part}" for part in SUBBLOCKS if (part, "parent", *place) not in problem.cost_table]
            missing += ["non-block part"] if place not in problem.non_block_table else []
            if missing:
                raise InconsistentTables(
                    f"the cost table lacks {' and '.join(missing)} at scenario {scenario.name}, batch size "
                    f"{batch_size}: measure the costs of this profile again."
                )


def batch_choices(problem: Problem) -> list[Batches]:
    """All combinations of one batch size per scenario, larger ones first."""
    sizes = [sorted(set(scenario.batch_sizes)) for scenario in problem.scenarios]
    return sorted(itertools.product(*sizes), key=lambda batches: (sum(batches), batches), reverse=True)


def totals_of(problem: Problem, layers: Sequence[LayerChoice], batches: Batches, head: str = "") -> tuple[Totals, ...]:
    """Predicted totals, one per scenario at its batch size. head: the type of number of embedding and head.

    Raises InconsistentTables when a variant was not measured there.
    """
    return tuple(
        _totals(problem, layers, scenario, batch_size, head)
        for scenario, batch_size in zip(problem.scenarios, batches, strict=True)
    )


def parent_totals(problem: Problem, batches: Batches) -> tuple[Totals, ...]:
    """Totals of the parent that the budget's shares are taken of."""
    whose = problem.reference or problem
    return totals_of(whose, whose.parent, batches)


def _totals(problem: Problem, layers: Sequence[LayerChoice], scenario: Scenario, batch_size: int, head: str) -> Totals:
    blocks = [cost_of(problem, part, label, scenario, batch_size) for part, label in _subblocks(layers)]
    outside = problem.head_table.get((head, scenario.name, batch_size))
    if outside is None:
        raise InconsistentTables(
            f"embedding and head have no cost in {head} at scenario {scenario.name}: measure them, or choose another."
        )
    parts: list[Cost | NonBlockCost] = [outside, *blocks]
    prefill = math.fsum(cost.prefill_seconds for cost in parts)
    decode = math.fsum(cost.decode_seconds_per_token for cost in parts)
    runtime = prefill + scenario.generated_tokens * decode
    tokens = batch_size * (scenario.prompt_tokens + scenario.generated_tokens)
    pairs = zip((layer for layer in range(len(layers)) for _ in SUBBLOCKS), blocks, strict=True)
    memory = outside.weight_bytes + sum(bytes_of(problem, layer, cost, scenario) for layer, cost in pairs)
    return Totals(
        scenario=scenario.name,
        batch_size=batch_size,
        prefill_seconds=prefill,
        decode_seconds_per_token=decode,
        runtime_seconds=runtime,
        tokens_per_second=tokens / max(runtime, 1e-9),  # no-ops alone may take no time; infinity is no JSON
        memory_bytes=memory,
        parameters=sum(cost.parameters for cost in parts),
    )


def _subblocks(layers: Iterable[LayerChoice]) -> list[tuple[Subblock, str]]:
    return [(part, getattr(choice, part)) for choice in layers for part in SUBBLOCKS]


def bytes_of(problem: Problem, layer: int, cost: Cost, scenario: Scenario) -> int:
    """Bytes of a variant in a layer when a scenario's sequences end: its weights, and its KV cache."""
    tokens = scenario.prompt_tokens + scenario.generated_tokens
    return cost.weight_bytes + problem.costs.kv_bytes(layer, cost, tokens)


def cost_of(problem: Problem, subblock: Subblock, variant: str, scenario: Scenario, batch_size: int) -> Cost:
    """The measured cost of a variant; InconsistentTables when there is none."""
    cost = problem.cost_table.get((subblock, variant, scenario.name, batch_size))
    if cost is None:
        raise InconsistentTables(
            f"{subblock} variant {variant} has no cost at scenario {scenario.name}, batch size {batch_size}: "
            "measure it, or choose another."
        )
    return cost


def budget_rows(problem: Problem, batches: Batches) -> tuple[BudgetRow, ...]:
    """The rows of the budget: runtime and memory once per scenario or once over the traffic, parameters once."""
    totals = parent_totals(problem, batches)
    alone = [tuple(float(i == index) for i in range(len(totals))) for index in range(len(totals))]
    budget, first = problem.budget, alone[0]
    rows = [row for weights in alone for row in _memory_limits(problem, budget, totals, weights)]
    for weights in [problem.traffic] if problem.traffic else alone:
        rows += _time_limits(problem, budget, totals, weights)
    for weights, scenario in zip(alone, problem.scenarios, strict=True):
        rows += _memory_limits(problem, scenario.budget, totals, weights, f" of {scenario.name}")
        rows += _time_limits(problem, scenario.budget, totals, weights, f" of {scenario.name}")
    outside = problem.non_block_table[totals[0].scenario, totals[0].batch_size].parameters
    everything = totals[0].parameters
    rows += _ceiling("parameters", "parameters", first, budget.parameters, 1)
    rows += _ceiling("parameters_fraction", "parameters", first, budget.parameters_fraction, everything)
    share = budget.layer_parameters_fraction
    rows += _ceiling("layer_parameters_fraction", "layer_parameters", first, share, everything - outside)
    return tuple(rows)


def _memory_limits(
    problem: Problem, budget: ScenarioBudget, totals: Sequence[Totals], weights: Weights, of: str = ""
) -> list[BudgetRow]:
    parent = _weighed(problem, totals, "memory", weights)
    return [
        *_ceiling(f"memory_fraction{of}", "memory", weights, budget.memory_fraction, parent),
        *_ceiling(f"memory_gib{of}", "memory", weights, budget.memory_gib, 2**30),
    ]


def _time_limits(
    problem: Problem, budget: ScenarioBudget, totals: Sequence[Totals], weights: Weights, of: str = ""
) -> list[BudgetRow]:
    """Latency counts a batch of each scenario by its weight, throughput the share of it that one request takes."""
    each = tuple(weight / total.batch_size for weight, total in zip(weights, totals, strict=True))
    tokens = sum(
        weight * (scenario.prompt_tokens + scenario.generated_tokens)
        for weight, scenario in zip(weights, problem.scenarios, strict=True)
    )
    runtime = _weighed(problem, totals, "runtime", each)
    prefill = _weighed(problem, totals, "prefill", weights)
    wait, share = budget.max_time_to_first_token_seconds, budget.time_to_first_token_fraction
    return [
        *_floor(f"speedup{of}", each, budget.speedup, runtime),
        *_floor(f"min_tokens_per_second{of}", each, budget.min_tokens_per_second, tokens),
        *_ceiling(f"max_latency_seconds{of}", "runtime", weights, budget.max_latency_seconds, 1),
        *_ceiling(f"max_time_to_first_token_seconds{of}", "prefill", weights, wait, 1),
        *_ceiling(f"time_to_first_token_fraction{of}", "prefill", weights, share, prefill),
    ]


def _ceiling(
    field: str, quantity: Quantity, weights: Weights, asked: float | None, reference: float
) -> list[BudgetRow]:
    return [] if asked is None else [BudgetRow(field=field, quantity=quantity, weights=weights, most=asked * reference)]


def _floor(field: str, weights: Weights, asked: float | None, reference: float) -> list[BudgetRow]:
    return (
        [] if asked is None else [BudgetRow(field=field, quantity="runtime", weights=weights, most=reference / asked)]
    )


def broken_limits(
    problem: Problem, layers: Sequence[LayerChoice], batches: Batches, head: str = ""
) -> tuple[BudgetRow, ...]:
    """The rows of the budget that a choice passes by more than the tolerance, summed layer by layer in float64."""
    totals = totals_of(problem, layers, batches, head)
    return tuple(limit for limit in budget_rows(problem, batches) if used_of(problem, totals, limit) > 1 + TOLERANCE)


def used_of(problem: Problem, totals: Sequence[Totals], row: BudgetRow) -> float:
    """What an architecture takes of a row's `most`, as a share: above 1 breaks the budget. Floors on speed are
    rows too: a `most` of run time.
    """
    return _weighed(problem, totals, row.quantity, row.weights) / row.most


def _weighed(problem: Problem, totals: Sequence[Totals], quantity: Quantity, weights: Weights) -> float:
    return math.fsum(
        weight * _value(problem, total, quantity) for weight, total in zip(weights, totals, strict=True) if weight
    )


def _value(problem: Problem, totals: Totals, quantity: Quantity) -> float:
    if quantity == "runtime":
        return totals.runtime_seconds
    if quantity == "prefill":
        return totals.prefill_seconds
    if quantity == "memory":
        return totals.memory_bytes
    outside = problem.non_block_table[totals.scenario, totals.batch_size].parameters
    return totals.parameters - (outside if quantity == "layer_parameters" else 0)


def fitting_batches(problem: Problem, layers: Sequence[LayerChoice], head: str = "") -> Batches | None:
    """The largest combination of batch sizes at which a choice keeps the whole budget, None when there is none."""
    fitting = (batches for batches in batch_choices(problem) if not broken_limits(problem, layers, batches, head))
    return next(fitting, None)


def within_budget(problem: Problem, layers: Sequence[LayerChoice]) -> bool:
    """True when a choice keeps the whole budget at some combination of the profile's batch sizes."""
    return fitting_batches(problem, layers) is not None


def score_of(problem: Problem, layers: Sequence[LayerChoice], head: str = "") -> tuple[float, float]:
    """Predicted score of a choice and its standard error, nats per token.

    All scores are means over the same sequences, so their errors are correlated: the error is that of the mean of the
    per-sequence sums over their documents, not the root of the sum of squares. It is 0 where fewer than two sequences
    were kept.
    """
    chosen = _scores_of(problem, layers, head)
    value = math.fsum(getattr(score, problem.metric) for score in chosen)
    summed = np.sum([getattr(score, f"{problem.metric}_per_sequence") for score in chosen], axis=0, dtype=np.float64)
    if np.size(summed) < 2:
        return value, 0.0
    return value, mean(summed, problem.documents).error


def kl_on(problem: Problem, layers: Sequence[LayerChoice], capability: str, head: str = "") -> float:
    """Predicted KL of a choice on a capability, in nats per token; `general` is the corpus."""
    chosen = _scores_of(problem, layers, head)
    return math.fsum(one.kl for score in chosen for one in score.capabilities if one.name == capability)


def broken_kl(problem: Problem, layers: Sequence[LayerChoice], head: str = "") -> list[str]:
    """The capabilities on which the predicted KL of a choice is above the highest that is asked."""
    most = problem.capabilities.most
    return [name for name, asked in most.items() if kl_on(problem, layers, name, head) > asked * (1 + TOLERANCE)]


def _scores_of(problem: Problem, layers: Sequence[LayerChoice], head: str) -> list[Score]:
    """The scores of all that is chosen. head: the type of number of embedding and head."""
    if head not in problem.heads:
        raise InconsistentTables(f"the head has no score in {head}: choose another.")
    chosen = [score for layer, choice in enumerate(layers) for score in scores_behind(problem, layer, choice)]
    return chosen + ([score] if (score := problem.heads[head]) else [])


def scores_behind(problem: Problem, layer: int, choice: LayerChoice) -> list[Score]:
    """The scores of one layer's choice, out of the table.

    A subblock of the parent needs no score in the table. If it has none there, it counts as 0 and is left out here.
    """
    wanted: list[tuple[str, str]] = [*_subblocks([choice])]
    if choice.coupled:
        wanted = [("block", choice.block_label)]
    found = []
    for part, label in wanted:
        score = problem.score_table.get((layer, part), {}).get(label)
        if score is not None:
            found.append(score)
        elif label != "parent":
            raise InconsistentTables(f"layer {layer} has no score of {part} variant {label}: choose another.")
    return found


def predicted(
    problem: Problem, layers: Sequence[LayerChoice], method: str, batches: Batches | None = None, head: str = ""
) -> Architecture:
    """The architecture of a given choice, at `batches` or else at the largest batch sizes at which it fits.

    No solver stands behind it: status is "heuristic" and `bound` is the sum of the lowest scores of every layer, which
    no choice can pass.
    """
    at = batches or fitting_batches(problem, layers, head) or batch_choices(problem)[0]
    score, error = score_of(problem, layers, head)
    bound = math.fsum(_lowest(problem, layer) for layer in range(problem.costs.num_hidden_layers))
    bound += min(getattr(found, problem.metric) if found else 0.0 for found in problem.heads.values())
    return Architecture(
        method=method,
        layers=tuple(layers),
        score=score,
        score_se=error,
        head=head,
        totals=totals_of(problem, layers, at, head),
        parent_totals=parent_totals(problem, at),
        status="heuristic",
        bound=min(bound, score),
        gap=gap_between(score, bound),
    )


def _lowest(problem: Problem, layer: int) -> float:
    lowest = {part: 0.0 for part in (*SUBBLOCKS, "block")}
    for part in lowest:
        scores = problem.score_table.get((layer, part), {})
        lowest[part] = min([0.0, *(getattr(score, problem.metric) for score in scores.values())])
    return min(lowest["attention"] + lowest["ffn"], lowest["block"])


def gap_between(score: float, bound: float) -> float:
    """Relative distance of a score from a lower bound; 0 when they meet."""
    distance = score - bound
    return distance / max(abs(score), 1e-9) if distance > 0 else 0.0
