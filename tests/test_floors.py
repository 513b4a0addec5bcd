"""The highest KL on a capability: the child that is chosen keeps it itself, not its sum of scores alone."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.child import assemble, library_of
from blocks.compute import HOST
from blocks.errors import InfeasibleBudget, PuzzleFailure
from blocks.estimates import lower_bound, mean
from blocks.library import read_tensors
from blocks.records import Architecture, Floor, HeldTime, Metric
from blocks.typed_labels import type_in
from flows import floors as holding
from flows.floors import Library, _Search
from flows.run import Run
from profiles.load import load_profile
from profiles.schema import Budget, ScenarioBudget
from tasks.distill.record import open_parent
from tasks.evaluate import floors
from tasks.evaluate.compare import contender, parent_contender
from tasks.evaluate.floors import (
    Chosen,
    Held,
    Look,
    as_measured,
    asked_next,
    check,
    floors_of,
    hold,
    in_words,
    is_kept,
    nearer_whole,
    next_answer,
    next_limit,
    rows_of,
    split_of,
    times_of,
    worst,
)
from tasks.inputs.corpus import documents_of, weights_of
from tasks.operating.registry import description
from tasks.operating.run_figures import report_metrics
from tasks.pages.report import floors_table, report_markdown, times_table
from tasks.planning.effort import floors_work, shape_of
from tasks.search import capabilities
from tasks.search.choose import choose
from tasks.search.mip import SolverStopped
from tasks.search.one_type import candidates, whole_parent
from tasks.search.totals import Problem, as_asked, broken_limits, kl_on
from tests.chain import Chain, chosen
from tests.test_budget import timed as timed_architecture
from tests.test_capabilities import needles_of, problem, reported
from tests.test_gkd import CHILD
from tests.test_number_types import problem_with
from tests.test_report import report_of

SHARES = {"general": 1.0, "retrieval": 0.0}


def metric(value: float, se: float = 0.0, n: int = 9) -> Metric:
    return Metric(value=value, se=se, n=n)


def library(weights: dict[str, float], most: dict[str, float] | None = None) -> Problem:
    return problem(weights, most, layers=6)


def held(most: float, truth: float, rounds: int = 3, se: float = 0.0) -> tuple[Chosen, tuple[Floor, ...], list[float]]:
    """A search under a limit, where a whole child has `truth` times its summed scores. Also what was measured."""
    asked, seen = library(SHARES, {"retrieval": most}), list[float]()

    def measure(found: Chosen) -> list[tuple[Floor, ...]]:
        (child,) = found.near
        seen.append(truth * kl_on(asked, child.layers, "retrieval"))
        return [floors_of({"retrieval": most}, found.problem, child, {"retrieval": metric(seen[-1], se)}, rounds)]

    def again(looks: Sequence[Sequence[Look]]) -> Chosen | None:
        found = next_answer(asked, looks, 1, 1)
        return None if found is None else found[1]

    first = Chosen(problem=asked, near=(choose(asked),))
    held = hold(first, rounds, measure, again)
    return held.chosen, floors_among(held.of(held.chosen.near[0])), seen


def floors_among(looks: Sequence[Look]) -> tuple[Floor, ...]:
    return tuple(look for look in looks if isinstance(look, Floor))


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
    assert once.at_most is not None and once.at_most > most and once.limit == most, "without, the limit is passed"
    assert floor.at_most == 1.5 * predicted(found) == seen[-1] <= most and floor.limit < most
    best = choose(library(SHARES, {"retrieval": most / 1.5}))  # of all that keep the limit
    assert found.near[0].score >= best.score - 1e-9
    assert found.near[0].score == choose(library(SHARES, {"retrieval": floor.limit})).score


def test_it_is_the_bound_that_is_kept_not_the_figure() -> None:
    most = 1.05 * reach()[1]
    _, (floor,), seen = held(most, truth=1.0, se=0.03 * most)
    assert seen[0] <= most and floor.at_most is not None and floor.at_most <= most and len(seen) == 2
    # Student's t of 8 degrees of freedom: three children share 5 %, one has it alone
    assert floor.at_most == pytest.approx(floor.measured.value + 2.5660 * 0.03 * most, rel=1e-4)
    once = held(most, truth=1.0, rounds=1, se=0.03 * most)[1][0].at_most
    assert once is not None and once == pytest.approx(seen[0] + 1.8595 * 0.03 * most, rel=1e-4)


def test_one_document_shows_no_error() -> None:
    (floor,) = floors_of({"retrieval": 1.0}, *alone(), {"retrieval": metric(0.5, n=1)})
    assert floor.at_most is None and worst([floor]) == 0.5 and "one document shows no error" in in_words(floor)


def test_the_report_and_mlflow_have_the_limits() -> None:
    kept = floors_of({"retrieval": 1.0}, *alone(), {"retrieval": metric(0.5)})
    report = reported(report_of().candidates).model_copy(update={"floors": kept})
    _, (row,), _ = floors_table(report)
    assert row[:3] == ["retrieval", "1", "9"] and row[-1] == "0.5" and "### Limits on" in report_markdown(report)
    figures = {name: value for name, value in report_metrics(report).items() if name.startswith("floor/")}
    (floor,) = kept
    assert figures == {
        "floor/retrieval_asked": 1.0,
        "floor/retrieval_limit": 9.0,
        "floor/retrieval_predicted": floor.predicted,
        "floor/retrieval_measured": 0.5,
    }


def alone() -> tuple[Problem, Architecture]:
    asked = library(SHARES, {"retrieval": 9.0})
    return asked, choose(asked)


def test_of_several_children_those_race_that_keep_the_limits() -> None:
    asked = library(SHARES, {"retrieval": 9.0})
    first = Chosen(problem=asked, near=tuple(candidates(asked, 3, 1)))
    second = Chosen(problem=asked, near=tuple(candidates(asked, 4, 2))[3:])

    def raced(got: Sequence[float], then: float | None = None) -> tuple[Held, list[Sequence[Look]]]:
        values = dict(zip(map(id, first.near), got, strict=True)) | {id(second.near[0]): then or 0.0}
        asked_again = list[Sequence[Look]]()

        def measure(found: Chosen) -> list[tuple[Floor, ...]]:
            each = ({"retrieval": metric(9.0 * values[id(one)])} for one in found.near)
            return [floors_of({"retrieval": 9.0}, asked, *pair) for pair in zip(found.near, each, strict=True)]

        def again(looks: Sequence[Sequence[Look]]) -> Chosen | None:
            asked_again.append(looks[-1])
            return second if then else None

        return hold(first, 3, measure, again), asked_again

    held, looked = raced((0.9, 1.2, 0.8))
    assert held.chosen.near == (first.near[0], first.near[2]) and not looked
    assert [floors_among(held.of(one))[0].at_most for one in held.chosen.near] == pytest.approx([8.1, 7.2])
    held, looked = raced((1.2, 0.9, 0.8))
    assert held.chosen.near == first.near[1:] and floors_among(looked[0])[0].at_most == pytest.approx(10.8), (
        "of the best child"
    )
    assert raced((1.5, 1.1, 1.3))[0].chosen.near == (first.near[1],)
    assert raced((1.5, 1.1, 1.3), then=0.9)[0].chosen.near == second.near
    assert raced((1.5, 0.9, 1.3), then=0.9)[0].chosen.near == (first.near[1],), "it scores less than the second answer"


def test_a_solver_without_an_answer_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise SolverStopped("time is up")

    _, (floor,), _ = held(1.2 * reach()[1], truth=1.5, rounds=1)
    monkeypatch.setattr(floors, "candidates", stopped)
    assert next_answer(library(SHARES), [[floor]], 1, 1) is None


def test_what_the_budget_does_not_allow_is_come_as_near_to_as_it_does() -> None:
    most = 1.3 * reach()[0]
    found, (floor,), seen = held(most, truth=1.6, rounds=5)
    assert floor.at_most == min(seen) > most, "of those that pass the limit, the one that passes it least"
    assert predicted(found) < predicted(held(most, truth=1.6, rounds=1)[0])
    assert in_words(floor).endswith(": not kept before GKD")


def test_a_limit_that_is_kept_stays_when_another_is_lowered() -> None:
    asked = library(SHARES | {"code": 0.0}, {"retrieval": reach()[1], "code": 5.0})
    kept = Floor(capability="code", asked=5.0, limit=5.0, predicted=0.1, measured=metric(0.1), at_most=0.1)
    one = reach()[1]
    passed = Floor(
        capability="retrieval", asked=one, limit=one, predicted=0.9 * one, measured=metric(one), at_most=1.2 * one
    )
    found = next_answer(asked, [[passed, kept]], 1, 1)
    assert found is not None
    assert found[1].problem.capabilities.most == pytest.approx({"retrieval": 0.9 * one / 1.2, "code": 5.0})


@torch.inference_mode()
def test_a_child_is_measured_on_text_that_no_stage_before_gkd_reads(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = needles_of(chain)
    assert split_of(text) == ("train", text.train_sequences) and split_of(chain.corpus) == ("validation", 8)
    monkeypatch.setattr(capabilities, "CHECKED_TOKENS", 1)
    monkeypatch.setattr(capabilities, "CHECKED_ROWS", text.train_sequences // 2)
    rows = list(rows_of(text, chain.workspace))
    assert len(rows) == text.train_sequences // 2 and max(rows) > len(rows)
    which = contender("child", chosen(CHILD), chain.blocks)
    found = check(which, chain.parent, text, chain.workspace, HOST)
    reader = open_parent(chain.workspace / chain.parent.folder, HOST)
    child = assemble(reader, library_of(list(which.blocks)), which.architecture, chain.workspace)
    tokens = read_tensors(chain.workspace, text.tokens, ["train"])["train"][rows]
    weights = weights_of(text, "train", chain.workspace)
    assert weights is not None
    weights = weights[rows].double()
    ours, theirs = (model(tokens).logits.double().log_softmax(-1) for model in (child, reader.model()))
    kl = ((theirs.exp() * (theirs - ours)).sum(-1) * weights).mean(1) / weights.mean()
    documents = documents_of(text, "train", chain.workspace)
    by_hand = mean(kl.numpy(), [documents[row] for row in rows])
    assert (found.value, found.se) == pytest.approx((by_hand.value, by_hand.error), rel=1e-4)
    assert found.n == len({documents[row] for row in rows}) > 1
    monkeypatch.setattr(floors, "figures_of", lambda *_: pytest.fail("it is measured once"))
    assert check(which, chain.parent, text, chain.workspace, HOST) == found
    monkeypatch.undo()
    own = parent_contender(chosen(CHILD))
    assert check(own, chain.parent, text, chain.workspace, HOST).value == pytest.approx(0.0, abs=1e-5)


class Bare(Run):
    """A run that calls plain functions."""

    def stage(self, name: str) -> Any:
        return nullcontext(lambda *_: None)

    def call(self, which: Any, makes: str, *values: Any, **_: Any) -> Any:
        return which.fn(*values)


def test_what_is_chosen_in_types_under_a_lower_limit_is_scored_in_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The scores are settled under the lower limit, and the choice is made by those; a refusal is no next answer."""
    profile = load_profile("smollm2-llama-cpp", ["capabilities={general: {max_kl: 0.3}}"])
    run, asked = Bare(profile=profile, workspace=tmp_path), library(SHARES, {"general": 0.3})
    best, other = candidates(asked, 2, 1)
    first, told = Chosen(problem=asked, near=(other,)), list[Any]()
    settled = (asked.scores[0],)

    def score_types(tight: Run, *_: Any) -> Any:
        told.append(tight.profile.capability_limits["general"])
        return settled

    def choose_child(tight: Run, parent: Any, scores: Any, costs: Any, after: Any) -> Chosen:
        told.append((tight.profile.capability_limits["general"], scores))
        return Chosen(problem=asked, near=first.near, scores=scores)

    monkeypatch.setattr(holding, "score_types", score_types)
    monkeypatch.setattr(holding, "choose_child", choose_child)
    monkeypatch.setattr(holding, "problem_of", lambda *_: asked)
    made = Library(records=(), blocks=(), scores=(), costs=asked.costs)
    search = _Search(run=run, source=(None, None), capabilities=(), library=made)  # type: ignore[arg-type]
    search.choices.append((first, None))
    passed = Floor(capability="general", asked=0.3, limit=0.3, predicted=0.25, measured=metric(0.3), at_most=0.36)
    found = search.again([[passed]])
    assert found is not None and found.scores == settled
    assert told == [pytest.approx(0.25 / 1.2), (told[0], settled)] and run.profile.capability_limits["general"] == 0.3

    def refuses(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(holding, "choose_child", refuses)
    raised: Exception = InfeasibleBudget("nothing fits")
    assert search.again([[passed]]) is None
    told.clear()
    search.choices.append((Chosen(problem=asked, near=(best,)), None))
    assert search.again([[passed]]) is None and not told, "that answer was there before, nothing is scored for it"
    search.choices.pop()
    raised = PuzzleFailure("a file is damaged")
    with pytest.raises(PuzzleFailure):
        search.again([[passed]])


def test_rows_are_spread_over_a_long_text(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    text = needles_of(chain)
    monkeypatch.setattr(capabilities, "CHECKED_ROWS", 4)
    monkeypatch.setattr(capabilities, "CHECKED_TOKENS", 4 * text.sequence_length)
    count = text.train_sequences
    assert rows_of(text, chain.workspace) == tuple(place * count // 4 for place in range(4))
    few = torch.zeros(count, text.sequence_length)
    few[[1, count - 1], 3] = 1.0
    monkeypatch.setattr(floors, "weights_of", lambda *_: few)
    assert rows_of(text, chain.workspace) == (1, count - 1), "a row without an answer says nothing"


def test_a_plan_knows_what_looks_at_children_take(chain: Chain) -> None:
    profile = load_profile("tiny", ["search_space.ffn=[no_op]", "capabilities={general: {max_kl: 0.3}}"])
    tasks, tokens, work = floors_work(shape_of(profile, chain.reader), 0.5)
    assert (tasks, tokens) == (2, 2 * profile.corpus.validation_sequences * profile.corpus.sequence_length)
    race = profile.model_copy(update={"race": profile.race.model_copy(update={"candidates": 3})})
    assert floors_work(shape_of(race, chain.reader), 0.5)[:2] == (6, 3 * tokens)
    off = profile.model_copy(update={"search": profile.search.model_copy(update={"floor_rounds": 0})})
    assert floors_work(shape_of(off, chain.reader), 0.5)[:2] == (0, 0) and work.flops > 0


# --- limits on time: of a library whose children are slower, or faster, than their costs add up to


@cache
def fast(speedup: float) -> Problem:
    asked = problem(SHARES, layers=6)
    return replace(asked, budget=Budget(speedup=speedup))


def timed(asked: Problem, slower: float, rounds: int = 3, error: float = 0.005) -> tuple[Chosen, HeldTime, list[float]]:
    """A search for speed where every child takes `slower` times its costs. Also the speeds that were measured.

    error: of a speed.
    """
    seen = list[float]()

    def measure(found: Chosen) -> list[tuple[Look, ...]]:
        (child,) = found.near
        own, parents = timed_architecture(child, slower, error=error), timed_architecture(child, 1.0, parent=True)
        looks = times_of(asked, found.problem, child, own, parents)
        seen.append(looks[0].measured.value)
        return [looks]

    def again(looks: Sequence[Sequence[Look]]) -> Chosen | None:
        found = next_answer(asked, looks, 1, 1)
        return None if found is None else found[1]

    held = hold(Chosen(problem=asked, near=(choose(asked),)), rounds, measure, again)
    (look,) = held.of(held.chosen.near[0])
    assert isinstance(look, HeldTime)
    return held.chosen, look, seen


def test_a_child_slower_than_its_costs_is_chosen_again_for_more_speed() -> None:
    asked = fast(1.5)
    first, slow, _ = timed(asked, 1.1, rounds=1)
    assert slow.measured.value < 1.5 < slow.predicted and in_words(slow).endswith("not kept before GKD")
    found, look, seen = timed(asked, 1.1)
    assert look.at_worst == lower_bound(metric(seen[-1], 0.005, 8), 0.8)
    assert look.asked == 1.5 < look.at_worst < look.measured.value and look.asked < look.limit
    assert look.predicted / look.measured.value == pytest.approx(1.1)
    assert found.near[0].score == choose(fast(look.limit)).score > first.near[0].score
    assert found.near[0].score <= choose(fast(1.5 * 1.1 * 1.06)).score, "no more of it than it takes"


def test_a_child_faster_than_its_costs_gets_its_quality_back() -> None:
    asked = fast(1.5)
    first, quick, _ = timed(asked, 0.85, rounds=1)
    found, look, seen = timed(asked, 0.85)
    assert quick.measured.value > 1.6 and len(seen) > 1
    assert 1.5 * (1 - 0.01) <= look.measured.value < quick.measured.value and look.limit < 1.5
    assert found.near[0].score < first.near[0].score


def test_costs_that_hold_are_left_as_they_are() -> None:
    assert len(timed(fast(1.5), 1.0, error=0.0)[2]) == 1
    assert len(timed(fast(1.5), 1.0, error=0.05)[2]) > 1, "what is not sure is asked for with a margin"


def test_the_next_limit_lies_between_what_kept_it_and_what_did_not() -> None:
    def look(predicted: float, measured: float, limit: float) -> HeldTime:
        given = {"field": "speedup", "name": "speedup", "floor": True, "asked": 2.0}
        return HeldTime(**given, limit=limit, predicted=predicted, measured=metric(measured))  # type: ignore[arg-type]

    slow, quick = look(2.0, 1.9, 2.0), look(2.3, 2.2, 2.25)
    assert next_limit([slow]) == pytest.approx(2.0 * 2.0 / 1.9 / 0.995)
    assert 2.0 < next_limit([slow, quick]) < 2.3 and next_limit([quick, slow]) == next_limit([slow, quick])
    assert next_limit([look(2.0, 2.0, 2.0)]) == 2.0, "neither more nor less is needed"
    assert next_limit([look(2.6, 2.5, 2.0)]) == 2.0, "another limit binds"


def test_limits_of_a_scenario_and_of_the_profile_are_each_their_own() -> None:
    asked = fast(1.5)
    chat = asked.scenarios[0].model_copy(update={"budget": ScenarioBudget(max_latency_seconds=9.0)})
    asked = replace(asked, scenarios=(chat,))
    child = choose(asked)
    own, parents = timed_architecture(child, 1.2), timed_architecture(child, 1.0, parent=True)
    looks = times_of(asked, asked, child, own, parents)
    assert [one.field for one in looks] == ["speedup", "max_latency_seconds of chat"]
    late = looks[1].model_copy(update={"predicted": 8.9, "measured": metric(9.9), "at_worst": None})
    then = asked_next(asked, [[looks[0], late]], 1.0)
    assert then.scenarios[0].budget.max_latency_seconds == pytest.approx(8.9 * 9.0 / 9.9 * 0.995)
    assert then.budget.speedup == pytest.approx(next_limit([looks[0]])) and asked.budget.speedup == 1.5
    (speed, _) = looks
    assert isinstance(speed, HeldTime)
    slower = speed.model_copy(update={"name": "speedup of rag", "at_worst": 0.9 * speed.measured.value})
    for both in ([speed, slower], [slower, speed]):
        assert asked_next(asked, [both], 1.0).budget.speedup == pytest.approx(next_limit([slower]))
        assert next_limit([slower]) > next_limit([speed])
    kept = asked_next(asked, [[looks[0]], [late]], 1.0)  # the second answer was measured on a busy machine
    assert kept.budget.speedup == then.budget.speedup
    assert as_asked(then, Asked(asked)).budget == asked.budget  # type: ignore[arg-type]


class Asked:
    """What a problem takes of a profile."""

    def __init__(self, problem: Problem) -> None:
        self.budget, self.scenarios, self.capability_limits = problem.budget, problem.scenarios, dict[str, float]()


def test_the_report_and_mlflow_have_the_limits_on_time() -> None:
    _, look, _ = timed(fast(1.5), 1.1)
    report = report_of().model_copy(update={"held_times": (look,)})
    _, (row,), _ = times_table(report)
    assert row[:2] == ["speedup", "1.5"] and "### Limits on time, before GKD" in report_markdown(report)
    figures = report_metrics(report)
    assert figures["floor/speedup_asked"] == 1.5 and figures["floor/speedup_measured"] == look.measured.value
    assert figures["floor/speedup_limit"] == look.limit > 1.5
    asked = report.model_copy(update={"request": {"limits": [{"name": "speedup", "asked": look.limit}]}})
    assert "speedup 1.5" in description(asked, "")


def test_the_same_blocks_in_another_batch_are_another_answer() -> None:
    asked = fast(1.5)
    first, late = choose(asked), metric(9.9)
    totals = tuple(one.model_copy(update={"batch_size": 2}) for one in first.totals)
    second = Chosen(problem=asked, near=(first.model_copy(update={"totals": totals}),))
    given = {"field": "max_latency_seconds", "name": "max_latency_seconds", "floor": False, "asked": 9.0, "limit": 9.0}
    looks = [HeldTime(**given, predicted=8.9, measured=one) for one in (late, metric(8.8))]  # type: ignore[arg-type]
    found = hold(Chosen(problem=asked, near=(first,)), 3, lambda _: [(looks.pop(0),)], lambda _: second)
    assert found.chosen is not None and found.chosen.near == second.near and not looks


def test_an_answer_that_could_not_be_timed_takes_no_place() -> None:
    asked, quick = fast(1.5), metric(1.9)
    one, other = (Chosen(problem=asked, near=(each,)) for each in candidates(asked, 2, 1))
    look = HeldTime(field="speedup", name="speedup", floor=True, asked=1.5, limit=1.5, predicted=1.5, measured=quick)
    seen = [[(look,)], None]
    assert hold(other, 3, lambda _: seen.pop(0), lambda _: one).chosen.near == other.near and not seen
    assert hold(other, 3, lambda _: None, lambda _: one).looks == ((),), "the first answer stands"


def test_a_limit_on_time_is_held_by_the_bound_of_what_was_measured() -> None:
    given = {"field": "speedup", "name": "speedup", "floor": True, "asked": 2.0, "limit": 2.0, "predicted": 2.0}
    for worst_case, kept, then in (
        (1.95, False, 4.0 / 1.95 / 0.995),
        (2.01, True, 2.0),
        (2.1, True, 4.0 / 2.1 / 0.995),
    ):
        look = HeldTime(**given, measured=metric(2.2), at_worst=worst_case)  # type: ignore[arg-type]
        assert is_kept(look) == kept and next_limit([look]) == pytest.approx(then)
    late = look.model_copy(update={"floor": False, "measured": metric(1.9), "at_worst": 2.05})
    assert not is_kept(late) and next_limit([late]) == pytest.approx(4.0 / 2.05 * 0.995)


def test_a_child_measured_to_be_faster_than_its_sum_keeps_its_budget_later() -> None:
    asked = fast(1.5)
    _, look, _ = timed(asked, 0.85)
    assert look.predicted < 1.5 <= look.measured.value * 1.01
    looser = as_measured(asked, [look]).budget.speedup
    assert looser is not None and looser == pytest.approx(1.5 * 0.85) and looser <= 1.01 * look.predicted
    slow = look.model_copy(update={"measured": metric(0.5 * look.predicted)})
    assert as_measured(asked, [slow]).budget == asked.budget, "only looser: the search was asked for more of it"
    kl = Floor(capability="retrieval", asked=1.0, limit=1.3, predicted=1.2, measured=metric(0.9), at_most=0.95)
    limits = as_measured(library(SHARES, {"retrieval": 1.0}), [kl]).capabilities.most
    assert limits == pytest.approx({"retrieval": 1.2 / 0.9})
    assert as_measured(library(SHARES), [kl]).capabilities.most == {}, "it is asked no more"


# --- the parent in one type of number, which the costs leave out by a little


def nearly(slower: float) -> tuple[Problem, Architecture]:
    """A budget that the parent in iq4_nl passes by so much, by its costs, and the parent in it. All else hurts more."""
    free = problem_with(1.1)
    least = {"parent@iq4_nl": 0.01, "head@iq4_nl": 0.01}
    scores = [one.model_copy(update={"kl": least.get(one.variant, 1.0 + one.kl)}) for one in free.scores]
    table = free.costs
    costs, outside = ([_sooner(one) for one in each] for each in (table.costs, table.non_block))
    free = replace(free, scores=tuple(scores), costs=table.model_copy(update={"costs": costs, "non_block": outside}))
    whole = whole_parent(free, "iq4_nl", (1,))
    took = whole.totals[0].runtime_seconds / whole.parent_totals[0].runtime_seconds
    return replace(free, budget=Budget(speedup=slower / took)), whole


def _sooner(cost: Any) -> Any:
    """What is in iq4_nl takes a fifth."""
    if type_in(getattr(cost, "variant", "")) != "iq4_nl" and getattr(cost, "head", "") != "iq4_nl":
        return cost
    times = {name: getattr(cost, name) / 5 for name in ("prefill_seconds", "decode_seconds_per_token")}
    return cost.model_copy(update=times)


def answered(asked: Problem, gained: float) -> tuple[Held, list[str]]:
    """Held with what costs leave out; all children are as fast as by their costs but that of one type, by `gained`."""
    seen = list[str]()

    def measure(found: Chosen) -> list[tuple[Look, ...]]:
        (child,) = found.near
        seen.append(child.method)
        slower = 1 / gained if child.method == "one type" else 1.0
        own, parents = timed_architecture(child, slower, error=0.0), timed_architecture(child, 1.0, parent=True)
        return [times_of(asked, found.problem, child, own, parents)]

    first = Chosen(problem=asked, near=(choose(asked),))
    return hold(first, 3, measure, lambda _: None, lambda held: nearer_whole(asked, held)), seen


def test_the_parent_in_one_type_is_timed_where_it_is_nearer_and_costs_may_be_off() -> None:
    asked, whole = nearly(1.05)
    assert broken_limits(asked, whole.layers, (1,), whole.head) and choose(asked).score > whole.score
    found, seen = answered(asked, 1.06)
    assert seen[1:] == ["one type"] and found.chosen.near[0].layers == whole.layers
    (look,) = found.of(found.chosen.near[0])
    assert isinstance(look, HeldTime) and look.predicted < look.asked < look.measured.value
    relaxed = found.chosen.problem
    assert not broken_limits(relaxed, whole.layers, (1,), whole.head), "baselines are searched by the same costs"
    assert relaxed.budget.speedup == pytest.approx(look.predicted)


def test_the_parent_in_one_type_that_is_too_slow_is_no_child() -> None:
    asked, whole = nearly(1.05)
    found, seen = answered(asked, 1.0)
    assert seen[1:] == ["one type"] and found.chosen.near[0].layers == choose(asked).layers
    far, _ = nearly(1.2)
    assert answered(far, 1.3)[1][1:] == [], "so far off no costs are"
    enough, _ = nearly(0.9)
    assert answered(enough, 1.0)[1][1:] == [], "the search had it"


@pytest.mark.parametrize(("more", "timed_too"), [(1.04, True), (1.1, False)])
def test_the_parent_in_one_type_is_timed_where_scores_hardly_differ(more: float, timed_too: bool) -> None:
    asked, whole = nearly(1.05)
    child = choose(asked).model_copy(update={"score": whole.score / more})
    own, parents = timed_architecture(child, 1.0), timed_architecture(child, 1.0, parent=True)
    looks = times_of(asked, asked, child, own, parents)
    found = nearer_whole(asked, Held(chosen=Chosen(problem=asked, near=(child,)), looks=(looks,)))
    assert (found is not None) == timed_too


def test_what_was_not_timed_is_not_beside_the_parent_in_one_type() -> None:
    asked, _ = nearly(1.05)
    assert nearer_whole(asked, Held(chosen=Chosen(problem=asked, near=(choose(asked),)), looks=((),))) is None
