"""Laplace prior: a sharp peak at zero and exponential tails; its MAP penalty is L1."""

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
class Laplace(Prior):
    """p(θ) = exp(−|θ| / scale) / (2 scale), independently for every parameter; standard deviation √2 · scale.

    Source:
        Williams (1995), Neural Computation 7(1), 117-143.

    Attributes:
        scale: The mean of |θ|.
        fan_in: Divide the scale of a weight by the square root of its number of inputs.
    """

    scale: Annotated[FiniteFloat, Field(gt=0)]
    fan_in: bool

    def bind(self, layout: Layout, members: Sequence[int]) -> "BoundLaplace":
        return BoundLaplace(scales(layout, self.scale, fan_in=self.fan_in))


@dataclass(frozen=True)
class BoundLaplace(BoundPrior):
    """Independent zero-mean Laplace densities of scales `[P]`."""

    scale: Tensor
    _log_normaliser: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_log_normaliser", (2 * self.scale).log().sum())

    def log_prob(self, flat: Tensor) -> Tensor:
        return -(flat.abs() / self.scale).sum(-1) - self._log_normaliser

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        # The difference of two unit exponentials is a unit Laplace variable.
        e = self.scale.new_empty(2, num_samples, len(self.scale)).exponential_(generator=generator)
        return self.scale * (e[0] - e[1])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BoundLaplace":
        return BoundLaplace(self.scale.to(device, dtype))
