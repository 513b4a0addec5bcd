"""The highest KL on a capability, kept by the child itself and not by the sum of its scores alone.

Scores add up only roughly: the KL of a whole child was up to half above their sum (benchmarks/capabilities.md). So the
chosen child is measured before GKD, on text of each capability that no stage has read. Where a one-sided bound of its
KL is above what is asked, the search gets a limit that is lower by as much, and its answer is measured in turn. All
children that may be measured share an error of 5 % (Bonferroni).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from blocks.compute import Compute
from blocks.errors import InfeasibleBudget
from blocks.estimates import upper_bound
from blocks.library import digest_of, made_once
from blocks.records import Architecture, CorpusInfo, Floor, Metric, ParentInfo, Score, Value
from tasks.evaluate.compare import Contender, figures_of, served, targets_on
from tasks.evaluate.quality import mean_metric
from tasks.inputs.corpus import documents_of, weights_of
from tasks.search.capabilities import rows_read
from tasks.search.choose import with_most_tokens
from tasks.search.mip import SolverStopped
from tasks.search.one_type import candidates
from tasks.search.totals import Problem, kl_on

VERSION = 1
CONFIDENCE = 0.95  # of all children together
EASED = (1.0, 0.5, 0.25)  # parts of the way to the limit that is wanted, on which an answer is looked for


class Checked(Value):
    """The KL of a child on a capability, in nats per token; its error is over documents."""

    kl: Metric


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the search was asked and what it found, the best first. scores: of the library that it searched."""

    problem: Problem
    near: tuple[Architecture, ...]
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Held:
    """A choice whose children were measured, and the limits of each of `chosen.near`."""

    chosen: Chosen
    floors: tuple[tuple[Floor, ...], ...]

    def of(self, child: Architecture) -> tuple[Floor, ...]:
        """The limits of one of them."""
        pairs = zip(self.chosen.near, self.floors, strict=True)
        return next(floors for one, floors in pairs if (one.layers, one.head) == (child.layers, child.head))


def split_of(corpus: CorpusInfo) -> tuple[str, int]:
    """The split that a child is measured on, and its sequences. Training text of a capability is for GKD alone, which
    comes later. That of the corpus has trained the blocks, so there it is the text of the scores.
    """
    return ("train", corpus.train_sequences) if corpus.capability else ("validation", corpus.validation_sequences)


def rows_of(corpus: CorpusInfo, workspace: Path) -> tuple[int, ...]:
    """The sequences of that split that are read: spread evenly, since neighbours may be of one document, over those
    that have tokens which count.
    """
    split, sequences = split_of(corpus)
    weights = weights_of(corpus, split, workspace) if corpus.judged_by_weight else None
    able = range(sequences) if weights is None else weights.any(dim=1).nonzero().flatten().tolist()
    count = rows_read(len(able), corpus.sequence_length)
    return tuple(able[place * len(able) // count] for place in range(count))


def check(
    which: Contender,
    parent: ParentInfo,
    corpus: CorpusInfo,
    workspace: Path,
    compute: Compute,
    dtype: torch.dtype = torch.float32,
) -> Metric:
    """A contender's KL on a capability, with the weights that it is served with. It is measured once."""
    rows, split = rows_of(corpus, workspace), split_of(corpus)[0]
    key = digest_of(
        model=which.served_key,
        cache=which.cache,
        parent=parent.fingerprint,
        text=[corpus.fingerprint, split, rows],
        precision=[str(dtype), str(compute.dtype)],
        v=VERSION,
    )

    def made() -> Checked:
        targets = targets_on(split, rows, parent, corpus, workspace, compute)
        model = partial(served, which, parent, workspace, compute, dtype)
        kl = figures_of(which, targets, workspace, compute, model)["kl"]
        counted = 1.0 if targets.weights is None else targets.weights.double().mean()  # 1 over the whole split
        documents = documents_of(corpus, split, workspace)
        return Checked(kl=mean_metric(kl / counted, [documents[row] for row in rows] if documents else ()))

    return made_once(workspace / "floors" / f"{key}.json", Checked, workspace, made).kl


def floors_of(
    asked: Mapping[str, float], problem: Problem, child: Architecture, measured: Mapping[str, Metric], children: int = 1
) -> tuple[Floor, ...]:
    """Every limit on a capability beside what a child is predicted and measured to have. asked: by the profile.
    children: how many may be measured, each of which may seem to keep a limit.
    """
    return tuple(
        Floor(
            capability=name,
            asked=most,
            limit=problem.capabilities.most[name],
            predicted=kl_on(problem, child.layers, name, child.head),
            measured=measured[name],
            at_most=_at_most(measured[name], 1 - (1 - CONFIDENCE) / children),
        )
        for name, most in asked.items()
    )


def _at_most(found: Metric, confidence: float) -> float | None:
    """The one-sided upper bound; None for a single document, which shows no error."""
    return upper_bound(found, confidence) if found.n > 1 else None


def _share(floor: Floor) -> float:
    """What a child takes of a limit; above 1 it is not kept."""
    return (floor.measured.value if floor.at_most is None else floor.at_most) / floor.asked


def worst(floors: Sequence[Floor]) -> float:
    """The largest share of a limit that a child takes."""
    return max(map(_share, floors), default=0.0)


def tighter(problem: Problem, floors: Sequence[Floor], count: int, min_different: int) -> Chosen | None:
    """The search again, each limit that was not kept lower by as much as it was passed; None where nothing is found.

    Where the budget does not allow so much, an answer on half or a quarter of the way is taken.
    problem: of the profile's budget, before `with_most_tokens`.
    """
    for part in EASED:
        most = {one.capability: _lowered(one, part) for one in floors}
        try:
            asked = with_most_tokens(replace(problem, capabilities=replace(problem.capabilities, most=most)))
            return Chosen(problem=asked, near=tuple(candidates(asked, count, min_different)))
        except (InfeasibleBudget, SolverStopped):
            continue
    return None


def _lowered(floor: Floor, part: float) -> float:
    share = _share(floor)
    return floor.limit if share <= 1 else min(floor.limit, floor.predicted or floor.limit) / share**part


def hold(
    first: Chosen,
    rounds: int,
    measure: Callable[[Chosen], Sequence[tuple[Floor, ...]]],
    again: Callable[[Sequence[Floor]], Chosen | None],
) -> Held:
    """Of up to `rounds` answers, which end with the first whose best child keeps every limit itself, the one with the
    lowest score among its children that do, and these children; where none does, the child that passes its limits
    least.

    measure: every child of an answer. again: see `tighter`; of the answer's best child.
    """
    tried: list[tuple[bool, float, Held]] = []
    found: Chosen | None = first
    while found is not None and len(tried) < rounds:
        floors = tuple(measure(found))
        kept = [place for place, one in enumerate(floors) if worst(one) <= 1]
        least = min(range(len(floors)), key=lambda place: worst(floors[place]))
        held = _only(found, floors, kept or [least])
        tried.append((not kept, held.chosen.near[0].score if kept else worst(floors[least]), held))
        found = again(floors[0]) if len(tried) < rounds and 0 not in kept else None
    return min(tried, key=lambda one: one[:2])[2]


def _only(found: Chosen, floors: Sequence[tuple[Floor, ...]], places: Sequence[int]) -> Held:
    near = tuple(found.near[place] for place in places)
    return Held(chosen=replace(found, near=near), floors=tuple(floors[place] for place in places))


def in_words(floor: Floor) -> str:
    """What came of a limit, in a sentence."""
    words = [f"max_kl of {floor.capability}: {floor.asked:.4g} asked"]
    words += [] if floor.limit == floor.asked else [f", of the search {floor.limit:.4g}"]
    words += [f"; the child was predicted to have {floor.predicted:.4g}, measured {floor.measured.value:.4g}"]
    bound = "one document shows no error" if floor.at_most is None else f"with 95 % at most {floor.at_most:.4g}"
    words += [f", {bound}", "" if _share(floor) <= 1 else ": not kept before GKD"]
    return "".join(words)
