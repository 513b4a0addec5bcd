"""A race of architectures: halving against a table that is written out, who races against enumeration, the cost."""

import itertools

import pytest

from blocks.errors import PuzzleError
from blocks.records import LayerChoice
from profiles.errors import ProfileError
from profiles.load import load_profile
from profiles.schema import Budget
from tasks.evaluate.compare import Contender, contender
from tasks.evaluate.race import race
from tasks.planning.effort import race_shares
from tasks.search.choose import choose_several
from tasks.search.totals import score_of, within_budget
from tests.chain import chosen
from tests.test_choose import ATTENTIONS, FFNS, random_problem


def named(name: str, place: int) -> Contender:
    layers = (LayerChoice(ffn=f"ffn{place}"), LayerChoice())
    return contender(name, chosen(layers, score=float(place)), [])


def test_the_worse_half_drops_out_and_the_last_round_leaves_one() -> None:
    kl = {  # after 0, 12 and 24 steps: the optimum of the sums leads at first, and loses
        "a": (0.50, 0.40, 9.0),
        "b": (0.60, 9.0, 9.0),
        "c": (0.55, 0.30, 0.20),
        "d": (0.70, 9.0, 9.0),
        "e": (0.52, 0.35, 9.0),
    }
    asked, gone = list[tuple[str, int]](), list[str]()

    def kl_after(which: Contender, steps: int) -> float:
        asked.append((which.name, steps))
        return kl[which.name][steps // 12]

    runners = [named(name, place) for place, name in enumerate(kl, start=1)]
    winner, racers = race(runners, (0, 12, 24), kl_after, lambda which: gone.append(which.name))
    assert winner is runners[2]
    assert asked == [*((name, 0) for name in "abcde"), *((name, 12) for name in "aec"), *((name, 24) for name in "ce")]
    assert gone == ["b", "d", "a", "e"]
    assert [racer.place for racer in racers] == [3, 5, 1, 2, 4]
    assert racers[0].kl == ((0, 0.55), (12, 0.30), (24, 0.20)) and racers[-1].kl == ((0, 0.70),)
    assert [racer.different for racer in racers] == [1, 1, 0, 1, 1]


def test_a_race_that_one_round_decides_ends_there() -> None:
    winner, racers = race([named("a", 1), named("b", 2)], (0, 12, 24), lambda which, _: which.architecture.score, print)
    assert winner.name == "a" and [len(racer.kl) for racer in racers] == [1, 1]


@pytest.mark.parametrize("seed", range(4))
def test_those_who_race_are_the_best_that_differ_enough(seed: int) -> None:
    """Greedy by enumeration: each is the lowest sum within the budget, two layers or more from all before it."""
    problem = random_problem(seed, Budget(memory_fraction=0.7))
    found = choose_several(problem, 4, 2)
    pairs = [LayerChoice(attention=a, ffn=f) for a, f in itertools.product(ATTENTIONS, FFNS)]
    left = [(score_of(problem, layers)[0], layers) for layers in itertools.product(pairs, repeat=3)]
    left.sort(key=lambda pair: pair[0])
    for each in found:
        best = next(layers for _, layers in left if within_budget(problem, layers))
        assert each.score == pytest.approx(score_of(problem, best)[0])
        left = [
            (value, layers)
            for value, layers in left
            if sum(mine != theirs for mine, theirs in zip(layers, each.layers, strict=True)) >= 2
        ]
    assert [each.score for each in found] == sorted(each.score for each in found) and len(found) == 4


def test_one_architecture_differs_from_none() -> None:
    """Without a race nothing is asked of how far racers are apart: a parent may have fewer layers than that."""
    problem, layers = random_problem(0, Budget(memory_fraction=0.7)), 3
    far, near = (choose_several(problem, 1, different)[0] for different in (layers + 1, 1))
    assert far.layers == near.layers
    with pytest.raises(PuzzleError, match="min_different"):
        choose_several(problem, 2, layers + 1)


RACE = "{candidates: 8, rounds: [0, 8, 16]}"


def test_what_a_race_takes_is_planned() -> None:
    profile = load_profile("tiny", [f"race={RACE}"])
    assert race_shares(profile) == pytest.approx(((4 * 8 + 2 * 8) / 24, 8 / 24))
    assert race_shares(load_profile("tiny")) == (0.0, 1.0)


@pytest.mark.parametrize("rounds", ["[0, 12]", "[8, 24]", "[8, 8]", "[16, 8]"])
def test_rounds_that_no_evaluation_ends_are_refused(rounds: str) -> None:
    with pytest.raises(ProfileError, match=r"rounds rise, are multiples of gkd.evaluate_every \(8\)"):
        load_profile("tiny", [f"race={{candidates: 2, rounds: {rounds}}}"])
