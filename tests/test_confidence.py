"""The bootstrap against exact enumeration, its laws, and the robust objective against brute force."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from profiles.schema import Budget, Search
from tasks.libraries.interchange import joint_view
from tasks.search.confidence import Draws, bootstrap
from tasks.search.joint import JointLibrary, JointOption, LibraryFileError
from tasks.search.request import Request, limits
from tasks.search.solve import choose_joint
from tests.test_choose import EXACT, random_problem
from tests.test_interchange import stored
from tests.test_nvlabs import puzzle


def library(samples: dict[str, list[float]], layers: int = 1) -> JointLibrary:
    """Every layer has the same options; the first takes the whole budget, the others half of it."""
    options = [
        JointOption(
            layer=f"layer_{layer}",
            label=label,
            metrics={"kl": float(np.mean(values))},
            samples={"kl": np.array(values)},
            costs={"memory_gib": 2.0 if label == "parent" else 1.0, "latency_seconds": 1.0},
        )
        for layer in range(layers)
        for label, values in samples.items()
    ]
    return JointLibrary(layers=tuple(f"layer_{i}" for i in range(layers)), options=tuple(options))


SAMPLES = {"parent": [0.0, 0.0, 0.0], "a": [0.1, 0.5, 0.2], "b": [0.4, 0.1, 0.25]}


def test_recurrence_like_all_27_draws() -> None:
    """One layer, three sequences: every draw can be listed."""
    found = bootstrap(library(SAMPLES), Request(limits=limits(memory_gib=1.0)), Draws(most=500, seed=1))
    draws = [np.array(draw) for draw in itertools.product(range(3), repeat=3)]
    best = [min("ab", key=lambda label: np.array(SAMPLES[label])[draw].mean()) for draw in draws]
    regret = [
        np.array(SAMPLES["b"])[draw].mean() / min(np.array(SAMPLES[label])[draw].mean() for label in "ab") - 1
        for draw in draws
    ]
    assert found.chosen == {"layer_0": "b"} and found.sequences == 3
    for label, count in Counter(best).items():
        share = count / 27
        assert 0.2 < share < 0.8
        assert found.recurrence["layer_0"][label] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 500))
    assert found.agreement == found.recurrence["layer_0"]["b"]
    assert found.regret == pytest.approx(np.mean(regret), abs=4 * np.std(regret) / math.sqrt(500))
    assert found.within_1_percent == pytest.approx(np.mean(np.array(regret) <= 0.01), abs=0.1)


def test_no_noise_no_doubt() -> None:
    """Sequences that all say the same: the choice always recurs, nothing is regretted or too good to be true."""
    found = bootstrap(
        library({"parent": [0.0] * 6, "a": [0.2] * 6, "b": [0.3] * 6}, 3),
        Request(limits=limits(memory_gib=4.0)),
        Draws(most=30),
    )
    assert found.low == pytest.approx(found.high) == pytest.approx(found.objective)
    assert found.regret == pytest.approx(0, abs=1e-9) and found.within_1_percent == 1
    assert found.optimism == pytest.approx(0, abs=1e-9)


def test_the_winners_curse_is_seen() -> None:
    """Many equal options, noise alone tells them apart: what was chosen is worse on the sequences left out."""
    generator = np.random.default_rng(0)
    noisy = {f"v{i}": list(generator.gamma(2, 0.1, 12)) for i in range(20)}
    found = bootstrap(
        library({"parent": [0.0] * 12, **noisy}, 2), Request(limits=limits(memory_gib=2.0)), Draws(most=100)
    )
    assert found.optimism > 0.1 and found.regret > 0


def test_a_seed_repeats_and_another_does_not() -> None:
    runs = [
        bootstrap(library(SAMPLES), Request(limits=limits(memory_gib=1.0)), Draws(most=50, seed=seed))
        for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_draws_keep_the_budget_and_sum_to_one() -> None:
    view = joint_view(stored(random_problem(2, Budget(speedup=1.2))))
    request = Request(limits=limits(parameters="60%"))
    seen: list[tuple[int, int]] = []
    found = bootstrap(view, request, Draws(most=20), progress=lambda done, total, text="": seen.append((done, total)))
    assert seen == [(i + 1, 20) for i in range(20)]
    assert list(found.recurrence) == list(view.layers)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.recurrence.values())
    assert found.low <= found.high and found.regret >= -1e-9


def test_drawing_stops_when_it_is_precise_or_out_of_time() -> None:
    """Without noise the least number of draws is enough; with it all are used; without time two are."""
    request = Request(limits=limits(memory_gib=3.0))
    quiet = library({"parent": [0.0] * 6, "a": [0.2] * 6, "b": [0.3] * 6}, 3)
    generator = np.random.default_rng(0)
    loud = library({"parent": [0.0] * 9, **{f"v{i}": list(generator.gamma(2, 0.1, 9)) for i in range(9)}}, 3)
    sure = bootstrap(quiet, request, Draws(most=90, least=7))
    assert sure.draws == 7 and sure.agreement == 1 and sure.agreement_se == 0 and "known to 1%" in sure.stopped
    found = bootstrap(loud, request, Draws(most=30, least=7))
    assert found.draws == 30 and found.agreement_se > 0.01 and "30 draws" in found.stopped
    hurried = bootstrap(loud, request, Draws(most=30, seconds=0.0))
    assert hurried.draws == 2 and "time" in hurried.stopped


@pytest.mark.parametrize("factor", [0.0, 1.0, 5.0])
def test_robust_like_brute_force(factor: float) -> None:
    """mean + factor x se: with a large factor the steady variant wins over the one that is better on average."""
    samples = {"parent": [0.0] * 4, "wild": [0.0, 0.0, 0.0, 0.5], "steady": [0.15, 0.16, 0.15, 0.16]}
    view = library(samples, 2)
    (choice,) = choose_joint(
        view, Request(limits=limits(memory_gib=2.0), search=EXACT.model_copy(update={"robust": factor}))
    )
    value = {name: np.mean(x) + factor * np.std(x, ddof=1) / 2 for name, x in samples.items()}
    assert choice.objective == pytest.approx(2 * min(value["wild"], value["steady"]))
    label = "wild" if factor == 0 else "steady"
    assert set(choice.layers.values()) == {label}
    assert choice.score == pytest.approx(2 * np.mean(samples[label]))


def test_documents_are_drawn_whole() -> None:
    """Every sequence three times, each time of the same document: nothing is surer than with each once."""
    thrice = {name: list(np.repeat(values, 3)) for name, values in SAMPLES.items()}
    once, copied = library(SAMPLES), replace(library(thrice), documents=(0, 0, 0, 1, 1, 1, 2, 2, 2))
    for robust in (0.0, 2.0):
        request = Request(limits=limits(memory_gib=1.0), search=EXACT.model_copy(update={"robust": robust}))
        one, other = (bootstrap(each, request, Draws(most=60, seed=1)) for each in (once, copied))
        assert other.recurrence == one.recurrence and other.objective == pytest.approx(one.objective)
        assert (other.low, other.high, other.regret) == pytest.approx((one.low, one.high, one.regret))
    alone = replace(copied, documents=(7,) * 9)
    with pytest.raises(LibraryFileError, match="all scored sequences are of one document"):
        bootstrap(alone, request)


def test_without_scores_per_sequence_it_says_so() -> None:
    view = library(SAMPLES)
    bare = replace(view, options=tuple(replace(option, samples={}) for option in view.options))
    for call in (
        lambda: bootstrap(bare, Request(limits=limits(memory_gib=1.0))),
        lambda: choose_joint(bare, Request(limits=limits(memory_gib=1.0), search=Search(robust=1.0))),
    ):
        with pytest.raises(LibraryFileError, match="keeps no kl per sequence"):
            call()


def test_the_command_tells_every_layer(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from tasks.libraries.interchange import write_library

    write_library(tmp_path, stored(random_problem(2, Budget(speedup=1.2))))
    code, out, err = puzzle("confidence", "--library", tmp_path, "--parameters", "70%", "--draws", 5)
    assert code == 0, err
    assert all(word in out for word in ("regret", "optimism", "agreement", "5 draws over 5 sequences", "layer_2"))
