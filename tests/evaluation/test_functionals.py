"""Metrics as functions of counts against scikit-learn, direct sums and closed forms."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
from sklearn import metrics as sk

from bdl_train.evaluation import functionals as f

RANDOM = np.random.default_rng(0)


def ones(count: int) -> np.ndarray:
    return np.ones((1, count))


def forecast(count: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.full(num_classes, 0.7), count).round(2)
    probs /= probs.sum(1, keepdims=True)
    return probs, (probs.cumsum(1) > random.random((count, 1))).argmax(1)


def test_areas_under_curves_are_those_of_scikit_learn_with_ties_and_weights():
    random = np.random.default_rng(1)
    score, positive = random.integers(0, 12, 200) / 12, random.random(200) < 0.3
    weights = random.integers(0, 4, 200).astype(float)
    found = f.ranking(score, positive)(np.stack([np.ones(200), weights]))
    for row, weight in zip(found, (np.ones(200), weights), strict=True):
        assert row[0] == pytest.approx(sk.roc_auc_score(positive, score, sample_weight=weight))
        assert row[1] == pytest.approx(sk.average_precision_score(positive, score, sample_weight=weight))
    assert np.isnan(f.ranking(score, np.zeros(200, bool))(ones(200))).all()
    assert f.ranking(np.full(200, 0.3), positive)(ones(200))[0, 0] == 0.5


def test_balanced_accuracy_is_that_of_scikit_learn():
    probs, y = forecast(80, 4)
    y[y == 3] = 0  # a class without rows
    prediction = probs.argmax(1)
    found = f.recalls((prediction == y).astype(float), y, 4)(ones(80))
    seen = [sk.recall_score(y == k, prediction == k) for k in (0, 1, 2)]
    assert found[0] == pytest.approx(np.mean(seen))


def test_calibration_errors_over_bins_by_a_loop():
    confidence, correct = RANDOM.random(300), (RANDOM.random(300) < 0.6).astype(float)
    bins = f.equal_width_bins(confidence, 15)
    gaps = [(np.abs((correct - confidence)[bins == g].mean()), (bins == g).sum()) for g in range(15)]
    expected = sum(gap * size for gap, size in gaps) / 300
    found = f.binned_gap(confidence, correct, bins, 15)(ones(300))[0]
    np.testing.assert_allclose(found, [expected, max(gap for gap, _ in gaps)])


def test_brier_score_falls_into_its_parts_by_stephensons_sums():
    probs, y = forecast(500, 3)
    one_hot = np.eye(3)[y]
    reliability = resolution = uncertainty = classwise = 0.0
    for k in range(3):
        p, o = probs[:, k], one_hot[:, k]
        bins = np.clip(np.ceil(p * 15) - 1, 0, 14)
        for g in np.unique(bins):
            own = bins == g
            share, p_mean, o_mean = own.mean(), p[own].mean(), o[own].mean()
            reliability += share * (p_mean - o_mean) ** 2
            classwise += share * abs(p_mean - o_mean) / 3
            within_variance = share * np.mean((p[own] - p_mean) ** 2)
            within_covariance = share * 2 * np.mean((o[own] - o_mean) * (p[own] - p_mean))
            resolution += share * (o_mean - o.mean()) ** 2 - within_variance + within_covariance
        uncertainty += o.mean() * (1 - o.mean())
    found = f.classwise(probs, y, 15)(ones(500))[0]
    np.testing.assert_allclose(found, [classwise, reliability, resolution, uncertainty], atol=1e-12)
    brier = np.square(probs - one_hot).sum(1).mean()
    assert found[1] - found[2] + found[3] == pytest.approx(brier)


def smooth_error_by_quadrature(confidence: np.ndarray, correct: np.ndarray, width: float) -> float:
    """∫ |mean of (y − p) K(t, p)| dt with the folded Gaussian, by scipy."""

    def density(t: float) -> float:
        images = [t + 2 * k for k in range(-4, 5)] + [2 * k - t for k in range(-4, 5)]
        kernel = sum(stats.norm.pdf(image, confidence, width) for image in images)
        return abs(float(np.mean((correct - confidence) * kernel)))

    return integrate.quad(density, 0, 1, limit=400, points=np.linspace(0.1, 0.9, 9))[0]


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.4])
def test_smooth_error_is_the_fixed_point_of_its_kernel_width(shift: float):
    random = np.random.default_rng(3)
    confidence = 0.45 + 0.5 * random.random(150)
    correct = (random.random(150) < confidence - shift).astype(float)
    found = float(f.smooth_gap(confidence, correct)(ones(150))[0])
    assert smooth_error_by_quadrature(confidence, correct, found) == pytest.approx(found, rel=0.05)


def test_smooth_error_of_one_gap_and_of_calibrated_rows():
    random = np.random.default_rng(4)
    confidence = random.random(50_000)
    calibrated = (random.random(50_000) < confidence).astype(float)
    assert f.smooth_gap(confidence, calibrated)(ones(50_000))[0] < 0.012
    # Always sure and always wrong: every kernel keeps the whole mass of 1.
    assert f.smooth_gap(np.ones(20), np.zeros(20))(ones(20))[0] == pytest.approx(1.0, abs=0.01)


def test_excess_of_the_area_is_over_the_best_order_and_coverage_holds_its_risk():
    random = np.random.default_rng(5)
    uncertainty, loss = random.random(200), (random.random(200) < 0.2).astype(float)
    loss[np.argsort(uncertainty)[:60]] = 0

    def area(order: np.ndarray) -> float:
        return float(np.mean(np.cumsum(loss[order]) / np.arange(1, 201)))

    order, best = np.argsort(uncertainty), np.argsort(loss, kind="stable")
    kept = np.cumsum(loss[order]) / np.arange(1, 201)
    found = f.selective(uncertainty, loss, 0.05)(ones(200))[0]
    np.testing.assert_allclose(found[0], area(order))
    np.testing.assert_allclose(found[1], area(order) - area(best), atol=1e-12)
    assert found[2] == np.flatnonzero(kept <= 0.05)[-1] / 200 + 1 / 200
    assert f.selective(loss, loss, 0.05)(ones(200))[0, 1] == pytest.approx(0, abs=1e-12)


def test_excess_of_continuous_losses_has_its_own_best_order():
    random = np.random.default_rng(6)
    loss = random.exponential(size=100)
    found = f.selective(random.random(100), loss, 0.0)(ones(100))[0]
    best = float(np.mean(np.cumsum(np.sort(loss)) / np.arange(1, 101)))
    assert found[0] - found[1] == pytest.approx(best)


def test_distance_from_uniform_is_that_of_scipy():
    values = RANDOM.beta(2, 1, 120)
    counts = np.stack([np.ones(120), np.bincount(RANDOM.integers(120, size=120), minlength=120)])
    found = f.distance_from_uniform(values)(counts)
    assert found[0] == pytest.approx(stats.kstest(values, "uniform").statistic)
    again = np.repeat(values, counts[1].astype(int))
    assert found[1] == pytest.approx(stats.kstest(again, "uniform").statistic)


def test_ratio_of_sums_and_nan_below_nothing():
    above, below = np.array([1.0, 2.0]), np.array([4.0, 0.0])
    np.testing.assert_allclose(f.ratio(above, below)(np.array([[1.0, 1.0], [1.0, 0.0]])), [0.75, 0.25])
    assert math.isnan(f.ratio(above, below)(np.array([[0.0, 1.0]]))[0])


def test_many_classes_have_the_same_values_without_resamples(monkeypatch: pytest.MonkeyPatch):
    probs, y = forecast(300, 4)
    few = f.classwise(probs, y, 15)(ones(300))
    monkeypatch.setattr(f, "MANY_CLASSES", 3)
    counts = np.stack([np.ones(300), np.r_[2.0, 0.0, np.ones(298)]])
    many = f.classwise(probs, y, 15)(counts)
    np.testing.assert_allclose(many[0], few[0], atol=1e-12)
    assert np.isnan(many[1]).all()
