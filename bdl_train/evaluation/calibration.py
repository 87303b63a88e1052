"""Whether stated probabilities come true: the reliability diagram of classes, PIT values and coverage of numbers.

Shape letters: N rows, G bins.
"""

import numpy as np
import pandas as pd
from scipy import stats

from bdl_train.evaluation.functionals import equal_mass_bins
from bdl_train.evaluation.metrics import Metric, inside, jittered_pit, pit_p_value
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section

NUM_BINS = 15
FEWEST_ROWS = 30
"""Below so many rows nothing is called calibrated, or not."""
_NOTHING = "No row has a finite prediction: a member predicts NaN everywhere, see its training."
LEVELS = np.round(np.arange(0.05, 1.0, 0.05), 2)


def calibration_section(rows: RowScores, metrics: dict[str, Metric]) -> Section:
    """The chapter `calibration`: tables `reliability` (and `classes`), or `pit` and `coverage`.

    Args:
        rows: Scored rows.
        metrics: Of these rows, by key.
    """
    return _of_numbers(rows) if rows.probs is None else _of_classes(rows, rows.probs, metrics)


def share_interval(hits: np.ndarray, count: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Exact interval of shares (Clopper & Pearson 1934)."""
    hits, count = np.asarray(hits, float), np.asarray(count, float)
    edge = (1 - level) / 2
    low = np.where(hits > 0, stats.beta.ppf(edge, hits, count - hits + 1), 0.0)
    high = np.where(hits < count, stats.beta.ppf(1 - edge, hits + 1, count - hits), 1.0)
    return low, high


def reliability(probability: np.ndarray, hit: np.ndarray, num_bins: int = NUM_BINS) -> pd.DataFrame:
    """Mean probability against frequency in bins of equal mass, with exact 95 % intervals of the frequency.

    Args:
        probability: `[N]`.
        hit: `[N]` in {0, 1}.
        num_bins: Most bins; ties share one.
    """
    bins = equal_mass_bins(probability, num_bins)
    size = np.bincount(bins, minlength=num_bins)
    there = size > 0
    said = np.bincount(bins, weights=probability, minlength=num_bins)[there] / size[there]
    hits = np.bincount(bins, weights=hit, minlength=num_bins)[there]
    low, high = share_interval(hits, size[there])
    return pd.DataFrame(
        {"probability": said, "frequency": hits / size[there], "low": low, "high": high, "n": size[there]}
    )


def _of_classes(rows: RowScores, probs: np.ndarray, metrics: dict[str, Metric]) -> Section:
    c = rows.columns
    known = np.isfinite(c["confidence"])
    if not known.any():
        return Section.empty("calibration", "Calibration", _NOTHING)
    table = reliability(c["confidence"][known], c["correct"][known])
    each = [
        reliability(probs[known, k], (c["y"][known] == k).astype(float), 10).assign(k=k)
        for k in range(probs.shape[1])
    ]
    tables = {"reliability": table, "classes": pd.concat(each, ignore_index=True)}
    warnings = () if known.all() else (f"{int((~known).sum())} rows have no finite probability",)
    said, low, high = (table[name].to_numpy() for name in ("probability", "low", "high"))
    outside = int(np.sum((said < low) | (said > high)))
    confidence, accuracy = float(c["confidence"][known].mean()), float(c["correct"][known].mean())
    ece = metrics["smooth_ece"]
    value = "" if ece.value is None else f" (calibration error without bins {ece.value:.3f})"
    gap = confidence - accuracy
    # One bin in twenty lies outside its 95 % interval by chance.
    chance = int(stats.binom.ppf(0.975, len(table), 0.05))
    numbers = f"confidence {confidence:.3f}, accuracy {accuracy:.3f}{value}"
    off = f"{outside} of {len(table)} bins off"
    if known.sum() < FEWEST_ROWS:
        verdict = f"Too few rows to tell: {numbers}, {int(known.sum())} rows; {off}."
        return Section("calibration", "Calibration", verdict, "note", tables, warnings)
    if outside <= chance:
        verdict = f"Probabilities come true: {numbers}; {off}, no more than chance."
        return Section("calibration", "Calibration", verdict, "good", tables, warnings)
    how = "too sure of itself" if gap > 0 else "not sure enough"
    verdict = f"The model is {how}: {numbers}; {off} by more than chance. Recalibration may help."
    return Section("calibration", "Calibration", verdict, "warn", tables, warnings)


def _of_numbers(rows: RowScores) -> Section:
    pit = jittered_pit(rows)
    known = np.isfinite(pit)
    if not known.any():
        return Section.empty("calibration", "Calibration", _NOTHING)
    num_bins = 20 if known.sum() >= 200 else 10
    counts, edges = np.histogram(pit[known], bins=num_bins, range=(0, 1))
    n = int(known.sum())
    low, high = share_interval(counts, np.full(num_bins, n))
    histogram = pd.DataFrame(
        {
            "left": edges[:-1],
            "right": edges[1:],
            "density": counts * num_bins / max(n, 1),
            "low": low * num_bins,
            "high": high * num_bins,
            "n": counts,
        }
    )
    hits = np.array([np.nansum(inside(rows, level)) for level in LEVELS])
    low, high = share_interval(hits, np.full(len(LEVELS), n))
    coverage = pd.DataFrame({"level": LEVELS, "coverage": hits / max(n, 1), "low": low, "high": high, "n": n})
    tables = {"pit": histogram, "coverage": coverage}
    warnings = () if known.all() else (f"{int((~known).sum())} rows have no finite PIT value",)
    p = pit_p_value(rows.take(known))
    ninety = float(np.interp(0.9, coverage["level"], coverage["coverage"]))
    start = f"90 % intervals hold {100 * ninety:.1f} % of the targets"
    test = f"Kolmogorov-Smirnov test of uniform PIT values: p = {p:.2g}, {n} rows"
    if n < FEWEST_ROWS:
        return Section(
            "calibration", "Calibration", f"Too few rows to tell: {start}; {test}.", "note", tables, warnings
        )
    if p >= 0.05:
        return Section("calibration", "Calibration", f"{start}; {test}.", "good", tables, warnings)
    middle, ends = counts[num_bins // 4 : -(num_bins // 4)].mean(), np.r_[counts[:1], counts[-1:]].mean()
    how = "too narrow" if ends > middle else "too wide" if ends < 0.7 * middle else "shifted or misshapen"
    verdict = f"The predictive is {how}: {start}; {test}."
    return Section("calibration", "Calibration", verdict, "warn", tables, warnings)
