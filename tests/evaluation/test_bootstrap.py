"""Intervals over resampled rows: the same metrics as on the data, the coverage they claim, the same at any pace."""

import math

import numpy as np
import pytest
from scipy import stats

from bdl_train.evaluation import bootstrap, metrics
from bdl_train.evaluation.bootstrap import bootstrap_intervals, metrics_with_intervals, resamples_for
from bdl_train.evaluation.functionals import Statistic, mean_of, ranking, selective
from bdl_train.evaluation.metrics import measures_of, metrics_of
from bdl_train.evaluation.rows import INTERVALS, RowScores


def classes(count: int, seed: int) -> RowScores:
    random = np.random.default_rng(seed)
    probs = random.dirichlet([0.5, 0.7, 1.0], count).round(2)  # ties
    probs /= probs.sum(1, keepdims=True)
    y = np.array([random.choice(3, p=row) for row in probs])
    total = np.asarray(stats.entropy(probs, axis=1))
    return RowScores(
        {
            "y": y, "prediction": probs.argmax(1), "confidence": probs.max(1),
            "correct": (probs.argmax(1) == y).astype(float), "nll": -np.log(probs[np.arange(count), y] + 1e-9),
            "brier": np.square(probs - np.eye(3)[y]).sum(1), "total": total, "aleatoric": 0.9 * total,
            "epistemic": 0.1 * total,
        },
        probs,
    )  # fmt: skip


def numbers(count: int, seed: int) -> RowScores:
    random = np.random.default_rng(seed)
    y, std = random.standard_normal(count), np.full(count, 1.1)
    pit = stats.norm.cdf(y, scale=1.1)
    columns = {"y": y, "mean": 0 * y, "error": -y, "nll": -stats.norm.logpdf(y, scale=1.1), "crps": np.abs(y)}
    columns |= {
        "total_std": std,
        "aleatoric_std": std,
        "epistemic_std": 0 * std,
        "pit": pit,
        "pit_below": pit,
    }
    columns["median"] = 0 * y
    for level in INTERVALS:
        half = stats.norm.ppf((1 + level) / 2) * std
        columns |= {f"lower_{round(100 * level)}": -half, f"upper_{round(100 * level)}": half}
    return RowScores(columns)


def statistics_of(rows: RowScores) -> dict[str, Statistic]:
    return {one.labels[0].key: one.statistic for one in measures_of(rows, "")}


@pytest.mark.parametrize("make", [classes, numbers])
def test_a_resample_is_scored_as_its_rows_would_be(make):
    rows = make(60, 1)
    picked = np.random.default_rng(2).integers(60, size=60)
    counts = np.stack([np.ones(60), np.bincount(picked, minlength=60)]).astype(float)
    of_data, of_resample = (
        {metric.key: metric.value for metric in metrics_of(one, "")} for one in (rows, rows.take(picked))
    )
    for one in measures_of(rows, ""):
        for label, on_data, on_resample in zip(one.labels, *one.values(counts), strict=True):
            assert on_data == pytest.approx(of_data[label.key], abs=1e-12), label.key
            # The bins of equal mass are those of the data, not of the resample.
            if not label.key.startswith("ace"):
                assert on_resample == pytest.approx(of_resample[label.key], abs=1e-9), label.key


@pytest.mark.parametrize("make", [classes, numbers])
def test_coarse_curves_move_with_the_exact_ones(make):
    rows = make(3000, 8)
    picked = np.random.default_rng(9).integers(3000, size=(20, 3000))
    counts = np.stack([np.ones(3000), *(np.bincount(one, minlength=3000) for one in picked)]).astype(float)
    seen = 0
    for one in measures_of(rows, ""):
        if one.coarse is not None:
            exact, coarse = one.values(counts), np.asarray(one.coarse(counts)).reshape(21, -1)
            moved = (exact - exact[0]) - (coarse - coarse[0])
            assert np.abs(moved[:, :2]).max() < 0.05 * (exact - exact[0])[:, :2].std(0).max()
            seen += 1
    assert seen >= 1


def test_a_rare_class_that_some_resamples_miss_still_has_an_interval_and_an_absent_one_a_reason():
    rows = classes(60, 1)
    assert rows.probs is not None
    two = RowScores({**rows.columns, "y": (np.arange(60) < 5).astype(int)}, rows.probs[:, :2])
    found = {metric.key: metric for metric in metrics_with_intervals(two, "")}
    assert found["auroc"].low is not None
    two.columns["y"][:] = 0
    found = {metric.key: metric for metric in metrics_with_intervals(two, "")}
    assert (found["auroc"].value, found["auroc"].low) == (None, None)
    assert found["auroc"].reason == "the rows hold one class only"
    assert found["nll"].low is not None


def test_the_interval_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=300)
    (low, high) = bootstrap_intervals({"mean": mean_of(values)}, 300)["mean"]
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(4)
    )
    width = values.std() / math.sqrt(300)
    assert low == pytest.approx(other.confidence_interval.low, abs=0.2 * width)
    assert high == pytest.approx(other.confidence_interval.high, abs=0.2 * width)


def test_intervals_cover_the_truth_as_often_as_they_say():
    inside = 0
    for seed in range(200):
        values = np.random.default_rng(seed).standard_normal(100)
        low, high = bootstrap_intervals({"mean": mean_of(values)}, 100, seed=seed)["mean"]
        inside += low <= 0.0 <= high
    assert stats.binom.cdf(inside, 200, 0.93) > 0.005  # the percentile interval of 100 rows is a little short
    assert stats.binom.sf(inside, 200, 0.96) > 0.005


def test_the_pace_changes_nothing_and_the_seed_does(monkeypatch):
    statistics = statistics_of(classes(50, 5))
    whole = bootstrap_intervals(statistics, 50)
    assert bootstrap_intervals(statistics, 50, seed=1)["nll"] != whole["nll"]
    monkeypatch.setattr(bootstrap, "_AT_A_TIME", 350)
    again = bootstrap_intervals(statistics, 50)
    for key, interval in whole.items():
        np.testing.assert_allclose(again[key], interval, atol=1e-12)


def test_what_is_not_finite_has_no_interval():
    values = np.array([0.1, math.nan, 0.3])
    assert all(math.isnan(edge) for edge in bootstrap_intervals({"mean": mean_of(values)}, 3)["mean"])
    rows = classes(20, 6)
    rows.columns["confidence"][3] = math.nan
    assert np.isnan(bootstrap_intervals(statistics_of(rows), 20)["aurc"][0]).all()


def test_aurc_of_many_ties_is_that_of_their_rows():
    random = np.random.default_rng(7)
    confidence, correct = random.integers(1, 4, 40) / 4, random.integers(0, 2, 40).astype(float)
    picked = random.integers(40, size=40)
    counts = np.bincount(picked, minlength=40)[None].astype(float)
    found = selective(-confidence, 1 - correct, 0.05)(counts)
    again = selective(-confidence[picked], 1 - correct[picked], 0.05)(np.ones((1, 40)))
    np.testing.assert_allclose(found, again, atol=1e-12)
    (roc,) = ranking(confidence, correct > 0)(counts)
    np.testing.assert_allclose(
        roc, ranking(confidence[picked], correct[picked] > 0)(np.ones((1, 40)))[0], atol=1e-12
    )


def test_a_large_part_gets_fewer_resamples():
    assert [resamples_for(n) for n in (1, 100_000, 200_000, 10_000_000)] == [1000, 1000, 500, 200]


def test_intervals_stay_within_what_a_share_can_be():
    random = np.random.default_rng(0)
    probs = np.stack([1 - (p := random.random(600) ** 6), p], axis=1)
    y = (random.random(600) < p).astype(int)
    rows = classes(600, 2)
    two = RowScores(
        {**rows.columns, "y": y, "confidence": probs.max(1), "correct": (probs.argmax(1) == y).astype(float)},
        probs,
    )
    for metric in metrics_with_intervals(two, ""):
        if metric.unit == "share" and metric.low is not None and metric.high is not None:
            assert 0 <= metric.low <= metric.high <= 1, metric


def test_intervals_of_coarse_curves_are_moved_to_those_of_the_exact_ones(monkeypatch: pytest.MonkeyPatch):
    rows = classes(400, 11)
    (exact,) = (one.statistic for one in measures_of(rows, "") if one.labels[0].key == "aurc")
    low, high = bootstrap_intervals({"aurc": exact}, 400)["aurc"]
    monkeypatch.setattr(metrics, "GROUPS", 4)  # so coarse that it lies far from the exact value
    (coarse,) = (one.coarse for one in measures_of(rows, "") if one.labels[0].key == "aurc")
    assert coarse is not None
    ones = np.ones((1, 400))
    width = high[0] - low[0]
    assert abs(coarse(ones)[0, 0] - exact(ones)[0, 0]) > 0.1 * width
    found = {metric.key: metric for metric in metrics_with_intervals(rows, "")}["aurc"]
    assert found.low == pytest.approx(low[0], abs=0.1 * width)
    assert found.high == pytest.approx(high[0], abs=0.1 * width)
