"""Metrics of a set of scored rows, each with its unit and meaning.

A measure is a family of metrics that are computed together, as a function of counts (`functionals.py`): the value on
the data and its bootstrap interval are one computation.

Shape letters: N rows, K classes, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from bdl_train.evaluation import functionals as f
from bdl_train.evaluation.rows import INTERVALS, LEVELS, RowScores

NUM_BINS = 15
MAX_RISK = 0.05
MOST_CLASSES = 20
"""Up to so many classes have curves of their own."""
GROUPS = 512
"""Groups of neighbours that curves are resampled with."""
ONE_CLASS = "the rows hold one class only"


@dataclass(frozen=True)
class Metric:
    """One number: its key without the split's name, its value (None = undefined), unit, meaning and direction.

    Attributes:
        low, high: The edges of its 95 % interval over resampled rows; None = there is none.
        reason: Why it has no value.
    """

    key: str
    value: float | None
    unit: str
    meaning: str
    better: str  # "lower", "higher" or "" when neither is
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Label(NamedTuple):
    """What a number is called and means."""

    key: str
    unit: str
    meaning: str
    better: str


@dataclass(frozen=True)
class Measure:
    """Metrics that are computed together.

    Attributes:
        labels: One a metric.
        statistic: Their values `[R, n]` (or `[R]` for one).
        reason: Why they have no value on these rows; None = they have.
        coarse: Nearly the same at less cost, for resamples: intervals are moved by its difference on the data.
    """

    labels: tuple[Label, ...]
    statistic: f.Statistic
    reason: str | None = None
    coarse: f.Statistic | None = None

    def values(self, counts: np.ndarray) -> np.ndarray:
        """`[R, n]` for counts `[R, N]`."""
        return np.asarray(self.statistic(counts)).reshape(len(counts), len(self.labels))


def metrics_of(rows: RowScores, unit: str, classes: Sequence[str] = ()) -> list[Metric]:
    """All metrics that the rows allow, without intervals.

    Args:
        rows: Scored rows.
        unit: Of a numeric target, for errors and intervals.
        classes: Names of the classes, for metrics of one class.
    """
    ones = np.ones((len(rows), 1)).T
    return [
        Metric(*label[:1], None if one.reason else float(value), *label[1:], reason=one.reason)
        for one in measures_of(rows, unit, classes)
        for label, value in zip(one.labels, one.values(ones)[0], strict=True)
    ]  # fmt: skip


def measures_of(rows: RowScores, unit: str, classes: Sequence[str] = ()) -> list[Measure]:
    """The same as functions of counts."""
    return _number_measures(rows, unit) if rows.probs is None else _class_measures(rows, rows.probs, classes)


def _one(key: str, unit: str, meaning: str, better: str, statistic: f.Statistic) -> Measure:
    return Measure((Label(key, unit, meaning, better),), statistic)


def _class_measures(rows: RowScores, probs: np.ndarray, classes: Sequence[str]) -> list[Measure]:
    c = rows.columns
    y, confidence, correct = c["y"].astype(int), c["confidence"], c["correct"]
    num_classes = probs.shape[1]
    wide, even = f.equal_width_bins(confidence, NUM_BINS), f.equal_mass_bins(confidence, NUM_BINS)
    gap_over = f"gap between confidence and accuracy, {NUM_BINS}"
    return [
        _one("nll", "nats", "surprise at the true class", "lower", f.mean_of(c["nll"])),
        _one("accuracy", "share", "rows whose likeliest class is right", "higher", f.mean_of(correct)),
        _one(
            "balanced_accuracy",
            "share",
            "the same within each class, averaged over classes",
            "higher",
            f.recalls(correct, y, num_classes),
        ),
        _one(
            "brier",
            "0..2",
            "squared distance of the probabilities from the truth",
            "lower",
            f.mean_of(c["brier"]),
        ),
        Measure(
            (
                Label("ece", "share", f"{gap_over} equal-width bins", "lower"),
                Label("mce", "share", "the largest gap of one of these bins", "lower"),
            ),
            f.binned_gap(confidence, correct, wide, NUM_BINS),
        ),
        Measure(
            (
                Label("ace", "share", f"{gap_over} bins of equal mass", "lower"),
                Label("ace_max", "share", "the largest gap of one of these bins", "lower"),
            ),
            f.binned_gap(confidence, correct, even, NUM_BINS),
        ),
        Measure(
            (
                Label(
                    "classwise_ece",
                    "share",
                    "gap between probability and frequency, mean over classes",
                    "lower",
                ),
                Label(
                    "brier_reliability",
                    "0..2",
                    "part of the Brier score that calibration would remove",
                    "lower",
                ),
                Label(
                    "brier_resolution", "0..2", "part by which the probabilities tell rows apart", "higher"
                ),
                Label(
                    "brier_uncertainty", "0..2", "Brier score of always predicting the classes' shares", ""
                ),
            ),
            f.classwise(probs, y, NUM_BINS),
        ),
        _one(
            "smooth_ece",
            "share",
            "calibration error without bins (smECE)",
            "lower",
            f.smooth_gap(confidence, correct),
        ),
        Measure(
            (
                Label("aurc", "share", "error kept when deferring the least confident", "lower"),
                Label(
                    "excess_aurc", "share", "how much of it a perfect order of the rows would save", "lower"
                ),
                Label(
                    "coverage_at_5_risk",
                    "share",
                    "rows that can be kept at an error of at most 5 %",
                    "higher",
                ),
            ),
            f.selective(-confidence, 1 - correct, MAX_RISK),
            coarse=f.selective(-confidence, 1 - correct, MAX_RISK, GROUPS),
        ),
        *_curves(probs, y, classes),
        _one("entropy", "nats", "total uncertainty", "", f.mean_of(c["total"])),
        _one("aleatoric_entropy", "nats", "what members agree is uncertain", "", f.mean_of(c["aleatoric"])),
        _one("mutual_information", "nats", "what members disagree about", "", f.mean_of(c["epistemic"])),
        _one(
            "epistemic_share",
            "share",
            "of the total uncertainty, what members disagree about",
            "",
            f.ratio(c["epistemic"], c["total"]),
        ),
    ]


def _curves(probs: np.ndarray, y: np.ndarray, classes: Sequence[str]) -> list[Measure]:
    """Areas under the curves of each class against the others; of two classes, of the second one."""
    num_classes = probs.shape[1]
    reason = ONE_CLASS if len(np.unique(y)) < 2 else None
    roc = "chance that a row of the class is ranked above another"
    precision = "average precision"
    if num_classes == 2:
        labels = (Label("auroc", "share", roc, "higher"), Label("auprc", "share", precision, "higher"))
        exact, coarse = (f.ranking(probs[:, 1], y == 1, groups) for groups in (None, GROUPS))
        return [Measure(labels, exact, reason, coarse)]
    if num_classes > MOST_CLASSES:
        return []
    present = [k for k in range(num_classes) if (y == k).any()]
    names = list(classes) or [str(k) for k in range(num_classes)]
    labels = (
        Label("auroc", "share", f"{roc}, averaged over classes", "higher"),
        Label("auprc", "share", f"{precision}, averaged over classes", "higher"),
    )
    for k in present:
        labels += (
            Label(f"auroc_{names[k]}", "share", f"{roc}: {names[k]}", "higher"),
            Label(f"auprc_{names[k]}", "share", f"{precision}: {names[k]}", "higher"),
        )

    def averaged(groups: int | None) -> f.Statistic:
        each = [f.ranking(probs[:, k], y == k, groups) for k in present]

        def statistic(counts: np.ndarray) -> np.ndarray:
            found = np.stack([one(counts) for one in each], axis=1)
            return np.concatenate([found.mean(1, keepdims=True), found], axis=1).reshape(len(counts), -1)

        return statistic

    return [Measure(labels, averaged(None), reason, averaged(GROUPS))]


def _number_measures(rows: RowScores, unit: str) -> list[Measure]:
    c = rows.columns
    error = np.abs(c["error"])
    squared = f.mean_of(np.square(error))
    area, coarse_area = (f.selective(c["total_std"], error, 0.0, groups) for groups in (None, GROUPS))
    found = [
        _one("nll", "nats", "surprise at the true value", "lower", f.mean_of(c["nll"])),
        _one("rmse", unit, "typical error of the mean", "lower", lambda counts: np.sqrt(squared(counts))),
        _one("mae", unit, "mean absolute error of the mean", "lower", f.mean_of(error)),
        _one("crps", unit, "distance of the whole predictive from the truth", "lower", f.mean_of(c["crps"])),
    ]
    for level in INTERVALS:
        percent = round(100 * level)
        meaning = f"rows inside their central {percent} % interval; {level:.2f} is right"
        found.append(_one(f"coverage_{percent}", "share", meaning, "", f.mean_of(inside(rows, level))))
    for level in INTERVALS:
        percent = round(100 * level)
        width = c[f"upper_{percent}"] - c[f"lower_{percent}"]
        meaning = f"width of the central {percent} % interval"
        found.append(_one(f"interval_width_{percent}", unit, meaning, "lower", f.mean_of(width)))
    return [
        *found,
        _one(
            "pinball",
            unit,
            f"pinball loss, mean over {len(LEVELS)} quantiles",
            "lower",
            f.mean_of(pinball(rows)),
        ),
        Measure(
            (
                Label("aurc", unit, "absolute error kept when deferring the most uncertain", "lower"),
                Label("excess_aurc", unit, "how much of it a perfect order of the rows would save", "lower"),
            ),
            lambda counts: area(counts)[:, :2],
            coarse=lambda counts: coarse_area(counts)[:, :2],
        ),
        _one("total_std", unit, "predictive standard deviation", "", f.mean_of(c["total_std"])),
        _one("aleatoric_std", unit, "its noise part", "", f.mean_of(c["aleatoric_std"])),
        _one("epistemic_std", unit, "its part from disagreeing members", "", f.mean_of(c["epistemic_std"])),
        _one(
            "epistemic_share",
            "share",
            "of the total variance, what members disagree about",
            "",
            f.ratio(np.square(c["epistemic_std"]), np.square(c["total_std"])),
        ),
        _pit_distance(rows),
    ]


def inside(rows: RowScores, level: float) -> np.ndarray:
    """Whether each target lies from its (1 − level)/2 quantile to its (1 + level)/2 quantile, both included; `[N]`.

    y is at least the quantile of p if P(Y ≤ y) ≥ p, and at most that of q if P(Y < y) < q: no quantile is needed, and
    counts, whose distribution function jumps, are right too. NaN stays NaN.
    """
    pit, below = rows.columns["pit"], rows.columns["pit_below"]
    return np.where(np.isnan(pit), np.nan, (pit >= (1 - level) / 2) & (below < (1 + level) / 2))


def pinball(rows: RowScores) -> np.ndarray:
    """Mean over the stored quantiles q_τ of (y − q)·(τ − 1{y < q}), `[N]` (Koenker & Bassett 1978)."""
    y = rows.columns["y"]
    losses = [(y - rows.quantile(level)) * (level - (y < rows.quantile(level))) for level in LEVELS]
    return np.mean(losses, axis=0)


def jittered_pit(rows: RowScores, seed: int = 0) -> np.ndarray:
    """PIT values `[N]` that are uniform under the predictive, for counts too: there between P(Y < y) and P(Y ≤ y) at
    random (Czado et al. 2009, Section 2.1)."""
    pit, below = rows.columns["pit"], rows.columns["pit_below"]
    return below + (pit - below) * np.random.default_rng(seed).random(len(pit))


def pit_p_value(rows: RowScores) -> float:
    """P value of the Kolmogorov-Smirnov test that the PIT values are uniform."""
    pit = jittered_pit(rows)
    return float("nan") if np.isnan(pit).any() else float(stats.kstest(pit, "uniform").pvalue)


def _pit_distance(rows: RowScores) -> Measure:
    """Kolmogorov's distance of the PIT values from uniform: sup |F(u) − u|, over resamples too."""
    statistic = f.distance_from_uniform(jittered_pit(rows))

    p_value = pit_p_value(rows)
    meaning = f"largest gap between PIT values and a uniform law; p = {p_value:.2g} if they are"
    return Measure((Label("pit_distance", "share", meaning, "lower"),), statistic)


# --- single numbers of plain arrays -----------------------------------------------------------------------------


def expected_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> float:
    """Expected calibration error over equal-width bins (`functionals.binned_gap`).

    Args:
        confidence: `[N]` probabilities, never logits.
        correct: `[N]` in {0, 1}.
        num_bins: Of (0, 1].
    """
    return _alone(
        f.binned_gap(confidence, correct, f.equal_width_bins(confidence, num_bins), num_bins), confidence
    )


def adaptive_calibration_error(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS
) -> float:
    """The same over bins of equal mass: rows sorted by confidence, ties kept in one bin (Nguyen & O'Connor, 2015)."""
    return _alone(
        f.binned_gap(confidence, correct, f.equal_mass_bins(confidence, num_bins), num_bins), confidence
    )


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the risk-coverage curve (`functionals.selective`)."""
    return _alone(f.selective(-confidence, 1 - correct, MAX_RISK), confidence)


def _alone(statistic: f.Statistic, like: np.ndarray) -> float:
    return float(statistic(np.ones((len(like), 1)).T)[0, 0])
