"""Gaussian prior: isotropic, or with variances scaled by fan-in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from bdl_train.priors import BoundGaussian, Prior
from bdl_train.stack import Layout


@dataclass(frozen=True, kw_only=True)
class Gaussian(Prior):
    """θ ~ N(0, scale²) for every parameter.

    Attributes:
        scale: Standard deviation.
        fan_in: Divide the variance of a weight with two axes or more by its number of inputs, so that
            pre-activations keep their size whatever the width (Neal, 1996). Biases keep `scale`.
    """

    scale: Annotated[float, Field(gt=0)]
    fan_in: bool

    def bind(self, layout: Layout, members: Sequence[int]) -> BoundGaussian:
        stds = [torch.full((math.prod(shape),), self._std(shape)) for shape in layout.shapes]
        std = torch.cat(stds)
        return BoundGaussian(torch.zeros_like(std), std)

    def _std(self, shape: tuple[int, ...]) -> float:
        if self.fan_in and len(shape) >= 2:
            return self.scale / math.sqrt(math.prod(shape[1:]))
        return self.scale
