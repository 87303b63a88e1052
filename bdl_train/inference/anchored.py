"""Anchored ensembles: each member's MAP estimate under a prior recentred at its own draw from it.

Shape letters: M members, N training examples, P parameters of one member.
"""

import logging
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, descend
from bdl_train.likelihoods import Likelihood
from bdl_train.likelihoods.gaussian import Gaussian as GaussianLikelihood
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.atoms import Atoms
from bdl_train.potential import Batch
from bdl_train.priors import BoundGaussian, BoundPrior

log = logging.getLogger(__name__)


class AnchoredState(DescentState):
    """A descent on a recentred prior; `noise` `[M, N]` is added to the targets, None when they are kept."""

    def __init__(self, problem: Problem, anchors: Tensor, noise: Tensor | None) -> None:
        prior = problem.potential.prior
        assert isinstance(prior, BoundGaussian)
        super().__init__(problem, replace(problem.potential, prior=prior.recentred(anchors)))
        self.anchors = anchors
        self.noise = noise


@dataclass(frozen=True, kw_only=True)
class Anchored(Method[AnchoredState]):
    """Member m minimises its potential with the prior's mean moved to a draw θ_m ~ p(θ).

    With perturbed targets y + σε, ε drawn once per member and example, this is randomise-then-optimise: in the
    linear-Gaussian case each member is an exact posterior draw, N(A⁻¹b, A⁻¹) with A = XᵀX/σ² + Λ. Without, the
    covariance over members is A⁻¹ΛA⁻¹, narrower than the posterior.

    Source:
        Pearce et al. (2020), arXiv:1810.05546, Section 3 (anchors); Bardsley et al. (2014), SIAM J. Sci. Comput.
        36(4), Section 2 (randomise-then-optimise).

    Attributes:
        perturb_targets: Perturb the targets with the likelihood's noise. null = where it is defined: a Gaussian
            likelihood of known noise (`likelihood.learn_noise=false`).
        patience: As in `deep_ensemble`. Stopping early leaves the exact form; null trains to the end.
    """

    perturb_targets: bool | None
    patience: Annotated[int, Field(ge=1)] | None

    num_draws = 1

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    def check(self, setting: Setting) -> None:
        if self.perturb_targets and _known_noise(setting.likelihood) is None:
            raise UsageError(
                "inference.perturb_targets=true needs the noise of a Gaussian likelihood: use likelihood=gaussian "
                "with likelihood.learn_noise=false, or inference.perturb_targets=false for the form without "
                "perturbed targets."
            )

    def check_prior(self, prior: BoundPrior) -> None:
        if not isinstance(prior, BoundGaussian):
            raise UsageError(
                "inference=anchored needs a Gaussian prior for every parameter: a recentred draw of another family "
                "is no posterior sample. Use prior=gaussian, or Gaussians in every entry of prior.patterns."
            )

    def init(self, problem: Problem) -> AnchoredState:
        potential, flat = problem.potential, problem.stack.flat
        prior = potential.prior
        assert isinstance(prior, BoundGaussian)
        noise_std = _known_noise(potential.likelihood)
        perturb = noise_std is not None if self.perturb_targets is None else self.perturb_targets
        if self.perturb_targets is None:
            log.info(
                "Targets are %s", "perturbed with the known noise" if perturb else "kept: no known noise"
            )
        anchors, noise = [], []
        for m, seed in enumerate(problem.noise_seeds):
            generator = torch.Generator().manual_seed(seed)
            mean, std = prior.mean.expand_as(flat)[m].cpu(), prior.std.expand_as(flat)[m].cpu()
            anchors.append(mean + std * torch.empty_like(mean).normal_(generator=generator))
            if perturb:
                assert noise_std is not None
                noise.append(
                    noise_std * torch.empty(potential.num_data, dtype=flat.dtype).normal_(generator=generator)
                )
        return AnchoredState(
            problem, torch.stack(anchors).to(flat), torch.stack(noise).to(flat.device) if perturb else None
        )

    def step(self, state: AnchoredState, batch: Batch) -> StepLog:
        problem = state.problem
        if state.noise is not None:
            if batch.shared:
                noise = state.noise[:, batch.index]
                batch = Batch(
                    batch.x.expand(len(noise), *batch.x.shape), batch.y + noise, batch.index.expand_as(noise)
                )
            else:
                batch = replace(batch, y=batch.y + state.noise.gather(1, batch.index))
        return descend(state, batch, problem.schedule.factor(state.step, problem.num_steps))

    def posterior(self, state: AnchoredState) -> list[MemberPosterior]:
        return Atoms.of_stack(state.stack)


def _known_noise(likelihood: Likelihood) -> float | None:
    """The noise's standard deviation in units of the standardised target, when it is known."""
    if isinstance(likelihood, GaussianLikelihood) and not likelihood.learn_noise:
        return likelihood.noise_std
    return None
