"""Confidence intervals of metrics by the bootstrap over rows.

Shape letters: R resamples, N rows, n metrics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from bdl_train.evaluation.functionals import Statistic
from bdl_train.evaluation.metrics import Measure, Metric, measures_of, metrics_of
from bdl_train.evaluation.rows import RowScores

RESAMPLES, LEVEL = 1000, 0.95
LEAST_RESAMPLES, MOST_COUNTS = 200, 100_000_000
"""Beyond so many counts in all, fewer resamples are drawn, down to the least: of a large part any number is sharp."""
MOST_UNDEFINED = 0.05
"""Resamples on which a metric may be undefined (a rare class was not drawn) before it has no interval."""
_AT_A_TIME = 4_000_000


def resamples_for(num_rows: int) -> int:
    """How many resamples a part of this size gets."""
    return int(np.clip(MOST_COUNTS // max(num_rows, 1), LEAST_RESAMPLES, RESAMPLES))


def metrics_with_intervals(
    rows: RowScores,
    unit: str,
    classes: Sequence[str] = (),
    *,
    extra: Sequence[Measure] = (),
    seed: int = 0,
) -> list[Metric]:
    """`metrics_of` with 95 % intervals.

    Args:
        rows: Scored rows.
        unit: Of a numeric target.
        classes: Names of the classes.
        extra: Further measures of the same rows.
        seed: Of the resamples.
    """
    measures = [*measures_of(rows, unit, classes), *extra]
    found = [*metrics_of(rows, unit, classes), *(one for more in extra for one in _values(more, len(rows)))]
    defined = {str(i): one.coarse or one.statistic for i, one in enumerate(measures) if one.reason is None}
    edges = bootstrap_intervals(defined, len(rows), seed=seed)
    ones = np.ones((len(rows), 1)).T
    pairs = []
    for i, one in enumerate(measures):
        low, high = edges.get(str(i), (np.nan, np.nan))
        if one.reason is None and one.coarse is not None:
            shift = (one.statistic(ones) - one.coarse(ones))[0]
            most = np.array([1.0 if label.unit == "share" else np.inf for label in one.labels])
            low, high = np.clip(low + shift, 0.0, most), np.clip(high + shift, 0.0, most)
        pairs += zip(*(np.broadcast_to(edge, len(one.labels)) for edge in (low, high)), strict=True)
    return [
        replace(metric, low=float(low), high=float(high)) if np.isfinite(low) else metric
        for metric, (low, high) in zip(found, pairs, strict=True)
    ]


def _values(one: Measure, num_rows: int) -> list[Metric]:
    values = one.values(np.ones((num_rows, 1)).T)[0]
    return [
        Metric(label.key, float(value), label.unit, label.meaning, label.better)
        for label, value in zip(one.labels, values, strict=True)
    ]


def bootstrap_intervals(
    statistics: Mapping[str, Statistic], num_rows: int, *, seed: int = 0, level: float = LEVEL
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Percentile intervals (Efron & Tibshirani 1993, chapter 13) of several statistics from the same resamples.

    Args:
        statistics: By name.
        num_rows: N.
        seed: Of the resamples; the intervals do not depend on how many are worked on at a time.
        level: Of the central interval.

    Returns:
        Low and high of each, `[n]` (or of no dimension if the statistic is one number); NaN where more than 5 % of the
        resamples leave it undefined.
    """
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for counts in resampled_counts(num_rows, resamples_for(num_rows), seed):
        for name, statistic in statistics.items():
            drawn[name].append(statistic(counts))
    return {name: percentiles(np.concatenate(parts), level) for name, parts in drawn.items()}


def percentiles(values: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the central interval over the first axis of values `[R, ...]`, by the rule of `bootstrap_intervals`."""
    finite = np.isfinite(values)
    known = finite.mean(0) >= 1 - MOST_UNDEFINED
    edges = [(1 - level) / 2, (1 + level) / 2]
    if finite.all():
        low, high = np.quantile(values, edges, axis=0)
        return low, high
    # Columns without any finite value would warn.
    filled = np.where(known & ~finite, np.nan, np.where(known, values, 0.0))
    low, high = np.nanquantile(filled, edges, axis=0)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def resampled_counts(num_rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Counts `[R, N]` of rows drawn with replacement, some resamples at a time; their transpose is contiguous."""
    random = np.random.default_rng(seed)
    size = max(1, _AT_A_TIME // num_rows)
    for start in range(0, resamples, size):
        now = min(size, resamples - start)
        counts = np.empty((num_rows, now))
        for r in range(now):
            counts[:, r] = np.bincount(random.integers(num_rows, size=num_rows), minlength=num_rows)
        yield counts.T
