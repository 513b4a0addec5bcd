"""The MIP: one variant per subblock per layer, the lowest summed score within the whole budget (Puzzle, appendix B).

The tables are viewed as a joint library (tasks/search/view.py) and solved like any other (tasks/search/solve.py). The
answer is checked again by sums that share no code with either (tasks/search/totals.py).
"""

import math
import time
from dataclasses import replace
from typing import Any

from blocks.records import Architecture, LayerChoice
from tasks.running.progress import say
from tasks.search.joint import Option
from tasks.search.request import Limit, Request
from tasks.search.solve import JointChoice, choose_joint
from tasks.search.totals import TOLERANCE, Batches, Problem, broken_kl, broken_limits, predicted
from tasks.search.view import library_of, request_of


def with_most_tokens(problem: Problem) -> Problem:
    """Where the fastest child within a score is wanted: the problem of the lowest score at that speed.

    Its batch sizes are those of the fastest child, and the most tokens a second are a limit beside the others. So all
    that knows the lowest score alone, baselines among them, is asked the same at the same speed. Any other problem
    comes back as it is.
    """
    most = problem.search.fastest_within_score
    if most is None:
        return problem
    problem = replace(
        problem, within_score=most, search=problem.search.model_copy(update={"fastest_within_score": None})
    )
    (fastest,) = choose_joint(library_of(problem), _asked(problem, minimise="tokens_per_second"))
    speed = 1 / max(fastest.objective, 1e-9)  # nothing may take no time
    if fastest.status != "optimal":
        say(
            f"search: {speed:.4g} tokens/s are the most that were found within a score of {most:g}, the seconds of a "
            f"token {fastest.gap:.1%} above the proven least. Raise search.time_limit_seconds to look longer"
        )
    tokens = (1 - TOLERANCE) * speed  # sums of floats in another order
    sizes = {found.scenario: found.batch_size for found in fastest.scenarios}
    scenarios = (one.model_copy(update={"batch_sizes": (sizes[one.name],)}) for one in problem.scenarios)
    return replace(
        problem,
        scenarios=tuple(scenarios),
        # at these batch sizes so many tokens are at least the speed-up that was asked
        budget=problem.budget.model_copy(update={"min_tokens_per_second": tokens, "speedup": None}),
    )


def _asked(problem: Problem, **changes: Any) -> Request:
    """What is asked of the search: the budget, and the highest score where there is one."""
    asked, most = request_of(problem, **changes), problem.within_score
    if most is None:
        return asked
    limit = Limit(quantity="score", asked=most, name="search.fastest_within_score")
    return asked.model_copy(update={"limits": (*asked.limits, limit)})


def choose(problem: Problem) -> Architecture:
    """The best architecture of the library within the budget, over all combinations of batch sizes.

    The best has the lowest score, or the most tokens a second where `search.fastest_within_score` says so. Equal scores
    go to the larger batch. The time limit holds for each combination; at the limit the best architecture
    so far comes back with status "time_limit" and its gap. `bound` holds for all combinations together.

    Raises InfeasibleBudget with the nearest reachable values, SolverStopped when time ran out without any answer.
    """
    return choose_several(problem, 1, 1)[0]


def choose_several(problem: Problem, count: int, min_different: int) -> list[Architecture]:
    """The best architecture, then the best of those that differ from all before in `min_different` layers at least.

    Fewer than `count` where no more exist. Each has the proof of its own place: the bound of a later one holds for
    what differs from those before. See `choose`.
    """
    started = time.perf_counter()
    problem = with_most_tokens(problem)
    library = library_of(problem)
    options = {(option.layer, option.label): option.own for option in library.options}
    found = choose_joint(library, _asked(problem, diverse=count, min_different=min_different))
    seconds = time.perf_counter() - started
    return [_checked(problem, each, [options[item] for item in each.layers.items()], seconds) for each in found]


def _checked(problem: Problem, choice: JointChoice, options: list[Option | None], seconds: float) -> Architecture:
    """The architecture of a choice, its limits and score summed again without the library."""
    chosen = [own for own in options if own is not None]
    layers = [LayerChoice(**own.choice) for own in chosen if own.head is None]
    head = next((own.head for own in chosen if own.head is not None), "")
    sizes = {found.scenario: found.batch_size for found in choice.scenarios}
    batches: Batches = tuple(sizes[scenario.name] for scenario in problem.scenarios)
    architecture = predicted(problem, layers, "mip", batches, head)
    problems = [f"{limit.field} is broken" for limit in broken_limits(problem, layers, batches, head)]
    problems += [f"max_kl of {name} is broken" for name in broken_kl(problem, layers, head)]
    if not math.isclose(architecture.score, choice.score, rel_tol=1e-6, abs_tol=1e-9):
        problems.append(f"the score is {architecture.score}, not {choice.score}")
    if problems:
        raise AssertionError(f"the solver's answer fails its own check, a bug of puzzle: {'; '.join(problems)}")
    certificate = {name: getattr(choice, name) for name in ("status", "gap", "solved_by")}
    certificate["bound"] = min(choice.bound, choice.objective)
    return architecture.model_copy(update={**certificate, "solve_seconds": seconds})
