"""Every recalibration that suits a target: fitted on the validation part, applied to scored rows, kept with the run.

Shape letters: B rows of a tile.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bdl_train.data import Part
from bdl_train.errors import UsageError, unknown_choice
from bdl_train.evaluation.recalibration import (
    IsotonicCalibration,
    QuantileRecalibration,
    Recalibration,
    TemperatureScaling,
    VarianceScaling,
)
from bdl_train.evaluation.rows import RowScores
from bdl_train.files import sha256, write_json
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, read_json
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


KINDS: dict[str, type[Recalibration]] = {
    one.method: one
    for one in (TemperatureScaling, IsotonicCalibration, VarianceScaling, QuantileRecalibration)
}
FILE = "recalibration.json"


def record(run: RunDir, maps: Sequence[Recalibration]) -> Path:
    """Keep fitted maps with the posterior that they belong to; returns the file."""
    path, digest = run.posterior / FILE, sha256(run.posterior / "posterior.json")
    try:
        held = read_json(path) if path.is_file() else {}
        kept = dict(held["maps"]) if held.get("posterior_sha256") == digest else {}
    except (UsageError, AttributeError, KeyError, TypeError, ValueError):  # damaged: written anew
        kept = {}
    maps_by_name = {**kept, **{one.method: one.to_json() for one in maps}}
    write_json(path, {"posterior_sha256": digest, "fitted_on": "val", "maps": maps_by_name})
    return path


def recorded(run: RunDir, method: str) -> Recalibration:
    """A map that `record` kept.

    Raises:
        UsageError: none of this name, of another posterior, or damaged.
    """
    path = run.posterior / FILE
    how = f"fit it with: bdl evaluate run={run.path} recalibrate=true"
    if not path.is_file():
        raise UsageError(f"recalibration={method}: {run.path} has no recalibration; {how}")
    held = read_json(path)
    try:
        if held["posterior_sha256"] != sha256(run.posterior / "posterior.json"):
            raise UsageError(f"{path} was fitted to another posterior than this run holds now; {how}")
        if method not in held["maps"]:
            raise UsageError(unknown_choice("recalibration", method, held["maps"]))
        return KINDS[method].from_json(held["maps"][method])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__} {error}; {how}") from error


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
