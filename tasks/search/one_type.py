"""A library in several types of number, seen by searches that know of none: every block and the head in one type.

Labels without a type stand for the blocks in that type; the budget's shares stay those of the profile's parent.
"""

from collections.abc import Iterator
from dataclasses import replace

from blocks.records import Architecture, LayerChoice
from blocks.typed_labels import bare, type_in, typed
from tasks.search.totals import Problem, predicted


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
            yield kind, head, replace(problem, scores=scores, costs=table, reference=problem)


def back(problem: Problem, found: Architecture, kind: str, head: str) -> Architecture:
    """What was found in one type, as an architecture of the whole library; at the same batch sizes."""
    layers = [
        LayerChoice(attention=typed(one.attention, kind), ffn=typed(one.ffn, kind), coupled=one.coupled)
        for one in found.layers
    ]
    batches = tuple(totals.batch_size for totals in found.totals)
    again = predicted(problem, layers, found.method, batches, head)
    kept = {name: getattr(found, name) for name in ("evaluations", "solve_seconds")}
    return again.model_copy(update=kept)
