"""A library in several types of number, seen by searches that know of none: every block and the head in one type.

Labels without a type stand for the blocks in that type; the budget's shares stay those of the profile's parent.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from blocks.errors import InfeasibleBudget
from blocks.records import Architecture, LayerChoice
from blocks.typed_labels import bare, type_in, typed
from tasks.search.choose import choose, choose_several
from tasks.search.totals import Batches, Problem, predicted

NOTHING = 1e-12  # of a limit that may not be 0
FAR = 2.0  # times the optimum's score: what scores more is no candidate for the best child


def types_of(problem: Problem) -> tuple[str, ...]:
    """The types of number of a library, "" for the profile's precision first."""
    return tuple(dict.fromkeys(["", *(type_in(cost.variant) for cost in problem.costs.costs)]))


def in_one_type(problem: Problem) -> Iterator[tuple[str, str, Problem]]:
    """The type of the blocks, that of the head, and the problem in them; all combinations that were scored."""
    for kind in types_of(problem):
        scores = tuple(
            score.model_copy(update={"variant": bare(score.variant)})
            for score in problem.scores
            if score.subblock != "head" and typed(score.variant, kind) == score.variant
        )
        costs = tuple(
            cost.model_copy(update={"variant": bare(cost.variant)})
            for cost in problem.costs.costs
            if typed(cost.variant, kind) == cost.variant
        )
        for head in problem.heads:
            non_block = tuple(
                cost.model_copy(update={"head": ""}) for cost in problem.costs.non_block if cost.head == head
            )
            table = problem.costs.model_copy(update={"costs": costs, "non_block": non_block})
            yield kind, head, replace(_beside_head(problem, head), scores=scores, costs=table, reference=problem)


def whole_parent(problem: Problem, kind: str, batches: Batches) -> Architecture:
    """The parent with every block in a type, embedding and head too if they may have it: what needs no search."""
    whole = LayerChoice(attention=typed("parent", kind), ffn=typed("parent", kind))
    head = kind if kind in problem.heads else next((one for one in problem.heads if one), "")
    return predicted(problem, (whole,) * problem.costs.num_hidden_layers, "one type", batches, head)


def _beside_head(problem: Problem, head: str) -> Problem:
    """The problem with what a head leaves of the highest score and KL that are asked."""
    score, within = problem.heads[head], problem.within_score
    if score is None:
        return problem
    taken = {one.name: one.kl for one in score.capabilities}
    most = {name: max(asked - taken[name], NOTHING) for name, asked in problem.capabilities.most.items()}
    within = within and max(within - getattr(score, problem.metric), NOTHING)
    return replace(problem, capabilities=replace(problem.capabilities, most=most), within_score=within)


def back(problem: Problem, found: Architecture, kind: str, head: str) -> Architecture:
    """What was found in one type, as an architecture of the whole library; at the same batch sizes."""
    layers = [
        LayerChoice(attention=typed(one.attention, kind), ffn=typed(one.ffn, kind), coupled=one.coupled)
        for one in found.layers
    ]
    batches = found.batches
    again = predicted(problem, layers, found.method, batches, head)
    kept = {name: getattr(found, name) for name in ("evaluations", "solve_seconds")}
    return again.model_copy(update=kept)


def candidates(problem: Problem, count: int, min_different: int) -> list[Architecture]:
    """The optimum and others that might be better than it once they are trained: who takes part in a race.

    Sums of scores weigh pruning against few bits, and may be wrong about it in all layers at once. So up to half of the
    places go to the best that only prunes (in each type) and to the best that only takes fewer bits, where they score
    at most `FAR` times the optimum. The others are the best by score that differ from all before in `min_different`
    layers at least. In a library without types all are of the latter kind.
    """
    if count == 1 or len(types_of(problem)) == 1:
        return choose_several(problem, count, min_different)
    found = choose_several(problem, 1, min_different)
    for corner in corners(problem):
        if len(found) <= count // 2 and corner.score <= FAR * found[0].score and _apart(corner, found, min_different):
            found.append(corner)
    for one in choose_several(problem, count + len(found), min_different):
        if len(found) < count and _apart(one, found, min_different):
            found.append(one)
    return sorted(found, key=lambda one: one.score)


def corners(problem: Problem) -> list[Architecture]:
    """The best with all blocks in one type, for each type, and the best whose blocks are all the parent's; the lowest
    score first.
    """
    best: dict[str, Architecture] = {}
    for kind, head, alone in in_one_type(problem):
        try:
            found = back(problem, choose(alone), kind, head)
        except InfeasibleBudget:
            continue
        best[kind] = min(found, best.get(kind, found), key=lambda one: one.score)
    whole = [one for one in problem.scores if one.subblock == "head" or bare(one.variant) == "parent"]
    with suppress(InfeasibleBudget):
        best["whole"] = choose(replace(problem, scores=tuple(whole)))
    return sorted(best.values(), key=lambda one: one.score)


def _apart(one: Architecture, others: Sequence[Architecture], layers: int) -> bool:
    """Whether an architecture differs from all others in so many layers."""
    pairs = (zip(one.layers, other.layers, strict=True) for other in others)
    return all(sum(mine != theirs for mine, theirs in pair) >= layers for pair in pairs)
