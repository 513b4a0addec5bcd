"""Errors against formulas and resampling, pairs and clusters, and when a difference is clear."""

import math

import numpy as np
import pytest
from scipy import stats

from blocks.estimates import (
    independent_difference,
    independent_ratio,
    interval,
    is_below_zero,
    is_clear,
    lower_bound,
    mean,
    paired_difference,
    parts_of,
    pooled_accuracy,
    rank_correlation,
    ratio,
    ratio_by_groups,
    resampled,
)
from blocks.records import Metric


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0, 9.0], [0, 1, 1, 0, 1], [0.3] * 4, [-5.0, 7.0]])
def test_a_mean_has_the_usual_error(values: list[float]) -> None:
    found = mean(values).metric
    assert found.value == pytest.approx(np.mean(values))
    assert found.se == pytest.approx(stats.sem(values))
    assert found.n == len(values)


def test_one_value_tells_no_error() -> None:
    one = mean([3.0])
    assert (one.value, one.error) == (3, 0)
    assert not is_clear(one.metric)
    with pytest.raises(ValueError, match="two parts"):
        interval(one)


@pytest.mark.parametrize("copies", [2, 3, 5])
def test_an_item_that_is_there_several_times_counts_once(copies: int) -> None:
    """The same items, each copied: an error that took the copies as independent would shrink by sqrt(copies)."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    repeated = [value for value in values for _ in range(copies)]
    groups = [place for place in range(len(values)) for _ in range(copies)]
    assert mean(repeated, groups).error == pytest.approx(stats.sem(values))
    assert mean(repeated).error < stats.sem(values) / 1.2


def draw_of_documents(generator: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """24 sequences of documents of one to four sequences; what a document is like weighs more than chance."""
    sizes: list[int] = []
    while sum(sizes) < 24:
        sizes.append(int(generator.integers(1, 5)))
    documents = np.repeat(np.arange(len(sizes)), sizes)[:24]
    return generator.normal(size=len(sizes))[documents] + 0.5 * generator.normal(size=24), documents.tolist()


def test_intervals_over_documents_hold_the_truth_and_those_over_sequences_do_not() -> None:
    generator, draws = np.random.default_rng(5), 500
    held, alone = 0, 0
    for _ in range(draws):
        values, documents = draw_of_documents(generator)
        for groups in (documents, []):
            low, high = interval(mean(values, groups))
            held += bool(groups) and low <= 0 <= high
            alone += not groups and low <= 0 <= high
    assert 0.92 <= held / draws <= 0.975
    assert alone / draws < 0.85


def test_resampling_draws_documents_whole_and_gives_their_error() -> None:
    generator = np.random.default_rng(2)
    values, documents = draw_of_documents(generator)
    parts = parts_of(24, documents)
    drawn = np.array([resampled(generator, parts) for _ in range(4000)])
    assert all(len(set(draw[parts == part].tolist())) == 1 for draw in drawn[:50] for part in range(parts.max() + 1))
    means = drawn @ values / drawn.sum(axis=1)
    assert np.std(means) == pytest.approx(mean(values, documents).error, rel=0.15)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_below_zero_is_a_one_sided_t_test_whose_level_is_shared(seed: int) -> None:
    values = np.random.default_rng(seed).normal(-0.5, 1.0, 12)
    chance = float(stats.ttest_1samp(values, 0, alternative="less").pvalue)
    found = mean(values).metric
    assert is_below_zero(found, chance * 1.01) and not is_below_zero(found, chance * 0.99)
    assert is_below_zero(found, 8 * chance * 1.01, 8) and not is_below_zero(found, 8 * chance * 0.99, 8)
    assert not is_below_zero(mean([-1.0]).metric, 0.05) and is_below_zero(mean([-1.0, -1.0]).metric, 0.05)


def test_groups_are_one_for_each_value() -> None:
    with pytest.raises(ValueError, match="3 values need as many groups, not 2"):
        mean([1, 2, 3], ["a", "b"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pairs_take_out_what_was_hard_for_both(seed: int) -> None:
    generator = np.random.default_rng(seed)
    hard = generator.normal(size=24)
    first, second = hard + 0.3 + 0.05 * generator.normal(size=24), hard
    lead = paired_difference(mean(first), mean(second))
    assert lead.value == pytest.approx(np.mean(first - second)) and lead.se == pytest.approx(stats.sem(first - second))
    assert is_clear(lead) and not is_clear(independent_difference(mean(first).metric, mean(second).metric))


def test_pairs_need_one_sample() -> None:
    with pytest.raises(ValueError, match="3 and 2 parts"):
        paired_difference(mean([1, 2, 3]), mean([1, 2]))


def test_accuracies_are_pooled_over_items_or_over_tasks() -> None:
    correct = {"a": [1, 1, 1, 0], "b": [0, 1], "c": [0, 0, 0, 0]}
    pooled, by_task = pooled_accuracy(correct), pooled_accuracy(correct, by_task=True)
    assert pooled.value == pytest.approx(4 / 10)
    assert by_task.value == pytest.approx((0.75 + 0.5 + 0) / 3)
    errors = [stats.sem(correct[name]) for name in "abc"]
    assert by_task.error == pytest.approx(math.hypot(*errors) / 3)
    assert pooled.error == pytest.approx(math.hypot(4 * errors[0], 2 * errors[1], 4 * errors[2]) / 10)
    with pytest.raises(ValueError, match="items"):
        pooled_accuracy({"a": []})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_ratio_has_the_error_of_its_paired_bootstrap(seed: int) -> None:
    generator = np.random.default_rng(seed)
    parents = {name: generator.random(80) < 0.6 for name in "abc"}
    childs = {name: np.where(generator.random(80) < 0.8, own, ~own) for name, own in parents.items()}
    as_items = [{name: own.astype(int).tolist() for name, own in side.items()} for side in (childs, parents)]
    found = ratio(*(pooled_accuracy(side, by_task=True) for side in as_items))
    assert found is not None
    drawn = []
    for _ in range(4000):
        picked = {name: generator.integers(80, size=80) for name in "abc"}
        means = [np.mean([side[name][picked[name]].mean() for name in "abc"]) for side in (childs, parents)]
        drawn.append(means[0] / means[1])
    assert found.error == pytest.approx(np.std(drawn), rel=0.08)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert interval(found) == pytest.approx((low, high), abs=0.012)


def test_a_ratio_to_itself_has_no_error_and_one_to_nothing_is_none() -> None:
    own = mean([1, 0, 1, 1])
    same = ratio(own, own)
    assert same is not None and (same.value, same.error) == (1, 0)
    assert ratio(own, mean([0, 0, 0, 0])) is None


@pytest.mark.parametrize(
    ("value", "se", "n", "clear"),
    [
        (0.2, 0.09, 400, True),
        (-0.2, 0.09, 400, True),
        (0.2, 0.1, 400, False),
        (9, 0, 1, False),
        (0.2, 0.09, 7, False),
        (0.2, 0.075, 7, True),
    ],
)
def test_clear_is_more_than_two_standard_errors(value: float, se: float, n: int, clear: bool) -> None:
    assert is_clear(Metric(value=value, se=se, n=n)) is clear


def test_of_few_documents_no_more_is_clear_by_chance() -> None:
    """Two standard errors hold in 95.4 % of large samples; of seven documents they would in 91 %."""
    generator, draws = np.random.default_rng(7), 2000
    clear = sum(is_clear(mean(generator.normal(size=7)).metric) for _ in range(draws))
    assert clear / draws == pytest.approx(2 * stats.norm.sf(2), abs=0.015)


def test_a_lower_bound_is_that_of_a_one_sided_t_test() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.05]
    expected = stats.ttest_1samp(values, 0, alternative="greater").confidence_interval(0.95).low
    assert lower_bound(mean(values).metric, 0.95) == pytest.approx(expected)
    assert lower_bound(mean([0.3]).metric, 0.95) == -math.inf
    assert lower_bound(mean([0.2] * 4).metric, 0.95) == pytest.approx(0.2)


def test_rank_correlations_are_spearmans_and_nothing_where_nothing_varies() -> None:
    generator = np.random.default_rng(0)
    scores, true = generator.normal(size=9).round(1), generator.normal(size=(9, 5)).round(1)
    true[:, 2] = 0.5
    expected = [stats.spearmanr(scores, column).statistic if np.ptp(column) else 0.0 for column in true.T]
    np.testing.assert_allclose(rank_correlation(scores, true), expected)
    assert not rank_correlation(np.ones(9), true).any()


def test_a_ratio_is_paired_in_the_groups_that_two_samples_share() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(3, 1, 12), generator.normal(2, 1, 12)
    groups = [f"document {one // 3}" for one in range(12)]
    other = [f"other {one // 3}" for one in range(12)]
    one, two = mean(first, groups), mean(second, groups)
    paired = ratio(one, two)
    assert paired is not None
    assert ratio_by_groups(one, groups, two, groups) == paired.metric
    alone = ratio_by_groups(one, groups, mean(second, other), other)
    known = independent_ratio(one.metric, two.metric)
    assert alone is not None and known is not None
    assert (alone.value, alone.se, alone.n) == pytest.approx((known.value, known.se, known.n))
    # in another order, and one document short: the moves still meet those of their own document
    order = generator.permutation(9)
    short, left = second[:9][order], [groups[place] for place in order]
    part = ratio_by_groups(mean(short, left), left, one, groups)
    assert part is not None and part.n == 3
    same = ratio_by_groups(mean(first[:9][order], left), left, mean(first[:9], groups[:9]), groups[:9])
    assert same is not None and (same.value, same.se) == pytest.approx((1, 0), abs=1e-12)
    assert ratio_by_groups(one, groups, mean([0.0, 0.0]), [0, 1]) is None
