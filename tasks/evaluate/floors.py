"""Limits that the child keeps itself, and not by the sum of its scores and costs alone.

Scores add up only roughly: the KL of a whole child was up to half above their sum (benchmarks/capabilities.md). So do
costs, and a machine is not as fast now as it was when they were measured. So the chosen child is measured before GKD:
its KL on text of each capability that no stage has read, its speed in turns with its parent. The search then gets other
limits, higher or lower by what the child is beside what was asked, and its answer is measured in turn. What counts is a
one-sided bound. All children that may be measured for a KL share an error of 5 % (Bonferroni). Each look at a time is
bounded with 80 %: its noise is the machine's, and the surer the bound, the more KL is paid for speed that nobody asked
for (docs/log.md).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blocks.compute import Compute
from blocks.errors import InfeasibleBudget
from blocks.estimates import lower_bound, upper_bound
from blocks.library import digest_of, made_once
from blocks.records import (
    Architecture,
    CorpusInfo,
    CostTable,
    Floor,
    HeldTime,
    Metric,
    ParentInfo,
    Score,
    Throughput,
    Value,
)
from profiles.schema import Profile
from tasks.evaluate.budget import FLOORS, limits_of
from tasks.evaluate.compare import Contender, figures_of, served, targets_on
from tasks.evaluate.quality import mean_metric
from tasks.inputs.corpus import documents_of, weights_of
from tasks.search.capabilities import rows_read
from tasks.search.choose import with_most_tokens
from tasks.search.mip import SolverStopped
from tasks.search.one_type import candidates, types_of, whole_parent
from tasks.search.totals import TOLERANCE, Problem, budget_rows, kl_on, used_of

VERSION = 2
TIMES = ("runtime", "prefill")  # quantities of a budget
CONFIDENCE = {"kl": 0.95, "time": 0.8}
EASED = (1.0, 0.5, 0.25)  # parts of the way to the limit that is wanted, on which an answer is looked for
# shares of a limit: a child that takes less than ENOUGH gives away quality or speed, and the next one aims at AIM
ENOUGH = {"kl": 0.85, "time": 0.99}
AIM = {"kl": 0.925, "time": 0.995}
MAY_BE_OFF = 1.1  # of a limit on time: what the parent in one type may pass by its costs and still be timed
AS_NEAR = 1.05  # times the score of the chosen child: sums miss by more (docs/log.md), and it has lost no block
TOO_UNSURE = 0.05  # a time with a larger relative error tells nothing


class Checked(Value):
    """The KL of a child on a capability, in nats per token; its error is over documents."""

    kl: Metric


Look = Floor | HeldTime  # at one limit of one child


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
    looks: tuple[tuple[Look, ...], ...]

    def of(self, child: Architecture) -> tuple[Look, ...]:
        """The limits of one of them."""
        pairs = zip(self.chosen.near, self.looks, strict=True)
        return next(looks for one, looks in pairs if _served(one) == _served(child))


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
            at_most=_bound(measured[name], 1 - (1 - CONFIDENCE["kl"]) / children),
        )
        for name, most in asked.items()
    )


def _bound(found: Metric, confidence: float, from_below: bool = False) -> float | None:
    """The one-sided bound; None for a single document or round, which shows no error."""
    return (lower_bound if from_below else upper_bound)(found, confidence) if found.n > 1 else None


def times_are_held(profile: Profile, costs: CostTable | None) -> bool:
    """Whether a chosen child is timed for the limits on time; costs: None where they are not measured yet."""
    return profile.limits_time and profile.search.floor_rounds > 0 and not (costs and costs.modelled)


def times_of(
    asked: Problem, problem: Problem, child: Architecture, own: Sequence[Throughput], parents: Sequence[Throughput]
) -> tuple[HeldTime, ...]:
    """Every limit on time beside what a child is predicted and measured to take.

    asked: with the budget of the profile. problem: what the search was asked. own, parents: speeds of the child and its
    parent, by scenario.
    """
    rows = budget_rows(asked, child.batches)
    found = zip(rows, limits_of(asked, child, own, parents), strict=True)
    return tuple(
        HeldTime(
            field=row.field,
            name=limit.name,
            floor=limit.floor,
            asked=limit.asked,
            limit=_limit_in(problem, row.field) or limit.asked,
            predicted=limit.got,
            measured=limit.measured,
            at_worst=_bound(limit.measured, CONFIDENCE["time"], limit.floor),
        )
        for row, limit in found
        if limit.measured is not None
    )


def _limit_in(problem: Problem, field: str) -> float | None:
    """What the search was asked; None for the speed that `with_most_tokens` found."""
    name, _, scenario = field.partition(" of ")
    if problem.within_score is not None and name in FLOORS and not scenario:
        return None
    budgets = {one.name: one.budget for one in problem.scenarios}
    found: float | None = getattr(budgets[scenario] if scenario else problem.budget, name)
    return found


def share(look: Look) -> float:
    """What a child takes of a limit, at worst."""
    bound = look.at_most if isinstance(look, Floor) else look.at_worst
    return _load(look, look.measured.value if bound is None else bound) / _load(look, look.asked)


def is_kept(look: Look) -> bool:
    """Whether a child keeps a limit, as far as can be told."""
    return share(look) <= 1 + TOLERANCE


def worst(looks: Sequence[Look]) -> float:
    """The largest share of a limit that a child takes."""
    return max(map(share, looks), default=0.0)


def _load(look: Look, figure: float) -> float:
    """A figure of a limit as what is limited from above: a speed as its time."""
    return 1 / figure if isinstance(look, HeldTime) and look.floor else figure


def _of(each: Mapping[str, float], look: Look) -> float:
    return each["kl" if isinstance(look, Floor) else "time"]


def _binds(look: Look) -> bool:
    return _load(look, look.predicted) > 0.95 * _load(look, look.limit)


def _gives_away(look: Look) -> bool:
    """Whether the search's limit holds a child to clearly more than was asked."""
    return _binds(look) and share(look) < _of(ENOUGH, look)


def next_limit(looks: Sequence[Look]) -> float:
    """What the search is asked next of a limit, from the looks at it so far, the last of which is the latest answer.

    Between an answer that kept it and one that did not, by a straight line; otherwise by the latest in proportion.
    """
    last = looks[-1]
    points = [(_load(one, one.predicted), share(one), is_kept(one)) for one in looks]
    over = min((at for at in points if not at[2]), default=None)
    under = max((at for at in points if at[2]), default=None)
    limit, aim = _load(last, last.limit), _of(AIM, last)
    if over and under and under[0] < over[0]:
        part = (aim - under[1]) / (over[1] - under[1])
        limit = under[0] + max(part, 0.0) * (over[0] - under[0])
    elif not is_kept(last):
        limit = min(limit, points[-1][0] or limit) / share(last)
        limit *= 1.0 if isinstance(last, Floor) else aim  # the error of a KL is in its bound
    elif _gives_away(last):
        limit = points[-1][0] * aim / share(last)
    return _load(last, limit)


def asked_next(problem: Problem, looks: Sequence[Sequence[Look]], part: float) -> Problem:
    """The problem of the profile with the limits that come next, or a part of the way to them.

    looks: at the best child of every answer so far; one on a busy machine has none at limits on time.
    """
    found = dict[str, list[Look]]()
    for look in (look for answer in looks for look in answer):
        found.setdefault(f"{name_of(look)}, {getattr(look, 'field', '')}", []).append(look)
    last_of = [(each[-1], next_limit(each)) for each in found.values()]
    return _limited(problem, [(last, last.limit * (wanted / last.limit) ** part) for last, wanted in last_of])


def as_measured(problem: Problem, looks: Sequence[Look]) -> Problem:
    """The problem with limits that are looser where a child was measured to take less than its sum, by as much."""
    looser = list[tuple[Look, float]]()
    for look in looks:
        most = problem.capabilities.most
        limit = most.get(look.capability) if isinstance(look, Floor) else _limit_in(problem, look.field)
        if limit is not None:  # else it is asked no more
            part = min(_load(look, look.measured.value) / _load(look, look.predicted), 1.0) if look.predicted else 1.0
            looser.append((look, _load(look, _load(look, limit) / part)))
    return _limited(problem, looser)


def _limited(problem: Problem, limits: Iterable[tuple[Look, float]]) -> Problem:
    """With these limits on capabilities, and of the budget on time: of one that holds in several scenarios, the
    strictest.
    """
    most, times = dict(problem.capabilities.most), dict[str, float]()
    for look, limit in limits:
        if isinstance(look, Floor):
            most[look.capability] = limit
        else:
            before = times.get(look.field, limit)
            times[look.field] = max(before, limit) if look.floor else min(before, limit)
    scenarios = tuple(
        one.model_copy(update={"budget": one.budget.model_copy(update=_own(times, one.name))})
        for one in problem.scenarios
    )
    budget = problem.budget.model_copy(update=_own(times, ""))
    capabilities = replace(problem.capabilities, most=most)
    return replace(problem, capabilities=capabilities, scenarios=scenarios, budget=budget)


def _own(times: Mapping[str, float], scenario: str) -> dict[str, float]:
    """The limits of one scenario's budget; "": of the profile's."""
    parts = ((*field.partition(" of "), limit) for field, limit in times.items())
    return {name: limit for name, _, whose, limit in parts if whose == scenario}


def next_answer(
    problem: Problem, looks: Sequence[Sequence[Look]], count: int, min_different: int
) -> tuple[Problem, Chosen] | None:
    """What is asked next, and the answer; None where nothing is found.

    Where the budget does not allow so much, an answer on half or a quarter of the way is taken.
    problem: of the profile's budget, before `with_most_tokens`. looks: see `asked_next`.
    """
    for part in EASED:
        wanted = asked_next(problem, looks, part)
        try:
            asked = with_most_tokens(wanted)
            return wanted, Chosen(problem=asked, near=tuple(candidates(asked, count, min_different)))
        except (InfeasibleBudget, SolverStopped):
            continue
    return None


def hold(
    first: Chosen,
    rounds: int,
    measure: Callable[[Chosen], Sequence[tuple[Look, ...]] | None],
    again: Callable[[Sequence[Sequence[Look]]], Chosen | None],
    beside: Callable[[Held], Chosen | None] = lambda _: None,
) -> Held:
    """Of up to `rounds` answers, the best one among its children that keep every limit themselves, and these children;
    where none does, the child that passes its limits least. The best has the lowest score, or where the fastest child
    within a score is wanted, the most tokens a second. It ends with an answer whose best child keeps all limits and
    gives nothing away, or that was there before, or that could not be measured.

    measure: every child of an answer, None where it could not be. again: see `next_answer`; of the best child of every
    answer so far. beside: what is measured last, and taken if it keeps every limit; see `nearer_whole`.
    """
    tried: list[tuple[bool, float, Held]] = []
    best = list[tuple[Look, ...]]()
    found: Chosen | None = first
    while found is not None and (measured := measure(found)) is not None:
        looks = tuple(measured)
        kept = [place for place, one in enumerate(looks) if all(map(is_kept, one))]
        least = min(range(len(looks)), key=lambda place: worst(looks[place]))
        held = _only(found, looks, kept or [least])
        tried.append((not kept, _rank(held.chosen) if kept else worst(looks[least]), held))
        best.append(looks[0])
        found = None if len(tried) == rounds or _settled(0 in kept, looks[0]) else again(best)
        if found is not None and any(is_same(found, one.chosen) for *_, one in tried):
            break
    if not tried:
        return Held(chosen=first, looks=((),) * len(first.near))
    best_of_all = min(tried, key=lambda one: one[:2])[2]
    other = beside(best_of_all)
    if other is None or any(is_same(other, one.chosen) for *_, one in tried) or not (measured := measure(other)):
        return best_of_all
    if not measured[0] or not all(map(is_kept, measured[0])):
        return best_of_all
    return Held(chosen=replace(other, problem=_at_costs_of(other.problem, measured[0])), looks=(measured[0],))


def nearer_whole(asked: Problem, held: Held) -> Chosen | None:
    """The parent in one type of number, if by the scores it is as near as the chosen child and by the costs, which may
    be off, a little too slow: a search among sums leaves it out, and whoever serves it would have the better child.

    asked: of the profile's budget. None for a race, which has its own candidates, and where nothing was timed.
    """
    child = held.chosen.near[0]
    timed = any(isinstance(look, HeldTime) for look in held.looks[0])
    if not timed or len(held.chosen.near) > 1 or asked.within_score is not None:
        return None
    wholes = [whole_parent(asked, kind, child.batches) for kind in types_of(asked) if kind]
    nearer = [one for one in wholes if one.score < AS_NEAR * child.score and _is_a_little_slow(asked, one)]
    best = min(nearer, key=lambda one: one.score, default=None)
    return None if best is None else replace(held.chosen, near=(best,))


def _is_a_little_slow(asked: Problem, whole: Architecture) -> bool:
    """Whether it keeps the budget but for limits on time, and passes these by little."""
    rows = [(row.quantity in TIMES, used_of(asked, whole.totals, row)) for row in budget_rows(asked, whole.batches)]
    slow = any(timed and part > 1 + TOLERANCE for timed, part in rows)
    return slow and all(part <= (MAY_BE_OFF if timed else 1 + TOLERANCE) for timed, part in rows)


def _at_costs_of(problem: Problem, looks: Sequence[Look]) -> Problem:
    """The problem with limits on time that a measured child keeps by its costs too, so that others are searched like
    it.
    """
    times = [look for look in looks if isinstance(look, HeldTime)]
    return _limited(problem, [(look, (min if look.floor else max)(look.limit, look.predicted)) for look in times])


def _rank(chosen: Chosen) -> float:
    """By which answers are compared, the lowest is the best."""
    tokens = chosen.problem.budget.min_tokens_per_second
    return chosen.near[0].score if chosen.problem.within_score is None or tokens is None else -tokens


def _settled(kept: bool, looks: Sequence[Look]) -> bool:
    """Whether another answer could be no better: a limit that binds is taken, or none does."""
    binding = [look for look in looks if _binds(look)]
    return kept and not (binding and all(map(_gives_away, binding)))


def is_same(one: Chosen, other: Chosen) -> bool:
    """Whether the best children of two answers are the same, served the same way."""
    return _served(one.near[0]) == _served(other.near[0])


def _served(child: Architecture) -> tuple[Any, ...]:
    return child.layers, child.head, child.batches


def _only(found: Chosen, looks: Sequence[tuple[Look, ...]], places: Sequence[int]) -> Held:
    near = tuple(found.near[place] for place in places)
    return Held(chosen=replace(found, near=near), looks=tuple(looks[place] for place in places))


def name_of(look: Look) -> str:
    """The limit, as the report has it."""
    return f"max_kl of {look.capability}" if isinstance(look, Floor) else look.name


def in_words(look: Look) -> str:
    """What came of a limit, in a sentence."""
    words = [f"{name_of(look)}: {look.asked:.4g} asked"]
    words += [] if look.limit == look.asked else [f", of the search {look.limit:.4g}"]
    words += [f"; the child was predicted to have {look.predicted:.4g}, measured {look.measured.value:.4g}"]
    if isinstance(look, Floor):
        bound = "one document shows no error" if look.at_most is None else f"with 95 % at most {look.at_most:.4g}"
        words += [f", {bound}"]
    else:
        least = "least" if look.floor else "most"
        words += [f" +-{look.measured.se:.2g}"]
        words += [] if look.at_worst is None else [f", with 80 % at {least} {look.at_worst:.4g}"]
    return "".join([*words, "" if is_kept(look) else ": not kept before GKD"])
