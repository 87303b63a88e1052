"""Leaving rows to a human: what is gained when the most uncertain rows are deferred, and which action costs least.

A row is kept if its uncertainty is below a threshold, else deferred. Shape letters: N rows, G distinct levels of
uncertainty, Q thresholds, K classes, A actions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError, unknown_choice
from bdl_train.evaluation.bootstrap import LEVEL, bootstrap_intervals, percentiles, resamples_for
from bdl_train.evaluation.functionals import mean_of, selective
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section

KEY, TITLE = "deferral", "Deferral"
COSTS_KEY, COSTS_TITLE = "costs", "Costs of decisions"
NUM_POINTS = 100
"""Coverages of the written curve."""
NUM_THRESHOLDS = 20
"""Coverages that a guaranteed threshold is chosen from: 5 %, 10 %, ..., 100 % of the validation rows."""
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
class Policy:
    """Which rows are kept: those with an uncertainty below `threshold`.

    Attributes:
        threshold: inf keeps every row; NaN keeps none, because no threshold reaches the target.
        coverage: Share of the validation rows that is kept, or would be where the mean loss is lowest.
        mean_loss: Of the kept validation rows, or its upper bound; the lowest there is if none reaches the target.
    """

    threshold: float
    coverage: float
    mean_loss: float

    def keeps(self, uncertainty: np.ndarray) -> np.ndarray:
        return uncertainty < self.threshold


def binomial_interval(successes: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Central interval of a share (Clopper & Pearson 1934): covers it with at least `level`, whatever it is."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, count - successes + 1))
    high = 1.0 if successes == count else float(beta.ppf(1 - tail, successes + 1, count - successes))
    return low, high


def risk_coverage(uncertainty: np.ndarray, loss: np.ndarray) -> pd.DataFrame:
    """Mean loss of the n least uncertain rows, for n = 1..N.

    Rows of equal uncertainty are taken in expectation over their order.

    Source:
        Geifman & El-Yaniv (2017), arXiv:1705.08500, Section 2.

    Args:
        uncertainty, loss: `[N]`, finite.

    Returns:
        `coverage` n/N, `risk` (the mean loss), `threshold` (the largest uncertainty among the n).
    """
    _, width, losses = _levels(uncertainty, loss)
    count = len(uncertainty)
    kept = np.arange(1, count + 1)
    risk = _mean_of_first(kept, width, losses)
    return pd.DataFrame({"coverage": kept / count, "risk": risk, "threshold": np.sort(uncertainty)})


def _levels(uncertainty: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct uncertainties `[G]`, ascending, the number of rows at each and the sum of their losses."""
    levels, place = np.unique(uncertainty, return_inverse=True)
    return levels, np.bincount(place), np.bincount(place, weights=loss)


def _mean_of_first(kept: np.ndarray, width: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Mean loss of the first `kept` rows: a level that is cut gives its share of losses."""
    ends, sums = np.append(0, np.cumsum(width)), np.append(0.0, np.cumsum(losses))
    return np.interp(kept, ends, sums) / kept


def empirical_policy(uncertainty: np.ndarray, loss: np.ndarray, most: float) -> Policy:
    """The threshold that keeps most rows while the mean loss of these very rows is at most `most`.

    On other rows the mean loss is above the target about as often as below it: see `guaranteed_policy`.
    """
    levels, width, losses = _levels(uncertainty, loss)
    kept = np.cumsum(width)
    return _largest(np.append(levels[1:], np.inf), kept, np.cumsum(losses) / kept, most)


def guaranteed_policy(uncertainty: np.ndarray, wrong: np.ndarray, most: float, delta: float) -> Policy:
    """A threshold whose error rate on kept rows is at most `most`, except with probability `delta` over these rows.

    For Q coverages fixed beforehand, the threshold is the uncertainty of the first row that is not kept: given it, the
    rows below it are independent draws of kept rows and their errors binomial, so the upper Clopper-Pearson bound at
    δ/Q holds, and all Q bounds hold together with probability 1 − δ. The largest coverage with a bound of at most
    `most` is chosen. Only that rows are independent and of one kind is assumed.

    Source:
        Geifman & El-Yaniv (2017), arXiv:1705.08500, Section 3. They bisect over thresholds with δ/log₂N; there the
        threshold tried next depends on the errors seen before, here none does.

    Args:
        uncertainty: `[N]` of validation rows that were not trained on.
        wrong: `[N]` in {0, 1}.
        most: The error rate allowed.
        delta: Probability that the guarantee fails.
    """
    from scipy.stats import beta

    count = len(uncertainty)
    order = np.argsort(uncertainty, kind="stable")
    ranked = np.append(uncertainty[order], np.inf)
    edges = np.unique(ranked[-(-count * np.arange(1, NUM_THRESHOLDS + 1) // NUM_THRESHOLDS)])
    kept = np.searchsorted(ranked[:-1], edges)
    edges, kept = edges[kept > 0], kept[kept > 0]
    errors = np.cumsum(wrong[order])[kept - 1]
    bound = np.ones(len(kept))
    some = errors < kept
    bound[some] = beta.ppf(1 - delta / NUM_THRESHOLDS, errors[some] + 1, (kept - errors)[some])
    return _largest(edges, kept, bound, most)


def _largest(edges: np.ndarray, kept: np.ndarray, mean_loss: np.ndarray, most: float) -> Policy:
    reached = np.flatnonzero(mean_loss <= most)
    best = reached[-1] if len(reached) else int(mean_loss.argmin())
    threshold = float(edges[best]) if len(reached) else math.nan
    return Policy(threshold, float(kept[best] / kept[-1]), float(mean_loss[best]))


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
        f"Slice {one['slice']}: its kept rows have a {risk.words} of {risk.say(one['risk_kept'], unit)} "
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
        drawn.append(_mean_of_first(kept, width, losses))
    low, high = percentiles(np.stack(drawn))
    _, width, losses = _levels(rows.uncertainty, rows.loss)
    ideal = np.cumsum(np.sort(rows.loss))[kept - 1] / kept
    values = {"risk": _mean_of_first(kept, width, losses), "ideal": ideal, "low": low, "high": high}
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
            f"{text}. The target is missed: are the test rows of another kind than the validation rows?",
            "warn",
        )
    if row["risk_kept"] > target:
        return f"{text}. That is above the target, by no more than chance allows.", "note"
    if row["high"] > target:
        return f"{text}. The target is met on these rows, but the interval reaches above it.", "note"
    return f"{text}. The target is met.", "good"


def cost_section(
    test: RowScores,
    *,
    matrix: Sequence[Sequence[float]],
    classes: Sequence[str],
    actions: Sequence[str],
    seed: int,
) -> Section:
    """What decisions cost if each row gets the action of least expected cost under its predictive.

    The action is argmin_a Σ_k p(k) · cost[k, a]; of equal ones the first. Compared with, on the same rows:
    `argmax` (the cheapest action if the likeliest class were the true one), `majority` (always the cheapest action for
    the most frequent class), `best_constant` (always the one action that is cheapest on these rows, known only
    afterwards), `oracle` (the true class is known).

    Source:
        Elkan (2001), The foundations of cost-sensitive learning, equation 1; a deferring action has one flat cost
        (Chow 1970).

    Args:
        test: Rows of a classification.
        matrix: `[K, A]`, the cost of each action if the true class is that of the row, in any one unit.
        classes: Names of the K classes.
        actions: Names of the A actions.
        seed: Of the intervals.

    Returns:
        Tables `actions` (action, n, share, expected_cost, mean_cost, share_argmax: of rows that get it) and `summary`
        (policy, n, mean_cost, low, high, expected_cost, saving, saving_low, saving_high: against `least_expected`).

    Raises:
        UsageError: a wrong shape, a cost that is negative or not a number, no classes.
    """
    cost = _cost_matrix(test, matrix, classes, actions)
    assert test.probs is not None
    finite = np.isfinite(test.probs).all(1)
    if not finite.any():
        raise UsageError("cost needs rows with finite probabilities, this part has none.")
    warnings = (
        () if finite.all() else (f"{int((~finite).sum())} rows without finite probabilities are left out.",)
    )
    probs, y = test.probs[finite].astype(np.float64), test.columns["y"][finite].astype(int)
    expected, cheapest = probs @ cost, cost.argmin(1)
    majority = int(np.bincount(y, minlength=len(cost)).argmax())
    taken = {
        "least_expected": expected.argmin(1),
        "argmax": cheapest[probs.argmax(1)],
        "majority": np.full(len(y), cheapest[majority]),
        "best_constant": np.full(len(y), cost[y].mean(0).argmin()),
        "oracle": cheapest[y],
    }
    paid = {name: cost[y, action] for name, action in taken.items()}
    summary = _cost_summary(
        paid, {name: expected[np.arange(len(y)), one] for name, one in taken.items()}, seed
    )
    chosen = taken["least_expected"]
    shares = pd.DataFrame(
        [
            {
                "action": name,
                "n": int((chosen == a).sum()),
                "share": float((chosen == a).mean()),
                "expected_cost": _mean(expected[chosen == a, a]),
                "mean_cost": _mean(cost[y, a][chosen == a]),
                "share_argmax": float((taken["argmax"] == a).mean()),
            }
            for a, name in enumerate(actions)
        ]
    )
    verdict, level = _cost_verdict(summary.set_index("policy"))
    return Section(COSTS_KEY, COSTS_TITLE, verdict, level, {"actions": shares, "summary": summary}, warnings)


def _cost_matrix(
    test: RowScores, matrix: Sequence[Sequence[float]], classes: Sequence[str], actions: Sequence[str]
) -> np.ndarray:
    if test.probs is None:
        raise UsageError("cost is a matrix over classes, and this run's target is a number: remove `cost`.")
    shape = f"{len(classes)} rows (the true class: {', '.join(classes)}) of {len(actions)} costs ({', '.join(actions)})"
    if len(set(actions)) < len(actions) or not actions:
        raise UsageError(f"cost needs actions with different names, got: {', '.join(actions) or 'none'}.")
    given = list(matrix) if isinstance(matrix, Sequence | np.ndarray) else []
    lengths = [len(row) if isinstance(row, Sequence | np.ndarray) else 1 for row in given]
    if lengths != [len(actions)] * len(classes) or len(classes) != test.probs.shape[1]:
        raise UsageError(
            f"cost must have {shape}, got rows of {lengths} costs; there are {test.probs.shape[1]} classes."
        )
    try:
        cost = np.asarray(matrix, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cost must hold numbers only: {error}.") from error
    wrong = ~(np.isfinite(cost) & (cost >= 0))
    if wrong.any():
        k, a = np.argwhere(wrong)[0]
        raise UsageError(
            f"cost must hold finite numbers of 0 or more, got {cost[k, a]} for the class {classes[k]} and the action "
            f"{actions[a]}: to reward an action, add a constant to the row."
        )
    return cost


def _cost_summary(
    paid: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], seed: int
) -> pd.DataFrame:
    own = paid["least_expected"]
    statistics = {name: mean_of(cost) for name, cost in paid.items()}
    statistics |= {f"{name} saving": mean_of(cost - own) for name, cost in paid.items()}
    edges = bootstrap_intervals(statistics, len(own), seed=seed)
    return pd.DataFrame(
        [
            {
                "policy": name,
                "n": len(cost),
                "mean_cost": _mean(cost),
                "low": edges[name][0],
                "high": edges[name][1],
                "expected_cost": _mean(expected[name]),
                "saving": _mean(cost - own),
                "saving_low": edges[f"{name} saving"][0],
                "saving_high": edges[f"{name} saving"][1],
            }
            for name, cost in paid.items()
        ]
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _cost_verdict(summary: pd.DataFrame) -> tuple[str, Level]:
    own, argmax, constant = (summary.loc[name] for name in ("least_expected", "argmax", "best_constant"))
    text = (
        f"The action of least expected cost costs {own['mean_cost']:.4g} a row ({own['low']:.4g} to {own['high']:.4g}; "
        f"the model expected {own['expected_cost']:.4g}). It saves {argmax['saving']:.4g} ({argmax['saving_low']:.4g} "
        f"to {argmax['saving_high']:.4g}) against acting on the likeliest class, and {constant['saving']:.4g} "
        f"({constant['saving_low']:.4g} to {constant['saving_high']:.4g}) against always taking the best single action."
    )
    if argmax["saving_high"] < 0 or constant["saving_high"] < 0:
        return f"{text} A simpler rule is cheaper: are the probabilities calibrated?", "warn"
    if argmax["saving_low"] > 0 and constant["saving_low"] > 0:
        return text, "good"
    return text, "note"
