"""Scores on several capabilities: one weighed score that the search minimises, and the KL on each, which it may limit.

Scores add up over layers on every capability, so their weighed sum does too, and so does the KL on each: a limit on it
is a row of the program like any other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from blocks.errors import PuzzleFailure
from blocks.estimates import mean
from blocks.records import CapabilityScore, Score
from profiles.schema import GENERAL

METRICS = ("kl", "lm_loss")
CHECKED_TOKENS = 16_384  # of each capability on which a chosen child is held to a limit (tasks/evaluate/floors.py), or:
CHECKED_ROWS = 32  # at least, where there are as many; a bound over few documents is wide


class InconsistentTables(PuzzleFailure):
    """Scores and costs that do not belong to one parent, or do not cover what the profile asks for."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Shares of the capabilities in the score, which sum to 1, and the highest KL on those that have one. Empty: the
    score is that on the corpus.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)


NONE = Capabilities()


def weighed(scores: Iterable[Score], capabilities: Capabilities) -> tuple[Score, ...]:
    """The scores with the weighed sum over all capabilities in the place of the score on the corpus, which becomes one
    of `capabilities`. As they are where there are no capabilities.
    """
    return tuple(_weighed(score, capabilities.weights) if capabilities.weights else score for score in scores)


def _weighed(score: Score, weights: Mapping[str, float]) -> Score:
    parts = {one.name: one for one in (score.on(GENERAL), *score.capabilities)}
    lacking = [name for name in weights if name not in parts]
    if lacking:
        raise InconsistentTables(
            f"layer {score.layer} {score.subblock} {score.variant} has no score on the capability {lacking[0]}: run "
            "`puzzle optimize` with this profile again."
        )
    counted = [(weights[name], parts[name]) for name in weights if weights[name]]
    documents, kept = _documents(counted), tuple(parts[name] for name in weights)
    figures = {name: value for metric in METRICS for name, value in _mixed(metric, counted, documents).items()}
    return score.model_copy(update={**figures, "documents": documents, "capabilities": kept})


def _documents(counted: Sequence[tuple[float, CapabilityScore]]) -> tuple[int, ...]:
    """A number for the document of each sequence of all of them; each sequence is its own where nobody knows it."""
    if len(counted) == 1:
        return counted[0][1].documents
    found, first = list[int](), 0
    for _, part in counted:
        own = part.documents or range(len(part.kl_per_sequence))
        found += [first + document for document in own]
        first += max(own, default=-1) + 1
    return tuple(found)


def _mixed(
    metric: str, counted: Sequence[tuple[float, CapabilityScore]], documents: Sequence[int]
) -> dict[str, float | tuple[float, ...]]:
    """A metric's weighed sum, its error, and values whose mean and error over documents are these.

    A sequence of a capability with share w, N_c of all N sequences, moves the sum by w / N_c times its distance from
    the capability's own mean. So the differences between capabilities count for no error, as in a stratified sample.
    """
    total = math.fsum(weight * getattr(part, metric) for weight, part in counted)
    if len(counted) == 1:
        values: tuple[float, ...] = getattr(counted[0][1], f"{metric}_per_sequence")
    else:
        count = sum(len(part.kl_per_sequence) for _, part in counted)
        values = tuple(
            total + weight * count / len(own) * (value - getattr(part, metric))
            for weight, part in counted
            for own in [getattr(part, f"{metric}_per_sequence")]
            for value in own
        )
    return {metric: total, f"{metric}_se": mean(values, documents).error, f"{metric}_per_sequence": values}


def rows_read(sequences: int, length: int) -> int:
    """On how many of so many sequences a chosen child is held to a limit."""
    return min(sequences, max(CHECKED_ROWS, math.ceil(CHECKED_TOKENS / length)))
