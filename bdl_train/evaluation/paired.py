"""Two models on the same rows: differences of row means, with intervals over rows of one test set or over splits.

Shape letters: N rows, J splits, m comparisons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bdl_train.evaluation.bootstrap import LEVEL, bootstrap_intervals
from bdl_train.evaluation.functionals import mean_of

ROWS, PLAIN, CORRECTED = (
    "paired bootstrap over rows",
    "paired t over splits",
    "corrected resampled t over splits",
)
"""How an interval was made."""


@dataclass(frozen=True)
class RowMetric:
    """A metric that is a mean over rows.

    Attributes:
        key, words: In tables and in sentences.
        better: "lower" or "higher".
        unit: Its own; None = that of the target.
        power: Of the target's unit.
    """

    key: str
    words: str
    better: str
    unit: str | None = None
    power: int = 1

    def unit_of(self, target_unit: str) -> str:
        if self.unit is not None:
            return self.unit
        return f"({target_unit})²" if self.power == 2 and target_unit else target_unit


NLL = RowMetric("nll", "NLL", "lower", "nats")
CLASS_METRICS = (
    NLL,
    RowMetric("accuracy", "accuracy", "higher", "share"),
    RowMetric("brier", "Brier score", "lower", ""),
)
NUMBER_METRICS = (
    NLL,
    RowMetric("crps", "CRPS", "lower"),
    RowMetric("mae", "MAE", "lower"),
    RowMetric("mse", "MSE", "lower", None, 2),
)


def row_metrics(columns: Mapping[str, np.ndarray]) -> dict[RowMetric, np.ndarray]:
    """The values `[N]` whose means are the metrics, from the columns of scored rows (`predictions.parquet`)."""
    if "correct" in columns:
        values = (columns["nll"], columns["correct"], columns["brier"])
        return dict(zip(CLASS_METRICS, values, strict=True))
    error = np.asarray(columns["error"], np.float64)
    values = (columns["nll"], columns["crps"], np.abs(error), np.square(error))
    return dict(zip(NUMBER_METRICS, values, strict=True))


@dataclass(frozen=True)
class Interval:
    """A mean difference with its 95 % interval and two-sided p-value; NaN with a reason where there are none."""

    difference: float
    low: float
    high: float
    p: float
    method: str
    reason: str = ""


def over_rows(differences: np.ndarray, *, seed: int) -> Interval:
    """The mean difference of one test set, and what other rows of its kind would do to it.

    The interval is that of the percentile bootstrap over rows, each row with both of its scores. The p-value is that
    of the paired t-test over rows: resamples could not tell small ones from 0.

    Says nothing of other trainings of the same models.

    Source:
        Efron & Tibshirani (1993), An introduction to the bootstrap, chapters 8 and 13.

    Args:
        differences: `[N]`.
        seed: Of the resamples.
    """
    plain = _t_interval(differences, 0.0, ROWS, "row")
    if plain.reason or plain.low == plain.high:
        return plain
    low, high = bootstrap_intervals({"it": mean_of(differences)}, len(differences), seed=seed)["it"]
    return Interval(plain.difference, float(low), float(high), plain.p, ROWS)


def over_splits(differences: np.ndarray, test_share: float | None) -> Interval:
    """The mean of the differences of several splits of one data set, and what further splits would do to it.

    Splits of one data set share training rows, and rows that one tests on another trains on, so that their differences
    are correlated and the plain paired t-test finds too much. The variance of the mean is taken as
    (1/J + n_test/n_train) S², which is exact if the correlation is n_test / (n_test + n_train); the t distribution has
    J − 1 degrees of freedom.

    Source:
        Nadeau & Bengio (2003), Inference for the generalization error, Machine Learning 52, Section 3 (the
        corrected resampled t-test); Bouckaert & Frank (2004) for cross-validation.

    Args:
        differences: `[J]`, one a split.
        test_share: n_test / n_train; None = unknown, for the plain test, whose interval is too narrow.
    """
    if test_share is None:
        return _t_interval(differences, 0.0, PLAIN, "split")
    return _t_interval(differences, test_share, CORRECTED, "split")


def _t_interval(differences: np.ndarray, extra: float, method: str, of: str) -> Interval:
    """Variance (1/J + extra) S² of the mean of J differences."""
    from scipy import stats

    count = len(differences)
    if not np.isfinite(differences).all():
        num_bad = int((~np.isfinite(differences)).sum())
        return _unknown(math.nan, method, f"it is not finite in {num_bad} of {count} {of}s")
    mean, variance = float(np.mean(differences)), 0.0 if count < 2 else float(np.var(differences, ddof=1))
    # Equal differences leave rounding.
    if variance <= (1e-12 * abs(mean)) ** 2:
        if mean == 0 and count > 1:
            return Interval(0.0, 0.0, 0.0, 1.0, method)
        return _unknown(mean, method, f"it is the same in every {of}, which leaves no spread to judge it by")
    error = math.sqrt((1 / count + extra) * variance)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return Interval(mean, mean - reach, mean + reach, p, method)


def _unknown(difference: float, method: str, reason: str) -> Interval:
    return Interval(difference, math.nan, math.nan, math.nan, method, reason)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values `[m]` by Holm (1979), over those that are known; NaN stays.

    The chance that any of the true null hypotheses is rejected at a level is at most that level, however the tests
    depend on each other.
    """
    p = np.asarray(p, np.float64)
    found, known = np.full(len(p), np.nan), np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return found


@dataclass(frozen=True)
class SplitScores:
    """Scores of both models on the same rows, averaged over the seeds that were trained for them.

    Attributes:
        name: The split, for people.
        rows: `[N]` row ids.
        model, baseline: Values `[N]` by metric.
        test_share: n_test / n_train, or None if the training sizes are not known.
        num_pairs: How many pairs of runs were averaged.
    """

    name: str
    rows: np.ndarray
    model: Mapping[RowMetric, np.ndarray]
    baseline: Mapping[RowMetric, np.ndarray]
    test_share: float | None
    num_pairs: int


@dataclass(frozen=True)
class SplitDifference:
    """One metric on one split; the interval is over its rows."""

    split: str
    pairs: int
    n: int
    mean: float
    baseline_mean: float
    difference: float
    low: float
    high: float


def difference(
    splits: Sequence[SplitScores], metric: RowMetric, *, seed: int
) -> tuple[Interval, list[SplitDifference]]:
    """Model − baseline of one metric: over rows for one split, over splits for several; and each split alone.

    Args:
        splits: Of different rows, J.
        metric: In all of them.
        seed: Of the resamples of rows.
    """
    intervals = [over_rows(one.model[metric] - one.baseline[metric], seed=seed) for one in splits]
    each = [
        SplitDifference(
            one.name,
            one.num_pairs,
            len(one.rows),
            float(one.model[metric].mean()),
            float(one.baseline[metric].mean()),
            found.difference,
            found.low,
            found.high,
        )
        for one, found in zip(splits, intervals, strict=True)
    ]
    if len(splits) == 1:
        return intervals[0], each
    known = [one.test_share for one in splits if one.test_share is not None]
    test_share = float(np.mean(known)) if len(known) == len(splits) else None
    return over_splits(np.array([one.difference for one in each]), test_share), each
