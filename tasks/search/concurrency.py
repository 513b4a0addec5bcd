"""What every number of requests at a time would give: the choice of a batch size, shown beside those not taken."""

from blocks.records import Architecture, AtBatchSize
from tasks.search.totals import Batches, Problem, broken_limits, totals_of

# limits of the budget that say the same of any model; all others are shares of the parent, or limit its size
ABSOLUTE = ("memory_gib", "max_latency_seconds", "max_time_to_first_token_seconds")


def at_batch_sizes(problem: Problem, found: Architecture) -> tuple[AtBatchSize, ...]:
    """The child and its parent at every batch size of each scenario that has several, the other scenarios as chosen.

    problem: what the user asks. Its budget tells what is broken at a size; of the parent only what `ABSOLUTE` names.
    """
    chosen: Batches = found.batches
    whose, rows = problem.reference or problem, list[AtBatchSize]()
    for index, scenario in enumerate(problem.scenarios):
        sizes = sorted(set(scenario.batch_sizes))
        for size in sizes if len(sizes) > 1 else ():
            at = (*chosen[:index], size, *chosen[index + 1 :])
            broken = [row.field for row in broken_limits(problem, found.layers, at, found.head)]
            parents = [row.field for row in broken_limits(problem, whose.parent, at)]
            rows.append(
                AtBatchSize(
                    child=totals_of(problem, found.layers, at, found.head)[index],
                    parent=totals_of(whose, whose.parent, at)[index],
                    chosen=at == chosen,
                    broken=tuple(dict.fromkeys(broken)),
                    reliable=not problem.costs.disturbed,
                    parent_broken=tuple(dict.fromkeys(name for name in parents if name.partition(" ")[0] in ABSOLUTE)),
                )
            )
    return tuple(rows)
