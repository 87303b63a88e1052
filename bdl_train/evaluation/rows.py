"""Scores of single rows, in the target's own units. Parts of a data set join in any order.

Shape letters: B rows, K classes.
"""

from dataclasses import dataclass, field
from functools import singledispatch
from typing import Self

import numpy as np
import torch

from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import ClassStats, NumberStats, PredictiveStats
from bdl_train.specs import TargetSpec

INTERVALS = (0.5, 0.8, 0.9, 0.95)
LEVELS = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)
"""Quantiles of numeric predictives that are kept: the median and the edges of the intervals."""


_QUANTILES = {0.5: "median"} | {
    edge: f"{side}_{round(100 * level)}"
    for level in INTERVALS
    for side, edge in (("lower", round((1 - level) / 2, 3)), ("upper", round((1 + level) / 2, 3)))
}


@dataclass(frozen=True)
class RowScores:
    """Columns of equal length, one entry a row; `merge` joins disjoint rows.

    Attributes:
        columns: Name to `[N]` array. Numeric targets: y, mean, total_std, aleatoric_std, epistemic_std, nll, crps, pit
            (P(Y ≤ y)), pit_below (P(Y < y), lower than `pit` for counts), error, median, and lower_P, upper_P of the
            central intervals of P = 50, 80, 90, 95 %. Classes: y, prediction, confidence, correct, nll, brier, total,
            aleatoric, epistemic (nats), energy (mean over components of −log Σ exp(logits), NaN if it was not kept).
        probs: `[N, K]` for classes, else None.
    """

    columns: dict[str, np.ndarray]
    probs: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(self.columns["nll"])

    def quantile(self, level: float) -> np.ndarray:
        """The quantile of one of `LEVELS`, `[N]`."""
        return self.columns[_QUANTILES[level]]

    def merge(self, other: Self) -> Self:
        columns = {name: np.concatenate([self.columns[name], other.columns[name]]) for name in self.columns}
        if self.probs is None or other.probs is None:
            return type(self)(columns)
        return type(self)(columns, np.concatenate([self.probs, other.probs]))

    def take(self, index: np.ndarray) -> Self:
        """Some of the rows, by position `[n]` or by a truth value a row `[N]`."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return type(self)(columns, None if self.probs is None else self.probs[index])

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        probs = [part.probs for part in parts if part.probs is not None]
        return cls(columns, np.concatenate(probs) if probs else None)


def score_rows(tile: TilePrediction, y: np.ndarray, target: TargetSpec) -> RowScores:
    """Score one tile of rows.

    Args:
        tile: The predictive, made with these targets.
        y: `[B]` encoded targets.
        target: Its `loc` and `scale` bring everything back to the target's units (the Jacobian is in the NLL).
    """
    scored = _score(tile.stats, tile.mixture, y, target)
    if scored.probs is not None:
        energy = np.full(len(y), np.nan) if tile.energy is None else tile.energy.cpu().numpy()
        scored.columns["energy"] = energy
    return scored


@singledispatch
def _score(stats: PredictiveStats, mixture: Mixture | None, y: np.ndarray, target: TargetSpec) -> RowScores:
    raise TypeError(f"No scores are known for {type(stats).__name__}.")


@_score.register
def _(stats: ClassStats, mixture: None, y: np.ndarray, target: TargetSpec) -> RowScores:
    probs_BK = stats.mean_probs.cpu().numpy()
    prediction, confidence = probs_BK.argmax(1), probs_BK.max(1)
    # argmax takes NaN for the largest: such a row is neither right nor wrong.
    correct = np.where(np.isnan(confidence), np.nan, prediction == y)
    one_hot = np.eye(probs_BK.shape[1])[y]
    return RowScores(
        {
            "y": y,
            "prediction": prediction,
            "confidence": confidence,
            "correct": correct,
            "nll": stats.nll.cpu().numpy(),
            "brier": np.square(probs_BK - one_hot).sum(1),
            "total": stats.total.cpu().numpy(),
            "aleatoric": stats.aleatoric.cpu().numpy(),
            "epistemic": stats.epistemic.cpu().numpy(),
        },
        probs_BK,
    )


@_score.register
def _(stats: NumberStats, mixture: Mixture, y: np.ndarray, target: TargetSpec) -> RowScores:
    loc, scale = target.loc, target.scale
    y_B = torch.from_numpy(y).to(stats.mean.device)
    quantiles = mixture.quantile(torch.tensor(LEVELS, dtype=torch.float64)).cpu().numpy() * scale + loc
    mean = stats.mean.cpu().numpy() * scale + loc
    raw = y.astype(np.float64) * scale + loc
    return RowScores(
        {
            "y": raw,
            "mean": mean,
            "total_std": stats.total.sqrt().cpu().numpy() * scale,
            "aleatoric_std": stats.aleatoric.sqrt().cpu().numpy() * scale,
            "epistemic_std": stats.epistemic.sqrt().cpu().numpy() * scale,
            "nll": stats.nll.cpu().numpy() + np.log(scale),
            "crps": mixture.crps(y_B).cpu().numpy() * scale,
            "pit": mixture.cdf(y_B).cpu().numpy(),
            "pit_below": mixture.cdf_below(y_B).cpu().numpy(),
            "error": mean - raw,
            **{_QUANTILES[level]: values for level, values in zip(LEVELS, quantiles, strict=True)},
        }
    )
