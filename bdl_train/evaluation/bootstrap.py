"""Confidence intervals of metrics by the bootstrap over rows.

A resample of N rows is a vector of counts, so a metric is written once as a function of counts `[R, N]`, R resamples
at a time; counts of one give its value on the data itself.

Shape letters: R resamples, N rows, G bins or groups of ties.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from bdl_train.evaluation.metrics import NUM_BINS, equal_mass_bins, equal_width_bins
from bdl_train.evaluation.rows import INTERVALS, RowScores

Statistic = Callable[[np.ndarray], np.ndarray]
"""From counts `[R, N]`, each row of which sums to N, to values `[R]`."""

RESAMPLES, LEVEL = 1000, 0.95
LEAST_RESAMPLES, MOST_COUNTS = 200, 200_000_000
"""Beyond so many counts in all, fewer resamples are drawn, down to the least: of a large part any number is sharp."""
_AT_A_TIME = 4_000_000


def resamples_for(num_rows: int) -> int:
    """How many resamples a part of this size gets."""
    return int(np.clip(MOST_COUNTS // max(num_rows, 1), LEAST_RESAMPLES, RESAMPLES))


def bootstrap_intervals(
    statistics: Mapping[str, Statistic], num_rows: int, *, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[float, float]]:
    """Percentile intervals (Efron & Tibshirani 1993, chapter 13) of several metrics from the same resamples.

    Args:
        statistics: By name. What is not finite on a resample leaves that metric without an interval: (NaN, NaN).
        num_rows: N.
        seed: Of the resamples; the intervals do not depend on how many are worked on at a time.
        level: Of the central interval.
    """
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for counts in _counts(num_rows, resamples_for(num_rows), seed):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(counts))
    edges = ((1 - level) / 2, (1 + level) / 2)
    found = {}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        low, high = np.quantile(values, edges) if np.isfinite(values).all() else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found


def _counts(num_rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    size = max(1, _AT_A_TIME // num_rows)
    for start in range(0, resamples, size):
        picked = [
            np.bincount(random.integers(num_rows, size=num_rows), minlength=num_rows)
            for _ in range(min(size, resamples - start))
        ]
        yield np.stack(picked).astype(np.float64)


def statistics_of(rows: RowScores) -> dict[str, Statistic]:
    """The metrics of `metrics_of`, by the same keys, as functions of counts."""
    c = rows.columns
    if rows.probs is not None:
        return {
            **{key: mean_of(c[name]) for key, name in _CLASS_MEANS.items()},
            "ece": _binned_gap(c, equal_width_bins(c["confidence"], NUM_BINS)),
            "ace": _binned_gap(c, equal_mass_bins(c["confidence"], NUM_BINS)),
            "aurc": _aurc(c["confidence"], c["correct"]),
        }
    squared = mean_of(np.square(c["error"]))
    found: dict[str, Statistic] = {
        "rmse": lambda counts: np.sqrt(squared(counts)),
        "mae": mean_of(np.abs(c["error"])),
        "interval_width_95": mean_of(c["upper_95"] - c["lower_95"]),
        **{key: mean_of(c[key]) for key in ("nll", "crps", "total_std", "aleatoric_std", "epistemic_std")},
    }
    for level in INTERVALS:
        inside = (c["pit"] >= (1 - level) / 2) & (c["pit_below"] < (1 + level) / 2)
        found[f"coverage_{round(100 * level)}"] = mean_of(np.where(np.isnan(c["pit"]), np.nan, inside))
    return found


_CLASS_MEANS = {
    "nll": "nll", "accuracy": "correct", "brier": "brier",
    "entropy": "total", "aleatoric_entropy": "aleatoric", "mutual_information": "epistemic",
}  # fmt: skip


def mean_of(values: np.ndarray) -> Statistic:
    """The mean of values `[N]`."""
    values = np.asarray(values, np.float64)
    return lambda counts: counts @ values / len(values)


def _binned_gap(columns: Mapping[str, np.ndarray], bins: np.ndarray) -> Statistic:
    """Σ_g |Σ of correct − confidence in bin g| / N. The bins are those of the data."""
    gap = columns["correct"] - columns["confidence"]
    by_bin = np.where(bins[:, None] == np.arange(NUM_BINS), gap[:, None], 0.0)  # [N, G]
    return lambda counts: np.abs(counts @ by_bin).sum(1) / len(gap)


def _aurc(confidence: np.ndarray, correct: np.ndarray) -> Statistic:
    """Area under the risk-coverage curve; a row that was drawn k times is k rows of equal confidence.

    A group of W rows with mean error e behind W0 rows with E0 errors adds Σ_{k=1..W} (E0 + k·e)/(W0 + k)
    = W·e + (E0 − W0·e)·(H(W0 + W) − H(W0)), with harmonic numbers H: exact in the expectation over the order of ties.
    """
    order = np.argsort(-confidence, kind="stable")
    starts = np.flatnonzero(np.diff(confidence[order], prepend=np.inf))
    errors, count = 1 - correct[order], len(confidence)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, count + 1))])

    def statistic(counts: np.ndarray) -> np.ndarray:
        if np.isnan(confidence).any():
            return np.full(len(counts), np.nan)
        ordered = counts[:, order]
        width = np.add.reduceat(ordered, starts, axis=1)
        wrong = np.add.reduceat(ordered * errors, starts, axis=1)
        width_before = np.cumsum(width, axis=1) - width
        wrong_before = np.cumsum(wrong, axis=1) - wrong
        rate = wrong / np.maximum(width, 1)
        reached = (width_before + width).astype(int)
        steps = harmonic[reached] - harmonic[width_before.astype(int)]
        return (wrong + (wrong_before - width_before * rate) * steps).sum(1) / count

    return statistic
