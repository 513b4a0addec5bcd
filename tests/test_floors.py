"""The highest KL on a capability: the child that is chosen keeps it itself, not its sum of scores alone."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch

from blocks.child import assemble, library_of
from blocks.compute import HOST
from blocks.library import read_tensors
from blocks.records import Floor, Metric
from profiles.load import load_profile
from tasks.distill.record import open_parent
from tasks.evaluate.compare import contender, parent_contender
from tasks.evaluate.floors import Chosen, check, floors_of, hold, in_words, text_of, tighter
from tasks.inputs.corpus import weights_of
from tasks.planning.effort import floors_work, shape_of
from tasks.search.choose import choose
from tasks.search.totals import Problem, kl_on
from tests.chain import Chain, chosen
from tests.test_capabilities import needles_of, problem
from tests.test_gkd import CHILD

SHARES = {"general": 1.0, "retrieval": 0.0}


def metric(value: float, se: float = 0.0, n: int = 9) -> Metric:
    return Metric(value=value, se=se, n=n)


def library(weights: dict[str, float], most: dict[str, float] | None = None) -> Problem:
    return problem(weights, most, layers=6)


def held(most: float, truth: float, rounds: int = 3, se: float = 0.0) -> tuple[Chosen, tuple[Floor, ...], list[float]]:
    """A search under a limit, where a whole child has `truth` times its summed scores. Also what was measured."""
    asked, seen = library(SHARES, {"retrieval": most}), list[float]()

    def measure(found: Chosen) -> tuple[Floor, ...]:
        child = found.near[0]
        seen.append(truth * kl_on(asked, child.layers, "retrieval"))
        return floors_of({"retrieval": most}, found.problem, child, {"retrieval": metric(seen[-1], se)})

    def again(floors: Sequence[Floor]) -> Chosen | None:
        return tighter(asked, floors, 1, 1)

    first = Chosen(problem=asked, near=(choose(asked),))
    return (*hold(first, rounds, measure, again), seen)


def predicted(found: Chosen) -> float:
    return kl_on(found.problem, found.near[0].layers, "retrieval")


@cache
def reach() -> tuple[float, float]:
    """The least KL that the budget allows, and that of the child without a limit."""
    free, alone = library(SHARES), library({"general": 0.0, "retrieval": 1.0})
    least, most = (kl_on(free, choose(one).layers, "retrieval") for one in (alone, free))
    assert least < 0.75 * most
    return least, most


def test_sums_that_hold_are_left_as_they_are() -> None:
    found, (floor,), seen = held(reach()[1], truth=1.0)
    assert len(seen) == 1 and floor.limit == floor.asked
    assert floor.at_most == floor.measured.value == predicted(found) <= floor.asked


def test_a_child_that_passes_its_limit_is_chosen_again_under_a_lower_one() -> None:
    most = 1.2 * reach()[1]
    _, (once,), _ = held(most, truth=1.5, rounds=1)
    found, (floor,), seen = held(most, truth=1.5)
    assert once.at_most > most and once.limit == most, "without, the limit is passed"
    assert floor.at_most == 1.5 * predicted(found) == seen[-1] <= most and floor.limit < most
    best = choose(library(SHARES, {"retrieval": most / 1.5}))  # of all that keep the limit
    assert found.near[0].score >= best.score - 1e-9
    assert found.near[0].score == choose(library(SHARES, {"retrieval": floor.limit})).score


def test_it_is_the_bound_that_is_kept_not_the_figure() -> None:
    most = 1.05 * reach()[1]
    _, (floor,), seen = held(most, truth=1.0, se=0.1 * most)
    assert seen[0] <= most < seen[0] + 1.86 * 0.1 * most and floor.at_most <= most, "t of 8 degrees of freedom, 95 %"
    assert floor.at_most == pytest.approx(floor.measured.value + 1.8595 * 0.1 * most, rel=1e-4)
    assert held(most, truth=1.0, rounds=1, se=0.1 * most)[1][0].at_most > most


def test_what_the_budget_does_not_allow_is_come_as_near_to_as_it_does() -> None:
    most = 1.3 * reach()[0]
    found, (floor,), seen = held(most, truth=1.6, rounds=5)
    assert floor.at_most == min(seen) > most, "of those that pass the limit, the one that passes it least"
    assert predicted(found) < predicted(held(most, truth=1.6, rounds=1)[0])
    assert "leaves no child that keeps it" in in_words(floor)


def test_a_limit_that_is_kept_stays_when_another_is_lowered() -> None:
    asked = library(SHARES | {"code": 0.0}, {"retrieval": reach()[1], "code": 5.0})
    kept = Floor(capability="code", asked=5.0, limit=5.0, predicted=0.1, measured=metric(0.1), at_most=0.1)
    one = reach()[1]
    passed = Floor(
        capability="retrieval", asked=one, limit=one, predicted=0.9 * one, measured=metric(one), at_most=1.2 * one
    )
    found = tighter(asked, [passed, kept], 1, 1)
    assert found is not None
    assert found.problem.capabilities.most == pytest.approx({"retrieval": 0.9 * one / 1.2, "code": 5.0})


@torch.inference_mode()
def test_a_child_is_measured_on_text_that_no_stage_before_gkd_reads(chain: Chain) -> None:
    text = needles_of(chain)
    split, count = text_of(text)
    assert (split, text_of(chain.corpus)) == ("train", ("validation", 8)) and count == text.train_sequences
    which = contender("child", chosen(CHILD), chain.blocks)
    found = check(which, chain.parent, text, chain.workspace, HOST)
    reader = open_parent(chain.workspace / chain.parent.folder, HOST)
    child = assemble(reader, library_of(list(which.blocks)), which.architecture, chain.workspace)
    tokens = read_tensors(chain.workspace, text.tokens, ["train"])["train"]
    weights = weights_of(text, "train", chain.workspace)
    assert weights is not None
    ours, theirs = (model(tokens).logits.double().log_softmax(-1) for model in (child, reader.model()))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    assert found.value == pytest.approx(float((kl * weights).sum() / weights.sum()), rel=1e-4)
    own = parent_contender(chosen(CHILD))
    assert check(own, chain.parent, text, chain.workspace, HOST).value == pytest.approx(0.0, abs=1e-5)


def test_a_plan_knows_what_looks_at_children_take(chain: Chain) -> None:
    profile = load_profile("tiny", ["search_space.ffn=[no_op]", "capabilities={general: {max_kl: 0.3}}"])
    tasks, tokens, work = floors_work(shape_of(profile, chain.reader), 0.5)
    assert (tasks, tokens) == (2, 2 * profile.corpus.validation_sequences * profile.corpus.sequence_length)
    off = profile.model_copy(update={"search": profile.search.model_copy(update={"floor_rounds": 0})})
    assert floors_work(shape_of(off, chain.reader), 0.5)[:2] == (0, 0) and work.flops > 0
