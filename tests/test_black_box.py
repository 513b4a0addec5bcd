"""Searches that see sums alone: they keep the rows, come close to the best of all, and repeat with their seed."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tasks.black_box import evolve, reinforce
from tasks.mip import Integers, Program, minimise
from tests.test_mip import EXACT, best_of_all, fits, instance

Search = Callable[[Program, np.random.Generator], Integers | None]
SEARCHES = pytest.mark.parametrize("search", [evolve, reinforce])


@SEARCHES
@pytest.mark.parametrize("seed", range(3))
def test_they_find_the_best_of_a_small_program(search: Search, seed: int) -> None:
    program = instance(4, 5, seed, 2)
    found = search(program, np.random.default_rng(seed))
    assert found is not None and fits(program, tuple(found.tolist()))
    assert program.scores[found].sum() == pytest.approx(best_of_all(program), rel=1e-9)


@SEARCHES
def test_they_come_close_on_a_larger_one(search: Search) -> None:
    """30 slots of 12: within 15 % of the certified best, and far better than chance."""
    program = instance(30, 12, 0, 2)
    best = minimise(program, EXACT)
    found = search(program, np.random.default_rng(0))
    assert best is not None and found is not None and fits(program, tuple(found.tolist()))
    assert best.objective <= program.scores[found].sum() + 1e-9
    assert program.scores[found].sum() < 1.15 * best.objective


@SEARCHES
def test_nothing_fits(search: Search) -> None:
    program = instance(4, 5, 0, 2)
    assert search(replace(program, room=program.room * 0.01), np.random.default_rng(0)) is None


@SEARCHES
def test_one_option_slots_and_seeds(search: Search) -> None:
    """Slots without a choice stand; a seed repeats."""
    program = instance(6, 5, 1, 1)
    kept = np.ones(len(program.scores), dtype=bool)
    kept[[1, 2, 3, 4]] = False  # slot 0: the parent's own alone
    program = program.only(kept)
    first, again = (search(program, np.random.default_rng(5)) for _ in range(2))
    assert first is not None and again is not None and (first == again).all() and first[0] == 0
    alone = program.only(np.isin(np.arange(len(program.scores)), program.starts))
    assert search(alone, np.random.default_rng(0)) is None  # all parents: over the room
