"""Adaptive scoring: every variant is scored on a few sequences, and on more only while that may change the choice.

After each round the MIP is solved with the scores so far. Then, for every variant j that was not chosen, scoring asks:
what if the chosen variant of this slot is exchanged for j? The objective rises by d_j >= 0 (the difference of the
scores, and of what the two take of the budgets, valued by the LP relaxation). But d_j has a standard error. If the true
difference is below 0, j was the better choice. What j is expected to gain is E[max(0, -(d_j + error))] under Student's
t. The sum of these gains bounds what is expected to be lost by stopping now ("expected opportunity cost", Chick and
Inoue, Oper. Res. 49, 2001). Scoring stops when the sum is below a tolerance. Until then the variants with the largest
gains get more sequences. The smallest gains, which together make up less than half of the tolerance, are left alone.

All variants see the same sequences in the same order, and two variants are compared on the sequences that both have
seen. Some variants were scored on fewer sequences than others, and some sequences are harder for every variant. So each
score is modelled as (level of the variant) x (difficulty of the sequence), the chain-ladder estimator. The levels can
then be compared. The difficulty is common to all variants, cannot change a choice, and counts as no error. Errors are
those against scoring on all sequences (finite population): nothing is left when all of them were used.

A = scored variants, D = sequences of the deepest, N = options of the MIP, S = slots.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blocks.estimates import mean
from blocks.records import SUBBLOCKS, Score
from profiles.schema import Adaptive
from tasks.search.choose import choose
from tasks.search.grid import Grid, grids_of
from tasks.search.joint import Option
from tasks.search.mip import Answer, minimise, relaxation
from tasks.search.program import Floats, Integers
from tasks.search.totals import Problem, ScoreMetric

_SWEEPS = 50  # of the fit; it settles within ten
_PRIOR = 4.0  # degrees of freedom that a variant's variance borrows from all others'
_FROZEN = 0.5  # share of the tolerance that variants which are let be may add up to
_LEAST = 1e-12  # nats: keeps divisions finite where a variant loses nothing

Key = tuple[int, str, str]  # layer, subblock or "block", variant
Measure = Callable[[Mapping[Key, int]], Mapping[Key, Score]]


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round found.

    spent: share of the tokens of full scoring. expected_loss: of stopping now, in the objective's unit. tolerance: the
    loss at which scoring stops, as a share of the objective. open_variants: those that get more sequences.
    """

    spent: float
    objective: float
    expected_loss: float
    tolerance: float
    open_variants: int


@dataclass(frozen=True, kw_only=True)
class AdaptiveScores:
    """scores: as the MIP takes them, of unequal tokens. rounds: how it went."""

    scores: tuple[Score, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What was scored, fitted. sequences: of full scoring.

    depths (A,) sequences of each variant; values (A, D) nats, nan beyond; difficulty (D,) of mean 1; level (A,) nats;
    residuals (A, D) what level x difficulty does not explain.
    scale (A,): levels in KL, which is never negative. spread: usual standard deviation of a residual over scale.
    """

    sequences: int
    depths: Integers
    values: Floats
    difficulty: Floats
    level: Floats
    scale: Floats
    residuals: Floats
    spread: float


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """An exchange that may be better than the choice: its expected gain in nats, sequences behind it, its variants."""

    gain: float
    depth: int
    variants: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """What the solver found at one combination of batch sizes."""

    grid: Grid
    answer: Answer


def score_adaptively(
    keys: Sequence[Key],
    problem_of: Callable[[Iterable[Score]], Problem],
    settings: Adaptive,
    sequences: int,
    measure: Measure,
    looked: Callable[[Round], None] = lambda _: None,
) -> AdaptiveScores:
    """Score all variants as deep as the choice needs, at most on `sequences`.

    measure: scores on the first so many sequences of one order; a variant that it leaves out has failed and is dropped.
    Raises InfeasibleBudget after the first round when nothing fits.
    """
    depths = dict.fromkeys(keys, min(settings.start_sequences, sequences))
    rounds: list[Round] = []
    while True:
        measured = measure(depths)
        depths = {key: depth for key, depth in depths.items() if key in measured}
        scores = comparable([measured[key] for key in depths])
        problem = problem_of(scores)
        table = table_of([measured[key] for key in depths], problem.metric, sequences)
        objective, doubts = doubts_of(problem, table, list(depths))
        limit = settings.tolerance * abs(objective)
        deeper = _deeper(doubts, limit, table, settings.growth)
        spent = int(table.depths.sum()) / (len(depths) * sequences)
        loss = math.fsum(doubt.gain for doubt in doubts)
        rounds.append(
            Round(
                spent=spent,
                objective=objective,
                expected_loss=loss,
                tolerance=settings.tolerance,
                open_variants=len(deeper),
            )
        )
        looked(rounds[-1])
        if not deeper:
            return AdaptiveScores(scores=tuple(scores), rounds=tuple(rounds))
        names = list(depths)
        depths |= {names[index]: depth for index, depth in deeper.items()}


def in_words(look: Round) -> str:
    """One round in a line."""
    going_on = f"{look.open_variants} variants get more" if look.open_variants else "no more is needed"
    return (
        f"score        {look.spent:.0%} of full scoring's tokens; expected loss "
        f"{look.expected_loss / max(abs(look.objective), _LEAST):.1%} of the objective {look.objective:.4g} "
        f"(asked {look.tolerance:.1%}): {going_on}"
    )


def _deeper(doubts: Sequence[Doubt], limit: float, table: Table, growth: float) -> dict[int, int]:
    """Variants that get more sequences, and up to how many; none when the expected loss is within the limit."""
    if math.fsum(doubt.gain for doubt in doubts) <= limit:
        return {}
    wanted: dict[int, int] = {}
    frozen = 0.0
    for doubt in sorted(doubts, key=lambda doubt: doubt.gain):
        frozen += doubt.gain
        if frozen > _FROZEN * limit:
            target = min(math.ceil(doubt.depth * growth), table.sequences)
            wanted |= {index: max(target, wanted.get(index, 0)) for index in doubt.variants}
    return {index: depth for index, depth in wanted.items() if depth > table.depths[index]}


# --- estimates from unequal depths


def table_of(scores: Sequence[Score], metric: ScoreMetric, sequences: int) -> Table:
    """The fit of level x difficulty by alternating ratios; all variants weigh the same.

    Difficulty is fitted on KL whatever the metric: the rise of the LM loss is a noisy KL (the expectation of one under
    the parent is the other), and may be negative.
    """
    kl = _matrix([score.kl_per_sequence for score in scores])
    known = ~np.isnan(kl)
    filled = np.where(known, kl, 0.0)
    difficulty = np.ones(kl.shape[1])
    for _ in range(_SWEEPS):
        scale = np.maximum(filled.sum(1) / (known * difficulty).sum(1), _LEAST)
        difficulty = np.maximum((filled / scale[:, None]).sum(0) / known.sum(0), _LEAST)
        difficulty /= difficulty.mean()
    values = _matrix([getattr(score, f"{metric}_per_sequence") for score in scores])
    depths, exposure = known.sum(1), (known * difficulty).sum(1)
    level = np.nansum(values, axis=1) / exposure
    scale = np.maximum(filled.sum(1) / exposure, _LEAST)
    residuals = values - level[:, None] * difficulty
    variances = np.nansum(residuals**2, axis=1) / np.maximum(depths - 1, 1)
    return Table(
        sequences=sequences,
        depths=depths,
        values=values,
        difficulty=difficulty,
        level=level,
        scale=scale,
        residuals=residuals,
        spread=float(np.median(np.sqrt(variances) / scale)),
    )


def _matrix(rows: Sequence[tuple[float, ...]]) -> Floats:
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = row
    return found


def comparable(scores: Sequence[Score]) -> list[Score]:
    """Scores of unequal depth as scores over the sequences of the deepest, which every later stage can add and pair.

    What was measured stays. The rest is level x difficulty plus the variant's own residuals again, so much larger that
    mean and standard error, and those of differences of two variants of one depth, are what the measured sequences
    give, were they independent of each other. `tokens` keeps counting what was measured.
    """
    documents = max((score.documents for score in scores), key=len, default=())
    filled = {}
    for metric in ("kl", "lm_loss"):
        table = table_of(scores, metric, 0)
        filled[metric] = [_filled(table, index) for index in range(len(scores))]
    found = []
    for index, score in enumerate(scores):
        update: dict[str, Any] = {}
        for metric, rows in filled.items():
            row = rows[index]
            error = mean(row, documents).error
            update |= {metric: float(row.mean()), f"{metric}_se": error, f"{metric}_per_sequence": tuple(row.tolist())}
        update["documents"] = documents
        found.append(score.model_copy(update=update) if table.depths[index] < len(row) else score)
    return found


def _filled(table: Table, index: int) -> Floats:
    """(D,) values of a variant with the sequences it was not scored on filled in."""
    depth, deepest = int(table.depths[index]), len(table.difficulty)
    own = table.residuals[index, :depth]
    rest = table.difficulty[depth:]
    again = own[np.arange(deepest - depth) % depth]
    if depth > 1 and len(rest):
        again = again - rest * (again.sum() / rest.sum())  # the mean stays the level
        wanted = (deepest * (deepest - 1) / (depth * (depth - 1)) - 1) * float(own @ own)
        there = float(again @ again)
        again = again * math.sqrt(wanted / there) if there > 0 else again
    return np.concatenate([table.values[index, :depth], table.level[index] * rest + again])


# --- what more sequences could change


def doubts_of(problem: Problem, table: Table, keys: Sequence[Key]) -> tuple[float, list[Doubt]]:
    """The objective of the best architecture, and every exchange that may still turn out better."""
    place = {key: index for index, key in enumerate(keys)}
    solved = [(grid, minimise(grid.program, problem.search)) for grid in grids_of(problem)]
    solutions = [Solution(grid=grid, answer=answer) for grid, answer in solved if answer is not None]
    if not solutions:
        choose(problem)  # raises, and says why
    best = min(solutions, key=lambda solution: solution.answer.objective)
    doubts = _moves(best, problem, table, place)
    doubts += [_batch_doubt(best, other, table, place) for other in solutions if other is not best]
    return best.answer.objective, [doubt for doubt in doubts if doubt.gain > 0]


def _moves(best: Solution, problem: Problem, table: Table, place: Mapping[Key, int]) -> list[Doubt]:
    """Every exchange of one slot's chosen option for another, with what it costs by the LP relaxation."""
    grid, program = best.grid, best.grid.program
    relaxed = relaxation(program, problem.search)
    assert relaxed is not None, "an integer answer is one of the relaxation"
    chosen = best.answer.selection[program.slot_of]
    # negative where integrality alone kept a better option out: no sequence can change that
    distance = np.maximum(relaxed.distance - relaxed.distance[chosen], 0.0)
    members = [_members(option, place) for option in grid.options]
    doubts = []
    for option in range(len(members)):
        if option != chosen[option]:
            doubts.append(_doubt(float(distance[option]), members[option], members[chosen[option]], table))
    return doubts


def _batch_doubt(best: Solution, other: Solution, table: Table, place: Mapping[Key, int]) -> Doubt:
    """The whole architecture exchanged for that of another combination of batch sizes."""
    one, two = (
        tuple(index for option in _chosen(solution) for index in _members(option, place)) for solution in (best, other)
    )
    return _doubt(other.answer.objective - best.answer.objective, two, one, table)


def _chosen(solution: Solution) -> list[Option]:
    return [solution.grid.options[index] for index in solution.answer.selection]


def _members(option: Option, place: Mapping[Key, int]) -> tuple[int, ...]:
    """Rows of the variants whose scores make up an option's; the parent's own subblocks have none."""
    if option.coupled:
        keys: list[Key] = [(option.layer, "block", f"{option.attention}+{option.ffn}")]
    else:
        keys = [(option.layer, part, str(getattr(option, part))) for part in SUBBLOCKS]
    return tuple(place[key] for key in keys if key in place)


def _doubt(distance: float, rivals: tuple[int, ...], chosen: tuple[int, ...], table: Table) -> Doubt:
    """The expected gain of putting `rivals` in the place of `chosen`, which seems to cost `distance`."""
    differ = tuple(set(rivals) ^ set(chosen))
    depth = int(table.depths[list(differ)].min(initial=table.sequences))
    if not differ or depth >= table.sequences:
        return Doubt(gain=0.0, depth=depth, variants=differ)
    rows, signs = list(differ), np.array([1.0 if index in rivals else -1.0 for index in differ])
    variance, freedom = _variance(signs @ table.residuals[rows, :depth], rows, table)
    error = math.sqrt(variance / depth * (1 - depth / table.sequences))
    return Doubt(gain=expected_gain(distance, error, freedom), depth=depth, variants=differ)


def _variance(differences: Floats, rows: list[int], table: Table) -> tuple[float, float]:
    """Variance of paired differences (n,) and its degrees of freedom, drawn towards what is usual in the library.

    Few sequences say little about a variance; relative to their level, residuals of all variants are much alike.
    """
    freedom = len(differences) - 1
    usual = float(((table.spread * table.scale[rows]) ** 2).sum())
    own = float(np.var(differences, ddof=1)) if freedom else 0.0
    return (_PRIOR * usual + freedom * own) / (_PRIOR + freedom), _PRIOR + freedom


def expected_gain(distance: float, error: float, freedom: float) -> float:
    """E[max(0, error x t - distance)] for t of Student's distribution, freedom > 1; nats."""
    from scipy.stats import t

    if error <= 0:
        return max(-distance, 0.0)
    at = distance / error
    return float(error * ((freedom + at * at) / (freedom - 1) * t.pdf(at, freedom) - at * t.sf(at, freedom)))
