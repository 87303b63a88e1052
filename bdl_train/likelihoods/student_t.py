"""Student-t likelihood: regression whose noise has heavy tails, so that outliers pull less."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field, FiniteFloat
from torch import Tensor
from torch.distributions import StudentT as StudentTDistribution

from bdl_train.likelihoods import PREFIX, Likelihood, at_least_float32
from bdl_train.specs import TargetKind, TargetSpec

LOG_SCALE = f"{PREFIX}log_scale"


@dataclass(frozen=True, kw_only=True)
class StudentT(Likelihood):
    """y | x ~ output + scale · t(df), in units of the standardised target; variance scale² · df / (df − 2).

    Source:
        Lange, Little & Taylor (1989), Journal of the American Statistical Association 84, 881-896.

    Attributes:
        df: Degrees of freedom; above 2, so that the predictive variance exists.
        scale: The scale: known, or the start and prior median when learned.
        learn_scale: Learn log(scale) per member.
        log_scale_prior_std: Standard deviation of the Gaussian prior on log(scale).
    """

    df: Annotated[FiniteFloat, Field(gt=2)]
    scale: Annotated[FiniteFloat, Field(gt=0)]
    learn_scale: bool
    log_scale_prior_std: Annotated[FiniteFloat, Field(gt=0)]

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.CONTINUOUS})

    def num_outputs(self, target: TargetSpec) -> int:
        return 1

    def params(self) -> dict[str, tuple[float, float, float]]:
        if not self.learn_scale:
            return {}
        log_scale = math.log(self.scale)
        return {"log_scale": (log_scale, log_scale, self.log_scale_prior_std)}

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        loc = at_least_float32(outputs).squeeze(-1)
        log_scale = self._log_scale(loc, params)
        z = (y - loc) * (-log_scale).exp()
        return self._log_normaliser - log_scale - 0.5 * (self.df + 1) * (z.square() / self.df).log1p()

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> StudentTDistribution:
        loc = at_least_float32(outputs).squeeze(-1)
        return StudentTDistribution(self.df, loc, self._log_scale(loc, params).exp(), validate_args=False)

    @property
    def _log_normaliser(self) -> float:
        """log Γ((df + 1) / 2) − log Γ(df / 2) − ½ log(π df)."""
        half = 0.5 * self.df
        return math.lgamma(half + 0.5) - math.lgamma(half) - 0.5 * math.log(math.pi * self.df)

    def _log_scale(self, loc: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        if self.learn_scale:
            return params[LOG_SCALE].to(loc.dtype).unsqueeze(-1)
        return loc.new_full((), math.log(self.scale))
