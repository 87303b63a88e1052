"""Student-t prior: heavy tails let a few weights be large at little cost."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat
from torch import Generator, Tensor

from bdl_train.priors import BoundPrior, Prior
from bdl_train.priors._fan_in import scales
from bdl_train.stack import Layout


@dataclass(frozen=True, kw_only=True)
class StudentT(Prior):
    """θ ~ scale · t(df), independently for every parameter.

    Source:
        Fortuin et al. (2022), arXiv:2102.06571, Section 3 (heavy tails suit the weights of dense layers).

    Attributes:
        scale: The scale; the standard deviation is scale · √(df / (df − 2)) where df > 2.
        df: Degrees of freedom; 1 is the Cauchy density.
        fan_in: Divide the scale of a weight by the square root of its number of inputs.
    """

    scale: Annotated[FiniteFloat, Field(gt=0)]
    df: Annotated[FiniteFloat, Field(ge=1)]
    fan_in: bool

    def bind(self, layout: Layout, members: Sequence[int]) -> "BoundStudentT":
        return BoundStudentT(scales(layout, self.scale, fan_in=self.fan_in), self.df)


@dataclass(frozen=True)
class BoundStudentT(BoundPrior):
    """Independent zero-mean t densities of scales `[P]`, all with `df` degrees of freedom."""

    scale: Tensor
    df: float
    _log_normaliser: Tensor = field(init=False)

    def __post_init__(self) -> None:
        half = 0.5 * self.df
        one = math.lgamma(half) - math.lgamma(half + 0.5) + 0.5 * math.log(math.pi * self.df)
        object.__setattr__(self, "_log_normaliser", self.scale.log().sum() + one * len(self.scale))

    def log_prob(self, flat: Tensor) -> Tensor:
        z_sq = (flat / self.scale).square()
        return -0.5 * (self.df + 1) * (z_sq / self.df).log1p().sum(-1) - self._log_normaliser

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        # √(df (u^(−2/df) − 1)) · cos(2πv) is t(df) for uniform u, v: Bailey (1994), Math. Comp. 62, 779-781.
        u, v = self.scale.new_empty(2, num_samples, len(self.scale)).uniform_(generator=generator)
        radius_sq = self.df * torch.expm1(-2 / self.df * torch.log1p(-u))  # 1 − u is never 0
        return self.scale * radius_sq.sqrt() * torch.cos(2 * math.pi * v)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BoundStudentT":
        return BoundStudentT(self.scale.to(device, dtype), self.df)
