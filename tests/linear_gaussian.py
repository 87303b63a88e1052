"""A linear model with known Gaussian noise and a Gaussian prior: the one network whose posterior is known in full.

Shape letters: M members, S draws, P parameters, N examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny_problems import Example, Work, work
from torch import Tensor, nn

from bdl_train.inference import Method
from bdl_train.likelihoods.gaussian import Gaussian as GaussianLikelihood
from bdl_train.models.mlp import Mlp
from bdl_train.posteriors import MemberPosterior
from bdl_train.priors.gaussian import Gaussian
from bdl_train.specs import InputSpec

NOISE_STD, PRIOR_STD = 0.5, 0.7


@dataclass(frozen=True)
class LinearGaussian:
    """y = x·w + b + N(0, noise²), with w, b ~ N(0, prior²) independent; float64.

    Attributes:
        x: `[N, P − 1]`, columns correlated.
        precision, mean: Of the posterior at temperature 1 in the order of the flat vector, `[P, P]` and `[P]`.
    """

    x: Tensor
    y: Tensor

    @classmethod
    def make(cls, num_data: int = 40, num_inputs: int = 3, *, correlation: float = 0.6) -> "LinearGaussian":
        generator = torch.Generator().manual_seed(3)
        z = torch.randn(num_data, num_inputs, generator=generator, dtype=torch.float64)
        shared = torch.randn(num_data, 1, generator=generator, dtype=torch.float64)
        x = (1 - correlation) ** 0.5 * z + correlation**0.5 * shared
        weights = torch.linspace(-1, 1, num_inputs, dtype=torch.float64)
        noise = torch.randn(num_data, generator=generator, dtype=torch.float64)
        return cls(x, x @ weights + 0.3 + NOISE_STD * noise)

    @property
    def design(self) -> Tensor:
        """`[N, P]`: the layer's weight comes first in the flat vector, its bias last."""
        return torch.cat([self.x, torch.ones(len(self.x), 1, dtype=self.x.dtype)], dim=1)

    @property
    def precision(self) -> Tensor:
        num_params = self.design.shape[1]
        eye = torch.eye(num_params, dtype=self.x.dtype)
        return self.design.T @ self.design / NOISE_STD**2 + eye / PRIOR_STD**2

    @property
    def mean(self) -> Tensor:
        return torch.linalg.solve(self.precision, self.design.T @ self.y / NOISE_STD**2)

    def covariance(self, temperature: float = 1.0) -> Tensor:
        """Of the posterior ∝ exp(−N · potential / T)."""
        return temperature * torch.linalg.inv(self.precision)

    def predictive(self, x: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and variance of y at new rows `[B, P − 1]`, noise included."""
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        variance = torch.einsum("bp,pq,bq->b", design, self.covariance(temperature), design)
        return design @ self.mean, variance + NOISE_STD**2

    def work(self, members: Sequence[int] = range(4), **settings: Any) -> Work:
        """The problem of a stack; `settings` as in `tiny_problems.work`."""
        spec = InputSpec(tuple(self.x.shape[1:]))
        likelihood = GaussianLikelihood(noise_std=NOISE_STD, learn_noise=False, log_noise_prior_std=1.0)

        def make_network() -> nn.Module:
            return Mlp(hidden=[], activation="tanh", dropout=0.0).network(spec, 1)

        of = Example(spec, self.x, self.y, likelihood, make_network)
        return work(of, list(members), prior=Gaussian(scale=PRIOR_STD, fan_in=False), **settings)


def posteriors_of(the_work: Work, method: Method[Any]) -> list[MemberPosterior]:
    """What each member has learned after all steps of the method."""
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    assert not state.failed.any()
    return method.posterior(state)


def draws_of(posteriors: Sequence[MemberPosterior], num_draws: int) -> Tensor:
    """Draws of each member, `[M, S, P]`."""
    return torch.stack([torch.stack([flat for flat, _ in one.draw(num_draws, seed=1)]) for one in posteriors])
