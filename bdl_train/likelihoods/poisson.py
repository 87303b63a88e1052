"""Poisson likelihood of counts, by a log-rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.distributions import Poisson as PoissonDistribution

from bdl_train.likelihoods import Likelihood, at_least_float32
from bdl_train.specs import TargetKind, TargetSpec


@dataclass(frozen=True, kw_only=True)
class Poisson(Likelihood):
    """y | x ~ Poisson(exp(output)), one log-rate `[..., B, 1]`.

    The terms of log p are computed in float64: at a rate of a million they are near 10⁷ and cancel down to
    about 8 nats, which float32 gets wrong by whole nats, and float32 has no exp above 88. The rate is not
    clamped, for a clamp has no gradient to come back with.
    """

    kinds: ClassVar[frozenset[TargetKind]] = frozenset({TargetKind.COUNT})

    def num_outputs(self, target: TargetSpec) -> int:
        return 1

    def log_prob(self, outputs: Tensor, y: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        log_rate, count = outputs.squeeze(-1).double(), y.double()
        log_prob = count * log_rate - log_rate.exp() - (count + 1).lgamma()
        return log_prob.to(at_least_float32(outputs).dtype)

    def distribution(self, outputs: Tensor, params: Mapping[str, Tensor]) -> PoissonDistribution:
        """Rates in float64. Its `log_prob` is accurate for large counts given in float64 (not int64)."""
        return PoissonDistribution(outputs.squeeze(-1).double().exp(), validate_args=False)
