"""Split conformal prediction: intervals and sets that hold the target as often as they promise, whatever the model.

The promise rests on one assumption, that validation and test rows are exchangeable. It is about all rows together,
not about one row, and weakens as far as the validation part also chose something (when to stop, a recalibration).

Shape letters: N rows, K classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.rows import RowScores

EXPECTED = 0.99
"""Of all draws of exchangeable rows have a coverage in the range that is called expected."""

Edges = tuple[np.ndarray, np.ndarray]
"""Lower and upper edges of central intervals, `[N]` each, in the target's units."""
Threshold = float | np.ndarray
"""One for all rows, or one a row `[N]`."""


# --- thresholds ---------------------------------------------------------------------------------------------------


def rank(num_rows: int, level: float) -> int:
    """⌈(n + 1) · level⌉: which of n sorted scores is the threshold; above n there is none."""
    # (n + 1) · level that is a whole number may come out a rounding above it.
    return math.ceil((num_rows + 1) * level - 1e-9)


def threshold(scores: np.ndarray, level: float) -> float:
    """The ⌈(n + 1) · level⌉-th smallest of n validation scores; infinite if there are fewer.

    A new exchangeable score is at most this with probability `level` or more, and `level` + 1 / (n + 1) or less if no
    two scores are equal. Given the validation rows, that probability is Beta(k, n + 1 − k) with k = ⌈(n + 1) · level⌉.

    Source:
        Vovk et al. (2005), Algorithmic learning in a random world, Section 2; Angelopoulos & Bates (2021),
        arXiv:2107.07511, Sections 1 and 3.2.

    Raises:
        UsageError: a level outside (0, 1), or scores that are NaN.
    """
    if not 0 < level < 1:
        raise UsageError(
            f"A level of conformal prediction must lie between 0 and 1, got {level}: change `levels`."
        )
    if np.isnan(scores).any():
        raise UsageError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} validation scores are NaN, which have no order: look for "
            "a member that predicts NaN."
        )
    k = rank(len(scores), level)
    return float(np.partition(scores, k - 1)[k - 1]) if k <= len(scores) else math.inf


def group_thresholds(scores: np.ndarray, groups: np.ndarray, level: float) -> dict[Any, float]:
    """A threshold for each group, from its own validation rows (Mondrian): the promise holds in every group.

    Args:
        scores: `[N]` of validation rows.
        groups: `[N]` labels.
        level: Of coverage.

    Returns:
        By label; infinite for a group of too few rows.

    Source:
        Vovk et al. (2005), Section 4.5; Angelopoulos & Bates (2021), arXiv:2107.07511, Section 4.1.
    """
    return {label: threshold(scores[groups == label], level) for label in np.unique(groups).tolist()}


def thresholds_of_rows(by_group: Mapping[Any, float], groups: np.ndarray) -> np.ndarray:
    """Each row's own threshold `[N]`; infinite for a group that validation has not."""
    return np.array([by_group.get(label, math.inf) for label in groups.tolist()], dtype=np.float64)


# --- numbers ------------------------------------------------------------------------------------------------------


def normalised_scores(rows: RowScores) -> np.ndarray:
    """|y − mean| / predictive standard deviation, `[N]`.

    Source:
        Lei et al. (2018), arXiv:1604.04173, Section 5.2, with the predictive standard deviation for their ρ.
    """
    return np.abs(rows.columns["y"] - rows.columns["mean"]) / _spread(rows)


def normalised_intervals(rows: RowScores, q: Threshold) -> np.ndarray:
    """mean ± q · predictive standard deviation, `[N, 2]`."""
    half = np.broadcast_to(q, len(rows)) * _spread(rows)
    return np.stack([rows.columns["mean"] - half, rows.columns["mean"] + half], axis=1)


def cqr_scores(y: np.ndarray, edges: Edges) -> np.ndarray:
    """max(lower − y, y − upper): how far a target is outside its interval, negative inside; `[N]`.

    Source:
        Romano et al. (2019), arXiv:1905.03222, equation 6.
    """
    return np.maximum(edges[0] - y, y - edges[1])


def cqr_intervals(edges: Edges, q: Threshold) -> np.ndarray:
    """[lower − q, upper + q], `[N, 2]`; lower above upper is an empty interval."""
    return np.stack([edges[0] - q, edges[1] + q], axis=1)


def _spread(rows: RowScores) -> np.ndarray:
    spread = rows.columns["total_std"]
    if not (spread > 0).all():
        raise UsageError(
            f"{int((~(spread > 0)).sum())} of {len(rows)} rows have a predictive standard deviation that is not above "
            "0, so that errors cannot be divided by it: look for a likelihood without noise or a member of NaN."
        )
    return spread


# --- classes ------------------------------------------------------------------------------------------------------


def lac_scores(probs: np.ndarray) -> np.ndarray:
    """1 − probability of every class, `[N, K]`: sets of least mean size, which may be empty.

    Source:
        Sadinle et al. (2019), arXiv:1609.00451, Theorem 1; Angelopoulos & Bates (2021), arXiv:2107.07511, Section 1.
    """
    return 1 - probs


def aps_scores(probs: np.ndarray, u: np.ndarray | None) -> np.ndarray:
    """Probability of the classes that are likelier, plus a share u of a class's own, `[N, K]` (adaptive sets).

    With random u the scores have no ties, so that coverage is exact, and a set may be empty. With u = 0 the likeliest
    class scores 0 and is in every set: a set is the likeliest classes up to the one that takes their probability over
    the threshold, and coverage is `level` or more.

    Source:
        Romano et al. (2020), arXiv:2006.02544, Section 2; u here is 1 − u there.

    Args:
        probs: `[N, K]`.
        u: `[N]` uniform on (0, 1), fresh for every row; None = 0.
    """
    order = np.argsort(-probs, axis=1, kind="stable")
    sorted_probs = np.take_along_axis(probs, order, axis=1)
    # The first class scores p − p, exactly 0.
    before = np.cumsum(sorted_probs, axis=1) - sorted_probs
    own = 0 if u is None else u[:, None] * sorted_probs
    scores = np.empty_like(before)
    np.put_along_axis(scores, order, before + own, axis=1)
    return scores


def prediction_sets(scores: np.ndarray, q: Threshold) -> np.ndarray:
    """Which classes score at most the threshold, `[N, K]` bool."""
    return scores <= np.broadcast_to(q, len(scores))[:, None]


# --- what exchangeability allows ----------------------------------------------------------------------------------


def expected_coverage(num_val: int, num_test: int, level: float, *, ties: bool) -> tuple[float, float]:
    """The range that holds the coverage of test rows in `EXPECTED` of all draws of exchangeable rows.

    The number of test rows that are covered is BetaBinomial(num_test; k, n + 1 − k) with k = ⌈(n + 1) · level⌉.

    Args:
        num_val, num_test: Rows.
        level: Of coverage.
        ties: Equal scores at the threshold can only add coverage: there is no upper edge.

    Source:
        Angelopoulos & Bates (2021), arXiv:2107.07511, Section 3.3.
    """
    k = rank(num_val, level)
    if k > num_val:
        return 1.0, 1.0
    counts = np.arange(num_test + 1)
    below = np.cumsum(stats.betabinom.pmf(counts, num_test, k, num_val + 1 - k))
    low, high = np.searchsorted(below, [(1 - EXPECTED) / 2, (1 + EXPECTED) / 2])
    return float(low / num_test), 1.0 if ties else float(min(high, num_test) / num_test)
