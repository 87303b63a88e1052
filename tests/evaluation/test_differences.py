"""Differences of two groups by scipy, by hand, and over all regroupings."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from bdl_train.evaluation.differences import Regroupings, adjust, difference, newcombe, welch


def test_welch_is_that_of_scipy():
    random = np.random.default_rng(1)
    inside, outside = random.exponential(2, 40), random.normal(1, 3, 300)
    test: Any = scipy.stats.ttest_ind(inside, outside, equal_var=False)
    interval = test.confidence_interval(0.95)
    assert welch(inside, outside) == pytest.approx((interval.low, interval.high, test.pvalue))
    gap = difference(inside, outside, Regroupings(0))
    assert (gap.test, gap.p) == ("Welch", pytest.approx(test.pvalue))
    assert gap.difference == pytest.approx(inside.mean() - outside.mean())


def test_shares_have_the_interval_of_newcombe_and_fishers_test_when_rare():
    # Newcombe (1998), Table II, example (a): 56/70 against 48/80.
    assert newcombe((56, 48), (70, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    for hits, sizes in [((0, 3), (10, 50)), ((5, 0), (5, 20))]:
        edges = [
            scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
            for k, n in zip(hits, sizes, strict=True)
        ]
        a, b = (k / n for k, n in zip(hits, sizes, strict=True))
        low = a - b - math.hypot(a - edges[0].low, edges[1].high - b)
        high = a - b + math.hypot(edges[0].high - a, b - edges[1].low)
        assert newcombe(hits, sizes) == pytest.approx((low, high))
        groups = [np.repeat([1.0, 0.0], [k, n - k]) for k, n in zip(hits, sizes, strict=True)]
        gap = difference(groups[0], groups[1], Regroupings(0))
        expected = scipy.stats.fisher_exact([[k, n - k] for k, n in zip(hits, sizes, strict=True)])[1]
        assert (gap.test, gap.p) == ("Fisher", pytest.approx(expected))
        assert (gap.low, gap.high) == pytest.approx((low, high))


def test_groups_without_spread_have_a_p_value():
    assert difference(np.zeros(40), np.zeros(90), Regroupings(0)).p == 1
    gap = difference(np.full(40, 2.5), np.full(90, 1.5), Regroupings(0))
    assert gap.test == "Fisher"
    assert gap.p < 1e-20
    assert 0 < gap.low < gap.difference == 1 <= gap.high + 1e-12


def test_the_permutation_test_is_that_over_all_regroupings():
    random = np.random.default_rng(2)
    inside, outside = random.normal(0.8, 1, 4), random.normal(0, 1, 9)
    every = np.concatenate([inside, outside])
    means = [
        every[list(some)].mean() - np.delete(every, list(some)).mean()
        for some in itertools.combinations(range(13), 4)
    ]
    exact = np.mean(np.abs(means) >= abs(inside.mean() - outside.mean()) - 1e-12)
    for a, b in ((inside, outside), (outside, inside)):
        found = difference(a, b, Regroupings(0))
        assert found.test == "permutation"
        # A share of 9999 draws: five standard errors.
        assert found.p == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 9999))


def test_regroupings_are_sets_of_distinct_rows_all_equally_likely():
    drawn = Regroupings(3)._positions(6, 3)
    assert (np.sort(drawn, axis=1)[:, 1:] != np.sort(drawn, axis=1)[:, :-1]).all()
    _, counts = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)
    assert len(counts) == math.comb(6, 3)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_p_values_are_uniform_under_noise():
    random = np.random.default_rng(4)
    regroup = Regroupings(0)
    for sizes in ((8, 60), (60, 200)):
        groups = [[random.exponential(size=size) for size in sizes] for _ in range(400)]
        p = np.array([difference(inside, outside, regroup).p for inside, outside in groups])
        # The share below 5 % and 20 %, within four standard errors, and 1 % for Welch on skewed values.
        for level in (0.05, 0.2):
            assert np.mean(p <= level) == pytest.approx(
                level, abs=0.01 + 4 * math.sqrt(level * (1 - level) / 400)
            )


def test_adjusted_p_values_are_those_by_hand_and_leave_out_the_unknown():
    # m = 4: 0.01·4/1 = 0.04, 0.02·4/2 = 0.04, 0.03·4/3 = 0.04, 0.5·4/4, each the least of those behind it.
    np.testing.assert_allclose(
        adjust(np.array([0.5, np.nan, 0.01, 0.03, 0.02])), [0.5, np.nan, 0.04, 0.04, 0.04]
    )
