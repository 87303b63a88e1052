"""A mixture that is widened about its own mean: again a mixture, of the same family.

Shape letters: C components, B rows.
"""

from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT

from bdl_train.errors import UsageError
from bdl_train.predictive.mixture import Mixture


def scaled(mixture: Mixture, scale: float) -> Mixture:
    """The mixture of m + scale · (Y − m), where m `[B]` is the mean of Y in each row, in float64.

    Locations move away from m and spreads grow by the same factor, so that mean and weights stay, standard deviations
    are multiplied by `scale`, and quantiles, CRPS and densities remain exact.

    Args:
        mixture: Of Normal or StudentT components.
        scale: Above 0.

    Raises:
        ValueError: `scale` is not a number above 0.
        UsageError: components that have no spread of their own, such as Poisson.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a finite number above 0, got {scale}.")
    weights = mixture.weights.to(mixture.components.mean.device)
    center_B = weights @ mixture.components.mean.double() / weights.sum()
    return Mixture(_about(mixture.components, center_B, scale), mixture.log_weights)


@singledispatch
def _about(components: Distribution, center_B: Tensor, scale: float) -> Distribution:
    raise UsageError(
        f"The spread of {type(components).__name__} components follows from their mean and cannot be scaled alone: "
        "recalibrate the quantiles of this likelihood instead, or choose one for continuous targets."
    )


@_about.register
def _(components: Normal, center_B: Tensor, scale: float) -> Normal:
    return Normal(*_moved(components.loc, components.scale, center_B, scale), validate_args=False)


@_about.register
def _(components: StudentT, center_B: Tensor, scale: float) -> StudentT:
    loc, spread = _moved(components.loc, components.scale, center_B, scale)
    return StudentT(components.df.double(), loc, spread, validate_args=False)


def _moved(loc: Tensor, spread: Tensor, center_B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    loc_CB, spread_CB = torch.broadcast_tensors(loc.double(), spread.double())
    return center_B + scale * (loc_CB - center_B), scale * spread_CB
