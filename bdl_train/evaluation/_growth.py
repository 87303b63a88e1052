"""Values over the severity of a shift, and whether uncertainty grows where the error does.

Shape letters: N rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bdl_train.evaluation import functionals as f
from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.metrics import NUM_BINS, inside
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level

UNCERTAINTY_TOLERANCE = 0.01
"""Uncertainty counts as grown when it is above the clean one by more than this share of it."""
YES, NO, EXEMPT, UNDEFINED, FLAT = "yes", "no", "exempt", "undefined", "error does not grow"

Found = tuple[float, float, float]
"""A value and the edges of its interval."""


Scored = tuple[RowScores, np.ndarray | None]
"""Scored rows, and the clean row `[N]` that each of them is; None = they are the clean rows, in their order."""


@dataclass(frozen=True)
class Measures:
    """Keys of `metrics_of`, and when the error has grown: by more than absolute + relative · clean."""

    shown: tuple[str, ...]
    quality: str
    sign: int  # of the error, which is sign · quality up to a constant
    total: str
    epistemic: str
    absolute: float
    relative: float
    statistic: Callable[[RowScores], f.Statistic]  # the values of `shown`, `[R, n]`

    @classmethod
    def of(cls, rows: RowScores) -> "Measures":
        if rows.probs is None:
            shown = ("nll", "rmse", "coverage_95", "total_std", "epistemic_std")
            return cls(shown, "rmse", 1, "total_std", "epistemic_std", 0.0, 0.02, _of_numbers)
        shown = ("nll", "accuracy", "ece", "entropy", "mutual_information")
        return cls(shown, "accuracy", -1, "entropy", "mutual_information", 0.01, 0.0, _of_classes)


def _of_classes(rows: RowScores) -> f.Statistic:
    c = rows.columns
    means = f.means_of([c[name] for name in ("nll", "correct", "total", "epistemic")])
    bins = f.equal_width_bins(c["confidence"], NUM_BINS)
    gap = f.binned_gap(c["confidence"], c["correct"], bins, NUM_BINS)
    return lambda counts: np.insert(means(counts), 2, gap(counts)[:, 0], axis=1)


def _of_numbers(rows: RowScores) -> f.Statistic:
    c = rows.columns
    means = f.means_of(
        [c["nll"], np.square(c["error"]), inside(rows, 0.95), c["total_std"], c["epistemic_std"]]
    )

    def statistic(counts: np.ndarray) -> np.ndarray:
        found = means(counts)
        found[:, 1] = np.sqrt(found[:, 1])
        return found

    return statistic


@dataclass(frozen=True)
class Curve:
    """One kind of shift, the clean rows first.

    Attributes:
        kind: Its name.
        seen_in_inputs: False for wrong labels: uncertainty cannot and must not follow them.
        severities: 0 for the clean rows, then rising.
        values: By measure, at each severity.
        changes: The same minus the clean value, with paired intervals.
    """

    kind: str
    seen_in_inputs: bool
    severities: tuple[float, ...]
    values: list[dict[str, Found]]
    changes: list[dict[str, Found]]


def measured(
    clean: RowScores, levels: Sequence[Scored], measures: Measures, seed: int
) -> tuple[list[dict[str, Found]], list[dict[str, Found]]]:
    """Values of the clean rows and of each level, and their changes from the clean ones, from the same resamples.

    Args:
        clean: `[N]` scored rows.
        levels: Shifted rows, N each.
        measures: What to measure.
        seed: Of the resamples.
    """
    parts = [measures.statistic(clean)]
    parts += [_by_source(measures.statistic(rows), source) for rows, source in levels]

    def statistic(counts: np.ndarray) -> np.ndarray:
        values = np.stack([part(counts) for part in parts], axis=1)
        return np.stack([values, values - values[:, :1]], axis=1)

    low, high = bootstrap_intervals({"all": statistic}, len(clean), seed=seed)["all"]
    value = statistic(np.ones((len(clean), 1)).T)[0]
    # [values and changes, levels, measures, value and edges]
    found = np.stack([value, low, high], axis=-1).tolist()
    values, changes = (
        [dict(zip(measures.shown, map(tuple, level), strict=True)) for level in kind] for kind in found
    )
    return values, changes


def _by_source(statistic: f.Statistic, source: np.ndarray | None) -> f.Statistic:
    """A statistic of drawn rows as a function of counts of the clean ones: a row drawn twice comes and goes as one."""
    if source is None:
        return statistic

    def of_clean(counts: np.ndarray) -> np.ndarray:
        # A resample without any of the drawn rows leaves it undefined.
        with np.errstate(invalid="ignore", divide="ignore"):
            return statistic(counts.T[source].T)

    return of_clean


def curves_table(curves: Sequence[Curve], count: int) -> pd.DataFrame:
    """kind, severity, metric, value, low, high, n."""
    rows = [
        (curve.kind, severity, metric, *found, count)
        for curve in curves
        for severity, values in zip(curve.severities, curve.values, strict=True)
        for metric, found in values.items()
    ]
    return pd.DataFrame(rows, columns=["kind", "severity", "metric", "value", "low", "high", "n"])


def growth_table(curves: Sequence[Curve], measures: Measures) -> pd.DataFrame:
    """A row a kind.

    The error (1 − accuracy, or RMSE) has grown at a severity if the paired interval of its change lies above 0 and the
    change is above the tolerance: 0.01 of accuracy, or 2 % of the clean RMSE. Uncertainty (mean predictive entropy, or
    mean predictive standard deviation) has grown if the same holds with a tolerance of 1 % of the clean one.

    Columns: kind; uncertainty_rank, epistemic_rank, error_rank (Spearman correlation with severity, clean included);
    agreement (Spearman correlation of uncertainty and error); error_change, uncertainty_change, epistemic_change, each
    with _low and _high, from clean to the strongest severity; breaks_at (the mildest severity whose error has grown,
    NaN if none); as_it_should: `yes` if uncertainty has grown at every severity whose error has, `no` if not, `error
    does not grow`, `exempt` for label noise, which inputs do not show, `undefined` if a value or an edge of its
    change is not finite.
    """
    columns = ["kind", "uncertainty_rank", "epistemic_rank", "error_rank", "agreement"]
    columns += [
        f"{name}_change{edge}"
        for name in ("error", "uncertainty", "epistemic")
        for edge in ("", "_low", "_high")
    ]
    columns += ["breaks_at", "as_it_should"]
    return pd.DataFrame([_growth_row(curve, measures) for curve in curves], columns=columns)


def _growth_row(curve: Curve, measures: Measures) -> tuple[object, ...]:
    total = [values[measures.total][0] for values in curve.values]
    epistemic = [values[measures.epistemic][0] for values in curve.values]
    error = [measures.sign * values[measures.quality][0] for values in curve.values]
    margin = measures.absolute + measures.relative * abs(error[0])
    broken = [_error_change(changes, measures) for changes in curve.changes]
    wrong = [low > 0 and change > margin for change, low, _ in broken]
    room = UNCERTAINTY_TOLERANCE * total[0]
    wary = [low > 0 and change > room for change, low, _ in (one[measures.total] for one in curve.changes)]
    edges = [one[key][1] for one in curve.changes for key in (measures.quality, measures.total)]
    if not np.isfinite([*total, *error, *edges]).all():
        answer = UNDEFINED
    elif not curve.seen_in_inputs:
        answer = EXEMPT
    elif not any(wrong):
        answer = FLAT
    else:
        answer = YES if all(sure for sure, is_wrong in zip(wary, wrong, strict=True) if is_wrong) else NO
    last = curve.changes[-1]
    return (
        curve.kind,
        _rank(curve.severities, total),
        _rank(curve.severities, epistemic),
        _rank(curve.severities, error),
        _rank(total, error),
        *broken[-1],
        *last[measures.total],
        *last[measures.epistemic],
        next((s for s, is_wrong in zip(curve.severities, wrong, strict=True) if is_wrong), np.nan),
        answer,
    )


def _error_change(changes: Mapping[str, Found], measures: Measures) -> Found:
    value, low, high = changes[measures.quality]
    return (value, low, high) if measures.sign > 0 else (-value, -high, -low)


def _rank(one: tuple[float, ...] | list[float], other: tuple[float, ...] | list[float]) -> float:
    """Spearman's correlation; NaN if one of them does not change."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(one), rankdata(other)])
    if not np.isfinite([one, other]).all() or (np.ptp(ranks, axis=1) == 0).any():
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])


def verdict_of(growth: pd.DataFrame, curves: Sequence[Curve], measures: Measures) -> tuple[str, Level]:
    """In words: for how many kinds uncertainty grows as it should, which do not, and where quality breaks first."""
    answers: dict[str, list[str]] = {}
    for kind, answer in zip(growth["kind"], growth["as_it_should"], strict=True):
        answers.setdefault(answer, []).append(kind)
    good, bad, undefined = (answers.get(answer, []) for answer in (YES, NO, UNDEFINED))
    quality, uncertainty = _WORDS[measures.quality], _WORDS[measures.total]
    asked, broken = len(good) + len(bad) + len(answers.get(FLAT, [])), len(good) + len(bad)
    found = []
    if undefined:
        found.append(f"Some values are not finite under {_listed(undefined)}.")
    if growth.empty:
        found.append("No kind of shift with severities was asked for.")
    elif broken == 0:
        found.append(f"None of {asked} kinds of shift makes {quality} worse, so no uncertainty has to grow.")
    else:
        also = f", not under {_listed(bad)}" if bad else ""
        found.append(
            f"{quality[0].upper()}{quality[1:]} gets worse under {broken} of {asked} kinds of shift; {uncertainty} "
            f"grows as it should under {len(good)} of those {broken}{also}."
        )
        found.append(_first_break(growth, curves, measures))
    return " ".join(found), "warn" if bad or undefined else ("good" if good else "note")


_WORDS = {
    "accuracy": "accuracy", "rmse": "RMSE",
    "entropy": "predictive entropy", "total_std": "the predictive standard deviation",
}  # fmt: skip


def _first_break(growth: pd.DataFrame, curves: Sequence[Curve], measures: Measures) -> str:
    """Of the kinds that break at their mildest severities, the one that breaks most there."""
    places = []
    for curve, at in zip(curves, growth["breaks_at"], strict=True):
        if curve.seen_in_inputs and np.isfinite(at):
            step = curve.severities.index(at)
            places.append((step, -_error_change(curve.changes[step], measures)[0], curve))
    step, _, curve = min(places, key=lambda place: place[:2])
    before, after = (curve.values[i][measures.quality][0] for i in (0, step))
    return (
        f"It breaks first under {curve.kind}, at severity {curve.severities[step]:g}: {_WORDS[measures.quality]} "
        f"{before:.3g} to {after:.3g}."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
