"""Predictions as table columns, in the target's own units: what `bdl predict` writes for each row."""

from collections.abc import Callable, Sequence
from functools import singledispatch

import numpy as np
import torch

from bdl_train.evaluation.recalibration import Recalibration
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import ClassStats, NumberStats, PredictiveStats
from bdl_train.specs import TargetSpec


def prediction_columns(
    tile: TilePrediction,
    target: TargetSpec,
    intervals: Sequence[float],
    recalibration: Recalibration | None = None,
) -> dict[str, np.ndarray]:
    """Columns of one tile of rows.

    Numeric targets: `mean`, `total_std`, `aleatoric_std`, `epistemic_std`, and `lower_P`, `upper_P` for each
    central interval of P percent. Classes: `prediction`, `p_<class>`, and `total`, `aleatoric`, `epistemic` in nats.

    Args:
        tile: The predictive.
        target: Its `loc` and `scale` give the units, its `classes` the names.
        intervals: Probability masses in (0, 1); classes have none.
        recalibration: A map that was fitted on validation rows; what it does not give (parts that belong to members,
            moments after a quantile map) is NaN.
    """
    if recalibration is None:
        return _columns(tile.stats, tile.mixture, target, intervals, _same)
    tile = recalibration.on_tile(tile)
    columns = _columns(tile.stats, tile.mixture, target, intervals, recalibration.levels)
    if not recalibration.gives_moments:
        columns |= {name: np.full(len(columns[name]), np.nan) for name in _MOMENTS}
    return columns


_NOTHING = np.array(None, dtype=object)
_MOMENTS = ("mean", "total_std", "aleatoric_std", "epistemic_std")
Levels = Callable[[Sequence[float]], np.ndarray]


def _same(levels: Sequence[float]) -> np.ndarray:
    return np.asarray(levels, float)


@singledispatch
def _columns(
    stats: PredictiveStats,
    mixture: Mixture | None,
    target: TargetSpec,
    intervals: Sequence[float],
    at: Levels,
) -> dict[str, np.ndarray]:
    raise TypeError(f"No columns are known for {type(stats).__name__}.")


@_columns.register
def _(
    stats: ClassStats, mixture: None, target: TargetSpec, intervals: Sequence[float], at: Levels
) -> dict[str, np.ndarray]:
    probs_BK = stats.mean_probs.cpu().numpy()
    names = np.array(target.classes, dtype=object)
    return {
        "prediction": np.where(np.isnan(probs_BK).any(1), _NOTHING, names[probs_BK.argmax(1)]),
        **{f"p_{name}": probs_BK[:, k] for k, name in enumerate(target.classes)},
        "total": stats.total.cpu().numpy(),
        "aleatoric": stats.aleatoric.cpu().numpy(),
        "epistemic": stats.epistemic.cpu().numpy(),
    }


@_columns.register
def _(
    stats: NumberStats, mixture: Mixture, target: TargetSpec, intervals: Sequence[float], at: Levels
) -> dict[str, np.ndarray]:
    levels = [edge for mass in intervals for edge in ((1 - mass) / 2, (1 + mass) / 2)]
    columns = {
        "mean": stats.mean.cpu().numpy() * target.scale + target.loc,
        "total_std": stats.total.sqrt().cpu().numpy() * target.scale,
        "aleatoric_std": stats.aleatoric.sqrt().cpu().numpy() * target.scale,
        "epistemic_std": stats.epistemic.sqrt().cpu().numpy() * target.scale,
    }
    if levels:
        edges_QB = mixture.quantile(torch.from_numpy(at(levels))).cpu().numpy()
        for i, mass in enumerate(intervals):
            columns[f"lower_{100 * mass:g}"] = edges_QB[2 * i] * target.scale + target.loc
            columns[f"upper_{100 * mass:g}"] = edges_QB[2 * i + 1] * target.scale + target.loc
    return columns
