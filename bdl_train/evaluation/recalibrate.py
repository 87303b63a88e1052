"""Every recalibration that suits a target, fitted on the validation part and applied to scored rows.

Shape letters: B rows of a tile.
"""

import numpy as np
import torch

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.recalibration import (
    IsotonicCalibration,
    QuantileRecalibration,
    Recalibration,
    TemperatureScaling,
    VarianceScaling,
)
from bdl_train.evaluation.rows import RowScores
from bdl_train.predictive.predict import Predictor
from bdl_train.specs import TargetSpec

Applied = list[tuple[Recalibration, RowScores]]
ROWS_A_BIN, MOST_BINS = 50, 20
"""A quantile map has a knot for so many validation rows, up to a number beyond which it would follow their noise."""


def recalibrated(
    predictor: Predictor, val_part: Part, val: RowScores, part: Part, rows: RowScores, target: TargetSpec
) -> tuple[Applied, list[str]]:
    """The maps and what they make of the rows, and why others could not be fitted.

    Args:
        predictor: Of the run; numbers are predicted once more, since their maps need the mixtures.
        val_part, val: The validation part and its scores.
        part, rows: The rows to recalibrate, and their scores.
        target: Of the run.

    Raises:
        UsageError: no map can be fitted.
    """
    found, reasons = [], []
    makers = (_temperature, _isotonic) if rows.probs is not None else (_variance, _quantile)
    for make in makers:
        try:
            found.append(make(predictor, val_part, val, part, rows, target))
        except UsageError as error:
            reasons.append(str(error))
    if not found:
        raise UsageError(" ".join(reasons))
    return found, reasons


def _temperature(
    predictor: Predictor, val_part: Part, val: RowScores, part: Part, rows: RowScores, target: TargetSpec
) -> tuple[Recalibration, RowScores]:
    fitted = TemperatureScaling.fit(val)
    return fitted, fitted.apply(rows)


def _isotonic(
    predictor: Predictor, val_part: Part, val: RowScores, part: Part, rows: RowScores, target: TargetSpec
) -> tuple[Recalibration, RowScores]:
    fitted = IsotonicCalibration.fit(val)
    return fitted, fitted.apply(rows)


def _variance(
    predictor: Predictor, val_part: Part, val: RowScores, part: Part, rows: RowScores, target: TargetSpec
) -> tuple[Recalibration, RowScores]:
    x = torch.from_numpy(val_part.x)
    mixtures = [(tile.mixture, val_part.y[tile.rows]) for tile in predictor(x)]
    fitted = VarianceScaling.fit_mixtures([(mixture, y) for mixture, y in mixtures if mixture is not None])
    tiles = predictor(torch.from_numpy(part.x), torch.from_numpy(part.y))
    return fitted, RowScores.concatenate([fitted.apply(tile, part.y[tile.rows], target) for tile in tiles])


def _quantile(
    predictor: Predictor, val_part: Part, val: RowScores, part: Part, rows: RowScores, target: TargetSpec
) -> tuple[Recalibration, RowScores]:
    fitted = QuantileRecalibration.fit(val, num_bins=int(np.clip(len(val) // ROWS_A_BIN, 2, MOST_BINS)))
    pieces = [
        fitted.quantiles(tile.mixture, target)
        for tile in predictor(torch.from_numpy(part.x))
        if tile.mixture is not None
    ]
    quantiles = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return fitted, fitted.apply(rows, quantiles)
