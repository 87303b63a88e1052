"""How alike members are: how far apart pairs of them predict, and whether they are wrong on the same rows.

Shape letters: M members.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from bdl_train.evaluation.members import MemberScores
from bdl_train.evaluation.metrics import Metric


def pair_measures(scores: MemberScores) -> tuple[np.ndarray, np.ndarray]:
    """Disagreement and correlation of each pair of members, `[M, M]`.

    Numbers: the root mean square distance of the means, and the correlation of their errors about 0, from
    2 Σ eᵢ eⱼ = Σ eᵢ² + Σ eⱼ² − Σ (eᵢ − eⱼ)². Classes: the share of rows with different predicted classes, and the
    correlation over rows of the surprise at the true class, NaN where the scores of single rows were not kept.
    """
    if "mse" in scores.sums:
        square_M = scores.sums["mse"]
        product_MM = (square_M[:, None] + square_M[None] - scores.distances) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation_MM = product_MM / np.sqrt(square_M[:, None] * square_M[None])
        return np.sqrt(scores.distances / scores.num_rows), correlation_MM
    num_members = len(scores.ids)
    if scores.nll.shape[1] < max(2, scores.num_rows):
        return scores.distances / scores.num_rows, np.full((num_members, num_members), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return scores.distances / scores.num_rows, np.atleast_2d(np.corrcoef(scores.nll.astype(np.float64)))


def pairs_of(scores: MemberScores, unit: str) -> tuple[pd.DataFrame, list[Metric]]:
    """Each pair once, and the means over pairs; of one member alone there are none.

    Args:
        scores: Of the members.
        unit: Of a numeric target.
    """
    disagreement_MM, correlation_MM = pair_measures(scores)
    one, other = np.triu_indices(len(scores.ids), 1)
    ids = np.asarray(scores.ids)
    pairs = pd.DataFrame(
        {
            "one": ids[one],
            "other": ids[other],
            "disagreement": disagreement_MM[one, other],
            "correlation": correlation_MM[one, other],
        }
    )
    if len(ids) < 2:
        return pairs, []
    if "mse" in scores.sums:
        words = (unit, "root mean square distance of two members' means", "of the errors of two members")
    else:
        words = (
            "share",
            "rows for which two members predict different classes",
            "of two members' surprise at a row",
        )
    return pairs, [
        _mean("member_disagreement", disagreement_MM[one, other], words[0], words[1]),
        _mean("member_correlation", correlation_MM[one, other], "-1..1", f"{words[2]}, mean over pairs"),
    ]


def _mean(key: str, values: np.ndarray, unit: str, meaning: str) -> Metric:
    value = float(values.mean())
    if math.isfinite(value):
        return Metric(key, value, unit, meaning, "")
    reason = "a member's scores are not finite or all the same, or too many to be kept"
    return Metric(key, None, unit, meaning, "", reason=reason)


def told_of_pairs(alike: Sequence[Metric]) -> list[str]:
    """A sentence on the correlation, if there is one."""
    correlation = next((one.value for one in alike if one.key == "member_correlation"), None)
    if correlation is None:
        return []
    what = next(one.meaning for one in alike if one.key == "member_correlation").partition(",")[0]
    return [f"The correlation {what} is {correlation:.2f}: averaging gains the more the lower it is."]
