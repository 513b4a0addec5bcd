"""The search that sees an objective alone: it keeps rows and count, finds the best of small programs, repeats."""

from dataclasses import replace

import numpy as np
import pytest

from tasks.search.mip import minimise
from tasks.search.program import Floats, Integers, Program
from tasks.studies.black_box import BlackBox, evolve
from tests.test_mip import EXACT, every_selection, fits, instance


def box_of(program: Program, evaluations: int = 20_000, seed: int = 0, objective: object = None) -> BlackBox:
    return BlackBox(
        program=program,
        objective=objective or (lambda chosen: program.scores[chosen].sum(axis=1)),  # type: ignore[arg-type]
        evaluations=evaluations,
        generator=np.random.default_rng(seed),
    )


@pytest.mark.parametrize("seed", range(3))
def test_they_find_the_best_of_a_small_program_whatever_the_objective(seed: int) -> None:
    """An objective that no sum over slots is: neighbours that are both far from the first option hurt twice."""
    program = instance(4, 5, seed, 2)
    asked: list[tuple[int, ...]] = []

    def entangled(chosen: Integers) -> Floats:
        asked.extend(tuple(one) for one in chosen.tolist())
        sums = program.scores[chosen]
        return np.asarray(sums.sum(axis=1) + 3 * (sums[:, 1:] * sums[:, :-1]).sum(axis=1))

    found = evolve(box_of(program, 2000, seed, entangled))
    assert found is not None and all(fits(program, one) for one in asked)
    assert len(asked) == len(set(asked)) <= 2000
    best = min(float(entangled(np.array([one]))[0]) for one in every_selection(program) if fits(program, one))
    assert float(entangled(found[None])[0]) == pytest.approx(best, rel=1e-9)


def test_they_come_close_on_a_larger_one() -> None:
    """30 slots of 12: within 15 % of the certified best, where the mean of random fitting ones is over twice it."""
    program = instance(30, 12, 0, 2)
    best = minimise(program, EXACT)
    box = box_of(program)
    chance = program.scores[box.begin(200)].sum(axis=1).mean()
    found = evolve(box)
    assert best is not None and found is not None and fits(program, tuple(found.tolist()))
    assert best.objective <= program.scores[found].sum() + 1e-9
    assert program.scores[found].sum() < 1.15 * best.objective < 0.5 * chance


@pytest.mark.parametrize("most", [1, 3, 40])
def test_no_more_is_evaluated_than_asked(most: int) -> None:
    box = box_of(instance(30, 12, 1, 2), most)
    found = evolve(box)
    assert found is not None and 1 <= len(box.known) <= most
    assert box.value == min(box.known.values()) == box.program.scores[found].sum()


def test_nothing_fits() -> None:
    program = instance(4, 5, 0, 2)
    assert evolve(box_of(replace(program, room=program.room * 0.01))) is None


def test_one_option_slots_and_seeds() -> None:
    """Slots without a choice stand; a seed repeats."""
    program = instance(6, 5, 1, 1)
    kept = np.ones(len(program.scores), dtype=bool)
    kept[[1, 2, 3, 4]] = False  # slot 0: the parent's own alone
    program = program.only(kept)
    first, again = (evolve(box_of(program, 500, 5)) for _ in range(2))
    assert first is not None and again is not None and (first == again).all() and first[0] == 0
    alone = program.only(np.isin(np.arange(len(program.scores)), program.starts))
    assert evolve(box_of(alone)) is None  # all parents: over the room
    loose = replace(alone, room=alone.room * 10)
    only = evolve(box_of(loose))
    assert only is not None and (only == loose.starts).all()
