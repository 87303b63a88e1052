"""Mean-field variational inference: a diagonal Gaussian a member, by reparameterised gradients (Blundell et al., 2015).

Shape letters: M members, P parameters of one member, N training examples.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.inference import Method, Problem, StepLog
from bdl_train.inference._descent import DescentState, take_step
from bdl_train.inference._noise import MemberNoise
from bdl_train.inference._optimizer import FlatOptimizer
from bdl_train.inference._variational import clipped, entropy, expected_potential, gaussians
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch


class MeanFieldState(DescentState):
    """Mean and log standard deviation of every weight; the stack's weights are the mean.

    Attributes:
        log_std: `[M, P]`.
    """

    def __init__(self, problem: Problem, initial_std: float) -> None:
        super().__init__(problem)
        flat = self.stack.flat
        # One tensor [M, 2P] for the optimiser, of which the mean and the log std are views.
        both = torch.cat([flat, torch.full_like(flat, math.log(initial_std))], dim=1)
        mean, self.log_std = both.tensor_split(2, dim=1)
        self.stack = replace(self.stack, flat=mean)
        self.optimizer = FlatOptimizer(problem.make_optimizer, both)
        self.noise = MemberNoise(problem.noise_seeds, flat)

    @property
    def std(self) -> Tensor:
        return self.log_std.exp()

    @property
    def beside_weights(self) -> dict[str, Tensor]:
        return {"log_std": self.log_std}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "log_std": self.log_std, "noise": self.noise.state_dict()}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.log_std.copy_(stored["log_std"])
        self.noise.load_state_dict(stored["noise"])


@dataclass(frozen=True, kw_only=True)
class MeanFieldVi(Method[MeanFieldState]):
    """Each member minimises E_q[potential] − (T/N) · H[q] over q = N(mean, diag(std²)), in nats per example.

    That is T/N · KL(q ‖ exp(−N · potential / T)) up to a constant: at T = 1, −ELBO/N, with the KL divergence to the
    prior summed over weights. At T ≠ 1 the prior is tempered with the likelihood; to weigh the KL alone would be
    another target. Of a Gaussian posterior with precision Λ the optimum has its mean and the variances 1/diag(Λ):
    never wider than the marginals.

    The optimiser works on (mean, log std): a step on log std is relative, the same at every scale, and the gradient of
    the entropy is the constant T/N. `optimizer.weight_decay` would pull log std to 0; the prior is the regulariser.

    Source:
        Blundell et al. (2015), arXiv:1505.05424, Section 3.2, with log std for their softplus; Wenzel et al. (2020),
        arXiv:2002.02405, Section 2.3, for a temperature on the whole posterior.

    Attributes:
        temperature: T; the target is exp(−N · potential / T). 1 = the posterior.
        initial_std: Of every weight. At the prior's the noise hides the data, and the means stay near 0.
        num_train_samples: Weight draws a step, in pairs ±; each costs one gradient.
        num_draws: Posterior draws a member contributes to the predictive.
        patience: Epochs without a better validation NLL of the mean after which a member stops and takes back its best
            mean and std; null = train to `trainer.max_epochs`.
    """

    temperature: Annotated[float, Field(gt=0)]
    initial_std: Annotated[float, Field(gt=0)]
    num_train_samples: Annotated[int, Field(ge=1)]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]
    patience: Annotated[int, Field(ge=1)] | None

    needs_per_example_likelihood = True

    @property
    def target_temperature(self) -> float:
        return self.temperature

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    def init(self, problem: Problem) -> MeanFieldState:
        return MeanFieldState(problem, self.initial_std)

    def step(self, state: MeanFieldState, batch: Batch) -> StepLog:
        problem, std_MP = state.problem, state.std
        found, grad_std_MP = expected_potential(state, batch, std_MP, state.noise, self.num_train_samples)
        share = self.temperature / state.potential.num_data
        grad = torch.cat([found.grad, std_MP * grad_std_MP - share], dim=1)
        factor = problem.schedule.factor(state.step, problem.num_steps)
        state.optimizer.step(clipped(grad, problem.clip_norm), factor, found.moving)
        take_step(state, found)
        objective_M = found.log.potential - share * entropy(std_MP)
        return replace(found.log, traces={"objective": objective_M})

    def posterior(self, state: MeanFieldState) -> list[MemberPosterior]:
        return gaussians(state.stack, state.std.square())
