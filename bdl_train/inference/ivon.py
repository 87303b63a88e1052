"""IVON: a diagonal Gaussian a member, by natural gradients in the form of a Newton-like optimiser (Shen et al., 2024).

Shape letters: M members, P parameters of one member, N training examples.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Problem, StepLog
from bdl_train.inference._descent import DescentState, take_step
from bdl_train.inference._noise import MemberNoise
from bdl_train.inference._variational import clipped, expected_potential, gaussians
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch
from bdl_train.priors import BoundGaussian, BoundPrior


class IvonState(DescentState):
    """Mean (the stack's weights), gradient momentum and curvature of every weight.

    Attributes:
        prior: Gaussian.
        momentum: `[M, P]`, g of the paper.
        curvature: `[M, P]`, h: running mean of the diagonal of E_q[∇² nll], nats per example.
    """

    def __init__(self, problem: Problem, initial_curvature: float) -> None:
        super().__init__(problem)
        prior, flat = problem.potential.prior, self.stack.flat
        assert isinstance(prior, BoundGaussian)
        self.prior = prior
        self.momentum = torch.zeros_like(flat)
        self.curvature = torch.full_like(flat, initial_curvature)
        self.noise = MemberNoise(problem.noise_seeds, flat)

    @property
    def decay(self) -> Tensor:
        """δ, the prior's precision over N, `[P]` or `[M, P]`."""
        return self.prior.precision / self.potential.num_data

    def variance(self, temperature: float) -> Tensor:
        """T / (N (h + δ)), `[M, P]`."""
        return temperature / (self.potential.num_data * (self.curvature + self.decay))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "momentum": self.momentum,
            "curvature": self.curvature,
            "noise": self.noise.state_dict(),
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.momentum.copy_(stored["momentum"])
        self.curvature.copy_(stored["curvature"])
        self.noise.load_state_dict(stored["noise"])


def next_curvature(curvature: Tensor, estimate: Tensor, decay: Tensor, curvature_decay: float) -> Tensor:
    """h ← β₂ h + (1 − β₂) ĥ + ½ (1 − β₂)² (h − ĥ)² / (h + δ), elementwise.

    The last term is that of a geodesic of the Gaussians: h + δ stays above half of what it was, whatever ĥ.

    Source:
        Shen et al. (2024), arXiv:2402.17641, Algorithm 1, line 5; Lin et al. (2020), arXiv:2002.10060.
    """
    change = (1 - curvature_decay) * (estimate - curvature)
    return curvature + change + 0.5 * change.square() / (curvature + decay)


@dataclass(frozen=True, kw_only=True)
class Ivon(Method[IvonState]):
    """Each member minimises E_q[potential] − (T/N) · H[q] over q = N(m, diag(σ²)), σ² = T / (N (h + δ)).

    The paper's δ is the prior's precision over N, weight by weight; its λ is N/T, so that the prior is tempered with
    the likelihood and the target is exp(−N · potential / T). A prior mean m₀ other than 0 makes δ·m into δ·(m − m₀).
    Of a Gaussian posterior with precision Λ the fixed point has its mean and the variances T/diag(Λ), as
    `mean_field_vi`; noise in ĥ makes h too large by about ½ (1 − β₂) Var(ĥ) / (h + δ).

    Source:
        Shen et al. (2024), arXiv:2402.17641, Algorithm 1, with draws in pairs θ = m ± σz where `num_train_samples`
        is even: ĥ is then a second difference, far less noisy than ĝ·(θ − m)/σ² of one draw.

    Attributes:
        lr: α, share of a Newton step ∇/(h + δ); times `scheduler`.
        temperature: T. 1 = the posterior.
        initial_curvature: h₀, nats per example; the initial std is √(T / (N (h₀ + δ))).
        momentum: β₁ of the gradient.
        curvature_decay: β₂; h forgets over about 1/(1 − β₂) steps.
        clip_radius: ξ, largest change (before `lr`) of a weight in a step; null = none.
        num_train_samples: Weight draws a step; each costs one gradient.
        num_draws: Posterior draws a member contributes to the predictive.
    """

    lr: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(gt=0)]
    initial_curvature: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    curvature_decay: Annotated[float, Field(ge=0, lt=1)]
    clip_radius: Annotated[float, Field(gt=0)] | None
    num_train_samples: Annotated[int, Field(ge=1)]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    needs_per_example_likelihood = True
    unused_groups = ("optimizer",)
    when_diverged = "lower inference.lr or inference.clip_radius"

    @property
    def target_temperature(self) -> float:
        return self.temperature

    def check_prior(self, prior: BoundPrior) -> None:
        if not isinstance(prior, BoundGaussian):
            raise UsageError(
                f"inference=ivon takes its weight decay from a Gaussian prior of every parameter, got "
                f"{type(prior).__name__}: use prior=gaussian, Gaussians in every entry of prior.patterns, or "
                "inference=mean_field_vi."
            )

    def init(self, problem: Problem) -> IvonState:
        return IvonState(problem, self.initial_curvature)

    def step(self, state: IvonState, batch: Batch) -> StepLog:
        problem, mean_MP, decay = state.problem, state.stack.flat, state.decay
        std_MP = state.variance(self.temperature).sqrt()
        found, grad_std_MP = expected_potential(state, batch, std_MP, state.noise, self.num_train_samples)
        # Both estimates hold the prior's part exactly; momentum and curvature are of the likelihood alone.
        pull_MP = decay * (mean_MP - state.prior.mean)
        grad_MP = clipped(found.grad - pull_MP, problem.clip_norm)
        momentum_MP = self.momentum * state.momentum + (1 - self.momentum) * grad_MP
        estimate_MP = grad_std_MP / std_MP - decay
        curvature_MP = next_curvature(state.curvature, estimate_MP, decay, self.curvature_decay)
        unbiased_MP = momentum_MP / (1 - self.momentum ** (state.step + 1))
        change_MP = (unbiased_MP + pull_MP) / (curvature_MP + decay)
        if self.clip_radius is not None:
            change_MP = change_MP.clamp(-self.clip_radius, self.clip_radius)
        lr = self.lr * problem.schedule.factor(state.step, problem.num_steps)
        mean_MP.copy_(found.where(mean_MP - lr * change_MP, mean_MP))
        state.momentum = found.where(momentum_MP, state.momentum)
        state.curvature = found.where(curvature_MP, state.curvature)
        take_step(state, found)
        return replace(found.log, traces={"curvature": state.curvature.mean(1)})

    def posterior(self, state: IvonState) -> list[MemberPosterior]:
        return gaussians(state.stack, state.variance(self.temperature))
