"""Recalibration: known distortions are undone, calibrated predictives stay, and every formula has a second route."""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from distorted_rows import (
    PRICE,
    VISITS,
    classes,
    count_rows,
    ece,
    mean_nll,
    number_rows,
    numbers,
    probs_of,
    species,
    tile_of,
)
from scipy.integrate import quad
from sklearn.isotonic import isotonic_regression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch.distributions import Categorical, Normal, Poisson

from bdl_train.errors import UsageError
from bdl_train.evaluation.metrics import metrics_of
from bdl_train.evaluation.recalibration import (
    IsotonicCalibration,
    QuantileRecalibration,
    Recalibration,
    TemperatureScaling,
    VarianceScaling,
    score_scaled,
)
from bdl_train.evaluation.rows import RowScores, score_rows
from bdl_train.predictive.mixture import Mixture

FITTED: list[Recalibration] = [
    TemperatureScaling(200, 1.5),
    IsotonicCalibration(200, ((0.1, 0.7),), ((0.0, 1.0),)),
    VarianceScaling(200, 2.0),
    QuantileRecalibration(200, (0.0, 0.2, 1.0), (0.0, 0.5, 1.0)),
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- temperature --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found(true: float):
    rows = classes(6000, 0, sharper=true)
    found = TemperatureScaling.fit(rows)
    # The information about 1/T of one row is the variance of the reported logits under the true probabilities.
    log_p = np.log(probs_of(rows))
    p = np.exp(log_p / true) / np.exp(log_p / true).sum(1, keepdims=True)
    information = ((p * log_p**2).sum(1) - (p * log_p).sum(1) ** 2).sum()
    assert found.temperature == pytest.approx(true, abs=4 * true**2 / math.sqrt(information))
    assert found.num_rows == 6000
    fresh = classes(6000, 1, sharper=true)
    assert ece(found.apply(fresh)) < 0.02
    assert ece(fresh) < 0.02 or true != 1


def test_temperature_is_the_minimum_and_scores_are_those_of_scikit_learn():
    rows = classes(300, 2, sharper=2.0)
    found = TemperatureScaling.fit(rows)

    def by_hand(temperature: float) -> np.ndarray:
        powered = probs_of(rows) ** (1 / temperature)
        return powered / powered.sum(1, keepdims=True)

    y = rows.columns["y"]
    best = min(np.linspace(1, 4, 3001), key=lambda t: -np.log(by_hand(t)[np.arange(300), y]).mean())
    assert found.temperature == pytest.approx(best, abs=0.001)
    after = found.apply(rows)
    np.testing.assert_allclose(probs_of(after), by_hand(found.temperature), rtol=1e-9)
    assert mean_nll(after) == pytest.approx(log_loss(y, probs_of(after), labels=[0, 1, 2]), rel=1e-9)
    expected = brier_score_loss(y, probs_of(after), labels=[0, 1, 2], scale_by_half=False)  # pyright: ignore[reportArgumentType]
    assert after.columns["brier"].mean() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(
        after.columns["total"], scipy.stats.entropy(probs_of(after), axis=1), rtol=1e-9
    )
    np.testing.assert_array_equal(after.columns["prediction"], rows.columns["prediction"])
    np.testing.assert_array_equal(after.columns["correct"], rows.columns["correct"])


def test_probabilities_of_zero_and_one_have_finite_scores():
    rows = classes(100, 3, sharper=1.0)
    probs_of(rows)[:40] = np.eye(3)[np.r_[(rows.columns["y"][:20] + 1) % 3, rows.columns["y"][20:40]]]
    after = TemperatureScaling.fit(rows).apply(rows)
    assert np.isfinite(after.columns["nll"]).all()
    np.testing.assert_allclose(probs_of(after).sum(1), 1)


def test_what_belongs_to_members_is_nan_and_metrics_still_work():
    rows = classes(200, 4, sharper=2.0)
    for fitted in (TemperatureScaling.fit(rows), IsotonicCalibration.fit(rows)):
        after = fitted.apply(rows)
        assert set(after.columns) == set(rows.columns)
        assert np.isnan(after.columns["aleatoric"]).all()
        assert np.isnan(after.columns["epistemic"]).all()
        found = {metric.key: metric.value for metric in metrics_of(after, "")}
        assert found["nll"] == pytest.approx(mean_nll(after))


@pytest.mark.parametrize("method", [TemperatureScaling, IsotonicCalibration])
def test_class_maps_refuse_what_cannot_be_fitted(
    method: type[TemperatureScaling] | type[IsotonicCalibration],
):
    rows = classes(200, 5, sharper=1.0)
    with pytest.raises(UsageError, match=r"all \d+ validation rows are of class 1"):
        method.fit(rows.take(rows.columns["y"] == 1))
    with pytest.raises(UsageError, match="no validation rows"):
        method.fit(rows.take(np.zeros(0, int)))
    with pytest.raises(UsageError, match="these are scores of numbers"):
        method.fit(number_rows(10, 0, 1.0))
    probs_of(rows)[[3, 7], 0] = np.nan
    with pytest.raises(UsageError, match="2 of 200 validation rows have scores that are not finite"):
        method.fit(rows)


def test_a_model_that_knows_nothing_is_flattened_and_says_so():
    rows = classes(500, 5, sharper=1.0)
    rows.columns["y"][:] = probs_of(rows).argmin(1)
    found = TemperatureScaling.fit(rows)
    assert found.describe() == "temperature 100 (the edge of what is searched)"
    np.testing.assert_allclose(probs_of(found.apply(rows)), 1 / 3, atol=0.02)


def test_rows_that_are_all_right_have_no_temperature():
    rows = classes(200, 5, sharper=1.0)
    right = rows.take(rows.columns["correct"] == 1)
    with pytest.raises(UsageError, match=f"all {len(right)} validation rows are right"):
        TemperatureScaling.fit(right)


# --- isotonic -----------------------------------------------------------------------------------------------------


def test_isotonic_maps_are_those_by_hand():
    """Pooled neighbours of each class by scikit-learn's plain regression on sorted labels, divided by their sum."""
    rows = classes(250, 6, sharper=2.0)
    probs, y = probs_of(rows), rows.columns["y"]
    mapped = np.empty_like(probs)
    for k in range(3):
        order = np.argsort(probs[:, k])
        mapped[order, k] = isotonic_regression((y == k)[order].astype(float))
    expected = (250 * mapped / mapped.sum(1, keepdims=True) + 1 / 3) / 251
    after = IsotonicCalibration.fit(rows).apply(rows)
    np.testing.assert_allclose(probs_of(after), expected, rtol=1e-9)
    np.testing.assert_allclose(after.columns["nll"], -np.log(expected[np.arange(250), y]), rtol=1e-9)
    assert probs_of(after).min() >= 1 / (3 * 251) * (1 - 1e-12)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_isotonic_calibration_undoes_a_distortion(num_classes: int):
    val, test = (classes(8000, seed, 3.0, num_classes) for seed in (7, 8))
    after = IsotonicCalibration.fit(val).apply(test)
    assert ece(test) > 0.08
    assert ece(after) < 0.025
    assert mean_nll(after) < mean_nll(test) - 0.05


def test_isotonic_calibration_of_two_classes_keeps_the_ranking():
    val, test = (classes(3000, seed, 3.0, 2) for seed in (9, 10))
    after = IsotonicCalibration.fit(val).apply(test)
    order = np.argsort(probs_of(test)[:, 1])
    assert (np.diff(probs_of(after)[order, 1]) >= 0).all()
    areas = [roc_auc_score(test.columns["y"], probs_of(one)[:, 1]) for one in (test, after)]
    assert areas[1] == pytest.approx(areas[0], abs=0.005)


def test_a_row_that_every_map_sends_to_zero_keeps_its_probabilities():
    zero = IsotonicCalibration(9, ((0.6, 0.7),) * 3, ((0.0, 1.0),) * 3)
    rows = classes(1, 11, 1.0)
    rows.probs[:] = [[0.5, 0.2, 0.3]]  # pyright: ignore[reportOptionalSubscript]
    np.testing.assert_allclose(probs_of(zero.apply(rows)), [[0.45 + 1 / 30, 0.18 + 1 / 30, 0.27 + 1 / 30]])


def test_a_class_that_validation_has_not_keeps_its_probability():
    rows = classes(300, 12, 1.0)
    fitted = IsotonicCalibration.fit(rows.take(rows.columns["y"] != 1))
    assert (fitted.x[1], fitted.y[1]) == ((0.0, 1.0), (0.0, 1.0))
    assert (probs_of(fitted.apply(rows))[:, 1] > 0).all()


# --- variance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["normal", "student_t"])
def test_a_known_factor_is_found(family: str):
    tile, y = numbers(4000, 13, 2.0, family)
    assert tile.mixture is not None
    likely = VarianceScaling.fit_mixtures([(tile.mixture, y)])
    assert likely.scale == pytest.approx(2.0, abs=0.1)
    assert likely.num_rows == 4000
    if family == "normal":
        # A sample variance of n Gaussian-like rows is off by about sqrt(2 / n) of itself.
        assert VarianceScaling.fit(score_rows(tile, y, PRICE)).scale == pytest.approx(2.0, abs=0.15)


def test_parts_of_the_validation_rows_are_the_whole():
    tile, y = numbers(300, 14, 1.5)
    assert tile.mixture is not None
    whole = VarianceScaling.fit_mixtures([(tile.mixture, y)])
    components = tile.mixture.components
    assert isinstance(components, Normal)
    parts = [
        (
            Mixture(Normal(components.loc[:, rows], components.scale[:, rows]), tile.mixture.log_weights),
            y[rows],
        )
        for rows in (slice(0, 100), slice(100, 300), slice(300, 300))
    ]
    assert VarianceScaling.fit_mixtures(parts).scale == pytest.approx(whole.scale, rel=1e-6)


def test_one_gaussian_has_a_closed_form():
    """s² = mean(error² / σ²) is the likeliest factor, and the NLL is log(s σ) + ½ log 2π + error² / (2 s² σ²)."""
    random = np.random.default_rng(15)
    std, y = 0.2 + random.random(500), 2 * random.normal(size=500)
    tile = tile_of(Normal(torch.zeros(1, 500).double(), torch.from_numpy(std)[None]), y)
    rows = score_rows(tile, y, PRICE)
    moments = VarianceScaling.fit(rows)
    assert moments.scale == pytest.approx(math.sqrt(np.mean(y**2 / std**2)), rel=1e-12)
    assert tile.mixture is not None
    assert VarianceScaling.fit_mixtures([(tile.mixture, y)]).scale == pytest.approx(moments.scale, rel=1e-5)
    after = moments.apply(tile, y, PRICE)
    s = moments.scale * std * 0.5
    expected = np.log(s) + 0.5 * math.log(2 * math.pi) + (0.5 * y) ** 2 / (2 * s**2)
    np.testing.assert_allclose(after.columns["nll"], expected, rtol=1e-9)


def test_a_factor_of_one_changes_no_score_and_others_only_the_spread():
    tile, y = numbers(200, 16, 1.0)
    before, same, wide = score_rows(tile, y, PRICE), *(score_scaled(tile, y, PRICE, s) for s in (1.0, 2.0))
    for name, values in before.columns.items():
        np.testing.assert_allclose(same.columns[name], values, rtol=1e-9, atol=1e-10, err_msg=name)
    for name in ("total_std", "aleatoric_std", "epistemic_std"):
        np.testing.assert_allclose(wide.columns[name], 2 * before.columns[name], rtol=1e-9)
    np.testing.assert_allclose(wide.columns["error"], before.columns["error"], rtol=1e-9, atol=1e-12)
    widths = [one.columns["upper_95"] - one.columns["lower_95"] for one in (before, wide)]
    np.testing.assert_allclose(widths[1], 2 * widths[0], rtol=1e-9)


def test_counts_classes_and_certain_predictives_have_no_factor():
    rows, _ = count_rows(50, 17, 1.0)
    with pytest.raises(UsageError, match="cannot be fitted to counts"):
        VarianceScaling.fit(rows)
    tile = tile_of(Poisson(torch.ones(1, 4).double()), np.arange(4))
    with pytest.raises(UsageError, match="Poisson"):
        score_scaled(tile, np.arange(4), VISITS, 2.0)
    with pytest.raises(UsageError, match="these are scores of classes"):
        VarianceScaling.fit(classes(10, 0, 1.0))
    labels = np.arange(6) % 3
    tile = tile_of(Categorical(logits=torch.zeros(1, 6, 3).double()), labels)
    with pytest.raises(UsageError, match="'species' cannot be scaled: it is a class"):
        score_scaled(tile, labels, species(3), 2.0)
    rows = number_rows(20, 0, 1.0)
    rows.columns["total_std"][:2] = 0
    with pytest.raises(UsageError, match="2 of 20 validation rows have scores that are not finite"):
        VarianceScaling.fit(rows)
    with pytest.raises(UsageError, match="no validation rows"):
        VarianceScaling.fit_mixtures([])


# --- quantiles ----------------------------------------------------------------------------------------------------


def quantile_fit(narrower: float) -> QuantileRecalibration:
    return QuantileRecalibration.fit(number_rows(4000, 18, narrower), num_bins=20)


@pytest.mark.parametrize("narrower", [0.5, 2.0])
def test_recalibrated_pit_values_are_uniform(narrower: float):
    test = number_rows(2000, 19, narrower)
    after = quantile_fit(narrower).apply(test)
    assert scipy.stats.kstest(test.columns["pit"], "uniform").pvalue < 1e-10
    # R itself is off by up to 1.36 / sqrt(4000), the fresh rows by 1.36 / sqrt(2000), in 95 % of draws each.
    assert scipy.stats.kstest(after.columns["pit"], "uniform").statistic < 1.5 * (4000**-0.5 + 2000**-0.5)
    assert mean_nll(after) < mean_nll(test) - 0.05


@pytest.mark.parametrize("narrower", [0.5, 2.0])
def test_the_recalibrated_density_integrates_to_one_and_to_its_distribution_function(narrower: float):
    fitted = quantile_fit(narrower)
    law: Any = scipy.stats.norm(1.0, 2.0)

    def score(y: float) -> RowScores:
        pit = np.array([law.cdf(y)])
        return fitted.apply(
            RowScores({"y": np.array([y]), "nll": -law.logpdf([y]), "pit": pit, "pit_below": pit})
        )

    def density(y: float) -> float:
        return math.exp(-float(score(y).columns["nll"][0]))

    breaks = law.ppf(np.array(fitted.knots[1:-1])).tolist()
    edges = [-25.0, *breaks, 27.0]
    pieces = [quad(density, low, high)[0] for low, high in pairwise(edges)]
    assert sum(pieces) == pytest.approx(1, abs=1e-8)
    assert sum(pieces[:7]) == pytest.approx(float(score(breaks[6]).columns["pit"][0]), abs=1e-8)
    assert density(1.0) > 0


def test_recalibrated_counts_sum_to_one_and_fit_better():
    val, _ = count_rows(3000, 20, 1.6)
    test, _ = count_rows(2000, 21, 1.6)
    fitted = QuantileRecalibration.fit(val, num_bins=10)
    assert mean_nll(fitted.apply(test)) < mean_nll(test) - 0.05
    counts = np.arange(200)
    law = scipy.stats.poisson(4.0)
    every = RowScores(
        {
            "y": counts,
            "nll": 4 - counts * math.log(4) + scipy.special.gammaln(counts + 1),
            "pit": law.cdf(counts),
            "pit_below": law.cdf(counts - 1),
        }
    )
    assert np.exp(-fitted.apply(every).columns["nll"][:40]).sum() == pytest.approx(1, abs=1e-9)
    assert np.isfinite(fitted.apply(every).columns["nll"]).all()


def test_the_map_by_hand():
    pit = np.array([0.1, 0.2, 0.3, 0.9])
    rows = RowScores({"y": pit, "nll": np.zeros(4), "pit": pit, "pit_below": pit})
    fitted = QuantileRecalibration.fit(rows, num_bins=2)
    # One knot at the median 0.25, below which two of four rows lie; a fifth row is spread evenly.
    assert fitted.knots == pytest.approx((0, 0.25, 1))
    assert fitted.values == pytest.approx((0, (2 + 0.25) / 5, 1))
    np.testing.assert_allclose(fitted.slope(np.array([0.1, 0.5, 0.0, 1.0])), np.array([1.8, 0.55 / 0.75] * 2))
    np.testing.assert_allclose(fitted.levels((0.225, 0.45)), [0.125, 0.25])
    np.testing.assert_allclose(fitted.apply(rows).columns["nll"][0], -math.log(1.8))


def test_recalibrated_quantiles_are_those_of_the_new_distribution():
    tile, y = numbers(400, 22, 2.0)
    fitted = quantile_fit(2.0)
    before = score_rows(tile, y, PRICE)
    assert tile.mixture is not None
    after = fitted.apply(before, fitted.quantiles(tile.mixture, PRICE))
    for name, level in (("lower_95", 0.025), ("upper_95", 0.975)):
        encoded = torch.from_numpy((after.columns[name] - PRICE.loc) / PRICE.scale)
        np.testing.assert_allclose(fitted.at(tile.mixture.cdf(encoded).numpy()), level, rtol=1e-6)
    found = {metric.key: metric.value for metric in metrics_of(after, "")}
    low, high = after.columns["lower_95"], after.columns["upper_95"]
    assert found["coverage_95"] == np.mean((low <= before.columns["y"]) & (before.columns["y"] <= high))
    for name in ("mean", "error", "total_std", "aleatoric_std", "epistemic_std", "crps"):
        assert np.isnan(after.columns[name]).all(), name
    assert np.isnan(fitted.apply(before).columns["lower_95"]).all()


def test_hopeless_pit_values_leave_a_map_that_is_finite():
    pit = np.array([0.0] * 30 + [1.0] * 30 + [0.5] * 30)
    rows = RowScores({"y": pit, "nll": np.zeros(90), "pit": pit, "pit_below": pit})
    fitted = QuantileRecalibration.fit(rows, num_bins=10)
    assert (np.diff(fitted.knots) > 0).all()
    assert (np.diff(fitted.values) > 0).all()
    assert np.isfinite(fitted.apply(rows).columns["nll"]).all()
    assert (fitted.slope(np.linspace(0, 1, 1000)) >= 1 / 91 - 1e-12).all()


def test_quantile_maps_refuse_what_cannot_be_fitted():
    rows = number_rows(8, 23, 1.0)
    for num_bins in (1, 9):
        with pytest.raises(UsageError, match=f"of {num_bins} bins needs 2 bins or more .* 8 rows"):
            QuantileRecalibration.fit(rows, num_bins=num_bins)
    with pytest.raises(UsageError, match="these are scores of classes"):
        QuantileRecalibration.fit(classes(10, 0, 1.0), num_bins=2)
    rows.columns["pit"][0] = np.nan
    with pytest.raises(UsageError, match="1 of 8 validation rows"):
        QuantileRecalibration.fit(rows, num_bins=4)


# --- all of them --------------------------------------------------------------------------------------------------


def test_calibrated_predictives_are_left_nearly_alone():
    val, test = (classes(6000, seed, 1.0) for seed in (24, 25))
    one = TemperatureScaling.fit(val).apply(test)
    assert np.abs(probs_of(one) - probs_of(test)).max() < 0.02
    two = IsotonicCalibration.fit(val).apply(test)
    assert mean_nll(two) < mean_nll(test) + 0.02
    assert np.abs(probs_of(two) - probs_of(test)).mean() < 0.03
    (val_tile, val_y), (tile, y) = (numbers(6000, seed, 1.0) for seed in (26, 27))
    assert val_tile.mixture is not None
    assert VarianceScaling.fit_mixtures([(val_tile.mixture, val_y)]).scale == pytest.approx(1, abs=0.05)
    fitted = QuantileRecalibration.fit(score_rows(val_tile, val_y, PRICE), num_bins=15)
    grid = np.linspace(0, 1, 101)
    np.testing.assert_allclose(fitted.at(grid), grid, atol=1.7 / math.sqrt(6000))
    before = score_rows(tile, y, PRICE)
    # A histogram of 15 bins costs 14 / (2 · 6000) nats on average; its spread is about sqrt(2 · 14) / (2 · 6000).
    assert mean_nll(fitted.apply(before)) - mean_nll(before) < 5 * 14 / 12_000


@pytest.mark.parametrize("fitted", FITTED, ids=lambda fitted: fitted.method)
def test_a_map_reads_back_from_json(fitted: Recalibration):
    assert type(fitted).from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    assert fitted.describe()


def test_two_classes_share_one_curve():
    for fitted in FITTED[:2]:
        curves = fitted.curves(("no", "yes"))
        assert list(curves) == ["yes"]
    x, value = FITTED[0].curves(("no", "yes"))["yes"]
    np.testing.assert_allclose(value[50], 0.5)
    np.testing.assert_allclose(value[80], 1 / (1 + (0.2 / 0.8) ** (1 / 1.5)))
    assert x[80] == 0.8
