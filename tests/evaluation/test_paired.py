"""Paired differences against scipy, closed forms, and simulations of what chance does."""

import math

import numpy as np
import pytest
import scipy.stats

from bdl_train.evaluation.paired import (
    CORRECTED,
    NLL,
    PLAIN,
    SplitScores,
    difference,
    holm,
    over_rows,
    over_splits,
    row_metrics,
)


def split_of(name: str, model: np.ndarray, baseline: np.ndarray, share: float | None = 0.25) -> SplitScores:
    return SplitScores(name, np.arange(len(model)), {NLL: model}, {NLL: baseline}, share, 1)


# --- one split ----------------------------------------------------------------------------------------------------


def test_the_interval_over_rows_is_the_paired_bootstrap_of_scipy():
    random = np.random.default_rng(0)
    baseline = random.exponential(1.0, 300)
    model = baseline + random.normal(0.05, 0.3, 300)
    found = over_rows(model - baseline, seed=0)
    resampled = scipy.stats.bootstrap(
        (model, baseline),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    test = scipy.stats.ttest_rel(model, baseline)
    assert found.difference == pytest.approx(model.mean() - baseline.mean())
    # An edge of 1000 resamples is off by some 8 % of the standard error; allow four times that.
    error = (model - baseline).std(ddof=1) / math.sqrt(300)
    assert (found.low, found.high) == pytest.approx((resampled.low, resampled.high), abs=0.32 * error)
    assert found.p == pytest.approx(test.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    # Unpaired, it would be many times wider.
    assert found.high - found.low < 0.3 * 2 * 1.96 * math.sqrt((model.var() + baseline.var()) / 300)
    assert over_rows(model - baseline, seed=0) == found != over_rows(model - baseline, seed=1)


def test_equal_runs_are_equal_and_what_has_no_spread_is_not_judged():
    same = over_rows(np.zeros(50), seed=0)
    assert (same.difference, same.low, same.high, same.p, same.reason) == (0, 0, 0, 1, "")
    constant = over_splits(np.full(3, 0.1), 0.25)
    assert constant.difference == pytest.approx(0.1)
    assert math.isnan(constant.p)
    assert "same in every split" in constant.reason
    infinite = over_rows(np.array([0.0, np.inf, 1.0]), seed=0)
    assert infinite.reason == "it is not finite in 1 of 3 rows"
    assert math.isnan(infinite.difference)
    assert math.isnan(over_rows(np.array([0.3]), seed=0).p)


# --- several splits -----------------------------------------------------------------------------------------------


def test_the_plain_interval_over_splits_is_that_of_the_paired_t_test():
    random = np.random.default_rng(2)
    model, baseline = random.normal(1, 0.2, (2, 12))
    test = scipy.stats.ttest_rel(model, baseline)
    interval = test.confidence_interval(0.95)  # pyright: ignore[reportAttributeAccessIssue]
    found = over_splits(model - baseline, None)
    assert found.method == PLAIN
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, test.pvalue))  # pyright: ignore[reportAttributeAccessIssue]


def test_the_variance_of_nadeau_and_bengio_by_hand():
    # Mean 0.04, S² = (0.02² + 0.01² + 0 + 0.01² + 0.02²) / 4 = 0.00025; (1/5 + 1/9) S² = 7.7778e-5.
    found = over_splits(np.array([0.02, 0.03, 0.04, 0.05, 0.06]), 1 / 9)
    assert found.method == CORRECTED
    assert found.difference == pytest.approx(0.04)
    reach = 2.7764451 * math.sqrt(7.7777778e-5)  # the 97.5 % point of t with 4 degrees of freedom
    assert (found.low, found.high) == pytest.approx((0.04 - reach, 0.04 + reach))
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(0.04 / math.sqrt(7.7777778e-5), 4))


def test_splits_that_share_training_rows_need_the_correction():
    """Differences with the correlation n_test / (n_test + n_train) and mean 0: 5 % may be called different."""
    random, repeats, num_splits, share = np.random.default_rng(3), 1500, 10, 1 / 9
    correlation = share / (1 + share)
    common = random.normal(size=(repeats, 1)) * math.sqrt(correlation)
    d_RJ = common + random.normal(size=(repeats, num_splits)) * math.sqrt(1 - correlation)
    corrected, plain = (np.mean([over_splits(d, one).p <= 0.05 for d in d_RJ]) for one in (share, None))
    spread = math.sqrt(0.05 * 0.95 / repeats)
    assert corrected == pytest.approx(0.05, abs=4 * spread)
    assert plain > 0.05 + 8 * spread


def test_several_splits_go_by_their_own_differences_and_one_by_its_rows():
    random = np.random.default_rng(4)
    pairs = [(random.normal(1.1, 0.1, n), random.normal(1, 0.1, n)) for n in (40, 50, 60)]
    splits = [split_of(str(i), *pair) for i, pair in enumerate(pairs)]
    found, each = difference(splits, NLL, seed=0)
    by_hand = np.array([(model - baseline).mean() for model, baseline in pairs])
    assert found == over_splits(by_hand, 0.25)
    assert [one.difference for one in each] == pytest.approx(by_hand)
    assert [(one.split, one.n) for one in each] == [("0", 40), ("1", 50), ("2", 60)]
    assert each[1].mean == pytest.approx(pairs[1][0].mean())
    assert each[1].low == over_rows(pairs[1][0] - pairs[1][1], seed=0).low
    alone, _ = difference(splits[:1], NLL, seed=0)
    assert alone == over_rows(pairs[0][0] - pairs[0][1], seed=0)
    # One split of unknown size, and none can be corrected.
    assert difference([*splits[:2], split_of("2", *pairs[2], None)], NLL, seed=0)[0].method == PLAIN


# --- chance and truth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "low", "high"), [(0.0, 0.0, 0.11), (0.2, 0.9, 1.0)])
def test_equal_models_are_told_apart_in_one_of_twenty_and_a_planted_difference_is_found(shift, low, high):
    random, repeats, count = np.random.default_rng(5), 200, 100
    wins = 0
    for _ in range(repeats):
        row = random.exponential(1.0, count)  # how hard a row is, for both
        model, baseline = (row + random.normal(0, 0.3, count) for _ in range(2))
        found = over_rows(model - baseline - shift, seed=0)
        wins += found.p <= 0.05 and not found.low <= 0 <= found.high
    # Four standard errors of 5 % are 0.06; the planted shift is 4.7 standard errors of the mean.
    assert low <= wins / repeats <= high


def test_holm_is_that_by_hand_and_leaves_out_the_unknown():
    # m = 4: 0.01·4, 0.02·3 = 0.06, 0.025·2 = 0.05 but not less than 0.06, 0.5·1.
    np.testing.assert_allclose(
        holm([0.5, np.nan, 0.01, 0.025, 0.02]), [0.5, np.nan, 0.04, 0.06, 0.06], equal_nan=True
    )
    assert holm([0.7, 0.8]).tolist() == [1.0, 1.0]
    assert holm([]).tolist() == []


def test_row_metrics_are_means_of_the_columns_that_are_there():
    nothing = np.zeros(2)
    classes = row_metrics({"nll": nothing, "correct": np.array([1.0, 0.0]), "brier": nothing})
    assert {metric.key: (metric.better, metric.unit_of("")) for metric in classes} == {
        "nll": ("lower", "nats"), "accuracy": ("higher", "share"), "brier": ("lower", ""),
    }  # fmt: skip
    numbers = row_metrics({"nll": nothing, "crps": nothing, "error": np.array([-3.0, 1.0])})
    assert {metric.key: float(values.mean()) for metric, values in numbers.items()} == {
        "nll": 0.0, "crps": 0.0, "mae": 2.0, "mse": 5.0,
    }  # fmt: skip
    assert [metric.unit_of("kg") for metric in numbers] == ["nats", "kg", "kg", "(kg)²"]
