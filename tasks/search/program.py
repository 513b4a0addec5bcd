"""A choice in numbers: one option of every slot, scores that add up, rows that must not be exceeded."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# N = options, S = slots, R = rows
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

ROOM = 1e-9  # how far, of a whole limit, the solver may overstep; the check afterwards allows 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """options slot after slot: scores (N,), starts (S,) first option of each slot, usage (R, N) <= room (R,) in sum.

    types: (N,) type of every option, different within a slot; needed with max_types alone. Rows should be scaled so
    that a limit is about 1.
    """

    scores: Floats
    starts: Integers
    usage: Floats
    room: Floats
    types: Integers | None = None
    max_types: int | None = None

    @property
    def sizes(self) -> Integers:
        """(S,) number of options of every slot."""
        return np.diff(np.append(self.starts, len(self.scores)))

    @property
    def slots(self) -> list[Integers]:
        """Option indices of every slot."""
        return np.split(np.arange(len(self.scores)), self.starts[1:])

    @property
    def slot_of(self) -> Integers:
        """(N,) slot of every option."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)

    def only(self, kept: Flags) -> "Program":
        """The program over the options where `kept` (N,) is true; every slot must keep one."""
        slots = self.slot_of[kept]
        starts = np.searchsorted(slots, np.arange(len(self.starts)))
        types = None if self.types is None else self.types[kept]
        return replace(self, scores=self.scores[kept], starts=starts, usage=self.usage[:, kept], types=types)

    def with_row(self, usage: Floats, room: float) -> "Program":
        """The program with one more row."""
        return replace(self, usage=np.vstack([self.usage, usage]), room=np.append(self.room, room))


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxation:
    """The LP: bound, prices (R,) of the rows (>= 0), distance (N,) by which the bound rises when an option is used."""

    bound: float
    prices: Floats
    distance: Floats


def possible(program: Program) -> Flags:
    """(N,) false for options that break a row even with the cheapest of every other slot.

    They cannot be chosen, and numbers far beyond a limit are what a solver fails on.
    """
    least = np.minimum.reduceat(program.usage, program.starts, axis=1)
    others = least.sum(axis=1, keepdims=True) - least[:, program.slot_of]
    return np.asarray((program.usage + others <= program.room[:, None] + ROOM).all(axis=0))
