"""Gaussian likelihood whose mean and standard deviation are both functions of the input."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, FiniteFloat
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import softplus

from bdl_train.likelihoods import Likelihood, at_least_float32
from bdl_train.specs import TargetKind, TargetSpec


@dataclass(frozen=True, kw_only=True)
class HeteroscedasticGaussian(Likelihood):
    """y | x ~ N(μ(x), s(x)²) with outputs (μ, r) and s = softplus(r) + min_std.

    Source:
        Nix & Weigend (1994); Lakshminarayanan et al. (2017), Section 2.2.1 (there the variance is softplus).

    Attributes:
        min_std: A floor under s, in units of the standardised target.
    """

    min_std: Annotated[FiniteFloat, Field(gt=0)]

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.CONTINUOUS})

    def num_outputs(self, target: TargetSpec) -> int:
        return 2

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        # Dense networks lay outputs as [M, O, B]: the gradient of rows of it needs no transposed copy.
        mean, raw = at_least_float32(outputs).movedim(-1, 0)
        std = softplus(raw) + self.min_std
        return -0.5 * ((y - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> Normal:
        mean, raw = at_least_float32(outputs).unbind(-1)
        return Normal(mean, softplus(raw) + self.min_std, validate_args=False)
