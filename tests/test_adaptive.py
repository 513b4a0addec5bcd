"""Adaptive scoring: the estimates by identities, the rule on synthetic libraries, the pieces against whole scoring."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from blocks.compute import HOST
from blocks.errors import InfeasibleBudget
from blocks.records import Score
from profiles.schema import Adaptive, Budget, Scenario, Scoring
from tasks.score import scoring
from tasks.score.scoring import score_sequences
from tasks.search.adaptive import AdaptiveScores, Key, comparable, expected_gain, score_adaptively, table_of
from tasks.search.choose import choose
from tasks.search.program import Floats
from tasks.search.totals import Problem, make_problem, score_of
from tests.chain import Chain
from tests.test_choose import CHAT, EXACT, costs_of

LABELS = {"attention": ("parent", "kv1", "no_op"), "ffn": ("parent", "ffn75", "ffn50", "ffn25", "no_op")}
LAYERS, SEQUENCES = 12, 32
BUDGET = Budget(parameters_fraction=0.6)


def scored(key: Key, kl: Floats, lm_loss: Floats | None = None) -> Score:
    lm_loss = kl if lm_loss is None else lm_loss
    return Score(
        layer=key[0],
        subblock=key[1],  # type: ignore[arg-type]
        variant=key[2],
        kl=float(np.mean(kl)),
        kl_se=float(np.std(kl, ddof=1) / math.sqrt(len(kl))),
        lm_loss=float(np.mean(lm_loss)),
        lm_loss_se=float(np.std(lm_loss, ddof=1) / math.sqrt(len(kl))),
        tokens=8 * len(kl),
        kl_per_sequence=tuple(kl),
        lm_loss_per_sequence=tuple(lm_loss),
    )


KEYS: list[Key] = [(i, part, name) for i in range(LAYERS) for part in LABELS for name in LABELS[part][1:]]


def library(seed: int, noise: float = 0.5) -> dict[Key, Floats]:
    """KL of every variant on every sequence: level x difficulty x lognormal noise."""
    generator = np.random.default_rng(seed)
    difficulty = generator.lognormal(0, 0.4, SEQUENCES)
    found = {}
    for key in KEYS:
        names = LABELS[key[1]]
        level = generator.lognormal(-4, 0.7) * names.index(key[2]) ** 1.5
        found[key] = level * difficulty * generator.lognormal(0, noise, SEQUENCES)
    return found


def problem_of(scores: Iterable[Score], scenarios: Sequence[Scenario] = (CHAT,), budget: Budget = BUDGET) -> Problem:
    return make_problem(scores, costs_of(LABELS, scenarios, LAYERS, 3), budget, scenarios, EXACT)


def replay(values: Mapping[Key, Floats], settings: Adaptive, **more: Any) -> tuple[AdaptiveScores, dict[Key, int]]:
    """Adaptive scoring of what is known already; the depth every variant reached."""
    reached: dict[Key, int] = {}

    def measure(depths: Mapping[Key, int]) -> dict[Key, Score]:
        reached.update(depths)
        return {key: scored(key, values[key][:depth]) for key, depth in depths.items()}

    return score_adaptively(list(values), lambda s: problem_of(s, **more), settings, SEQUENCES, measure), reached


def regret(values: Mapping[Key, Floats], scores: Iterable[Score]) -> float:
    """How much worse than full scoring's choice the choice from `scores` is, on all sequences, as a share."""
    full = problem_of(scored(key, row) for key, row in values.items())
    best, chosen = choose(full), choose(problem_of(scores))
    return score_of(full, chosen.layers)[0] / best.score - 1


# --- estimates


def test_level_times_difficulty_is_found_through_the_holes() -> None:
    """No noise: what a few sequences tell is the mean over all."""
    values = library(0, noise=0.0)
    depths = np.random.default_rng(1).integers(2, 20, len(KEYS))
    depths[3] = SEQUENCES
    table = table_of([scored(key, values[key][:n]) for key, n in zip(KEYS, depths, strict=True)], "kl", SEQUENCES)
    assert table.level == pytest.approx([values[key].mean() for key in KEYS], rel=1e-9)
    assert table.spread == pytest.approx(0, abs=1e-9)
    plain = np.array([values[key][:n].mean() / values[key].mean() for key, n in zip(KEYS, depths, strict=True)])
    assert np.abs(plain - 1).max() > 0.1  # the plain means are not comparable


def test_equal_depths_change_nothing() -> None:
    scores = [scored(key, row) for key, row in library(2).items()]
    assert comparable(scores) == scores
    table = table_of(scores, "kl", SEQUENCES)
    assert table.level == pytest.approx([score.kl for score in scores])


def test_filled_scores_carry_the_error_of_what_was_measured() -> None:
    """Mean, standard error and paired standard error over D filled values are those of the n measured residuals."""
    values, n = library(4), 8
    scores = [scored(key, row[: n if index else SEQUENCES]) for index, (key, row) in enumerate(values.items())]
    found, table = comparable(scores), table_of(scores, "kl", SEQUENCES)
    one, two = found[5], found[6]
    for index, score in ((5, one), (6, two)):
        assert score.tokens == 8 * n and len(score.kl_per_sequence) == SEQUENCES
        assert score.kl_per_sequence[:n] == tuple(values[KEYS[index]][:n])
        assert score.kl == pytest.approx(table.level[index])
    rest = [np.array(s.kl_per_sequence) - table.level[i] * table.difficulty for i, s in ((5, one), (6, two))]
    own = table.residuals[[5, 6], :n]
    for filled, measured in ((rest[0], own[0]), (rest[1], own[1])):
        assert stats.sem(filled) == pytest.approx(math.sqrt(measured @ measured / (n - 1) / n))
    assert stats.sem(rest[0] - rest[1]) == pytest.approx(stats.sem(own[0] - own[1]), rel=0.05)
    assert found[0] == scores[0]


def test_lm_loss_follows_the_difficulty_of_kl() -> None:
    """A rise of the LM loss may be negative; its estimate scales with the sequences' difficulty all the same."""
    values = library(0, noise=0.0)
    scores = [
        scored(key, row[: 4 if i % 2 else SEQUENCES], -row[: 4 if i % 2 else SEQUENCES])
        for i, (key, row) in enumerate(values.items())
    ]
    assert [s.lm_loss for s in comparable(scores)] == pytest.approx([-row.mean() for row in values.values()])


@pytest.mark.parametrize(("distance", "error", "freedom"), [(0.0, 1.0, 3.0), (0.5, 0.2, 5.0), (2.0, 1.0, 30.0)])
def test_expected_gain_is_the_integral(distance: float, error: float, freedom: float) -> None:
    whole, _ = integrate.quad(
        lambda x: (error * x - distance) * stats.t.pdf(x, freedom), distance / error, math.inf, epsabs=1e-12
    )
    assert expected_gain(distance, error, freedom) == pytest.approx(whole, rel=1e-6)


def test_expected_gain_without_error() -> None:
    assert expected_gain(0.3, 0.0, 5.0) == 0 and expected_gain(-0.3, 0.0, 5.0) == 0.3


# --- the rule


def test_no_noise_stops_at_the_first_look() -> None:
    values = library(1, noise=0.0)
    found, reached = replay(values, Adaptive())
    assert set(reached.values()) == {4} and len(found.rounds) == 1
    assert regret(values, found.scores) == pytest.approx(0, abs=1e-6)


def test_the_loss_stays_within_the_tolerance_at_a_third_of_the_tokens() -> None:
    losses, spent, expected = [], [], []
    for seed in range(6):
        values = library(seed, noise=0.3)
        found, _ = replay(values, Adaptive(tolerance=0.01))
        losses.append(regret(values, found.scores))
        spent.append(found.rounds[-1].spent)
        expected.append(found.rounds[-1].expected_loss / found.rounds[-1].objective)
    assert max(expected) <= 0.01
    assert np.mean(losses) < 0.01 and max(losses) < 0.02
    assert np.mean(spent) < 1 / 3
    few = [regret(v, [scored(k, r[:4]) for k, r in v.items()]) for v in (library(s, noise=0.3) for s in range(6))]
    assert np.mean(few) > 3 * np.mean(losses)  # as many tokens as the first look took, and no more, are too few


def test_dominated_variants_are_let_be() -> None:
    """A variant that costs as much as the parent and loses more is never in question."""
    values = library(3, noise=0.3)
    for layer in range(LAYERS):
        values[layer, "ffn", "ffn75"] = values[layer, "ffn", "no_op"] * 2
    _, reached = replay(values, Adaptive())
    assert {reached[layer, "ffn", "ffn75"] for layer in range(LAYERS)} == {4}
    assert max(reached.values()) > 4


def test_a_tolerance_of_nothing_is_full_scoring_where_it_matters() -> None:
    values = library(5, noise=0.5)
    found, reached = replay(values, Adaptive(tolerance=1e-9))
    assert regret(values, found.scores) == pytest.approx(0, abs=1e-9)
    assert max(reached.values()) == SEQUENCES
    chosen = choose(problem_of(found.scores))
    full = problem_of(scored(key, row) for key, row in values.items())
    assert chosen.score == pytest.approx(score_of(full, chosen.layers)[0], rel=0.05)


def test_it_never_asks_for_less_and_ends_below_the_limit() -> None:
    values = library(6)
    asked: list[dict[Key, int]] = []

    def measure(depths: Mapping[Key, int]) -> dict[Key, Score]:
        asked.append(dict(depths))
        return {key: scored(key, values[key][:depth]) for key, depth in depths.items()}

    found = score_adaptively(KEYS, problem_of, Adaptive(growth=1.5), SEQUENCES, measure)
    assert all(look.expected_loss > 0.01 * look.objective for look in found.rounds[:-1])  # not a look too many
    for before, after in zip(asked, asked[1:], strict=False):
        assert all(before[key] <= after[key] <= SEQUENCES for key in KEYS) and before != after
    assert [look.open_variants > 0 for look in found.rounds] == [True] * (len(asked) - 1) + [False]
    assert found.rounds[-1].spent == pytest.approx(sum(asked[-1].values()) / len(KEYS) / SEQUENCES)


def test_a_variant_that_fails_midway_is_dropped() -> None:
    values = library(7)
    bad = KEYS[0]

    def measure(depths: Mapping[Key, int]) -> dict[Key, Score]:
        return {k: scored(k, values[k][:n]) for k, n in depths.items() if k != bad or n <= 4 and len(depths) < 0}

    found = score_adaptively(KEYS, problem_of, Adaptive(), SEQUENCES, measure)
    assert bad not in {(s.layer, s.subblock, s.variant) for s in found.scores} and len(found.scores) == len(KEYS) - 1


def test_batch_sizes_are_weighed_against_each_other() -> None:
    """Two batch sizes whose best architectures differ: both are scored until one is surely better."""
    scenario = CHAT.model_copy(update={"batch_sizes": (1, 2)})
    values = library(8, noise=0.3)
    budget = Budget(speedup=1.6)
    found, _ = replay(values, Adaptive(), scenarios=(scenario,), budget=budget)
    full = problem_of([scored(k, row) for k, row in values.items()], (scenario,), budget)
    chosen = choose(problem_of(found.scores, (scenario,), budget))
    assert score_of(full, chosen.layers)[0] <= 1.02 * choose(full).score


def test_nothing_fits() -> None:
    with pytest.raises(InfeasibleBudget, match="parameters_fraction"):
        replay(library(0), Adaptive(), budget=Budget(parameters_fraction=0.01))


def test_true_in_a_profile_means_the_defaults() -> None:
    assert Scoring.model_validate({"adaptive": True}).adaptive == Adaptive()
    assert Scoring.model_validate({"adaptive": False}).adaptive is None
    assert Scoring.model_validate({"adaptive": {"tolerance": 0.02}}).adaptive == Adaptive(tolerance=0.02)
    with pytest.raises(ValueError, match="toleranze"):
        Scoring.model_validate({"adaptive": {"toleranze": 0.02}})


# --- scoring in pieces


def in_pieces(chain: Chain, workspace: Path, pieces: Sequence[dict[int, tuple[int, ...]]]) -> list[Score]:
    """Score layer 1; a piece says which of its blocks are scored on which sequences."""
    members = [block for block in chain.blocks if block.layer == 1]
    scores: list[Score] = []
    for piece in pieces:
        work = [(members[index], sequences) for index, sequences in piece.items()]
        scores = score_sequences(work, chain.records[1], chain.scored, chain.parent, workspace, HOST)
    return scores


@pytest.fixture
def workspace(chain: Chain, tmp_path: Path) -> Path:
    """The chain's workspace without its scores."""
    for part in chain.workspace.iterdir():
        if part.name != "scores":
            (tmp_path / part.name).symlink_to(part)
    return tmp_path


def test_pieces_give_the_values_of_whole_scoring(chain: Chain, workspace: Path) -> None:
    whole = [score for score in chain.scores if score.layer == 1]
    order = (4, 1, 5, 0, 3, 2)
    count = len(whole)
    first: dict[int, tuple[int, ...]] = {index: order[:2] for index in range(count)}
    then: dict[int, tuple[int, ...]] = {index: order if index % 2 else order[:3] for index in range(count)}
    for index, score in enumerate(in_pieces(chain, workspace, [first, then])):
        used = then[index]
        assert score.tokens == 32 * len(used)
        assert score.kl_per_sequence == pytest.approx([whole[index].kl_per_sequence[s] for s in used], rel=1e-4)
        losses = [whole[index].lm_loss_per_sequence[s] for s in used]
        assert score.lm_loss_per_sequence == pytest.approx(losses, rel=1e-4, abs=1e-6)
        assert score.kl == pytest.approx(np.mean(score.kl_per_sequence))


def test_what_is_known_is_not_computed_again(chain: Chain, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second batch: the first is kept. Other sequences later are all that is computed."""
    done: list[tuple[int, tuple[int, ...]]] = []
    real = scoring.score_batch

    def counted(suffix: Any, records: Any, hidden: Any, sequences: Any, folder: Path) -> Any:
        if len(done) == 1:
            done.append((0, ()))
            raise KeyboardInterrupt
        done.append((len(records), sequences))
        return real(suffix, records, hidden, sequences, folder)

    monkeypatch.setattr(scoring, "score_batch", counted)
    monkeypatch.setattr(scoring, "HELD_TOKENS", 64)
    with pytest.raises(KeyboardInterrupt):
        in_pieces(chain, workspace, [{0: (2, 0), 1: (2, 0)}])
    in_pieces(chain, workspace, [{0: (2, 0), 1: (2, 0)}])
    assert done == [(1, (2, 0)), (0, ()), (1, (2, 0))]
    in_pieces(chain, workspace, [{0: (0, 5), 1: (5, 2)}])
    assert done[3:] == [(2, (5,))]
    again = in_pieces(chain, workspace, [{0: (5, 0, 2), 1: (0, 2)}])
    assert len(done) == 4 and again[0].tokens == 96
