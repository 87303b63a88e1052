"""Metrics of a set of scored rows, each with its unit and meaning.

Shape letters: N rows, G bins.
"""

from dataclasses import dataclass

import numpy as np

from bdl_train.evaluation.rows import INTERVALS, RowScores

NUM_BINS = 15


@dataclass(frozen=True)
class Metric:
    """One number: its key without the split's name, its value (None = undefined), unit, meaning and direction.

    `low` and `high` are the edges of its 95 % interval over resampled rows; None = there is none.
    """

    key: str
    value: float | None
    unit: str
    meaning: str
    better: str  # "lower", "higher" or "" when neither is
    low: float | None = None
    high: float | None = None


def metrics_of(rows: RowScores, unit: str) -> list[Metric]:
    """All metrics that the rows allow.

    Args:
        rows: Scored rows.
        unit: Of a numeric target, for errors and intervals.
    """
    return _class_metrics(rows) if rows.probs is not None else _number_metrics(rows, unit)


def _class_metrics(rows: RowScores) -> list[Metric]:
    c = rows.columns
    return [
        Metric("nll", _mean(c["nll"]), "nats", "surprise at the true class", "lower"),
        Metric("accuracy", _mean(c["correct"]), "share", "rows whose likeliest class is right", "higher"),
        Metric(
            "brier",
            _mean(c["brier"]),
            "0..2",
            "squared distance of the probabilities from the truth",
            "lower",
        ),
        Metric(
            "ece",
            expected_calibration_error(c["confidence"], c["correct"]),
            "share",
            f"gap between confidence and accuracy, {NUM_BINS} equal-width bins",
            "lower",
        ),
        Metric(
            "ace",
            adaptive_calibration_error(c["confidence"], c["correct"]),
            "share",
            f"the same, {NUM_BINS} bins of equal mass",
            "lower",
        ),
        Metric(
            "aurc",
            aurc(c["confidence"], c["correct"]),
            "share",
            "error kept when deferring the least confident",
            "lower",
        ),
        Metric("entropy", _mean(c["total"]), "nats", "total uncertainty", ""),
        Metric("aleatoric_entropy", _mean(c["aleatoric"]), "nats", "what members agree is uncertain", ""),
        Metric("mutual_information", _mean(c["epistemic"]), "nats", "what members disagree about", ""),
    ]


def _number_metrics(rows: RowScores, unit: str) -> list[Metric]:
    c = rows.columns
    found = [
        Metric("nll", _mean(c["nll"]), "nats", "surprise at the true value", "lower"),
        Metric(
            "rmse", float(np.sqrt(np.mean(np.square(c["error"])))), unit, "typical error of the mean", "lower"
        ),
        Metric("mae", _mean(np.abs(c["error"])), unit, "mean absolute error of the mean", "lower"),
        Metric("crps", _mean(c["crps"]), unit, "distance of the whole predictive from the truth", "lower"),
    ]
    for level in INTERVALS:
        percent = round(100 * level)
        meaning = f"rows inside their central {percent} % interval; {level:.2f} is right"
        found.append(
            Metric(f"coverage_{percent}", coverage(c["pit_below"], c["pit"], level), "share", meaning, "")
        )
    found += [
        Metric(
            "interval_width_95",
            _mean(c["upper_95"] - c["lower_95"]),
            unit,
            "width of the central 95 % interval",
            "lower",
        ),
        Metric("total_std", _mean(c["total_std"]), unit, "predictive standard deviation", ""),
        Metric("aleatoric_std", _mean(c["aleatoric_std"]), unit, "its noise part", ""),
        Metric("epistemic_std", _mean(c["epistemic_std"]), unit, "its part from disagreeing members", ""),
    ]
    return found


def _mean(values: np.ndarray) -> float:
    # No nanmean: a member that predicts NaN must show.
    return float(np.mean(values))


def coverage(pit_below: np.ndarray, pit: np.ndarray, level: float) -> float:
    """Share of targets from the (1 − level)/2 quantile to the (1 + level)/2 quantile, both included.

    y is at least the quantile of p if P(Y ≤ y) ≥ p, and at most that of q if P(Y < y) < q: no quantile is needed, and
    counts, whose distribution function jumps, are right too.
    """
    inside = (pit >= (1 - level) / 2) & (pit_below < (1 + level) / 2)
    return float(np.mean(np.where(np.isnan(pit), np.nan, inside)))


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> float:
    """Σ_g (n_g / N) |accuracy_g − confidence_g| over equal-width bins of (0, 1], closed on the right.

    Source:
        Naeini et al. (2015); Guo et al. (2017), arXiv:1706.04599, equation 3.

    Args:
        confidence: `[N]` probabilities, never logits; 1.0 falls in the last bin, 0.0 in the first.
        correct: `[N]` in {0, 1}.
    """
    if np.isnan(confidence).any():
        return float("nan")
    bins = equal_width_bins(confidence, num_bins)
    gap = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gap).sum() / len(confidence))


def equal_width_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each row `[N]`: of (0, 1], closed on the right; NaN falls anywhere."""
    return np.clip(np.ceil(np.nan_to_num(confidence) * num_bins).astype(int) - 1, 0, num_bins - 1)


def equal_mass_bins(confidence: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each row `[N]`: rows sorted by confidence; those of equal confidence share their middle rank."""
    _, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - (counts + 1) / 2
    return np.minimum((middle * num_bins / len(confidence)).astype(int), num_bins - 1)[inverse]


def adaptive_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> float:
    """The same over bins of equal mass: rows sorted by confidence, ties kept in one bin (Nguyen & O'Connor, 2015)."""
    if np.isnan(confidence).any():
        return float("nan")
    bins = equal_mass_bins(confidence, num_bins)
    gap = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gap).sum() / len(confidence))


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the risk-coverage curve: mean over n of the error among the n most confident rows.

    Rows of equal confidence are taken in expectation over their order.

    Source:
        Geifman et al. (2019), arXiv:1805.08206, Section 2.
    """
    if np.isnan(confidence).any():
        return float("nan")
    _, inverse = np.unique(-confidence, return_inverse=True)
    errors = np.bincount(inverse, weights=1 - correct)
    counts = np.bincount(inverse)
    mean_error = np.repeat(errors / counts, counts)
    return float(np.mean(np.cumsum(mean_error) / np.arange(1, len(confidence) + 1)))
