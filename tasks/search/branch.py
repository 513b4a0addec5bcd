"""Branch and bound in numbers, thousands of partial choices at a time: slot after slot, kept while they can still win.

A partial choice is a sum of scores and a sum of every row. At prices p >= 0 of the rows no completion is cheaper than

    score + p @ used  +  sum over the slots to come of min_j (score_j + p @ usage_j)  -  p @ room

(Lagrange), so one matrix product per slot bounds all partial choices at many prices at once. The LP's own prices are
the best at the start; around them a cloud of others is drawn, since what has been chosen so far shifts them. It is
depth first over blocks of the most promising partial choices: the first block already ends in a good answer, and
memory is bounded by slots x block. Every bound holds at any prices, so nothing rests on how they were drawn.
"""

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np

from tasks.search.program import ROOM, Flags, Floats, Integers, Program, Relaxation, worth

_FIRST_CORE = 4  # options per slot of the first search, whose answer narrows the second
_FIRST = 2048  # children per block of the first search; it may make four blocks per slot
_BLOCK = 16384  # of the second
_MOST = 3_000_000  # partial choices, about two seconds
_SPREADS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of the logarithm of the prices
_DRAWS = 8  # price vectors per spread


@dataclass(frozen=True, kw_only=True, eq=False)
class Purse:
    """What may be spent: partial choices in all, children of one block, and when (time.perf_counter) to stop."""

    choices: int
    block: int
    ends: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """selection (S,) if any, its objective or inf, a proven bound of all answers; finished: nothing is left to try."""

    selection: Integers | None
    objective: float
    bound: float
    finished: bool

    def among(self, kept: Flags) -> "Found":
        """The same of a program of which this one was `only(kept)`."""
        if self.selection is None:
            return self
        return replace(self, selection=np.flatnonzero(kept)[self.selection])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Block:
    """n partial choices after `depth` slots: sums (1 + R, n) of score and rows, floor (n,) at the LP's prices, bound.

    up, origin (n,), option (n,): the block they were made from, which of its choices, what was added.
    """

    depth: int
    sums: Floats
    floor: Floats
    bound: Floats
    up: "_Block | None" = None
    origin: Integers = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    option: Integers = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def only(self, which: Integers | Flags) -> "_Block":
        return _Block(
            depth=self.depth,
            sums=self.sums[:, which],
            floor=self.floor[which],
            bound=self.bound[which],
            up=self.up,
            origin=self.origin[which],
            option=self.option[which],
        )


def branch(program: Program, relaxed: Relaxation, gap: float, ends: float) -> Found:
    """The best choice, twice searched: first among the options closest to the LP's, then all that could beat that.

    Unfinished when it is too hard for the purse; what was found and proven holds all the same.
    """
    near = nearest(program, relaxed.distance)
    first = quick(program, relaxed, gap, ends)
    useful = relaxed.useful(first.objective, gap)
    outside = relaxed.bound + float(relaxed.distance[~useful].min(initial=math.inf))
    if not useful.any() or (first.finished and not (useful & ~near).any()):
        return replace(first, bound=min(first.bound, outside, first.objective), finished=True)
    purse = Purse(choices=_MOST, block=_BLOCK, ends=ends)
    second = Branching(program.only(useful), relaxed.only(useful), gap, below=first.objective).run(purse).among(useful)
    selection = first.selection if second.selection is None else second.selection
    return replace(second, selection=selection, bound=min(second.bound, outside))


def quick(program: Program, relaxed: Relaxation, gap: float, ends: float) -> Found:
    """A good choice in some hundredths of a second; what it proves holds for the options closest to the LP's alone."""
    near = nearest(program, relaxed.distance)
    purse = Purse(choices=4 * _FIRST * len(program.starts), block=_FIRST, ends=ends)
    return Branching(program.only(near), relaxed.only(near), gap).run(purse).among(near)


def nearest(program: Program, distance: Floats) -> Flags:
    """(N,) true for the options of least distance, four a slot on average and one at least in every slot."""
    count = _FIRST_CORE * len(program.starts)
    if count >= len(distance):
        return np.ones(len(distance), dtype=bool)
    near = distance <= np.partition(distance, count)[count]
    return np.asarray(near | (distance <= np.minimum.reduceat(distance, program.starts)[program.slot_of]))


class Branching:
    """One search; `below`: only answers cheaper than this are of interest."""

    def __init__(self, program: Program, relaxed: Relaxation, gap: float, below: float = math.inf) -> None:
        self.program, self.gap, self.distance = program, gap, relaxed.distance
        self.best: Integers | None = None
        self.objective = below
        self.lowest = math.inf  # least bound of anything given up that could be below the best
        self.columns = np.vstack([program.scores, program.usage])
        slots = np.split(np.arange(len(program.scores)), program.starts[1:])
        # Slots in which a second choice is dear come first: they multiply the partial choices least.
        self.order = sorted(range(len(slots)), key=lambda slot: (len(slots[slot]) > 1, -self._second(slots[slot])))
        self.slots = [slots[slot] for slot in self.order]
        prices = _prices(relaxed.prices)
        self.weights = np.hstack([np.ones((len(prices), 1)), prices])
        reduced = self.weights @ self.columns
        self.rest = self._to_come(reduced) - (prices @ program.room)[:, None]
        self.least = self._to_come(program.usage)
        self.start = _Block(
            depth=0,
            sums=np.zeros((len(self.columns), 1)),
            floor=np.array([relaxed.bound]),
            bound=self.rest[:, 0].max(keepdims=True),
        )

    def _second(self, slot: Integers) -> float:
        return float(np.partition(self.distance[slot], 1)[1]) if len(slot) > 1 else math.inf

    def _to_come(self, values: Floats) -> Floats:
        """(V, S + 1): least sums over the slots from a depth on, of values (V, N)."""
        least = np.stack([values[:, slot].min(axis=1) for slot in self.slots], axis=1)
        sums = np.zeros((len(values), len(self.slots) + 1))
        sums[:, :-1] = np.cumsum(least[:, ::-1], axis=1)[:, ::-1]
        return sums

    @property
    def cutoff(self) -> float:
        """What has a bound from here on is given up."""
        return worth(self.objective, self.gap)

    def run(self, purse: Purse) -> Found:
        """Until nothing is left or the purse is empty."""
        left, spent = [self.start], 0
        while left and spent < purse.choices and time.perf_counter() < purse.ends:
            block = self._kept(left.pop())
            width = max(1, purse.block // len(self.slots[block.depth]))
            if len(block.bound) > width:
                near = np.argpartition(block.bound, width)
                left.append(block.only(near[width:]))
                block = block.only(near[:width])
            if not len(block.bound):
                continue
            children = self._children(block)
            spent += len(children.bound)
            if children.depth < len(self.slots):
                left.append(children)
            else:
                self._finish(children)
        bound = min([self.lowest, self.objective, *(float(block.bound.min(initial=math.inf)) for block in left)])
        return Found(
            selection=self.best, objective=self.objective, bound=bound, finished=not left or bound >= self.cutoff
        )

    def _kept(self, block: _Block) -> _Block:
        keep = block.bound < self.cutoff
        if keep.all():
            return block
        self.lowest = min(self.lowest, float(block.bound[~keep].min()))
        return block.only(keep)

    def _children(self, block: _Block) -> _Block:
        """Every choice of the block with every option of the next slot, less what a bound or a row rules out."""
        slot, depth = self.slots[block.depth], block.depth + 1
        floor = block.floor[:, None] + self.distance[slot]
        keep = floor < self.cutoff
        self.lowest = min(self.lowest, float(floor.min(where=~keep, initial=math.inf)))
        origin, pick = np.nonzero(keep)
        floor, option = floor[keep], slot[pick]
        sums = block.sums[:, origin] + self.columns[:, option]
        fits = sums[1:] + self.least[:, depth : depth + 1] <= self.program.room[:, None] + ROOM
        bound = (self.weights @ sums + self.rest[:, depth : depth + 1]).max(axis=0, initial=-math.inf)
        children = _Block(depth=depth, sums=sums, floor=floor, bound=bound, up=block, origin=origin, option=option)
        return self._kept(children.only(np.asarray(fits.all(axis=0))))

    def _finish(self, block: _Block) -> None:
        """The cheapest of the complete choices, when it is the best so far."""
        if not len(block.bound):
            return
        index, at = int(block.sums[0].argmin()), block
        selection = np.zeros(len(self.slots), dtype=np.int64)
        while at.up is not None:
            selection[self.order[at.depth - 1]] = at.option[index]
            index, at = int(at.origin[index]), at.up
        objective = math.fsum(self.program.scores[selection])
        if objective < self.objective:
            self.best, self.objective = selection, objective


def _prices(best: Floats) -> Floats:
    """(P, R): the LP's prices first, then a cloud around them; free rows get a price in half of it."""
    generator = np.random.default_rng(0)
    some = np.maximum(best, 0.05 * best.max(initial=0.0))
    cloud = [
        base * np.exp(generator.normal(0, spread, (_DRAWS // 2, len(best))))
        for spread in _SPREADS
        for base in (best, some)
    ]
    return np.vstack([best, *cloud])
