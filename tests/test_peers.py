"""The searches behind one function: all are registered, every one keeps the budget and minimises what it is given."""

import itertools
from typing import get_args

import numpy as np
import pytest

from blocks.errors import PuzzleError
from blocks.records import LayerChoice
from profiles.schema import BaselineName, Budget
from tasks.search.choose import choose
from tasks.search.grid import make_grid
from tasks.search.totals import Problem, batch_choices, score_of, within_budget
from tasks.studies.peers import JUDGED, NAMES, find, top
from tests.test_choose import ATTENTIONS, FFNS, random_problem

Layers = tuple[LayerChoice, ...]
TIGHT = Budget(layer_parameters_fraction=0.6)


def every_architecture(problem: Problem) -> list[Layers]:
    pairs = [LayerChoice(attention=a, ffn=f) for a, f in itertools.product(ATTENTIONS, FFNS)]
    whole = itertools.product(pairs, repeat=problem.costs.num_hidden_layers)
    return [layers for layers in whole if within_budget(problem, layers)]


def test_profiles_name_the_registry() -> None:
    assert ("mip", *get_args(BaselineName)) == NAMES


@pytest.mark.parametrize("name", JUDGED)
def test_every_peer_says_what_it_found_and_took(name: str) -> None:
    problem = random_problem(3, TIGHT, layers=4)
    found = find(name, problem, seed=2, evaluations=300)
    assert found.method == name and len(found.layers) == 4 and within_budget(problem, found.layers)
    assert found.solve_seconds > 0
    solver = name in ("mip", "no_op_only", "max_params")
    assert found.evaluations == 0 if solver else 1 <= found.evaluations <= 300
    assert found.score >= choose(problem).score - 1e-12
    assert find(name, problem, seed=2, evaluations=300).layers == found.layers


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(PuzzleError, match="unknown search 'annealing': it is one of mip"):
        find("annealing", random_problem(3, TIGHT))


def test_the_top_are_the_best_that_differ_enough() -> None:
    problem = random_problem(5, TIGHT, layers=3)
    (batches,) = batch_choices(problem)
    found = top(problem, 6, 2, batches)
    ranked = sorted(every_architecture(problem), key=lambda layers: score_of(problem, layers)[0])
    expected: list[Layers] = []
    while len(expected) < 6:
        expected.append(next(one for one in ranked if all(differ(one, other) >= 2 for other in expected)))
    assert [score_of(problem, one)[0] for one in found] == pytest.approx([score_of(problem, o)[0] for o in expected])
    assert len(top(problem, 10_000, 6, batches)) < 20, "when no more exist that differ in every subblock it stops"


def differ(first: Layers, second: Layers) -> int:
    return sum((a.attention != b.attention) + (a.ffn != b.ffn) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_choice_and_its_selection_are_one(joint: bool, coupled: bool) -> None:
    problem = random_problem(7, TIGHT, layers=3, coupled=coupled)
    (batches,) = batch_choices(problem)
    grid = make_grid(problem, batches, joint=joint)
    generator = np.random.default_rng(0)
    ends = np.append(grid.starts[1:], len(grid.options))
    for _ in range(50):
        selection = generator.integers(grid.starts, ends)
        back = grid.selection(grid.choice(selection))
        assert back is not None and (back == selection).all()
    assert grid.selection([LayerChoice(attention="kv7")] * 3) is None
