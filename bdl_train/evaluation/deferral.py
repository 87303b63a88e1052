"""Leaving rows to a human: what is gained when the most uncertain rows are deferred.

Shape letters: N rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError, unknown_choice
from bdl_train.evaluation.bootstrap import bootstrap_intervals, percentiles, resamples_for
from bdl_train.evaluation.functionals import mean_of, selective
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section
from bdl_train.evaluation.selection import (
    Policy,
    binomial_interval,
    empirical_policy,
    guaranteed_policy,
    levels_of,
    mean_of_first,
)

KEY, TITLE = "deferral", "Deferral"
NUM_POINTS = 100
"""Coverages of the written curve."""
USUAL_RISK = 0.05
"""The error rate at which a coverage is told when there is no target."""


class Slice(Protocol):
    """A named part of the rows; `mask` is `[N]`."""

    @property
    def name(self) -> str: ...

    @property
    def mask(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Risk:
    """What is to stay small: a loss per row, and the risk that a mean of losses stands for.

    Attributes:
        words, losses: The risk and what it is a mean of, for people.
        column: Of `RowScores`, from which `loss` comes.
        loss: From the column `[N]` to losses `[N]`.
        of_mean, to_mean: From a mean loss to the risk, and back; both increase.
        is_rate: Whether losses are 0 or 1.
    """

    words: str
    losses: str
    column: str
    loss: Callable[[np.ndarray], np.ndarray]
    of_mean: Callable[[Any], Any]
    to_mean: Callable[[float], float]
    is_rate: bool = False

    def say(self, value: float, unit: str) -> str:
        return f"{100 * value:.2f} %" if self.is_rate else f"{value:.4g} {unit}".rstrip()

    def interval(self, losses: np.ndarray, seed: int) -> tuple[float, float]:
        """95 % interval of the risk of these rows: exact for a rate, else over resampled rows; NaN without rows."""
        if len(losses) == 0:
            return math.nan, math.nan
        if self.is_rate:
            return binomial_interval(int(losses.sum()), len(losses))
        low, high = bootstrap_intervals({"mean": mean_of(losses)}, len(losses), seed=seed)["mean"]
        return float(self.of_mean(low)), float(self.of_mean(high))


RISKS = {
    "risk": Risk(
        "error rate",
        "shares of errors",
        "correct",
        lambda correct: 1 - correct,
        np.asarray,
        float,
        is_rate=True,
    ),
    "mae": Risk("mean absolute error", "absolute errors", "error", np.abs, np.asarray, float),
    "rmse": Risk("root mean squared error", "squared errors", "error", np.square, np.sqrt, np.square),
}
_CLASS_UNCERTAINTY: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "total": lambda c: c["total"],
    "epistemic": lambda c: c["epistemic"],
    "confidence": lambda c: 1 - c["confidence"],
}
_NUMBER_UNCERTAINTY: Mapping[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {
    "total": lambda c: c["total_std"],
    "epistemic": lambda c: c["epistemic_std"],
}


@dataclass(frozen=True)
class _Rows:
    """Uncertainty and loss `[N]` of the rows where both are finite; `finite` says which of all rows these are."""

    uncertainty: np.ndarray
    loss: np.ndarray
    finite: np.ndarray

    @classmethod
    def of(cls, rows: RowScores, metric: str, by: str, where: str, warnings: list[str]) -> "_Rows":
        known = _NUMBER_UNCERTAINTY if rows.probs is None else _CLASS_UNCERTAINTY
        if by not in known:
            raise UsageError(unknown_choice("defer.by", by, known))
        uncertainty = np.asarray(known[by](rows.columns), np.float64)
        loss = np.asarray(RISKS[metric].loss(rows.columns[RISKS[metric].column]), np.float64)
        finite = np.isfinite(uncertainty) & np.isfinite(loss)
        if not finite.any():
            raise UsageError(
                f"Deferral needs {where} rows with a finite uncertainty and loss, this part has none."
            )
        if not finite.all():
            warnings.append(
                f"{int((~finite).sum())} of {len(finite)} {where} rows are left out: uncertainty or loss is not finite."
            )
        return cls(uncertainty[finite], loss[finite], finite)


def deferral_section(
    val: RowScores | None,
    test: RowScores,
    *,
    metric: str,
    target_risk: float | None,
    by: str,
    confidence: float | None,
    slices: Sequence[Slice],
    unit: str,
    seed: int,
) -> Section:
    """The risk-coverage curve of the test rows, and what a policy chosen on validation rows does to them.

    The verdict without a target compares the area under the curve with that of a perfect ordering of the same losses
    (excess area, Geifman et al. 2019, arXiv:1805.08206, Section 4) and of a random one.

    Args:
        val: Rows to choose the threshold on; needed with a target only.
        test: Other rows, to report on.
        metric: Of `RISKS`: `risk` (error rate) for classes, `rmse` or `mae` for numbers.
        target_risk: The risk that kept rows may have; None = no policy, only the curve.
        by: `total`, `epistemic` or, for classes, `confidence`: what rows are ordered by.
        confidence: Probability with which the guarantee shall hold, for classes; None = the empirical choice.
        slices: Parts of the test rows to report on too.
        unit: Of a numeric target.
        seed: Of the intervals.

    Returns:
        Tables `curve` (coverage, risk, ideal, low, high) and, with a target, `policy` (slice, n, share_deferred,
        risk_kept, low, high, risk_deferred, target, threshold).

    Raises:
        UsageError: a setting of `defer` is unknown, out of range or does not fit the target.
    """
    _check(val, test, metric, target_risk, confidence)
    risk, warnings = RISKS[metric], []
    rows = _Rows.of(test, metric, by, "test", warnings)
    tables = {"curve": _curve(rows, risk, seed)}
    if target_risk is None:
        verdict, level = _ordering_verdict(rows, risk, by, seed)
        return Section(KEY, TITLE, verdict, level, tables, tuple(warnings))
    assert val is not None
    chosen_on = _Rows.of(val, metric, by, "validation", warnings)
    most = float(risk.to_mean(target_risk))
    if confidence is None:
        policy = empirical_policy(chosen_on.uncertainty, chosen_on.loss, most)
    else:
        policy = guaranteed_policy(chosen_on.uncertainty, chosen_on.loss, most, 1 - confidence)
    parts = {"all": np.ones(len(rows.loss), bool)} | {one.name: one.mask[rows.finite] for one in slices}
    found = [_policy_row(name, rows, mask, policy, risk, target_risk, seed) for name, mask in parts.items()]
    warnings += [
        f"Slice {one['slice']}: the {risk.words} of its kept rows is {risk.say(one['risk_kept'], unit)} "
        f"({risk.say(one['low'], unit)} to {risk.say(one['high'], unit)}), above the target."
        for one in found[1:]
        if one["low"] > target_risk
    ]
    verdict, level = _policy_verdict(found[0], policy, risk, confidence, by, unit, len(chosen_on.loss))
    return Section(KEY, TITLE, verdict, level, {**tables, "policy": pd.DataFrame(found)}, tuple(warnings))


def _check(
    val: RowScores | None, test: RowScores, metric: str, target_risk: float | None, confidence: float | None
) -> None:
    if metric not in RISKS:
        raise UsageError(unknown_choice("defer.metric", metric, RISKS))
    if RISKS[metric].column not in test.columns:
        fitting = [name for name, one in RISKS.items() if one.column in test.columns]
        raise UsageError(f"defer.metric={metric} does not fit this target: use {' or '.join(fitting)}.")
    if target_risk is None:
        return
    highest = 1.0 if RISKS[metric].is_rate else math.inf
    if not 0 < target_risk < highest:
        raise UsageError(f"defer.target must lie between 0 and {highest:g} for {metric}, got {target_risk}.")
    if confidence is not None and not 0 < confidence < 1:
        raise UsageError(f"defer.confidence must lie between 0 and 1, or be null, got {confidence}.")
    if confidence is not None and not RISKS[metric].is_rate:
        raise UsageError(
            f"defer.confidence={confidence} asks for a guarantee, which exists for error rates only: set it to null "
            f"for {metric}."
        )
    if val is None or len(val) == 0:
        raise UsageError(
            "defer.target needs validation rows to choose a threshold on: set data.val_fraction above 0."
        )


def _curve(rows: _Rows, risk: Risk, seed: int) -> pd.DataFrame:
    count = len(rows.loss)
    kept = np.unique(-(-count * np.arange(1, NUM_POINTS + 1) // NUM_POINTS))
    _, place = np.unique(rows.uncertainty, return_inverse=True)
    num_levels = int(place.max()) + 1
    random, drawn = np.random.default_rng(seed), []
    for _ in range(resamples_for(count)):
        picked = random.integers(count, size=count)
        width = np.bincount(place[picked], minlength=num_levels)
        losses = np.bincount(place[picked], weights=rows.loss[picked], minlength=num_levels)
        drawn.append(mean_of_first(kept, width, losses))
    low, high = percentiles(np.stack(drawn))
    _, width, losses = levels_of(rows.uncertainty, rows.loss)
    ideal = np.cumsum(np.sort(rows.loss))[kept - 1] / kept
    values = {"risk": mean_of_first(kept, width, losses), "ideal": ideal, "low": low, "high": high}
    return pd.DataFrame(
        {"coverage": kept / count} | {name: risk.of_mean(one) for name, one in values.items()}
    )


def _ordering_verdict(rows: _Rows, risk: Risk, by: str, seed: int) -> tuple[str, Level]:
    statistic, count = selective(rows.uncertainty, rows.loss, USUAL_RISK), len(rows.loss)
    area, excess, coverage = statistic(np.ones((1, count)))[0]
    low, high = bootstrap_intervals({"all": statistic}, count, seed=seed)["all"]
    unordered = float(rows.loss.mean())
    text = (
        f"With the most uncertain rows (by {by}) deferred first, the area under the risk-coverage curve, in "
        f"{risk.losses}, is {area:.4g} ({low[0]:.4g} to {high[0]:.4g}); a perfect order of the same losses has "
        f"{area - excess:.4g} (excess {excess:.4g}, {low[1]:.4g} to {high[1]:.4g}), a random one {unordered:.4g}."
    )
    if risk.is_rate:
        text += (
            f" {100 * coverage:.1f} % of rows ({100 * low[2]:.1f} to {100 * high[2]:.1f} %) can be kept at an error "
            f"rate of {100 * USUAL_RISK:g} % or less."
        )
    if unordered > 0 and area >= unordered:
        return f"{text} This uncertainty does not tell which rows go wrong.", "warn"
    return text, "note"


def _policy_row(
    name: str, rows: _Rows, mask: np.ndarray, policy: Policy, risk: Risk, target: float, seed: int
) -> dict[str, Any]:
    kept = policy.keeps(rows.uncertainty) & mask
    deferred = ~kept & mask
    low, high = risk.interval(rows.loss[kept], seed)
    return {
        "slice": name,
        "n": int(mask.sum()),
        "share_deferred": float(deferred.sum() / mask.sum()) if mask.any() else math.nan,
        "risk_kept": float(risk.of_mean(rows.loss[kept].mean())) if kept.any() else math.nan,
        "low": low,
        "high": high,
        "risk_deferred": float(risk.of_mean(rows.loss[deferred].mean())) if deferred.any() else math.nan,
        "target": target,
        "threshold": policy.threshold,
    }


def _policy_verdict(
    row: Mapping[str, Any],
    policy: Policy,
    risk: Risk,
    confidence: float | None,
    by: str,
    unit: str,
    num_val: int,
) -> tuple[str, Level]:
    def say(value: float) -> str:
        return risk.say(value, unit)

    target = float(row["target"])
    if math.isnan(policy.threshold):
        what = risk.words if confidence is None else f"{100 * confidence:g} % upper bound of the {risk.words}"
        return (
            f"No threshold on {by} reaches a {risk.words} of {say(target)}: the lowest {what} on {num_val} validation "
            f"rows is {say(float(risk.of_mean(policy.mean_loss)))}, with {100 * policy.coverage:.1f} % of rows kept. "
            "Raise defer.target or get more validation rows; as it is, every row is deferred."
        ), "warn"
    how = "" if confidence is None else f", guaranteed with {100 * confidence:g} %"
    text = f"To keep the {risk.words} at {say(target)}{how}, {100 * row['share_deferred']:.1f} % of test rows are "
    text += "deferred"
    if math.isnan(row["risk_kept"]):
        return f"{text}: none is kept.", "warn"
    text += f"; those kept have {say(row['risk_kept'])} ({say(row['low'])} to {say(row['high'])})"
    if not math.isnan(row["risk_deferred"]):
        text += f", those deferred {say(row['risk_deferred'])}"
    if row["low"] > target:
        return (
            f"{text}. The target is missed: the validation rows met it, but they are too few to promise it, or the "
            "test rows are of another kind. defer.confidence=0.95 chooses a threshold that can be relied on.",
            "warn",
        )
    if row["risk_kept"] > target:
        return f"{text}. That is above the target, by no more than chance allows.", "note"
    if row["high"] > target:
        return f"{text}. The target is met on these rows, but the interval reaches above it.", "note"
    return f"{text}. The target is met.", "good"
