"""Local repair of an architecture on its true quality: swap one or two options within the budget, keep what helps.

The summed scores say which swaps to try first, the measured KL which to keep: only where the differences, sequence by
sequence, lie beyond their noise. So the true KL on the sequences looked at never gets worse.

S = slots, N = options, R = rows, T = sequences.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from blocks.estimates import is_below_zero, mean
from blocks.records import Value
from tasks.running.progress import Progress, no_progress
from tasks.search.program import ROOM, Floats, Integers, Program

LEVEL = 0.05  # chance that a round of swaps none of which helps is nevertheless taken to help
ROUND = 8  # swaps tried before the best of them is kept
_NEAREST = 400  # single swaps, lowest summed score first, that pairs are made of
_REPEAT = 2  # how often one single swap may come up in a round

Measure = Callable[[Integers], Floats]  # a selection (S,) -> KL of every sequence (T,)


class Step(Value):
    """One swap that was kept: options by index, change of the summed score, of the true KL, and its paired error."""

    options: tuple[int, ...]
    predicted_change: float
    true_change: float
    se: float


class Repair(Value):
    """Where the swaps led, which were kept, how many were measured."""

    selection: tuple[int, ...]
    steps: tuple[Step, ...]
    evaluations: int


def paired(differences: Floats, documents: Sequence[int] = ()) -> tuple[float, float]:
    """Mean of paired differences (T,) and its standard error; inf for a single document, which shows no noise."""
    found = mean(differences, documents).metric
    return found.value, found.se if found.n > 1 else math.inf


def beyond_noise(differences: Floats, comparisons: int = 1, documents: Sequence[int] = ()) -> bool:
    """True when paired differences (T,) are below 0 by a one-sided t test, its level shared among the comparisons.

    documents: that of each sequence, where it is known.
    """
    return is_below_zero(mean(differences, documents).metric, LEVEL, comparisons)


def nearest_swaps(program: Program, selection: Integers, count: int, tried: set[bytes]) -> list[Integers]:
    """Up to `count` untried selections one or two swaps away that keep all rows, lowest summed score first."""
    change = program.scores - program.scores[selection][program.slot_of]
    use = program.usage - program.usage[:, selection][:, program.slot_of]
    change[selection] = math.inf
    near = np.argsort(change, kind="stable")[: min(_NEAREST, len(change) - len(selection))]
    room = program.room - program.usage[:, selection].sum(axis=1) + ROOM
    first, second = np.triu_indices(len(near))  # the diagonal: a swap alone
    pair = use[:, near[first]] + np.where(first == second, 0.0, use[:, near[second]])
    apart = program.slot_of[near[first]] != program.slot_of[near[second]]
    fits = (pair <= room[:, None]).all(axis=0) & (apart | (first == second))
    total = change[near[first]] + np.where(first == second, 0.0, change[near[second]])
    order = np.flatnonzero(fits)[np.argsort(total[fits], kind="stable")]
    found: list[Integers] = []
    seen = dict.fromkeys(near.tolist(), 0)
    for place in order:
        moves = {int(near[first[place]]), int(near[second[place]])}
        swapped = selection.copy()
        swapped[program.slot_of[list(moves)]] = list(moves)
        if swapped.tobytes() in tried or any(seen[move] >= _REPEAT for move in moves):
            continue
        for move in moves:
            seen[move] += 1
        found.append(swapped)
        if len(found) == count:
            break
    return found


def swap_repair(
    program: Program,
    start: Integers,
    measure: Measure,
    evaluations: int,
    progress: Progress = no_progress,
    documents: Sequence[int] = (),
) -> Repair:
    """Rounds of swaps from `start` (S,), which keeps the rows; the best of a round is kept if it is beyond noise.

    The start is measured besides the `evaluations`. documents: that of each sequence, where it is known.
    """
    selection = np.array(start, dtype=np.int64)
    now, spent, steps = measure(selection), 0, list[Step]()
    tried = {selection.tobytes()}
    while spent < evaluations:
        swaps = nearest_swaps(program, selection, min(ROUND, evaluations - spent), tried)
        if not swaps:
            break
        measured = []
        for swap in swaps:
            measured.append(measure(swap))
            tried.add(swap.tobytes())
            spent += 1
            progress(spent, evaluations)
        best = int(np.argmin([found.mean() for found in measured]))
        if beyond_noise(measured[best] - now, len(swaps), documents):
            steps.append(_step(program, (selection, swaps[best]), measured[best] - now, documents))
            selection, now = swaps[best], measured[best]
    return Repair(selection=tuple(selection.tolist()), steps=tuple(steps), evaluations=spent)


def _step(program: Program, swap: tuple[Integers, Integers], differences: Floats, documents: Sequence[int]) -> Step:
    before, after = swap
    change, error = paired(differences, documents)
    return Step(
        options=tuple(after[after != before].tolist()),
        predicted_change=float(program.scores[after].sum() - program.scores[before].sum()),
        true_change=change,
        se=error,
    )
