"""Searches that see of an architecture its summed score and what it overruns, nothing of the sum's structure.

Both work on the numbers of tasks/mip.py and answer with the best selection they met that keeps every row, or None.
Options of a slot are ordered by what they take, so that neighbours are alike.
"""

import numpy as np

from tasks.mip import ROOM, Floats, Integers, Program

GENERATIONS, POPULATION = 300, 10  # of differential evolution; the population is POPULATION x slots
STEPS, BATCH, RATE = 400, 256, 0.1  # of the policy gradient
_PENALTY = 10.0  # of overrunning all rows by a whole limit, in units of the spread of scores


class _Met:
    """Remembers the best selection so far; gives every selection its penalised score."""

    def __init__(self, program: Program) -> None:
        sizes = np.diff(np.append(program.starts, len(program.scores)))
        taken = program.usage.sum(axis=0) if len(program.room) else program.scores
        self.order = np.lexsort((taken, program.slot_of))
        self.program, self.sizes = program, sizes
        lows, highs = (np.array([f(s) for s in np.split(program.scores, program.starts[1:])]) for f in (np.min, np.max))
        self.scale = float((highs - lows).sum()) or 1.0
        self.best, self.objective = None, np.inf

    def selection(self, picks: Integers) -> Integers:
        """Option indices (B, S) of places (B, S) within the slots."""
        return np.asarray(self.order[self.program.starts + picks])

    def __call__(self, picks: Integers) -> Floats:
        """(B,) score / scale + penalty of places (B, S)."""
        selection = self.selection(picks)
        scores = self.program.scores[selection].sum(axis=1)
        overrun = self.program.usage[:, selection].sum(axis=2) - self.program.room[:, None]  # (R, B)
        keeps = (overrun <= ROOM).all(axis=0)
        if keeps.any():
            at = int(np.where(keeps, scores, np.inf).argmin())
            if scores[at] < self.objective:
                self.best, self.objective = selection[at].copy(), float(scores[at])
        return np.asarray(scores / self.scale + _PENALTY * np.maximum(overrun, 0).sum(axis=0))


def evolve(program: Program, generator: np.random.Generator) -> Integers | None:
    """Differential evolution (scipy) over one integer per slot."""
    from scipy.optimize import differential_evolution

    met = _Met(program)
    free = np.flatnonzero(met.sizes > 1)
    if not len(free):
        met(np.zeros((1, len(met.sizes)), dtype=np.int64))
        return met.best

    def penalised(x: Floats) -> Floats:
        picks = np.zeros((x.shape[1], len(met.sizes)), dtype=np.int64)
        picks[:, free] = np.rint(x.T).astype(np.int64)
        return met(picks)

    differential_evolution(
        penalised,
        bounds=[(0, int(size) - 1) for size in met.sizes[free]],
        integrality=np.ones(len(free), dtype=bool),
        maxiter=GENERATIONS,
        popsize=POPULATION,
        tol=0,
        polish=False,
        vectorized=True,
        updating="deferred",
        rng=generator,
    )
    return met.best


def reinforce(program: Program, generator: np.random.Generator) -> Integers | None:
    """REINFORCE (Williams, 1992), a batch's mean as baseline: one softmax per slot, sampled and pushed by reward."""
    import torch

    met = _Met(program)
    width = int(met.sizes.max())
    blocked = torch.arange(width) >= torch.tensor(met.sizes)[:, None]  # (S, W)
    logits = torch.zeros(len(met.sizes), width, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=RATE)
    draws = torch.Generator().manual_seed(int(generator.integers(2**31)))
    for _ in range(STEPS):
        policy = logits.masked_fill(blocked, -torch.inf).log_softmax(dim=1)
        picks = torch.multinomial(policy.detach().exp(), BATCH, replacement=True, generator=draws)  # (S, B)
        reward = -torch.from_numpy(met(picks.T.numpy())).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-8)
        loss = -(policy.gather(1, picks).sum(dim=0) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return met.best
