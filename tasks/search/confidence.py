"""How sure a choice is: a paired bootstrap of the whole search over the scored sequences.

Scores are means over few sequences, the same for every variant. Each draw takes as many sequences with replacement,
averages every variant's scores over them, and solves again: what recurs is what the data support. The minimum of noisy
sums is too low on average (the winner's curse); the sequences that a draw left out tell by how much.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from blocks.records import Value
from tasks.search.joint import JointLibrary, JointOption, LibraryFileError, samples_of
from tasks.search.program import Floats, Integers
from tasks.search.request import Request
from tasks.search.solve import Case, best_of, cases_of, choose_joint


class Confidence(Value):
    """Of the choice that the full scores give, over the draws.

    low, high: the 5 and 95 % points of its objective. regret: mean of its objective above the draw's own best, as a
    share of it; within_1_percent: share of draws in which that is at most 0.01. optimism: by how much, as a share, the
    score of a draw's best on the sequences left out lies above its score on those it was chosen on. recurrence: per
    layer, the share of draws that chose each label, most first; agreement: mean over layers of the chosen label's.
    """

    draws: int
    sequences: int
    objective: float
    low: float
    high: float
    regret: float
    within_1_percent: float
    optimism: float
    agreement: float
    chosen: dict[str, str]
    recurrence: dict[str, dict[str, float]]


def bootstrap(
    library: JointLibrary,
    request: Request,
    draws: int = 200,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Confidence:
    """Solve `draws` times on resampled sequences.

    Raises InfeasibleBudget when nothing fits, LibraryFileError when the library keeps no scores per sequence.
    """
    options, cases = cases_of(library, request)
    if request.minimise != "score" or any(limit.quantity == "score" for limit in request.limits):
        raise LibraryFileError("the confidence is that of a search for the lowest score: do not limit the score.")
    samples = samples_of(options, request.metric)
    choice = choose_joint(library, request.model_copy(update={"diverse": 1}))[0]
    place = {(option.layer, option.label): index for index, option in enumerate(options)}
    chosen = np.array([place[item] for item in choice.layers.items()])
    generator = np.random.default_rng(seed)
    objectives, bests, optimisms, picks = np.empty(draws), np.empty(draws), np.full(draws, np.nan), []
    for draw in range(draws):
        counts = generator.multinomial(samples.shape[1], np.full(samples.shape[1], 1 / samples.shape[1]))
        selection, bests[draw] = _best(cases, samples, counts, request)
        objectives[draw] = _scores(samples, counts, request)[chosen].sum()
        optimisms[draw] = _optimism(samples[selection].sum(axis=0), counts)
        picks.append(selection)
        tell(draw + 1, draws)
    regrets = (objectives - bests) / np.maximum(np.abs(bests), 1e-12)
    recurrence = _recurrence(options, np.array(picks))
    return Confidence(
        draws=draws,
        sequences=samples.shape[1],
        objective=choice.objective,
        low=float(np.quantile(objectives, 0.05)),
        high=float(np.quantile(objectives, 0.95)),
        regret=float(regrets.mean()),
        within_1_percent=float((regrets <= 0.01).mean()),
        optimism=float(np.nan_to_num(np.nanmean(optimisms))) if np.isfinite(optimisms).any() else 0.0,
        agreement=float(np.mean([recurrence[layer].get(label, 0.0) for layer, label in choice.layers.items()])),
        chosen=choice.layers,
        recurrence=recurrence,
    )


def _scores(samples: Floats, counts: Integers, request: Request) -> Floats:
    """(N,) objective of every option on the sequences of one draw, counted (T,) times each."""
    total, robust = counts.sum(), request.search.robust
    mean = samples @ counts / total
    if not robust:
        return np.asarray(mean)
    variance = ((samples - mean[:, None]) ** 2) @ counts / (total - 1)
    return np.asarray(mean + robust * np.sqrt(variance / total))


def _best(cases: list[Case], samples: Floats, counts: Integers, request: Request) -> tuple[Integers, float]:
    scores = _scores(samples, counts, request)
    drawn = [replace(case, program=replace(case.program, scores=scores)) for case in cases]
    answered = best_of(drawn, request.search)
    assert answered is not None, "the budget does not depend on the scores"
    return answered[1].selection, answered[1].objective


def _optimism(sums: Floats, counts: Integers) -> float:
    """(mean over the sequences left out - mean over those drawn) / the latter; nan when none was left out."""
    left, inside = sums[counts == 0], float(sums @ counts / counts.sum())
    return float((left.mean() - inside) / abs(inside)) if len(left) and inside else float("nan")


def _recurrence(options: list[JointOption], picks: Integers) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for column in picks.T:
        indices, counts = np.unique(column, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        layer = options[indices[0]].layer
        found[layer] = {options[indices[i]].label: float(counts[i] / len(picks)) for i in order}
    return found
