"""The program in numbers: against brute force with every kind of constraint, against SCIP, and its laws."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from profiles.schema import Search
from tasks.search.incumbent import incumbent
from tasks.search.mip import (
    Answer,
    SolverStopped,
    _swap_types,
    _typed_relaxation,
    fewest_types,
    least_usage,
    minimise,
    relaxation,
)
from tasks.search.program import Program, possible

EXACT = Search(gap=1e-9, time_limit_seconds=60)


def instance(slots: int, options: int, seed: int, rows: int, room: float = 0.6) -> Program:
    """Cheaper options score worse, by a slot's own weight; the first option of a slot takes most and scores 0.

    room: of the sum of the first options. Every row is drawn for itself, so that all of them bind.
    """
    generator = np.random.default_rng(seed)
    share = -np.sort(-generator.uniform(0, 1, (slots, options)), axis=1)
    share[:, 0] = 1
    weight = generator.uniform(0.2, 3, (slots, 1))
    scores = weight * (1 - share) ** 2 * generator.lognormal(0, 0.3, share.shape)
    usage = share * generator.uniform(0.6, 1.4, (rows, *share.shape))
    usage /= room * usage[:, :, :1].sum(axis=1, keepdims=True)
    return Program(
        scores=scores.ravel(),
        starts=np.arange(slots) * options,
        usage=usage.reshape(rows, slots * options),
        room=np.ones(rows),
        types=np.tile(np.arange(options), slots),
    )


def every_selection(program: Program) -> list[tuple[int, ...]]:
    ends = np.append(program.starts[1:], len(program.scores))
    return list(itertools.product(*(range(a, b) for a, b in zip(program.starts, ends, strict=True))))


def fits(program: Program, selection: tuple[int, ...]) -> bool:
    chosen = list(selection)
    if program.max_types is not None:
        assert program.types is not None
        if len(set(program.types[chosen].tolist())) > program.max_types:
            return False
    return bool((program.usage[:, chosen].sum(axis=1) <= program.room + 1e-12).all())


def best_of_all(program: Program) -> float | None:
    found = [math.fsum(program.scores[list(one)]) for one in every_selection(program) if fits(program, one)]
    return min(found, default=None)


def check(program: Program, answer: Answer | None, best: float | None) -> None:
    assert (answer is None) == (best is None)
    if answer is None or best is None:
        return
    assert fits(program, tuple(answer.selection.tolist()))
    assert answer.objective == pytest.approx(best, rel=1e-7, abs=1e-10)
    assert answer.bound <= best + 1e-9
    assert answer.objective - answer.bound <= 1e-6 * max(1.0, abs(best))


@pytest.mark.parametrize("seed", range(6))  # each room with each sign of the scores
@pytest.mark.parametrize("max_types", [None, 2])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_like_brute_force(seed: int, max_types: int | None, rows: int) -> None:
    """Also where nothing fits: at a tenth of the room some of these have no answer."""
    program = instance(4, 5, seed, rows, room=(0.6, 0.25, 0.1)[seed % 3])
    program = replace(program, max_types=max_types, scores=program.scores - (0.5 if seed % 2 else 0.0))
    check(program, minimise(program, EXACT), best_of_all(program))


def test_brute_force_saw_both_sides() -> None:
    """The instances above: some have an answer, some none, and in most the rows bind."""
    bests = [best_of_all(instance(4, 5, seed, 3, room=(0.6, 0.25, 0.1)[seed % 3])) for seed in range(6)]
    assert any(best is None for best in bests)
    assert sum(best is not None and best > 0 for best in bests) >= 2


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_force_a_difference(seed: int) -> None:
    """A diversity row: the second answer differs from the first in 3 of 4 slots and is the best of those."""
    program = instance(4, 5, seed, 2)
    first = minimise(program, EXACT)
    assert first is not None
    same = np.zeros(len(program.scores))
    same[first.selection] = 1
    second = program.with_row(same / 4, 1 / 4)
    answer = minimise(second, EXACT)
    check(second, answer, best_of_all(second))
    assert answer is None or (answer.selection == first.selection).sum() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_every_option_costs_at_least_its_distance(seed: int) -> None:
    """bound <= optimum, and bound + distance_j <= the optimum that uses option j: what the core's proof rests on."""
    program = instance(4, 4, seed, 2)
    relaxed = relaxation(program, EXACT)
    assert relaxed is not None and (relaxed.prices >= 0).all() and relaxed.prices.any()
    for option in range(len(program.scores)):
        found = [
            math.fsum(program.scores[list(one)])
            for one in every_selection(program)
            if option in one and fits(program, one)
        ]
        assert min(found, default=math.inf) >= relaxed.bound + relaxed.distance[option] - 1e-9


@pytest.mark.parametrize("seed", range(4))  # a room each
@pytest.mark.parametrize("near, width", [(1, 1), (1, 1000), (2, 3), (4, 1000)])
def test_any_beam_before_the_solver(seed: int, near: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good first choice, a bad one or none: what it leaves to the solver never loses the best answer."""
    monkeypatch.setattr("tasks.search.incumbent._NEAR", near)
    monkeypatch.setattr("tasks.search.incumbent._WIDTHS", (width, 2 * width))
    program = instance(5, 5, seed, 3, room=(0.6, 0.45, 0.3, 0.1)[seed % 4])
    check(program, minimise(program, EXACT), best_of_all(program))


@pytest.mark.parametrize("seed", range(8))
def test_the_first_choice_keeps_the_rows_and_shrinks_the_program(seed: int) -> None:
    program = instance(6, 5, seed, 3, room=0.5)
    program = program.only(possible(program))
    relaxed, best = relaxation(program, EXACT), best_of_all(program)
    assert relaxed is not None and best is not None
    found = incumbent(program, relaxed, 0.0)
    assert found is not None and fits(program, tuple(found.tolist()))
    objective = math.fsum(program.scores[found])
    assert best - 1e-9 <= objective <= best + 0.1 * abs(best)
    left_out = relaxed.bound + relaxed.distance > objective
    assert left_out.any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap", [0.0, 0.02, 0.2])
def test_the_gap_is_kept(seed: int, gap: float) -> None:
    program = instance(6, 5, seed, 3, room=0.5)
    found, best = minimise(program, Search(gap=gap)), best_of_all(program)
    assert found is not None and best is not None
    assert found.status == "optimal" and found.bound <= best + 1e-9
    assert best - 1e-9 <= found.objective <= found.bound + gap * abs(found.objective) + 1e-9


def test_what_the_relaxation_proves_good_enough_is_not_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    program = instance(6, 5, 0, 3, room=0.5)
    monkeypatch.setattr("tasks.search.mip._solve", lambda *_: pytest.fail("the first choice was good enough"))
    found, best = minimise(program, Search(gap=0.9)), best_of_all(program)
    assert found is not None and best is not None and found.status == "optimal"
    assert found.bound <= best + 1e-9 and best - 1e-9 <= found.objective <= found.bound + 0.9 * found.objective


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_types", [1, 2, 3])
def test_with_few_types_every_option_costs_at_least_its_distance(seed: int, max_types: int) -> None:
    """And the answer from swaps has few types, fits and is not better than the best."""
    program = instance(4, 4, seed, 2)
    types = np.random.default_rng(seed).permuted(np.tile(np.arange(4), (4, 1)), axis=1).ravel()
    program = replace(program, types=types if seed % 2 else program.types, max_types=max_types)
    relaxed, best = _typed_relaxation(program, EXACT), best_of_all(program)
    if relaxed is None:
        assert best is None
        return
    selections = [one for one in every_selection(program) if fits(program, one)]
    for option in range(len(program.scores)):
        least = min((math.fsum(program.scores[list(one)]) for one in selections if option in one), default=math.inf)
        assert least >= relaxed.bound + relaxed.distance[option] - 1e-9
    found = _swap_types(program, relaxed, EXACT, math.inf)
    if found is not None:
        assert best is not None and math.fsum(program.scores[found]) >= best - 1e-9
        assert fits(program, tuple(found.tolist()))


def test_with_few_types_the_bound_is_the_linear_programs() -> None:
    """Distances that rule something out, a bound above that without types: what the test before would not miss."""
    program = replace(instance(12, 8, 0, 2), max_types=2)
    typed, plain = _typed_relaxation(program, EXACT), relaxation(program, EXACT)
    assert typed is not None and plain is not None
    assert typed.bound > plain.bound + 1e-3
    answer = minimise(program, EXACT)
    assert answer is not None and (typed.bound + typed.distance > answer.objective).any()
    found = _swap_types(program, typed, EXACT, math.inf)
    assert found is not None and math.fsum(program.scores[found]) <= 1.1 * answer.objective


@pytest.mark.parametrize("seed", range(6))
def test_least_usage_like_brute_force(seed: int) -> None:
    program = instance(4, 5, seed, 3, room=0.15)
    overruns = program.usage[:, np.array(every_selection(program))].sum(axis=2) - 1
    keeps = overruns[2] <= 0
    expected = overruns[:2].max(axis=0)[keeps].min() if keeps.any() else None
    assert least_usage(program, [0, 1], [2], EXACT) == (None if expected is None else pytest.approx(expected, abs=1e-6))
    assert least_usage(program, [0], [], EXACT) == pytest.approx(overruns[0].min(), abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_fewest_types_like_brute_force(seed: int) -> None:
    program = instance(4, 5, seed, 2, room=0.6)
    generator = np.random.default_rng(seed)
    types = generator.integers(0, 6, len(program.scores))
    program = replace(program, types=types)
    expected = min(len(set(types[list(one)].tolist())) for one in every_selection(program) if fits(program, one))
    assert fewest_types(program, EXACT) == expected


@pytest.mark.parametrize("seed", [0, 2])  # benchmarks/search.py does twenty
def test_like_scip_on_80_by_16_with_three_budgets(seed: int) -> None:
    program = instance(80, 16, seed, 3)
    answer = minimise(program, EXACT)
    assert answer is not None
    used = program.usage[:, answer.selection].sum(axis=1)
    assert (used <= 1 + 1e-9).all() and (used > 0.99).all()
    assert answer.objective == pytest.approx(scip(program), abs=1e-6)


def scip(program: Program) -> float:
    """The same program, written again for another solver."""
    import pyscipopt

    model = pyscipopt.Model()
    model.hideOutput()
    x = [model.addVar(vtype="B", obj=float(score)) for score in program.scores]
    for row in np.split(np.arange(len(x)), program.starts[1:]):
        model.addCons(pyscipopt.quicksum(x[j] for j in row) == 1)
    for usage, room in zip(program.usage, program.room, strict=True):
        model.addCons(pyscipopt.quicksum(float(used) * x[j] for j, used in enumerate(usage)) <= float(room))
    model.setParam("limits/gap", 1e-9)
    model.optimize()
    assert model.getStatus() in ("optimal", "gaplimit")
    return math.fsum(score * round(model.getVal(one)) for score, one in zip(program.scores, x, strict=True))


def test_no_time_is_told() -> None:
    with pytest.raises(SolverStopped, match=r"raise search\.time_limit_seconds"):
        minimise(instance(80, 40, 0, 3, room=0.4), Search(time_limit_seconds=1e-6))


def test_at_the_time_limit_the_answer_carries_its_gap() -> None:
    """Six block types of 54 are too hard for two seconds: what is there by then, and how far it may be off."""
    program = replace(instance(80, 54, 0, 3), max_types=6)
    answer = minimise(program, Search(time_limit_seconds=2))
    assert answer is not None and answer.status == "time_limit"
    assert fits(program, tuple(answer.selection.tolist()))
    assert answer.objective == pytest.approx(math.fsum(program.scores[answer.selection]))
    assert 0.5 * answer.objective < answer.bound < answer.objective


def test_a_first_choice_outlives_a_solver_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never called optimal; its bound is the LP's."""

    def stopped(*_: Any) -> None:
        raise SolverStopped("no time")

    program = instance(12, 8, 0, 2)
    best, relaxed = minimise(program, EXACT), relaxation(program, EXACT)
    monkeypatch.setattr("tasks.search.mip._solve", stopped)
    answer = minimise(program, EXACT)
    assert best is not None and relaxed is not None and answer is not None
    assert answer.status == "time_limit" and fits(program, tuple(answer.selection.tolist()))
    assert answer.bound == pytest.approx(relaxed.bound) and answer.bound < best.objective <= answer.objective


def test_scale_does_not_matter() -> None:
    """Scores of a tiny model or a huge one: the same choice."""
    program = instance(20, 6, 1, 2)
    selections = [minimise(replace(program, scores=program.scores * by), EXACT) for by in (1e-7, 1.0, 1e7)]
    assert all(one is not None and (one.selection == selections[1].selection).all() for one in selections)  # type: ignore[union-attr]
