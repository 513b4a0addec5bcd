"""Selections brought within the rows of a program, and filled up to them, without a look at any score.

Many selections at a time: every open one makes one random swap of an option per round.
B = selections, S = slots, N = options, R = rows.
"""

import numpy as np

from tasks.search.program import ROOM, Flags, Floats, Integers, Program

FULL = 0.98  # share of the tightest row at which filling up may stop


def taken(program: Program, selections: Integers) -> Floats:
    """What every selection (B, S) takes of every row: (B, R)."""
    return np.asarray(program.usage[:, selections].sum(axis=2).T)


def keeps(program: Program, selections: Integers) -> Flags:
    """(B,) true where every row holds."""
    return np.asarray((taken(program, selections) <= program.room + ROOM).all(axis=1))


def after_swaps(program: Program, selections: Integers) -> Floats:
    """(B, R, N) what would be taken if option n stood in its slot instead of what is selected there."""
    selected = program.usage[:, selections[:, program.slot_of]].transpose(1, 0, 2)
    return np.asarray(taken(program, selections)[:, :, None] + program.usage - selected)


def draw(program: Program, count: int, generator: np.random.Generator) -> Integers:
    """`count` selections (B, S), each option of a slot equally likely; they may break rows."""
    return np.asarray(program.starts + generator.integers(0, program.sizes, (count, len(program.sizes))))


def within(
    program: Program, selections: Integers, generator: np.random.Generator, filled: float = 1.0
) -> tuple[Integers, Flags]:
    """The selections (B, S) after repair and, a share of them, filling up; and which (B,) keep every row."""
    mended = _repaired(program, np.array(selections), generator)
    kept = keeps(program, mended)
    filling = kept & (generator.random(len(mended)) < filled)
    mended[filling] = _filled(program, mended[filling], generator)
    return mended, kept


def _repaired(program: Program, selections: Integers, generator: np.random.Generator) -> Integers:
    """Swaps that lessen the summed overrun, until it is 0 or no single swap lessens it."""
    moving = np.flatnonzero(~keeps(program, selections))
    while len(moving):
        over = _overrun(program, taken(program, selections[moving])[:, :, None])[:, 0]
        left = _overrun(program, after_swaps(program, selections[moving]))
        moving = moving[_swap(program, selections, moving, left < over[:, None] - ROOM, generator)]
        moving = moving[~keeps(program, selections[moving])]
    return selections


def _filled(program: Program, selections: Integers, generator: np.random.Generator) -> Integers:
    """Swaps that take more of the tightest row and keep all, until it is nearly used; each takes more, so it ends."""
    moving = np.arange(len(selections) if len(program.room) else 0)
    while len(moving):
        share = taken(program, selections[moving]) / program.room
        moving = moving[share.max(axis=1) < FULL]
        now = taken(program, selections[moving])
        tightest = (now / program.room).argmax(axis=1)
        after = after_swaps(program, selections[moving])
        rows = np.arange(len(moving))
        useful = after[rows, tightest] > now[rows, tightest][:, None] + ROOM
        useful &= (after <= program.room[:, None] + ROOM).all(axis=1)
        moving = moving[_swap(program, selections, moving, useful, generator)]
    return selections


def _overrun(program: Program, used: Floats) -> Floats:
    """(B, n) summed overrun of used (B, R, n)."""
    return np.asarray(np.maximum(used - program.room[:, None], 0).sum(axis=1))


def _swap(
    program: Program, selections: Integers, which: Integers, useful: Flags, generator: np.random.Generator
) -> Flags:
    """Make one random useful swap (B, N) in every row of `selections` named by `which`, in place; who moved (B,)."""
    moved = useful.any(axis=1)
    keys = np.where(useful, generator.random(useful.shape), -1.0)
    option = keys.argmax(axis=1)[moved]
    selections[which[moved], program.slot_of[option]] = option
    return np.asarray(moved)
