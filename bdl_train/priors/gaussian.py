"""Gaussian prior: isotropic, or with variances scaled by fan-in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat

from bdl_train.priors import BoundGaussian, Prior
from bdl_train.priors._fan_in import scales
from bdl_train.stack import Layout


@dataclass(frozen=True, kw_only=True)
class Gaussian(Prior):
    """θ ~ N(0, scale²), independently for every parameter.

    Attributes:
        scale: Standard deviation.
        fan_in: Divide the scale of a weight by the square root of its number of inputs.
    """

    scale: Annotated[FiniteFloat, Field(gt=0)]
    fan_in: bool

    def bind(self, layout: Layout, members: Sequence[int]) -> BoundGaussian:
        std = scales(layout, self.scale, fan_in=self.fan_in)
        return BoundGaussian(torch.zeros_like(std), std)
