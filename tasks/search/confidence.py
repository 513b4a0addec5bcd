"""How sure a choice is: a paired bootstrap of the whole search over the scored sequences.

Scores are means over few sequences, the same for every variant. Each draw takes as many sequences with replacement,
averages every variant's scores over them, and searches again. Sequences of one document are drawn together. A variant
that most draws choose is supported by the data. The lowest of several noisy sums is too low on average (the winner's
curse). The sequences that a draw left out show by how much.

CVXPY and HiGHS solve every draw, which takes time. So drawing stops when more draws would not change the averages, or
when its time is up.
"""

import math
import time
from dataclasses import dataclass, field, replace

import numpy as np

from blocks.estimates import mean, parts_of, resampled
from blocks.records import Value
from profiles.schema import Search
from tasks.running.progress import Progress, no_progress
from tasks.search.cases import Case, cases_of
from tasks.search.joint import JointLibrary, JointOption, LibraryFileError, samples_of
from tasks.search.mip import SolverStopped
from tasks.search.program import Floats, Integers
from tasks.search.request import Request
from tasks.search.solve import JointChoice, best_of, choose_joint

_GAP = 1e-4  # of a draw's own best: far below what resampling moves it by


@dataclass(frozen=True, kw_only=True)
class Draws:
    """When drawing ends: after `most` draws, after `seconds`, or once the standard errors of agreement and regret over
    at least `least` draws are both at most `error`.
    """

    most: int = 200
    least: int = 40
    error: float = 0.01
    seconds: float = 120.0
    seed: int = 0


class Confidence(Value):
    """Of the choice that the full scores give, over the draws.

    low, high: the 5 and 95 % points of its objective. regret: mean of its objective above the draw's own best, as a
    share of it; within_1_percent: share of draws in which that is at most 0.01. optimism: by how much, as a share, the
    score of a draw's best on the sequences left out lies above its score on those it was chosen on. recurrence: per
    layer, the share of draws that chose each label, most first; agreement: mean over layers of the chosen label's;
    agreement_se: its standard error over the draws. stopped: why there are no more draws.
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
    agreement_se: float
    chosen: dict[str, str]
    recurrence: dict[str, dict[str, float]]
    stopped: str


def bootstrap(
    library: JointLibrary,
    request: Request,
    draws: Draws = Draws(),
    progress: Progress = no_progress,
    choice: JointChoice | None = None,
) -> Confidence:
    """Solve again and again on resampled sequences. choice: what is judged, the best by the full scores when None.

    Raises InfeasibleBudget when nothing fits, LibraryFileError when the library keeps no scores per sequence,
    SolverStopped when time was up before two draws were solved.
    """
    if request.minimise != "score" or any(limit.quantity == "score" for limit in request.limits):
        raise LibraryFileError("the confidence is that of a search for the lowest score: do not limit the score.")
    options, cases = cases_of(library, request)
    samples = samples_of(options, request.metric, library.documents)
    choice = choice or choose_joint(library, request.model_copy(update={"diverse": 1}))[0]
    place = {(option.layer, option.label): index for index, option in enumerate(options)}
    chosen = np.array([place[item] for item in choice.layers.items()])
    parts = parts_of(samples.shape[1], library.documents)
    drawn = _Drawn(cases=cases, samples=samples, parts=parts, request=request, chosen=chosen)
    drawn.run(draws, progress)
    objectives, bests, optimisms = (np.array(found) for found in zip(*drawn.figures, strict=True))
    picks = np.array(drawn.picks)
    regrets, agreements = drawn.regrets(), (picks == chosen).mean(axis=1)
    return Confidence(
        draws=len(picks),
        sequences=samples.shape[1],
        objective=choice.objective,
        low=float(np.quantile(objectives, 0.05)),
        high=float(np.quantile(objectives, 0.95)),
        regret=float(regrets.mean()),
        within_1_percent=float((regrets <= 0.01).mean()),
        optimism=float(np.nan_to_num(np.nanmean(optimisms))) if np.isfinite(optimisms).any() else 0.0,
        agreement=float(agreements.mean()),
        agreement_se=mean(agreements).error,
        chosen=choice.layers,
        recurrence=_recurrence(options, picks),
        stopped=drawn.stopped,
    )


@dataclass(kw_only=True, eq=False)
class _Drawn:
    """What was drawn so far. parts: of each sequence, the part of the sample that is drawn or not as a whole.
    figures: of every draw, the chosen one's objective, the draw's best, its optimism.
    """

    cases: list[Case]
    samples: Floats
    parts: Integers
    request: Request
    chosen: Integers
    picks: list[Integers] = field(default_factory=list)
    figures: list[tuple[float, float, float]] = field(default_factory=list)
    stopped: str = ""

    def run(self, draws: Draws, progress: Progress) -> None:
        """Draw until one of the reasons of `draws` to stop, and keep it in words."""
        generator, started = np.random.default_rng(draws.seed), time.perf_counter()
        self.stopped = f"{draws.most} draws were asked for"
        while (done := len(self.picks)) < draws.most:
            spent = time.perf_counter() - started
            if done >= draws.least and self._precise(draws.error):
                self.stopped = f"agreement and regret are known to {draws.error:.0%}"
                break
            if done >= 2 and spent >= draws.seconds:
                self.stopped = f"the time for draws, {draws.seconds:.0f} s, was up"
                break
            limit = min(self.request.search.time_limit_seconds, max(draws.seconds - spent, 1.0))
            search = self.request.search.model_copy(
                update={"time_limit_seconds": limit, "gap": max(self.request.search.gap, _GAP)}
            )
            try:
                self._draw(resampled(generator, self.parts), search)
            except SolverStopped:
                if done < 2:
                    raise
                self.stopped = f"the time for draws, {draws.seconds:.0f} s, was up"
                break
            each = (time.perf_counter() - started) / (done + 1)
            progress(done + 1, max(done + 1, min(draws.most, math.ceil(draws.seconds / each))))

    def _draw(self, counts: Integers, search: Search) -> None:
        scores = _scores(self.samples, self.parts, counts, self.request)
        cases = [replace(case, program=replace(case.program, scores=scores)) for case in self.cases]
        answered = best_of(cases, search)
        assert answered is not None, "the budget does not depend on the scores"
        selection, own = answered[1].selection, float(scores[self.chosen].sum())
        # within the gap the chosen one may be the better of the two
        self.figures.append(
            (own, min(answered[1].objective, own), _optimism(self.samples[selection].sum(axis=0), counts))
        )
        self.picks.append(selection)

    def regrets(self) -> Floats:
        """(D,) by how much the chosen one lies above each draw's best, as a share of it."""
        own, best, _ = np.array(self.figures).T
        return np.asarray((own - best) / np.maximum(np.abs(best), 1e-12))

    def _precise(self, error: float) -> bool:
        agreements = (np.array(self.picks) == self.chosen).mean(axis=1)
        return max(mean(agreements).error, mean(self.regrets()).error) <= error


def _scores(samples: Floats, parts: Integers, counts: Integers, request: Request) -> Floats:
    """(N,) objective of every option on the sequences of one draw, counted (T,) times each, part by part."""
    total, robust = counts.sum(), request.search.robust
    means = samples @ counts / total
    if not robust:
        return np.asarray(means)
    members = parts[:, None] == np.arange(parts.max() + 1)  # (T, P)
    moves = ((samples - means[:, None]) / total) @ members
    times = counts[np.argmax(members, axis=0)]
    return np.asarray(means + robust * np.sqrt(moves**2 @ times * len(times) / (len(times) - 1)))


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
