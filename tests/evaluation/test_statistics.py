from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats import contingency_tables, multitest, proportion

from bench.evaluation.statistics import (
    Bootstrap,
    bootstrap_p,
    clustered_mcnemar,
    holm,
    mcnemar,
    percentile_interval,
    rank_methods,
    seeds_p,
    smallest_gap,
    t_interval,
    table_seeds_p,
    wilson_interval,
)

figures = st.lists(st.integers(-1000, 1000).map(lambda i: i / 100), min_size=2, max_size=8)


@given(figures)
def test_the_t_interval_is_that_of_scipy(values):
    computed = t_interval(values)
    if np.ptp(values) == 0:
        assert computed == pytest.approx((values[0], values[0]))
    else:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert computed == pytest.approx(expected, abs=1e-9)


def test_one_value_has_no_t_interval():
    assert t_interval([0.5]) is None


@given(st.integers(1, 4000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_is_that_of_statsmodels(case):
    successes, n = case
    assert wilson_interval(successes, n) == pytest.approx(proportion.proportion_confint(successes, n, method="wilson"), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 5)])
def test_a_proportion_that_cannot_be_is_refused(successes, n):
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(successes, n)


@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_over_clusters_of_one_sample_is_mcnemar(seed):
    signs = np.random.default_rng(seed).choice([-1, 0, 1], 400, p=[0.1, 0.75, 0.15])
    assert clustered_mcnemar(signs) == pytest.approx(float(mcnemar((signs > 0).sum(), (signs < 0).sum())), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_mcnemar_over_clusters_counts_all_signs(seed):
    differences = np.random.default_rng(seed).integers(-4, 5, 12)
    sums = [int(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=12)]
    expected = np.mean([abs(total) >= abs(differences.sum()) for total in sums])
    assert clustered_mcnemar(differences) == pytest.approx(expected, rel=1e-9)
    assert stats.permutation_test(
        (differences, np.zeros(12, int)), lambda a, b: (a - b).sum(), permutation_type="samples", n_resamples=np.inf
    ).pvalue == pytest.approx(expected, rel=1e-9)


def test_classifiers_that_never_differ_in_a_cluster_are_not_told_apart():
    assert clustered_mcnemar([0, 0, 0]) == 1
    assert clustered_mcnemar([2, -2]) == 1


def test_people_with_many_pictures_do_not_make_equal_methods_differ():
    """Each of two equal methods knows some people better: 300 pictures of 30 people say no more than the people do."""
    rng = np.random.default_rng(1)
    of_pictures, of_people = 0, 0
    for _ in range(500):
        right = rng.random((2, 30, 10)) < rng.beta(2, 1, (2, 30, 1))
        first, second = right
        of_pictures += float(mcnemar((first & ~second).sum(), (second & ~first).sum())) < 0.05
        of_people += clustered_mcnemar(first.sum(axis=1) - second.sum(axis=1)) < 0.05
    assert of_people <= 25 + 2 * math.sqrt(500 * 0.05 * 0.95)
    assert of_pictures > 100


@given(st.integers(0, 2**32 - 1), st.integers(1, 300))
def test_mcnemar_is_that_of_statsmodels(seed, n):
    rng = np.random.default_rng(seed)
    first, second = rng.random(n) < 0.7, rng.random(n) < 0.6
    table = [[int((first & second).sum()), int((first & ~second).sum())], [int((~first & second).sum()), int((~first & ~second).sum())]]
    assert mcnemar((first & ~second).sum(), (second & ~first).sum()) == pytest.approx(
        contingency_tables.mcnemar(table, exact=True).pvalue, abs=1e-12
    )


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_holm_is_that_of_statsmodels(count):
    values = np.random.default_rng(count).random(count) ** 4
    assert holm(values.tolist()) == pytest.approx(multitest.multipletests(values, method="holm")[1].tolist(), abs=1e-12)


def test_the_smallest_gap_is_the_first_that_the_test_calls_one():
    gap = smallest_gap(3068, 0.08)
    pairs = round(3068 * 0.08)
    surplus = round(gap * 3068)
    assert stats.binomtest((pairs + surplus) // 2, pairs).pvalue < 0.05
    assert stats.binomtest((pairs + surplus - 2) // 2, pairs).pvalue >= 0.05


def test_a_split_of_three_samples_tells_nothing_apart():
    assert smallest_gap(3, 1.0) == 1.0


def test_the_bootstrap_of_a_plain_mean_has_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(size=400)
    boot = Bootstrap([None] * 400, replicates=4000)
    replicates = boot.macro_means(values, np.zeros(400, np.int64), counted=np.ones(400, bool))[0]
    assert np.std(replicates) == pytest.approx(stats.sem(values, ddof=0), rel=0.05)
    scipy_interval = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert percentile_interval(replicates) == pytest.approx(tuple(scipy_interval), abs=0.02)


def test_pictures_of_one_person_are_drawn_together():
    people = [f"p{i // 10}" for i in range(400)]
    values = np.repeat(np.random.default_rng(0).normal(size=40), 10)  # ten equal pictures of each
    boot = Bootstrap(people, replicates=4000)
    replicates = boot.macro_means(values, np.zeros(400, np.int64), counted=np.ones(400, bool))[0]
    assert boot.clusters == 40
    assert np.std(replicates) == pytest.approx(stats.sem(values[::10], ddof=0), rel=0.05)


def macro(values, labels, counted):
    return np.mean([values[counted & (labels == label)].mean() for label in np.unique(labels[counted])])


def test_replicates_are_what_the_metric_gives_on_the_drawn_samples():
    rng = np.random.default_rng(3)
    n = 60
    values, labels, counted = rng.random(n), rng.integers(0, 3, n), rng.random(n) < 0.8
    boot = Bootstrap([None] * n, replicates=20)
    replicates = boot.macro_means(values, labels, counted=counted)[0]
    for row, computed in zip(boot._draws, replicates, strict=True):
        drawn = np.repeat(np.arange(n), row.astype(int))
        assert computed == pytest.approx(macro(values[drawn], labels[drawn], counted[drawn]), abs=1e-6)


def test_figures_on_one_split_share_their_draws():
    rng = np.random.default_rng(4)
    values, labels = rng.random((2, 50)), np.zeros(50, np.int64)
    boot = Bootstrap([None] * 50)
    both = boot.macro_means(values, labels, counted=np.ones(50, bool))
    difference = boot.macro_means(values[0] - values[1], labels, counted=np.ones(50, bool))[0]
    np.testing.assert_allclose(both[0] - both[1], difference, atol=1e-6)


def test_a_class_that_a_replicate_lacks_is_left_out_of_its_mean():
    values, labels = np.array([1.0, 5.0]), np.array([0, 1])
    replicates = Bootstrap([None, None], replicates=200).macro_means(values, labels, counted=np.ones(2, bool))[0]
    assert set(np.unique(replicates)) == {1.0, 3.0, 5.0}


def test_values_that_do_not_count_may_be_nan():
    counted = np.array([True, False, True])
    replicates = Bootstrap([None] * 3, replicates=50).macro_means(np.array([1.0, np.nan, 1.0]), np.zeros(3, np.int64), counted=counted)
    assert np.nanmax(np.abs(replicates - 1)) == 0


def test_the_bootstrap_p_value_of_a_paired_difference_is_that_of_the_t_test():
    rng = np.random.default_rng(5)
    differences = rng.normal(0.1, 1, 300)
    boot = Bootstrap([None] * 300, replicates=8000)
    replicates = boot.macro_means(differences, np.zeros(300, np.int64), counted=np.ones(300, bool))[0]
    (computed,) = bootstrap_p([differences.mean()], [replicates.std(ddof=1)], clusters=300)
    assert computed == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.02)


def test_identical_figures_are_never_different():
    assert bootstrap_p([0.0], [0.0], clusters=10) == 1.0
    assert seeds_p([[0.0, 0.0]]) == 1.0


def test_seeds_are_compared_pair_by_pair():
    first, second = [0.80, 0.82, 0.85], [0.79, 0.80, 0.84]
    assert seeds_p([np.subtract(first, second)]) == pytest.approx(stats.ttest_rel(first, second).pvalue)


def pairs_of(rows):
    return tuple(np.transpose(list(itertools.combinations(range(rows), 2))))


def test_rows_of_a_table_are_compared_with_the_spread_of_the_two_way_layout():
    """Its variance against a regression on rows and seeds, its degrees of freedom against the eigenvalues of the rows' covariance."""
    figures = np.random.default_rng(2).normal(0, 1, (6, 5)) * np.array([1, 1, 1, 2, 3, 1])[:, None] + np.arange(6)[:, None]
    rows, seeds = np.indices(figures.shape)
    design = np.column_stack([np.eye(6)[rows.ravel()], np.eye(5)[seeds.ravel()][:, 1:]])
    variance = OLS(figures.ravel(), design).fit().scale
    centring = np.eye(6) - 1 / 6
    eigenvalues = np.linalg.eigvalsh(centring @ np.cov(figures) @ centring)
    degrees = 4 * eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    differences = figures[0] - figures[1:]
    error = np.sqrt(np.maximum(2 * variance, differences.var(axis=1, ddof=1)) / 5)
    together = 2 * stats.t.sf(np.abs(differences.mean(axis=1)) / error, degrees)
    expected = np.minimum(1, 2 * np.minimum(together, stats.ttest_rel(figures[:1].T, figures[1:].T).pvalue))
    np.testing.assert_allclose(table_seeds_p(figures, np.zeros(5, np.int64), np.arange(1, 6)), expected)


def test_two_rows_have_no_others_to_learn_from():
    figures = np.array([[0.80, 0.82, 0.85], [0.79, 0.80, 0.84]])
    assert table_seeds_p(figures, *pairs_of(2)) == seeds_p(figures[:1] - figures[1:])


def test_rows_tell_each_other_how_far_training_scatters():
    """Twenty tables of 21 equal rows and one that lies four standard deviations below, five seeds."""
    rng = np.random.default_rng(0)
    first, second = pairs_of(22)
    alone = together = 0
    for _ in range(20):
        figures = rng.standard_normal((22, 5))
        figures[0] -= 4
        alone += np.sum(np.array(holm(seeds_p(figures[first] - figures[second])))[first == 0] < 0.05)
        together += np.sum(np.array(holm(table_seeds_p(figures, first, second)))[first == 0] < 0.05)
    assert alone < 0.2 * 20 * 21
    assert together > 0.5 * 20 * 21


def test_read_outs_of_one_training_are_told_apart_by_their_own_spread():
    """Two rows that rise and fall together, beside others that scatter far more."""
    figures = np.random.default_rng(0).normal(0, 1, (11, 5))
    figures[1] = figures[0] + 0.3 + np.array([1e-3, -1e-3, 0, 2e-3, 0])
    first, second = pairs_of(11)
    assert holm(table_seeds_p(figures, first, second))[0] < 0.05


SPREADS = {
    "equal": np.ones(11),
    "one scatters ten times as far": np.array([10.0] + [1.0] * 10),
    "from little to much": np.geomspace(0.2, 3, 11),
}


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", SPREADS)
def test_rows_that_differ_by_their_seeds_alone_are_told_apart_in_at_most_five_tables_of_a_hundred(spread, seeds):
    """1,000 tables of eleven equal methods, however unequally their trainings scatter."""
    rng = np.random.default_rng(0)
    first, second = pairs_of(11)
    tables = rng.standard_normal((1000, 11, seeds)) * SPREADS[spread][:, None]
    false = sum(min(holm(table_seeds_p(table, first, second))) < 0.05 for table in tables)
    assert false <= 50


def test_the_critical_difference_is_that_of_demsar():
    # Demsar, JMLR 2006, Table 5: q_0.05 is 2.343 for two methods less 1.960, 2.569 for four, 3.164 for ten.
    for methods, q in ((2, 1.960), (4, 2.569), (10, 3.164)):
        figures = np.random.default_rng(0).random((12, methods))
        expected = q * math.sqrt(methods * (methods + 1) / (6 * 12))
        assert rank_methods(figures).critical_difference == pytest.approx(expected, rel=1e-3)


def test_ties_share_their_rank_and_the_best_is_first():
    assert rank_methods(np.array([[0.9, 0.8, 0.8], [0.9, 0.8, 0.8]])).ranks == (1.0, 2.5, 2.5)


def test_a_ranking_with_a_gap_is_refused():
    with pytest.raises(ValueError, match="every dataset"):
        rank_methods(np.array([[0.9, np.nan]]))


def test_equal_methods_are_told_apart_in_at_most_five_tables_of_a_hundred():
    """1,000 tables of six equal methods on 300 samples: all pairs by McNemar, corrected by Holm."""
    rng = np.random.default_rng(0)
    false = 0
    first, second = np.transpose(list(itertools.combinations(range(6), 2)))
    for _ in range(1000):
        difficulty = rng.beta(6, 2, 300)
        right = rng.random((6, 300)) < difficulty
        p_values = mcnemar((right[first] & ~right[second]).sum(axis=1), (right[second] & ~right[first]).sum(axis=1))
        false += min(holm(p_values)) < 0.05
    assert false <= 50 + 2 * math.sqrt(1000 * 0.05 * 0.95)
