"""The highest KL on a capability, kept by the child itself and not by the sum of its scores alone.

Scores add up only roughly: the KL of a whole child was up to half above their sum (benchmarks/capabilities.md). So the
chosen child is measured before GKD, on text of each capability that no stage has seen. Where a one-sided 95 % bound of
its KL is above what is asked, the search gets a limit that is lower by as much, and its answer is measured in turn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from blocks.compute import Compute
from blocks.errors import InfeasibleBudget
from blocks.estimates import lower_bound
from blocks.library import digest_of, made_once
from blocks.records import Architecture, CorpusInfo, Floor, Metric, ParentInfo, Value
from tasks.evaluate.compare import Contender, figures_of, served, targets_on
from tasks.evaluate.quality import mean_metric
from tasks.inputs.corpus import documents_of
from tasks.search.choose import with_most_tokens
from tasks.search.one_type import candidates
from tasks.search.totals import Problem, kl_on

VERSION = 1
CONFIDENCE = 0.95
CHECKED_TOKENS = 16_384  # of each capability
EASED = (1.0, 0.5, 0.25)  # parts of the way to the limit that is wanted, on which an answer is looked for


class Checked(Value):
    """The KL of a child on a capability, in nats per token; its error is over documents."""

    kl: Metric


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the search was asked and what it found, the best first."""

    problem: Problem
    near: tuple[Architecture, ...]


def text_of(corpus: CorpusInfo) -> tuple[str, int]:
    """The split that a child is measured on, and how many of its sequences. Training text of a capability is for GKD
    alone, which comes later. That of the corpus has trained the blocks, so there it is the text of the scores.
    """
    split, held = (
        ("train", corpus.train_sequences) if corpus.capability else ("validation", corpus.validation_sequences)
    )
    return split, min(held, math.ceil(CHECKED_TOKENS / corpus.sequence_length))


def check(
    which: Contender,
    parent: ParentInfo,
    corpus: CorpusInfo,
    workspace: Path,
    compute: Compute,
    dtype: torch.dtype = torch.float32,
) -> Metric:
    """A contender's KL on a capability, with the weights that it is served with. It is measured once."""
    split, count = text_of(corpus)
    key = digest_of(
        model=which.served_key,
        cache=which.cache,
        parent=parent.fingerprint,
        text=[corpus.fingerprint, split, count],
        precision=[str(dtype), str(compute.dtype)],
        v=VERSION,
    )

    def made() -> Checked:
        targets = targets_on(split, count, parent, corpus, workspace, compute)
        model = partial(served, which, parent, workspace, compute, dtype)
        kl = figures_of(which, targets, workspace, compute, model)["kl"]
        counted = 1.0 if targets.weights is None else targets.weights.double().mean()  # 1 over the whole split
        return Checked(kl=mean_metric(kl / counted, documents_of(corpus, split, workspace)[:count]))

    return made_once(workspace / "floors" / f"{key}.json", Checked, workspace, made).kl


def floors_of(
    asked: Mapping[str, float], problem: Problem, child: Architecture, measured: Mapping[str, Metric]
) -> tuple[Floor, ...]:
    """Every limit on a capability beside what a child is predicted and measured to have. asked: by the profile."""
    return tuple(
        Floor(
            capability=name,
            asked=most,
            limit=problem.capabilities.most[name],
            predicted=kl_on(problem, child.layers, name, child.head),
            measured=measured[name],
            at_most=_at_most(measured[name]),
        )
        for name, most in asked.items()
    )


def _at_most(found: Metric) -> float:
    """The one-sided upper bound; the figure itself for a single document, which shows no error."""
    return -lower_bound(found.model_copy(update={"value": -found.value}), CONFIDENCE) if found.n > 1 else found.value


def worst(floors: Sequence[Floor]) -> float:
    """The largest share of a limit that a child takes; above 1 one is not kept."""
    return max((one.at_most / one.asked for one in floors), default=0.0)


def tighter(problem: Problem, floors: Sequence[Floor], count: int, min_different: int) -> Chosen | None:
    """The search again, each limit that was not kept lower by as much as it was passed; None where nothing fits.

    Where the budget does not allow so much, an answer on half or a quarter of the way is taken.
    problem: of the profile's budget, before `with_most_tokens`.
    """
    for part in EASED:
        most = {one.capability: _lowered(one, part) for one in floors}
        try:
            asked = with_most_tokens(replace(problem, capabilities=replace(problem.capabilities, most=most)))
            return Chosen(problem=asked, near=tuple(candidates(asked, count, min_different)))
        except InfeasibleBudget:
            continue
    return None


def _lowered(floor: Floor, part: float) -> float:
    if floor.at_most <= floor.asked:
        return floor.limit
    return min(floor.limit, floor.predicted or floor.limit) * (floor.asked / floor.at_most) ** part


def hold(
    first: Chosen,
    rounds: int,
    measure: Callable[[Chosen], tuple[Floor, ...]],
    again: Callable[[Sequence[Floor]], Chosen | None],
) -> tuple[Chosen, tuple[Floor, ...]]:
    """The first answer that keeps every limit itself, or of `rounds` answers the one that passes them least.

    measure: of the best architecture of an answer. again: see `tighter`.
    """
    tried: list[tuple[Chosen, tuple[Floor, ...]]] = []
    found: Chosen | None = first
    while found is not None and len(tried) < rounds:
        tried.append((found, measure(found)))
        if worst(tried[-1][1]) <= 1:
            break
        found = again(tried[-1][1]) if len(tried) < rounds else None
    return min(tried, key=lambda one: max(worst(one[1]), 1.0))


def in_words(floor: Floor) -> str:
    """What came of a limit, in a sentence."""
    asked = f"max_kl of {floor.capability}: {floor.asked:.4g} asked"
    tighter = "" if floor.limit == floor.asked else f", {floor.limit:.4g} of the search"
    got = f"measured {floor.measured.value:.4g}, at most {floor.at_most:.4g} by a {100 * CONFIDENCE:.0f} % bound"
    left = (
        "" if floor.at_most <= floor.asked else "; the budget leaves no child that keeps it before GKD, of those tried"
    )
    return f"{asked}{tighter}; the child was predicted to have {floor.predicted:.4g}, {got}{left}"
