"""Scored rows whose predictive is off by a known distortion."""

import math

import numpy as np
import torch
from torch.distributions import Categorical, Distribution, Normal, Poisson, StudentT

from bdl_train.evaluation.metrics import expected_calibration_error
from bdl_train.evaluation.rows import RowScores, score_rows
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import stats_of
from bdl_train.specs import TargetKind, TargetSpec

PRICE = TargetSpec(TargetKind.CONTINUOUS, "price", loc=3.0, scale=0.5)
VISITS = TargetSpec(TargetKind.COUNT, "visits")


def species(num_classes: int) -> TargetSpec:
    return TargetSpec(TargetKind.CLASS, "species", tuple("abcdef"[:num_classes]))


def tile_of(components: Distribution, y: np.ndarray) -> TilePrediction:
    """An even mixture over the components `[C, B]`."""
    num_components = components.batch_shape[0]
    log_weights = torch.full((num_components,), -math.log(num_components), dtype=torch.float64)
    mixture = None if isinstance(components, Categorical) else Mixture(components, log_weights)
    stats = stats_of(components, log_weights, torch.from_numpy(y))
    return TilePrediction(slice(0, len(y)), stats, mixture, None, torch.arange(num_components))


def classes(num_rows: int, seed: int, sharper: float, num_classes: int = 3) -> RowScores:
    """Labels drawn from softmax(z); what is reported is softmax(sharper · z)."""
    random = np.random.default_rng(seed)
    z = 1.5 * random.normal(size=(num_rows, num_classes))
    y = (z + random.gumbel(size=z.shape)).argmax(1)
    logits = torch.from_numpy(sharper * z)[None]
    return score_rows(tile_of(Categorical(logits=logits), y), y, species(num_classes))


def numbers(
    num_rows: int, seed: int, narrower: float, family: str = "normal"
) -> tuple[TilePrediction, np.ndarray]:
    """Targets drawn from a mixture of three; what is reported is narrower around its mean."""
    random = np.random.default_rng(seed)
    loc, scale = random.normal(size=(3, num_rows)), 0.3 + random.random((3, num_rows))
    which, row = random.integers(3, size=num_rows), np.arange(num_rows)
    noise = random.normal(size=num_rows) if family == "normal" else random.standard_t(3.0, size=num_rows)
    y = loc[which, row] + scale[which, row] * noise
    middle = loc.mean(0)
    m, width = torch.from_numpy(middle + (loc - middle) / narrower), torch.from_numpy(scale / narrower)
    components = Normal(m, width) if family == "normal" else StudentT(torch.tensor(3.0).double(), m, width)
    return tile_of(components, y), y


def number_rows(num_rows: int, seed: int, narrower: float) -> RowScores:
    return score_rows(*numbers(num_rows, seed, narrower), PRICE)


def count_rows(num_rows: int, seed: int, inflated: float) -> tuple[RowScores, np.ndarray]:
    """Counts whose rates are `inflated` times what is reported, and the reported rates `[N]`."""
    random = np.random.default_rng(seed)
    rate = 1 + 5 * random.random(num_rows)
    y = random.poisson(inflated * rate)
    return score_rows(tile_of(Poisson(torch.from_numpy(rate)[None]), y), y, VISITS), rate


def probs_of(rows: RowScores) -> np.ndarray:
    assert rows.probs is not None
    return rows.probs


def mean_nll(rows: RowScores) -> float:
    return float(rows.columns["nll"].mean())


def ece(rows: RowScores) -> float:
    return expected_calibration_error(rows.columns["confidence"], rows.columns["correct"])
