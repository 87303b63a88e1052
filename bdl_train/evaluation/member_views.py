"""What each member by itself says of some rows: its density of the target, and its classes, or its mean and variance.

Shape letters: M members, N rows, B rows of a tile, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bdl_train.data import Part
from bdl_train.evaluation.members import member_scores
from bdl_train.predictive.predict import Predictor, TilePrediction
from bdl_train.specs import TargetSpec

MOST_ROWS, MOST_PROBS, LEAST_ROWS = 10_000, 200_000, 1_000
"""Rows that are looked at; fewer where rows times classes would pass `MOST_PROBS`, but not below `LEAST_ROWS`."""


@dataclass(frozen=True)
class MemberViews:
    """The predictives of single members, draws of each averaged, on the same rows.

    Attributes:
        log_prob: `[M, N]` log density of the target, in its units.
        probs: Of classes, `[M, N, K]`; else None.
        mean, variance: Of numbers, `[M, N]` as encoded; else None.
    """

    log_prob: np.ndarray
    probs: np.ndarray | None = None
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.log_prob)

    @classmethod
    def joined(cls, parts: "Sequence[MemberViews]") -> "MemberViews":
        """Of disjoint members on the same rows."""
        return cls(**_joined(parts, 0))

    @classmethod
    def of_rows(cls, parts: "Sequence[MemberViews]") -> "MemberViews":
        """Of the same members on disjoint rows."""
        return cls(**_joined(parts, 1))

    def of(self, members: "Sequence[int] | np.ndarray") -> "MemberViews":
        """Some members, by position and in this order."""
        return MemberViews(**{name: array[members] for name, array in _arrays(self).items()})


def _arrays(views: MemberViews) -> dict[str, np.ndarray]:
    found = {"log_prob": views.log_prob, "probs": views.probs, "mean": views.mean, "variance": views.variance}
    return {name: array for name, array in found.items() if array is not None}


def _joined(parts: Sequence[MemberViews], axis: int) -> dict[str, np.ndarray]:
    arrays = [_arrays(part) for part in parts]
    return {name: np.concatenate([one[name] for one in arrays], axis=axis) for name in arrays[0]}


def some_rows(part: Part, num_classes: int) -> Part:
    """At most so many rows as `MOST_ROWS` says, evenly spaced.

    Args:
        part: All of them.
        num_classes: K; 1 for numbers.
    """
    most = min(MOST_ROWS, max(LEAST_ROWS, MOST_PROBS // num_classes))
    if len(part) <= most:
        return part
    kept = np.linspace(0, len(part) - 1, most).round().astype(np.int64)
    return Part(part.x[kept], part.y[kept], part.rows[kept])


def member_views(predictor: Predictor, part: Part, target: TargetSpec) -> MemberViews:
    """Let every member of a posterior predict.

    Args:
        predictor: Of the members.
        part: Encoded rows with targets, one or more.
        target: Brings densities to its units.
    """
    x, y = torch.from_numpy(part.x), torch.from_numpy(part.y)
    return MemberViews.of_rows([_of_tile(tile, target) for tile in predictor(x, y, per_component=True)])


def _of_tile(tile: TilePrediction, target: TargetSpec) -> MemberViews:
    assert tile.per_component is not None
    ids, log_prob_MB = member_scores(tile.per_component, tile.members)
    log_prob = log_prob_MB.cpu().numpy() - math.log(target.scale)
    if tile.member_probs is not None:
        return MemberViews(log_prob, probs=tile.member_probs.double().cpu().numpy())
    assert tile.mixture is not None
    means, variances = [], []
    for member in ids:
        own = tile.mixture.part(torch.nonzero(tile.members == member)[:, 0].to(log_prob_MB.device))
        mean_CB, variance_CB = own.components.mean.double(), own.components.variance.double()
        mean_B = own.weights @ mean_CB
        means.append(mean_B.cpu().numpy())
        variances.append((own.weights @ (variance_CB + (mean_CB - mean_B).square())).cpu().numpy())
    return MemberViews(log_prob, mean=np.stack(means), variance=np.stack(variances))
