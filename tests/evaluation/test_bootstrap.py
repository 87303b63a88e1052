"""Intervals over resampled rows: the same metrics as on the data, the coverage they claim, the same at any pace."""

import math

import numpy as np
import pytest
from scipy import stats

from bdl_train.evaluation import bootstrap
from bdl_train.evaluation.bootstrap import bootstrap_intervals, mean_of, resamples_for, statistics_of
from bdl_train.evaluation.metrics import aurc, metrics_of
from bdl_train.evaluation.rows import RowScores


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
    return RowScores({**columns, "lower_95": -1.96 * std, "upper_95": 1.96 * std})


@pytest.mark.parametrize("make", [classes, numbers])
def test_a_resample_is_scored_as_its_rows_would_be(make):
    rows = make(60, 1)
    statistics = statistics_of(rows)
    picked = np.random.default_rng(2).integers(60, size=60)
    chosen = RowScores(
        {name: column[picked] for name, column in rows.columns.items()},
        None if rows.probs is None else rows.probs[picked],
    )
    counts = np.stack([np.ones(60), np.bincount(picked, minlength=60)]).astype(float)
    for rows_of, values in ((rows, 0), (chosen, 1)):
        for metric in metrics_of(rows_of, ""):
            if metric.key == "ace" and values == 1:
                continue  # its bins are those of the data, not of the resample
            assert statistics[metric.key](counts)[values] == pytest.approx(metric.value, abs=1e-12), (
                metric.key
            )
    assert set(statistics) == {metric.key for metric in metrics_of(rows, "")}


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
    assert bootstrap_intervals(statistics, 50, seed=1) != whole
    monkeypatch.setattr(bootstrap, "_AT_A_TIME", 350)
    again = bootstrap_intervals(statistics, 50)
    for key, interval in whole.items():
        assert again[key] == pytest.approx(interval, abs=1e-12)


def test_what_is_not_finite_has_no_interval():
    values = np.array([0.1, math.nan, 0.3])
    assert all(math.isnan(edge) for edge in bootstrap_intervals({"mean": mean_of(values)}, 3)["mean"])
    rows = classes(20, 6)
    rows.columns["confidence"][3] = math.nan
    assert math.isnan(bootstrap_intervals(statistics_of(rows), 20)["aurc"][0])


def test_aurc_of_many_ties_is_that_of_their_rows():
    random = np.random.default_rng(7)
    confidence, correct = random.integers(1, 4, 40) / 4, random.integers(0, 2, 40).astype(float)
    picked = random.integers(40, size=40)
    counts = np.bincount(picked, minlength=40)[None].astype(float)
    (value,) = bootstrap._aurc(confidence, correct)(counts)
    assert value == pytest.approx(aurc(confidence[picked], correct[picked]), abs=1e-12)


def test_a_large_part_gets_fewer_resamples():
    assert [resamples_for(n) for n in (1, 200_000, 400_000, 10_000_000)] == [1000, 1000, 500, 200]
