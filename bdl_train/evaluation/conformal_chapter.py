"""The chapter of an evaluation on conformal prediction: thresholds from validation rows, coverage on test rows.

Shape letters: N rows, K classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.conformal import (
    EXPECTED,
    Edges,
    aps_scores,
    cqr_intervals,
    cqr_scores,
    expected_coverage,
    group_thresholds,
    lac_scores,
    normalised_intervals,
    normalised_scores,
    prediction_sets,
    threshold,
    thresholds_of_rows,
)
from bdl_train.evaluation.rows import INTERVALS, RowScores
from bdl_train.evaluation.section import Level, Section
from bdl_train.specs import TargetSpec

TITLE = "Conformal prediction"
LEVEL = 0.95
"""Of Clopper-Pearson intervals."""


@dataclass(frozen=True)
class _Method:
    """Scores of validation rows; `judge` turns thresholds of test rows `[N]` into covered `[N]` and size `[N]`."""

    name: str
    scores: np.ndarray
    judge: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def conformal_section(
    val: RowScores,
    test: RowScores,
    *,
    levels: Sequence[float],
    target: TargetSpec,
    groups: tuple[np.ndarray, np.ndarray] | None,
    seed: int,
    edges: tuple[Mapping[float, Edges], Mapping[float, Edges]] | None = None,
) -> Section:
    """Thresholds from validation rows, coverage and size on test rows.

    Table `coverage`: method, level, threshold_from ("all rows", or "own group" with a threshold for each group), group
    ("all" or a label), num_val (rows behind the threshold), n (test rows), threshold, coverage, low, high
    (Clopper-Pearson, 95 %), expected_low, expected_high, verdict ("as expected", "too low", "too high", "not judged":
    thresholds from all rows promise nothing within one group), size, size_p10, size_p90 (width of intervals in the
    target's units, or classes in a set), empty (share of intervals or sets).

    Args:
        val, test: Scores of the two parts. What was fitted to `val` before weakens the promise.
        levels: Of coverage.
        target: For the unit of widths.
        groups: Labels of validation and test rows, `[N]` each.
        seed: Of the randomised sets.
        edges: For numbers, edges of central intervals of validation and test rows at further levels; those of
            `INTERVALS` are taken from the scores if they are there.

    Raises:
        UsageError: no rows, scores of NaN, or a level outside (0, 1).
    """
    for name, rows in (("validation", val), ("test", test)):
        if len(rows) == 0:
            raise UsageError(
                f"Conformal prediction needs {name} rows, there are none: set data.val_fraction above 0."
            )
        bad = np.isnan(rows.columns["mean"] if rows.probs is None else rows.probs.sum(1))
        if bad.any():
            raise UsageError(
                f"{int(bad.sum())} of {len(rows)} {name} rows are predicted as NaN, which has no order: look for a "
                "member that predicts NaN."
            )
    labels = None if groups is None else (_texts(groups[0], val), _texts(groups[1], test))
    found, warnings = [], []
    for level in levels:
        methods, missing = _methods(val, test, level, seed, edges)
        warnings += missing
        for method in methods:
            found += _rows(method, level, labels, len(val), len(test))
    warnings += _small_groups(found)
    verdict, judged = _verdict(found, "classes" if test.probs is not None else target.name)
    return Section("conformal", TITLE, verdict, judged, {"coverage": pd.DataFrame(found)}, tuple(warnings))


def _texts(groups: np.ndarray, rows: RowScores) -> np.ndarray:
    if len(groups) != len(rows):
        raise ValueError(f"There are {len(groups)} group labels for {len(rows)} rows.")
    return np.array([str(label) for label in groups.tolist()])


def _methods(
    val: RowScores,
    test: RowScores,
    level: float,
    seed: int,
    edges: tuple[Mapping[float, Edges], Mapping[float, Edges]] | None,
) -> tuple[list[_Method], list[str]]:
    if val.probs is not None and test.probs is not None:
        return _class_methods(val, test, val.probs, test.probs, seed), []
    y = test.columns["y"]
    found = [
        _Method(
            "normalised",
            normalised_scores(val),
            lambda q: _judged_intervals(normalised_intervals(test, q), y),
        )
    ]
    own, others = (
        _edges_of(rows, level, None if edges is None else edges[i]) for i, rows in enumerate((val, test))
    )
    if own is None or others is None:
        return found, [f"cqr is left out at level {level}: the scores hold no quantiles of {level}."]
    scores = cqr_scores(val.columns["y"], own)
    return [*found, _Method("cqr", scores, lambda q: _judged_intervals(cqr_intervals(others, q), y))], []


def _edges_of(rows: RowScores, level: float, given: Mapping[float, Edges] | None) -> Edges | None:
    if given is not None and level in given:
        return given[level]
    names = (f"lower_{round(100 * level)}", f"upper_{round(100 * level)}")
    if level in INTERVALS and all(name in rows.columns for name in names):
        return rows.columns[names[0]], rows.columns[names[1]]
    return None


def _class_methods(
    val: RowScores, test: RowScores, val_probs: np.ndarray, test_probs: np.ndarray, seed: int
) -> list[_Method]:
    random = np.random.default_rng(seed)
    u_val, u_test = random.random(len(val)), random.random(len(test))
    pairs = {
        "lac": (lac_scores(val_probs), lac_scores(test_probs)),
        "aps": (aps_scores(val_probs, None), aps_scores(test_probs, None)),
        "aps_randomised": (aps_scores(val_probs, u_val), aps_scores(test_probs, u_test)),
    }
    y_val, y_test = val.columns["y"].astype(int), test.columns["y"].astype(int)

    def judge_of(scores: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return lambda q: _judged_sets(prediction_sets(scores, q), y_test)

    return [
        _Method(name, own[np.arange(len(val)), y_val], judge_of(other))
        for name, (own, other) in pairs.items()
    ]


def _judged_intervals(intervals: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = intervals.T
    return (low <= y) & (y <= high), np.where(low <= high, high - low, np.where(low > high, 0.0, np.nan))


def _judged_sets(sets: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return sets[np.arange(len(y)), y], sets.sum(1).astype(np.float64)


def _rows(
    method: _Method, level: float, labels: tuple[np.ndarray, np.ndarray] | None, num_val: int, num_test: int
) -> list[dict[str, Any]]:
    """Rows of the table: one threshold for all, then each group under it, then under its own."""
    q, everything = threshold(method.scores, level), np.ones(num_test, bool)
    covered, size = method.judge(np.full(num_test, q))
    head = {"method": method.name, "level": level, "threshold_from": "all rows"}
    promise = _Promise(num_val, q, int((method.scores == q).sum()) > 1)
    found = [{**head, "group": "all", **_row(covered, size, level, promise, everything)}]
    if labels is None:
        return found
    own, others = labels
    names = np.unique(others).tolist()
    found += [
        {**head, "group": name, **_row(covered, size, level, _Promise(num_val, q, None), others == name)}
        for name in names
    ]
    by_group = group_thresholds(method.scores, own, level)
    covered, size = method.judge(thresholds_of_rows(by_group, others))
    head["threshold_from"] = "own group"
    promise = _Promise(num_val, math.nan, None)
    found.append({**head, "group": "all", **_row(covered, size, level, promise, everything)})
    for name in names:
        scores, q = method.scores[own == name], by_group.get(name, math.inf)
        promise = _Promise(len(scores), q, int((scores == q).sum()) > 1)
        found.append({**head, "group": name, **_row(covered, size, level, promise, others == name)})
    return found


@dataclass(frozen=True)
class _Promise:
    """Rows behind a threshold, and whether it has ties; `ties` None = nothing is promised of these test rows."""

    num_val: int
    threshold: float
    ties: bool | None


def _row(
    covered: np.ndarray, size: np.ndarray, level: float, promise: _Promise, rows: np.ndarray
) -> dict[str, Any]:
    covered, size = covered[rows], size[rows]
    count, n = int(covered.sum()), int(rows.sum())
    interval = stats.binomtest(count, n).proportion_ci(LEVEL, "exact")
    low, high, verdict = math.nan, math.nan, "not judged"
    if promise.ties is not None:
        low, high = expected_coverage(promise.num_val, n, level, ties=promise.ties)
        verdict = "too low" if count / n < low else "too high" if count / n > high else "as expected"
    # No interpolation: the difference of two infinite widths is NaN.
    p10, p90 = np.quantile(size, [0.1, 0.9], method="inverted_cdf")
    return {
        "num_val": promise.num_val,
        "n": n,
        "threshold": promise.threshold,
        "coverage": count / n,
        "low": float(interval.low),
        "high": float(interval.high),
        "expected_low": low,
        "expected_high": high,
        "verdict": verdict,
        "size": float(size.mean()),
        "size_p10": float(p10),
        "size_p90": float(p90),
        "empty": float((size == 0).mean()),
    }


def _small_groups(found: list[dict[str, Any]]) -> list[str]:
    """One warning for each group and level whose threshold is infinite."""
    whole = {(row["group"], row["level"]): row["num_val"] for row in found if row["threshold"] == math.inf}
    return [
        f"{who} has {num_val} validation rows, at least {_fewest(level)} are needed for level {level}: with its own "
        "threshold everything is covered."
        for (group, level), num_val in whole.items()
        for who in ["The whole" if group == "all" else f"Group '{group}'"]
    ]


def _fewest(level: float) -> int:
    """The least n with ⌈(n + 1) · level⌉ ≤ n."""
    return math.ceil(level / (1 - level) - 1e-9)


def _verdict(found: list[dict[str, Any]], unit: str) -> tuple[str, Level]:
    judged = [row for row in found if row["verdict"] != "not judged"]
    outside = [row for row in judged if row["verdict"] != "as expected"]
    overall = [row for row in found if row["threshold_from"] == "all rows" and row["group"] == "all"]
    top = max(row["level"] for row in overall)
    figures = ", ".join(
        f"{row['method']} {row['coverage']:.3f} with {row['size']:.3g} {unit}"
        for row in overall
        if row["level"] == top
    )
    text = (
        f"At level {top} the coverage of {overall[0]['n']} test rows and the mean size are: {figures}. "
        f"{len(judged) - len(outside)} of {len(judged)} coverages lie in the range that holds for {EXPECTED:.0%} of "
        "draws of exchangeable rows"
    )
    # Methods share rows, so that this bound on how many are outside by chance is a rough one.
    chance = stats.binom.ppf(0.99, len(judged), 1 - EXPECTED)
    if len(outside) <= chance and all(row["verdict"] == "as expected" for row in overall):
        return f"{text}; the few outside can be chance." if outside else f"{text}.", "good"
    worst = max(outside, key=lambda row: abs(row["coverage"] - row["level"]))
    where = "" if worst["group"] == "all" else f" in group '{worst['group']}'"
    return (
        f"{text}; {worst['method']}{where} at level {worst['level']} is {worst['verdict']} with "
        f"{worst['coverage']:.3f}, so that validation and test rows do not look alike.",
        "warn",
    )
