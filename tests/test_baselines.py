"""Baselines keep the budget, never beat the MIP, and are what their names say."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from blocks.compute import HOST
from blocks.errors import InfeasibleBudget
from blocks.library import read_tensors
from blocks.records import LayerChoice
from flows import stages
from profiles.load import load_profile
from profiles.schema import BaselineName, Budget
from tasks.distill.bld import distill
from tasks.search.choose import choose
from tasks.search.request import allowed
from tasks.search.solve import choose_joint
from tasks.search.totals import Problem, predicted, within_budget
from tasks.search.view import library_of, request_of
from tasks.studies.peers import JUDGED, find
from tests.chain import Chain, chosen, recording
from tests.test_choose import ATTENTIONS, CHAT, FFNS, random_problem, score

NAMES: tuple[BaselineName, ...] = get_args(BaselineName)
GONE = LayerChoice(attention="no_op", ffn="no_op")
BUDGETS = ({"speedup": 1.4}, {"layer_parameters_fraction": 0.6}, {"speedup": 1.2, "memory_fraction": 0.75})


@pytest.mark.parametrize("name", [name for name in NAMES if name != "minitron"])  # its widths alone reach less
@pytest.mark.parametrize(("budget", "coupled"), zip(BUDGETS, (False, True, False), strict=True))
def test_baseline_fits_and_is_never_better_than_the_mip(name: BaselineName, budget: Any, coupled: bool) -> None:
    scenario = CHAT.model_copy(update={"batch_sizes": (1, 4)})
    problem = random_problem(3, Budget(**budget), layers=5, scenarios=[scenario], coupled=coupled)
    assert not within_budget(problem, problem.parent), "the budget does not bind"
    architecture = find(name, problem, seed=1, evaluations=500)
    assert architecture.method == name
    assert within_budget(problem, architecture.layers)
    assert architecture.score >= choose(problem).score * (1 - 1e-9)
    assert architecture.bound <= architecture.score


@pytest.mark.parametrize("name", NAMES)
def test_impossible_budget_is_refused_by_name(name: BaselineName) -> None:
    with pytest.raises(InfeasibleBudget, match=f"The {name} baseline"):
        find(name, random_problem(3, Budget(layer_parameters_fraction=0.05)), evaluations=500)


def test_minitron_is_the_widest_ffn_that_fits_beside_the_parents_attention() -> None:
    problem = random_problem(4, Budget(layer_parameters_fraction=0.95), layers=4)
    found = find("minitron", problem)
    assert found.layers == (LayerChoice(ffn="ffn50"),) * 4 and within_budget(problem, found.layers)
    assert find("uniform", problem).score <= found.score
    with pytest.raises(InfeasibleBudget, match="The minitron baseline"):
        find("minitron", random_problem(4, Budget(layer_parameters_fraction=0.6), layers=4))
    coupled = random_problem(4, Budget(layer_parameters_fraction=0.95), layers=4, coupled=True)
    cheap = [score(layer, "block", "parent+ffn50", np.random.default_rng(0), 1e-6) for layer in range(4)]
    assert find("minitron", replace(coupled, scores=coupled.scores + tuple(cheap))).layers == found.layers
    assert "minitron" not in JUDGED and set(JUDGED) < set(NAMES) | {"mip"}


def test_minitrons_blocks_are_the_parents_most_active_channels(chain: Chain) -> None:
    """Copies: nothing is fitted or trained. They hurt more than the library's blocks of the same width."""
    profile = load_profile(
        "tiny",
        [
            "search_space={attention: [kv1], ffn: [ffn32, no_op]}",
            "bld={batch_sequences: 4, otherwise: [{variants: [ffn32], steps: 5}]}",
        ],
    )
    rival = chosen((LayerChoice(ffn="ffn32"),) * 3)
    jobs: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "recording", lambda *_: recording(chain.parent, chain.corpus))
        patch.setattr(stages, "_distill", lambda run, asked, name: jobs.extend(asked))
        run: Any = SimpleNamespace(profile=profile, workspace=chain.workspace)
        source = (chain.parent, chain.corpus, chain.records)
        assert stages.cut(run, *source, {"uniform": rival}) == [] and not jobs
        stages.cut(run, *source, {"minitron": rival})
    assert [(job.layer, job.variant) for job in jobs] == [(layer, "ffn32") for layer in range(3)]
    block = distill(jobs[1], chain.workspace, HOST)
    assert block.weights is not None and block.steps == 0
    own = read_tensors(chain.workspace, block.weights)
    mlp, kept = chain.reader.model().model.layers[1].mlp, chain.records[1].statistics
    active = read_tensors(chain.workspace, kept)["ffn_contribution"].topk(32).indices.sort().values
    (name,) = [name for name in own if name.endswith("mlp.down_proj.weight")]
    assert torch.equal(own[name], mlp.down_proj.weight.detach()[:, active])
    assert torch.equal(own[name.replace("down", "up")], mlp.up_proj.weight.detach()[active])
    trained = next(one for one in chain.blocks if (one.layer, one.variant) == (1, "ffn32"))
    assert block.key != trained.key and (block.nmse_after or 1) > (trained.nmse_after or 0)


def summed(problem: Problem, layer: int, choice: LayerChoice) -> float:
    known = {(s.layer, s.subblock, s.variant): s.kl for s in problem.scores}
    return known.get((layer, "attention", choice.attention), 0.0) + known.get((layer, "ffn", choice.ffn), 0.0)


def test_uniform_is_the_best_single_pair() -> None:
    problem = random_problem(4, Budget(layer_parameters_fraction=0.6), layers=4)
    pairs = [LayerChoice(attention=a, ffn=f) for a, f in itertools.product(ATTENTIONS, FFNS)]
    fitting = [pair for pair in pairs if within_budget(problem, [pair] * 4)]
    assert 0 < len(fitting) < len(pairs)
    expected = min(sum(summed(problem, layer, pair) for layer in range(4)) for pair in fitting)
    architecture = find("uniform", problem)
    assert len(set(architecture.layers)) == 1
    assert architecture.score == pytest.approx(expected)


def test_uniform_leaves_layers_alone_that_are_not_searched() -> None:
    problem = random_problem(4, Budget(layer_parameters_fraction=0.75), layers=4)
    problem = replace(problem, scores=tuple(s for s in problem.scores if s.layer not in (0, 3)))
    layers = find("uniform", problem).layers
    assert layers[0] == layers[3] == LayerChoice()
    assert layers[1] == layers[2] != LayerChoice()


def test_depth_drops_the_layers_with_the_lowest_scores_and_no_more_than_needed() -> None:
    problem = random_problem(5, Budget(layer_parameters_fraction=0.7), layers=5)
    layers = find("depth", problem).layers
    order = sorted(range(5), key=lambda layer: summed(problem, layer, GONE))
    dropped = [layer for layer in order if layers[layer] == GONE]
    assert 0 < len(dropped) < 5
    assert dropped == order[: len(dropped)]
    assert set(layers) == {GONE, LayerChoice()}
    one_less = tuple(LayerChoice() if layer == dropped[-1] else choice for layer, choice in enumerate(layers))
    assert not within_budget(problem, one_less)


def test_depth_needs_both_no_ops() -> None:
    problem = random_problem(5, Budget(layer_parameters_fraction=0.9))
    problem = replace(problem, scores=tuple(s for s in problem.scores if (s.subblock, s.variant) != ("ffn", "no_op")))
    with pytest.raises(InfeasibleBudget, match="no_op as attention and as ffn"):
        find("depth", problem)


def test_greedy_follows_the_paper_step_by_step() -> None:
    """F.2.2 written out with scalars: one limit, layers by mean score, savings carried on."""
    problem = random_problem(6, Budget(layer_parameters_fraction=0.55), layers=5)
    size = {(c.subblock, c.variant): c.parameters for c in problem.costs.costs}
    pairs = [LayerChoice(attention=a, ffn=f) for a, f in itertools.product(ATTENTIONS, FFNS)]
    share = 0.55 * (size["attention", "parent"] + size["ffn", "parent"])
    order = sorted(range(5), key=lambda layer: np.mean([summed(problem, layer, pair) for pair in pairs]))
    expected, carried = {}, 0.0
    for layer in order:
        available = share + carried
        within = [pair for pair in pairs if size["attention", pair.attention] + size["ffn", pair.ffn] <= available]
        expected[layer] = min(within, key=lambda pair: summed(problem, layer, pair))
        carried = available - size["attention", expected[layer].attention] - size["ffn", expected[layer].ffn]
    layers = find("greedy", problem).layers
    assert layers == tuple(expected[layer] for layer in range(5))
    assert len(set(layers)) > 1


def test_random_is_seeded_and_uses_the_budget() -> None:
    problem = random_problem(7, Budget(layer_parameters_fraction=0.7), layers=12)
    architectures = [find("random", problem, seed) for seed in range(8)]
    assert architectures[3].layers == find("random", problem, 3).layers
    assert len({architecture.layers for architecture in architectures}) == 8
    for architecture in architectures:
        layers_only = architecture.totals[0].parameters - 7_000
        used = layers_only / (architecture.parent_totals[0].parameters - 7_000)
        assert 0.65 <= used <= 0.7


def test_random_mends_several_limits_at_once() -> None:
    """kv1 is small but slow, no_op is fast but big: the cheapest by one limit alone breaks the other."""
    loose = random_problem(3, Budget(layer_parameters_fraction=1.0), layers=8)
    change = {
        "kv1": {"parameters": 0, "prefill_seconds": 0.05},
        "no_op": {"parameters": 10_000, "prefill_seconds": 0.0},
        "ffn50": {"parameters": 0, "prefill_seconds": 0.05},
    }
    costs = [cost.model_copy(update=change.get(cost.variant, {})) for cost in loose.costs.costs]
    mixed = replace(loose, costs=loose.costs.model_copy(update={"costs": tuple(costs)}))
    both = (LayerChoice(attention="kv1", ffn="ffn50"),) * 4 + (GONE,) * 4
    totals = predicted(mixed, both, "by hand").totals[0]
    tight = Budget(parameters=int(totals.parameters * 1.03), max_latency_seconds=totals.runtime_seconds * 1.03)
    problem = replace(mixed, budget=tight)
    for only in (GONE, LayerChoice(attention="kv1", ffn="ffn50")):
        assert not within_budget(problem, (only,) * 8)
    for seed in range(5):
        assert within_budget(problem, find("random", problem, seed).layers)


@pytest.mark.parametrize("name", ["uniform", "greedy"])
def test_the_best_batch_size_is_kept(name: BaselineName) -> None:
    """Large batches help the throughput, small ones the memory; what is best is not known before."""
    for budget, sizes, best in (
        (Budget(min_tokens_per_second=500.0), (4, 8), 8),
        (Budget(memory_gib=0.000_36), (1, 4), 1),
    ):
        scenario = CHAT.model_copy(update={"batch_sizes": sizes})
        problem = random_problem(3, budget, layers=5, scenarios=[scenario])
        alone = {
            size: find(name, replace(problem, scenarios=(CHAT.model_copy(update={"batch_sizes": (size,)}),))).score
            for size in sizes
        }
        assert alone[best] == min(alone.values()) < max(alone.values())
        architecture = find(name, problem)
        assert architecture.score == pytest.approx(alone[best])
        assert architecture.totals[0].batch_size == best


def test_no_op_only_keeps_or_removes_and_is_the_best_that_does() -> None:
    problem = random_problem(6, Budget(layer_parameters_fraction=0.6), layers=3)
    pairs = [LayerChoice(attention=a, ffn=f) for a in ("parent", "no_op") for f in ("parent", "no_op")]
    fitting = [c for c in itertools.product(pairs, repeat=3) if within_budget(problem, c)]
    expected = min(sum(summed(problem, layer, choice) for layer, choice in enumerate(c)) for c in fitting)
    architecture = find("no_op_only", problem)
    assert {label for c in architecture.layers for label in (c.attention, c.ffn)} <= {"parent", "no_op"}
    assert 0 < architecture.score == pytest.approx(expected)


def test_max_params_takes_all_the_parameters_it_can() -> None:
    problem = random_problem(6, Budget(speedup=1.4), layers=3)
    pairs = [LayerChoice(attention=a, ffn=f) for a, f in itertools.product(ATTENTIONS, FFNS)]
    fitting = [c for c in itertools.product(pairs, repeat=3) if within_budget(problem, c)]
    most = max(predicted(problem, c, "x").totals[0].parameters for c in fitting)
    architecture = find("max_params", problem)
    assert architecture.totals[0].parameters == most < predicted(problem, problem.parent, "x").totals[0].parameters


@pytest.mark.parametrize("name", ["uniform", "greedy", "random", "max_params", "evolutionary"])
def test_what_the_profile_rules_out_no_search_uses(name: str) -> None:
    """The last layer kept, no no-op attention: seen to bind by what the same search does without."""
    free = random_problem(6, Budget(layer_parameters_fraction=0.7), layers=3)
    search = free.search.model_copy(update={"forbid": ("attention=no_op",), "keep_layers": (2,)})
    layers = find(name, replace(free, search=search), evaluations=500).layers
    assert layers[2] == LayerChoice() and all(choice.attention != "no_op" for choice in layers)
    assert find(name, free, evaluations=500).layers != layers


@pytest.mark.parametrize(
    ("engine", "refused"), [("sglang", {("attention", "kv1"), ("ffn", "ffn50")}), ("tensorrt-llm", {("ffn", "ffn50")})]
)
def test_what_an_engine_cannot_run_is_not_chosen(engine: Any, refused: set[tuple[str, str]]) -> None:
    """Other KV heads than the parent's, a width of 50; nothing else is missing here, but for layer 0 in SGLang."""
    problem = random_problem(6, Budget(layer_parameters_fraction=0.75), layers=3)
    library, free = library_of(problem), request_of(problem)
    bound = free.model_copy(update={"must_run": (engine,)})
    chosen, options = (
        {(part, getattr(library.options[index].own, part)) for index in kept for part in ("attention", "ffn")}
        for kept in (allowed(library, bound), allowed(library, free))
    )
    assert refused < options and not chosen & refused
    (choice,) = choose_joint(library, bound)
    labels = " ".join(choice.layers.values())
    assert not any(label in labels for _, label in refused)
    assert "attention = no_op" not in choice.layers["layer_0"] or engine != "sglang"
