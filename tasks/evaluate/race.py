"""A race of architectures: successive halving over rounds of GKD (Jamieson and Talwalkar, 2016, arXiv:1502.07943).

Summed scores tell good architectures from bad ones, not the optimum from its neighbours, and GKD may turn their order.
So several are measured whole and trained a little; in each round the worse half drops out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blocks.records import Architecture, Racer
from profiles.schema import racers_in
from tasks.evaluate.compare import Contender


@dataclass(kw_only=True)
class _Runner:
    place: int
    which: Contender
    kl: list[tuple[int, float]] = field(default_factory=list)


def race(
    contenders: Sequence[Contender],
    rounds: Sequence[int],
    kl_after: Callable[[Contender, int], float],
    give_up: Callable[[Contender], None],
) -> tuple[Contender, tuple[Racer, ...]]:
    """The winner, and how each fared, best first. contenders: the lowest summed score first.

    rounds: steps of GKD that those who are left have done at its end, rising; the last leaves one. kl_after: the KL on
    validation text after so many steps. give_up: called with each that drops out.
    """
    left = [_Runner(place=place, which=which) for place, which in enumerate(contenders, start=1)]
    out: list[_Runner] = []
    running = list(racers_in(rounds, len(contenders)))
    for (steps, _), (_, stay) in zip(running, [*running[1:], (0, 1)], strict=False):
        for runner in left:
            runner.kl.append((steps, kl_after(runner.which, steps)))
        left.sort(key=lambda runner: runner.kl[-1][1])
        for runner in left[stay:]:
            give_up(runner.which)
        left, out = left[:stay], left[stay:] + out
    first = contenders[0].architecture
    racers = tuple(
        Racer(
            place=runner.place,
            score=runner.which.architecture.score,
            different=_different(runner.which.architecture, first),
            kl=tuple(runner.kl),
        )
        for runner in left + out
    )
    return left[0].which, racers


def _different(one: Architecture, other: Architecture) -> int:
    """The number of layers in which two architectures differ."""
    return sum(mine != theirs for mine, theirs in zip(one.layers, other.layers, strict=True))
