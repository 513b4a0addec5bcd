"""The search with a term for every two neighbouring layers, exact: products of choices as variables of their own.

    min  scores @ x + w sum_ijk sqrt(score_ij score_i+1,k) z_ijk    s.t.  sum_k z_ijk = x_ij,  sum_j z_ijk = x_i+1,k

beside one option per slot and the rows. z is continuous: with x whole, the sums leave z_ijk = x_ij x_i+1,k alone.
Slots are whole layers, in order. B = selections, S = slots, N = options.
"""

from typing import Any

import numpy as np

from profiles.schema import Search
from tasks.search.program import ROOM, Floats, Integers, Program, possible


def with_neighbours(program: Program, selections: Integers, weight: float) -> Floats:
    """(B,) objective of selections (B, S)."""
    scores = program.scores[selections]
    roots = np.sqrt(np.maximum(scores, 0))
    return np.asarray(scores.sum(axis=1) + weight * (roots[:, 1:] * roots[:, :-1]).sum(axis=1))


def minimise_with_neighbours(program: Program, weight: float, search: Search) -> Integers | None:
    """The selection (S,) of the least objective, or the best when time is up; None when there is none."""
    useful = possible(program)
    if not np.logical_or.reduceat(useful, program.starts).all():
        return None
    selection = _solve(program.only(useful), weight, search)
    return None if selection is None else np.flatnonzero(useful)[selection]


def _solve(program: Program, weight: float, search: Search) -> Integers | None:
    import cvxpy as cp
    from scipy.sparse import csr_array

    slots, count = program.slot_of, len(program.scores)
    left, right = _pairs(program)
    roots = np.sqrt(np.maximum(program.scores, 0))
    x, z = cp.Variable(count, boolean=True), cp.Variable(len(left), nonneg=True)
    every = np.arange(len(left))

    def sums(ends: Integers) -> Any:
        return csr_array((np.ones(len(ends)), (ends, every)), shape=(count, len(ends)))

    inner = slots < slots.max()  # options that have a right neighbour
    outer = slots > 0
    one = csr_array((np.ones(count), (slots, np.arange(count))), shape=(len(program.starts), count))
    rows: list[Any] = [one @ x == 1]
    if len(left):
        rows += [sums(left)[inner] @ z == x[inner], sums(right)[outer] @ z == x[outer]]
    if len(program.room):
        rows.append(program.usage @ x <= program.room)
    scale = float(np.abs(program.scores).max()) or 1.0
    objective = program.scores / scale @ x + (weight * roots[left] * roots[right] / scale) @ z
    model = cp.Problem(cp.Minimize(objective), rows)
    limits = {"mip_rel_gap": search.gap, "mip_abs_gap": 1e-9, "mip_feasibility_tolerance": ROOM}
    model.solve(solver=cp.HIGHS, time_limit=search.time_limit_seconds, primal_feasibility_tolerance=ROOM, **limits)
    if x.value is None or not np.allclose(one @ x.value, 1, atol=1e-4):
        return None
    ends = np.append(program.starts[1:], count)
    picks = [a + int(np.argmax(x.value[a:b])) for a, b in zip(program.starts, ends, strict=True)]
    return np.array(picks, dtype=np.int64)


def _pairs(program: Program) -> tuple[Integers, Integers]:
    """Both ends, option indices, of every two options of neighbouring slots."""
    options = np.split(np.arange(len(program.scores)), program.starts[1:])
    grids = [np.meshgrid(a, b, indexing="ij") for a, b in zip(options[:-1], options[1:], strict=True)]
    if not grids:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    left, right = (np.concatenate([grid[side].ravel() for grid in grids]) for side in (0, 1))
    return left, right
