"""Scale mixture prior: each parameter is either near zero or free, by a mixture of two Gaussians."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat
from torch import Generator, Tensor

from bdl_train.errors import UsageError
from bdl_train.priors import BoundPrior, Prior
from bdl_train.priors._fan_in import scales
from bdl_train.stack import Layout


@dataclass(frozen=True, kw_only=True)
class ScaleMixture(Prior):
    """p(θ) = weight · N(θ; 0, wide_std²) + (1 − weight) · N(θ; 0, narrow_std²), for every parameter.

    Source:
        Blundell et al. (2015), arXiv:1505.05424, equation 7.

    Attributes:
        weight: Of the wide component (π in the paper).
        wide_std, narrow_std: Standard deviations of the two components (σ₁ > σ₂).
        fan_in: Divide both standard deviations of a weight by the square root of its number of inputs.
    """

    weight: Annotated[FiniteFloat, Field(gt=0, lt=1)]
    wide_std: Annotated[FiniteFloat, Field(gt=0)]
    narrow_std: Annotated[FiniteFloat, Field(gt=0)]
    fan_in: bool

    def __post_init__(self) -> None:
        if self.narrow_std >= self.wide_std:
            raise UsageError(
                f"narrow_std must be smaller than wide_std, got narrow_std={self.narrow_std} and "
                f"wide_std={self.wide_std}."
            )

    def bind(self, layout: Layout, members: Sequence[int]) -> "BoundScaleMixture":
        wide = scales(layout, self.wide_std, fan_in=self.fan_in)
        narrow = scales(layout, self.narrow_std, fan_in=self.fan_in)
        return BoundScaleMixture(self.weight, wide, narrow)


@dataclass(frozen=True)
class BoundScaleMixture(BoundPrior):
    """Independent mixtures of two zero-mean Gaussians, of standard deviations `wide` and `narrow`, `[P]`."""

    weight: float
    wide: Tensor
    narrow: Tensor

    def log_prob(self, flat: Tensor) -> Tensor:
        log_wide = math.log(self.weight) + _log_normal(flat, self.wide)
        log_narrow = math.log1p(-self.weight) + _log_normal(flat, self.narrow)
        return torch.logaddexp(log_wide, log_narrow).sum(-1)

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        u = self.wide.new_empty(num_samples, len(self.wide)).uniform_(generator=generator)
        z = torch.empty_like(u).normal_(generator=generator)
        return torch.where(u < self.weight, self.wide, self.narrow) * z

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BoundScaleMixture":
        return BoundScaleMixture(self.weight, self.wide.to(device, dtype), self.narrow.to(device, dtype))


def _log_normal(x: Tensor, std: Tensor) -> Tensor:
    return -0.5 * (x / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
