"""Conformal prediction against crepes, brute force, and simulation of the coverage that it promises.

Shape letters: R repetitions, n validation rows, N rows, K classes.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from miscovered_rows import classes, edges_of, numbers, own_scores, probs_of

from bdl_train.errors import UsageError
from bdl_train.evaluation.conformal import (
    aps_scores,
    cqr_intervals,
    cqr_scores,
    expected_coverage,
    group_thresholds,
    lac_scores,
    normalised_intervals,
    normalised_scores,
    prediction_sets,
    rank,
    threshold,
    thresholds_of_rows,
)
from bdl_train.evaluation.rows import RowScores


def uniform(rows: RowScores) -> np.ndarray:
    return np.random.default_rng(len(rows)).random(len(rows))


SCORES: dict[str, Callable[[int, int], np.ndarray]] = {
    "normalised": lambda n, seed: normalised_scores(numbers(n, seed)),
    "cqr": lambda n, seed: cqr_scores((rows := numbers(n, seed)).columns["y"], edges_of(rows)),
    "lac": lambda n, seed: own_scores(rows := classes(n, seed), lac_scores(probs_of(rows))),
    "aps_randomised": lambda n, seed: own_scores(
        rows := classes(n, seed), aps_scores(probs_of(rows), uniform(rows))
    ),
    "aps": lambda n, seed: own_scores(rows := classes(n, seed), aps_scores(probs_of(rows), None)),
}


# --- the threshold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "expected"), [(0.5, 3.0), (0.8, 5.0), (0.55, 4.0), (0.1, 1.0), (0.84, math.inf)]
)
def test_threshold_by_hand(level: float, expected: float):
    # Six times 0.5, 0.8, 0.55, 0.1 and 0.84 is 3, 4.8, 3.3, 0.6 and 5.04.
    assert threshold(np.array([4.0, 1.0, 5.0, 2.0, 3.0]), level) == expected


def test_rank_is_not_moved_by_rounding():
    for percent in range(1, 100):
        assert rank(99, percent / 100) == percent, percent
    assert rank(19, 0.95) == 19
    assert rank(18, 0.95) == 19


def test_threshold_refuses_what_has_no_order():
    with pytest.raises(UsageError, match=r"between 0 and 1, got 95"):
        threshold(np.ones(5), 95)
    with pytest.raises(UsageError, match="1 of 2 validation scores are NaN"):
        threshold(np.array([1.0, math.nan]), 0.5)


# --- the promise --------------------------------------------------------------------------------------------------

NUM_VAL, NUM_TEST, REPEATS = 37, 63, 1500


@pytest.mark.parametrize("level", [0.5, 0.9])
@pytest.mark.parametrize("name", SCORES)
def test_mean_coverage_is_what_is_promised(name: str, level: float):
    """However wrong the model is: at least the level, at most 1 / (n + 1) more; the latter not with ties."""
    scores = SCORES[name](REPEATS * (NUM_VAL + NUM_TEST), 0).reshape(REPEATS, -1)
    q_R = np.array([threshold(one, level) for one in scores[:, :NUM_VAL]])
    covered_R = (scores[:, NUM_VAL:] <= q_R[:, None]).mean(1)
    k = rank(NUM_VAL, level)
    spread = scipy.stats.betabinom(NUM_TEST, k, NUM_VAL + 1 - k).std() / NUM_TEST
    tolerance = 4 * spread / math.sqrt(REPEATS)
    assert covered_R.mean() >= level - tolerance
    if name == "aps":
        # Half of the rows are right, their score is 0, and so is the threshold of level 0.5.
        assert covered_R.mean() > level + (0.02 if level == 0.5 else -tolerance)
    else:
        assert covered_R.mean() <= level + 1 / (NUM_VAL + 1) + tolerance


@pytest.mark.parametrize("name", [name for name in SCORES if name != "aps"])
def test_coverage_given_the_validation_rows_has_a_beta_distribution(name: str):
    """Against the share of 300,000 fresh scores below each threshold."""
    pool = np.sort(SCORES[name](300_000, 1))
    scores = SCORES[name](1000 * NUM_VAL, 2).reshape(1000, NUM_VAL)
    q = np.array([threshold(one, 0.8) for one in scores])
    coverage = np.searchsorted(pool, q, side="right") / len(pool)
    k = rank(NUM_VAL, 0.8)
    assert scipy.stats.kstest(coverage, scipy.stats.beta(k, NUM_VAL + 1 - k).cdf).pvalue > 0.01
    wrong = scipy.stats.beta(k - 1, NUM_VAL + 2 - k)  # one score lower: the test must be able to see that
    assert scipy.stats.kstest(coverage, wrong.cdf).pvalue < 0.01


def test_coverage_is_kept_in_every_group_with_its_own_threshold_only():
    """Group b has errors three times as large; thresholds from all rows cover it too rarely."""
    random = np.random.default_rng(3)
    groups = np.array(["a"] * 40 + ["b"] * 20)
    scale = np.where(groups == "a", 1.0, 3.0)
    mondrian, marginal = {"a": [], "b": []}, {"a": [], "b": []}
    for _ in range(1500):
        scores, fresh = np.abs(random.normal(size=(2, 60))) * scale
        q_rows = thresholds_of_rows(group_thresholds(scores, groups, 0.8), groups)
        for name in mondrian:
            mondrian[name].append((fresh <= q_rows)[groups == name].mean())
            marginal[name].append((fresh <= threshold(scores, 0.8))[groups == name].mean())
    for name, n in (("a", 40), ("b", 20)):
        k = rank(n, 0.8)
        tolerance = 4 * scipy.stats.betabinom(n, k, n + 1 - k).std() / n / math.sqrt(1500)
        assert 0.8 - tolerance <= np.mean(mondrian[name]) <= 0.8 + 1 / (n + 1) + tolerance
    assert np.mean(marginal["b"]) < 0.6
    assert np.mean(marginal["a"]) > 0.85


@pytest.mark.parametrize(("num_val", "num_test", "level"), [(50, 200, 0.9), (200, 30, 0.5), (19, 7, 0.95)])
def test_expected_range_holds_what_simulation_gives(num_val: int, num_test: int, level: float):
    random = np.random.default_rng(4)
    k = rank(num_val, level)
    share = np.sort(random.random((20_000, num_val)), axis=1)[
        :, k - 1
    ]  # of uniform scores: the threshold itself
    coverage = random.binomial(num_test, share) / num_test
    low, high = expected_coverage(num_val, num_test, level, ties=False)
    assert np.mean((low <= coverage) & (coverage <= high)) >= 0.99 - 0.003
    assert np.mean((low < coverage) & (coverage < high)) <= 0.99 + 0.003 or high == 1
    law = scipy.stats.betabinom(num_test, k, num_val + 1 - k)
    assert (low, high) == tuple(law.ppf([0.005, 0.995]) / num_test)
    assert expected_coverage(num_val, num_test, level, ties=True) == (low, 1.0)


def test_too_few_rows_cover_everything():
    assert expected_coverage(18, 100, 0.95, ties=False) == (1.0, 1.0)
    assert expected_coverage(19, 100, 0.95, ties=False)[0] < 1


# --- intervals ----------------------------------------------------------------------------------------------------


def test_normalised_intervals_are_those_of_crepes_also_by_group():
    from crepes import ConformalRegressor

    val, test = numbers(60, 5), numbers(25, 6)
    residuals = val.columns["y"] - val.columns["mean"]
    bins, test_bins = np.arange(60) % 2, np.arange(25) % 2
    for level in (0.5, 0.8, 0.9):
        theirs = ConformalRegressor()
        theirs.fit(residuals, sigmas=val.columns["total_std"])
        expected = theirs.predict_int(
            test.columns["mean"], sigmas=test.columns["total_std"], confidence=level
        )
        found = normalised_intervals(test, threshold(normalised_scores(val), level))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        theirs.fit(residuals, sigmas=val.columns["total_std"], bins=bins)
        expected = theirs.predict_int(
            test.columns["mean"], sigmas=test.columns["total_std"], bins=test_bins, confidence=level
        )
        q = thresholds_of_rows(group_thresholds(normalised_scores(val), bins, level), test_bins)
        np.testing.assert_allclose(normalised_intervals(test, q), expected, rtol=1e-12)


def test_cqr_by_brute_force():
    """The interval holds exactly the values of y whose own score is at most the threshold."""
    val, test = numbers(30, 7), numbers(8, 8)
    q = threshold(cqr_scores(val.columns["y"], edges_of(val)), 0.8)
    intervals = cqr_intervals(edges_of(test), q)
    assert cqr_scores(np.array([0.0, 5.0, 9.0]), (np.full(3, 2.0), np.full(3, 6.0))).tolist() == [2, -1, 3]
    for y in np.linspace(-6, 6, 241):
        inside = (intervals[:, 0] <= y) & (y <= intervals[:, 1])
        low, high = edges_of(test)
        by_hand = [max(a - y, y - b) <= q for a, b in zip(low, high, strict=True)]
        assert inside.tolist() == by_hand


def test_intervals_that_are_too_wide_shrink_to_nothing_at_most():
    edges = (np.array([0.0, 0.0]), np.array([1.0, 9.0]))
    np.testing.assert_array_equal(cqr_intervals(edges, -2.0), [[2.0, -1.0], [2.0, 7.0]])


# --- sets ---------------------------------------------------------------------------------------------------------


def test_lac_sets_are_those_of_crepes():
    from crepes import ConformalClassifier

    val, test = classes(60, 9), classes(30, 10)
    theirs = ConformalClassifier()
    theirs.fit(1 - probs_of(val)[np.arange(60), val.columns["y"]])
    for level in (0.5, 0.8, 0.9):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs.predict_set(1 - probs_of(test), confidence=level, smoothing=False)
        q = threshold(own_scores(val, lac_scores(probs_of(val))), level)
        np.testing.assert_array_equal(
            prediction_sets(lac_scores(probs_of(test)), q), np.asarray(expected, bool)
        )


def test_aps_scores_by_hand():
    probs = np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(aps_scores(probs, None), [[0.8, 0.0, 0.5], [0.8, 0.9, 0.0]])
    u = np.array([0.5, 1.0])
    np.testing.assert_allclose(aps_scores(probs, u), [[0.9, 0.25, 0.65], [0.9, 1.0, 0.8]])


def test_aps_sets_are_the_likeliest_classes_until_their_mass_exceeds_the_threshold():
    probs = probs_of(classes(200, 11))
    for q in (0.0, 0.3, 0.7, 0.95):
        sets = prediction_sets(aps_scores(probs, None), q)
        for row, found in zip(probs, sets, strict=True):
            mass, chosen = 0.0, set()
            for k in sorted(range(4), key=lambda k: -row[k]):
                if mass > q:
                    break
                chosen.add(k)
                mass += row[k]
            assert set(np.flatnonzero(found)) == chosen
        assert sets.any(1).all()


def test_randomised_sets_are_those_of_the_paper():
    """Romano et al.: the L likeliest classes whose mass reaches τ, the last dropped if U ≤ (mass − τ) / its own."""
    probs, random = probs_of(classes(300, 12)), np.random.default_rng(0)
    u, tau = random.random(300), 0.8
    sets = prediction_sets(aps_scores(probs, 1 - u), tau)
    for row, one, found in zip(probs, u, sets, strict=True):
        order = np.argsort(-row)
        mass = np.cumsum(row[order])
        last = int(np.flatnonzero(mass >= tau)[0])
        dropped = one <= (mass[last] - tau) / row[order[last]]
        assert set(np.flatnonzero(found)) == set(order[: last + (not dropped)])
