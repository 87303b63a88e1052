"""Homoscedastic Gaussian likelihood: one noise level per member, known or learned."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, FiniteFloat
from torch import Tensor
from torch.distributions import Normal

from bdl_train.likelihoods import PREFIX, Likelihood, at_least_float32
from bdl_train.specs import TargetKind, TargetSpec

LOG_NOISE = f"{PREFIX}log_noise_std"


@dataclass(frozen=True, kw_only=True)
class Gaussian(Likelihood):
    """y | x ~ N(output, noise_std²), in units of the standardised target.

    Attributes:
        noise_std: The noise standard deviation: known, or the start and prior median when learned.
        learn_noise: Learn log(noise_std) per member.
        log_noise_prior_std: Standard deviation of the Gaussian prior on log(noise_std).
    """

    noise_std: Annotated[FiniteFloat, Field(gt=0)]
    learn_noise: bool
    log_noise_prior_std: Annotated[FiniteFloat, Field(gt=0)]

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.CONTINUOUS})

    def num_outputs(self, target: TargetSpec) -> int:
        return 1

    def params(self) -> dict[str, tuple[float, float, float]]:
        if not self.learn_noise:
            return {}
        log_noise = math.log(self.noise_std)
        return {"log_noise_std": (log_noise, log_noise, self.log_noise_prior_std)}

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        mean = at_least_float32(outputs).squeeze(-1)
        log_noise = self._log_noise(mean, params)
        z = (y - mean) * (-log_noise).exp()
        return -0.5 * z.square() - log_noise - 0.5 * math.log(2 * math.pi)

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> Normal:
        mean = at_least_float32(outputs).squeeze(-1)
        return Normal(mean, self._log_noise(mean, params).exp().expand_as(mean), validate_args=False)

    def _log_noise(self, mean: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        if self.learn_noise:
            return params[LOG_NOISE].to(mean.dtype).unsqueeze(-1)
        return mean.new_full((), math.log(self.noise_std))
