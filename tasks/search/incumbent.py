"""A good choice in a few hundredths of a second, by beam search: it shrinks the program that HiGHS then solves.

An option whose reduced cost lifts the bound above a known choice cannot be part of a better one. So the better the
known choice, the fewer options HiGHS has to look at. No proof rests on this file: HiGHS proves the answer among the
options that are left, and tasks/search/mip.py states the bound of those that are not. Where time ends before HiGHS has
an answer as good, the choice found here is shown with the status "time_limit" and the bound proven by then.

The beam decides slot after slot. It keeps the partial choices with the lowest Lagrangian bound. At prices p >= 0 of the
rows no completion of a partial choice is cheaper than

    score + p @ used  +  sum over the slots to come of min_j (score_j + p @ usage_j)  -  p @ room

Before anything is chosen, the dual prices of the LP relaxation give the best bound. Every choice made shifts the best
prices, so the beam also tries prices drawn at random around them. It runs twice: among few options first, and then,
wider, among all that could be part of a better choice, without what is bound to be no better.
"""

import math

import numpy as np

from tasks.search.program import ROOM, Flags, Floats, Integers, Program, Relaxation

_NEAR = 4  # options per slot, on average, among which it looks
_WIDTHS = (1024, 8192)  # partial choices that are kept at first, and then
_SPREADS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # of the logarithm of the prices
_DRAWS = 8  # price vectors per spread
_FREE = (0.002, 0.1)  # prices of rows that cost nothing in the relaxation, of the highest price


def incumbent(program: Program, relaxed: Relaxation, gap: float) -> Integers | None:
    """A choice (S,) that keeps all rows; None when the beam ends in none, which proves nothing.

    gap: as a share of its score, a choice that is so close to the relaxation's bound is good enough.
    """
    best, least, kept = None, math.inf, _nearest(program, relaxed.distance)
    for width in _WIDTHS:
        found = _beam(program.only(kept), relaxed, relaxed.distance[kept], least, width)
        if found is None or (value := math.fsum(program.scores[kept][found])) >= least:
            break
        best, least = np.flatnonzero(kept)[found], value
        if least - relaxed.bound <= gap * abs(least):
            break
        kept = relaxed.bound + relaxed.distance < least
        if not np.logical_or.reduceat(kept, program.starts).all():
            break  # nothing is better
    return best


def _nearest(program: Program, distance: Floats) -> Flags:
    """(N,) true for the options of least distance, at least one in every slot."""
    count = _NEAR * len(program.starts)
    if count >= len(distance):
        return np.ones(len(distance), dtype=bool)
    near = distance <= np.partition(distance, count)[count]
    return np.asarray(near | (distance <= np.minimum.reduceat(distance, program.starts)[program.slot_of]))


def _beam(program: Program, relaxed: Relaxation, distance: Floats, least: float, width: int) -> Integers | None:
    """The best of `width` partial choices that could be below `least` in the end; None where none is left."""
    slots = program.slots
    # Slots in which a second choice is dear come first: they multiply the partial choices least.
    order = sorted(range(len(slots)), key=lambda slot: -_second(distance[slots[slot]]))
    columns = np.vstack([program.scores, program.usage])
    prices = _cloud(relaxed.prices)
    weights = np.hstack([np.ones((len(prices), 1)), prices])
    rest = _to_come(weights @ columns, [slots[slot] for slot in order]) - (prices @ program.room)[:, None]
    still = _to_come(program.usage, [slots[slot] for slot in order])
    sums, steps = np.zeros((len(columns), 1)), list[tuple[Integers, Integers]]()
    for depth, slot in enumerate(slots[place] for place in order):
        sums = (sums[:, :, None] + columns[:, None, slot]).reshape(len(columns), -1)
        fits = (sums[1:] + still[:, depth + 1, None] <= program.room[:, None] + ROOM).all(axis=0)
        bound = np.where(fits, (weights @ sums + rest[:, depth + 1, None]).max(axis=0), np.inf)
        kept = np.flatnonzero(bound < least)
        kept = kept[np.argpartition(bound[kept], width)[:width]] if len(kept) > width else kept
        if not len(kept):
            return None
        sums = sums[:, kept]
        steps.append((kept // len(slot), slot[kept % len(slot)]))
    selection, at = np.zeros(len(slots), dtype=np.int64), int(sums[0].argmin())
    for place, (origin, option) in zip(reversed(order), reversed(steps), strict=True):
        selection[place], at = option[at], int(origin[at])
    return selection


def _second(distance: Floats) -> float:
    return float(np.partition(distance, 1)[1]) if len(distance) > 1 else np.inf


def _to_come(values: Floats, slots: list[Integers]) -> Floats:
    """(V, S + 1): least sums over the slots from a depth on, of values (V, N)."""
    least = np.stack([values[:, slot].min(axis=1) for slot in slots], axis=1)
    return np.hstack([np.cumsum(least[:, ::-1], axis=1)[:, ::-1], np.zeros((len(values), 1))])


def _cloud(best: Floats) -> Floats:
    """(P, R): the LP relaxation's prices first, then random ones around; free rows get a price in half of those."""
    generator, shape = np.random.default_rng(0), (_DRAWS // 2, len(best))
    cloud = [best]
    for spread in _SPREADS:
        free = best.max(initial=0.0) * np.exp(generator.uniform(math.log(_FREE[0]), math.log(_FREE[1]), shape))
        cloud += [base * np.exp(generator.normal(0, spread, shape)) for base in (best, np.maximum(best, free))]
    return np.vstack(cloud)
