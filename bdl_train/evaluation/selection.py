"""Which rows to leave to a human: the curve of risk over coverage, and thresholds chosen on validation rows.

A row is kept if its uncertainty is below a threshold, else deferred. Shape letters: N rows, G distinct levels of
uncertainty, Q thresholds.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from bdl_train.evaluation.bootstrap import LEVEL

NUM_THRESHOLDS = 20
"""Coverages that a guaranteed threshold is chosen from: 5 %, 10 %, ..., 100 % of the validation rows."""


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
    _, width, losses = levels_of(uncertainty, loss)
    count = len(uncertainty)
    kept = np.arange(1, count + 1)
    risk = mean_of_first(kept, width, losses)
    return pd.DataFrame({"coverage": kept / count, "risk": risk, "threshold": np.sort(uncertainty)})


def levels_of(uncertainty: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct uncertainties `[G]`, ascending, the number of rows at each and the sum of their losses."""
    levels, place = np.unique(uncertainty, return_inverse=True)
    return levels, np.bincount(place), np.bincount(place, weights=loss)


def mean_of_first(kept: np.ndarray, width: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Mean loss of the first `kept` rows: a level that is cut gives its share of losses."""
    ends, sums = np.append(0, np.cumsum(width)), np.append(0.0, np.cumsum(losses))
    return np.interp(kept, ends, sums) / kept


def empirical_policy(uncertainty: np.ndarray, loss: np.ndarray, most: float) -> Policy:
    """The threshold that keeps most rows while the mean loss of these very rows is at most `most`.

    On other rows the mean loss is above the target about as often as below it: see `guaranteed_policy`.
    """
    levels, width, losses = levels_of(uncertainty, loss)
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
