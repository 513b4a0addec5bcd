"""A correction of summed scores, fitted to the true KL of whole architectures, and used only where it foretells better.

    as scored   true = sum of scores
    scale       true = c sum                         a better forecast; the choice stays what it was
    depth       true = sum over thirds of the depth of (c + d_third) x that third's scores; still a sum, still the MIP
    neighbours  true = c sum + g sum over layers of sqrt(score_i score_i+1), what two neighbours do to each other

c is free, d and g are held towards 0 by ridge regression, its strength by leave-one-out. Errors are relative, so that
architectures far from the optimum do not drown those near it, and are those of architectures left out (nested).

K = architectures, L = layers.
"""

from collections.abc import Callable

import numpy as np

from blocks.records import Value
from tasks.search.program import Floats
from tasks.studies.swaps import beyond_noise

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PARTS = 3  # of the depth
WORTH = 0.9  # a correction that changes the choice is used below this share of the plain scale's left-out error
LEAST = 6  # architectures to fit to, at least
_FLOOR = 0.1  # a part's scale stays above this share of the common one: a score must keep its sign


class Correction(Value):
    """What was fitted. kind: the one that is used. errors: relative left-out error (root mean square) of each kind.

    common: the factor of the plain scale. scales: factor of every layer's scores under `depth`. neighbours: g.
    """

    kind: str
    errors: dict[str, float]
    architectures: int
    common: float
    scales: tuple[float, ...]
    neighbours: float

    @property
    def changes_the_choice(self) -> bool:
        """True for the kinds that are more than one common factor, where they are used."""
        return self.kind in ("depth", "neighbours")


def fit_correction(contributions: Floats, truth: Floats) -> Correction:
    """Fit all kinds to contributions (K, L), summed scores per layer, and true KL (K,), which must be above 0.

    ValueError with fewer than LEAST architectures.
    """
    count, layers = contributions.shape
    if count < LEAST:
        raise ValueError(f"{count} architectures are too few to fit a correction: at least {LEAST}")
    parts = np.arange(layers) * PARTS // layers
    features: dict[str, Floats] = {
        "scale": np.empty((count, 0)),
        "depth": np.stack([contributions[:, parts == part].sum(axis=1) for part in range(PARTS)], axis=1),
        "neighbours": beside(contributions)[:, None],
    }
    total = contributions.sum(axis=1)
    off = {"as scored": total / truth - 1}
    off |= {name: _left_out(total, extra, truth) for name, extra in features.items()}
    fitted = {name: _solve(total, extra, truth, _strength(total, extra, truth)) for name, extra in features.items()}
    common, thirds = fitted["depth"][0], fitted["depth"][1:]
    return Correction(
        kind=_kind(off),
        errors={name: _root(values) for name, values in off.items()},
        architectures=count,
        common=float(fitted["scale"][0]),
        scales=tuple(np.maximum(common + thirds, _FLOOR * abs(common))[parts].tolist()),
        neighbours=float(fitted["neighbours"][1] / fitted["neighbours"][0]),
    )


def beside(contributions: Floats) -> Floats:
    """(K,) sum over neighbouring layers of sqrt(score_i x score_i+1); scores below 0 count as 0. (K, L)"""
    roots = np.sqrt(np.maximum(contributions, 0))
    return np.asarray((roots[:, 1:] * roots[:, :-1]).sum(axis=1))


def _kind(off: dict[str, Floats]) -> str:
    """From the left-out errors (K,) of each kind: what changes the choice must be better by much and beyond noise."""
    plain = min("as scored", "scale", key=lambda name: _root(off[name]))
    best = min("depth", "neighbours", key=lambda name: _root(off[name]))
    worth = _root(off[best]) < WORTH * _root(off[plain]) and beyond_noise(off[best] ** 2 - off[plain] ** 2, 2)
    return best if worth else plain


def _root(values: Floats) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _solve(total: Floats, extra: Floats, truth: Floats, ridge: float) -> Floats:
    """Coefficients (1 + E,) of total and extra (K, E), least relative error, the extra ones held towards 0."""
    rows = np.column_stack([total, extra]) / truth[:, None]
    held = np.sqrt(ridge * len(truth)) * np.eye(1 + extra.shape[1])[1:]
    wanted = np.concatenate([np.ones(len(truth)), np.zeros(len(held))])
    return np.asarray(np.linalg.lstsq(np.vstack([rows, held]), wanted, rcond=None)[0])


def _each_left_out(count: int, error: Callable[[Floats, int], float]) -> Floats:
    """error(kept (K,) flags, index of the one left out) for each of `count`."""
    kept = ~np.eye(count, dtype=bool)
    return np.array([error(kept[at], at) for at in range(count)])


def _left_out(total: Floats, extra: Floats, truth: Floats, ridge: float | None = None) -> Floats:
    """(K,) relative errors of each architecture by a fit to the others; ridge None: chosen anew for each."""

    def error(kept: Floats, at: int) -> float:
        some = total[kept], extra[kept], truth[kept]
        coefficients = _solve(*some, _strength(*some) if ridge is None else ridge)
        return float(np.append(total[at], extra[at]) @ coefficients / truth[at] - 1)

    return _each_left_out(len(truth), error)


def _strength(total: Floats, extra: Floats, truth: Floats) -> float:
    if not extra.shape[1]:
        return RIDGES[0]
    return min(RIDGES, key=lambda ridge: _root(_left_out(total, extra, truth, ridge)))
