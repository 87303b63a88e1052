"""Interacting members: what methods share whose members are particles of one approximation of the posterior.

Shape letters: M members, P parameters of one member.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Problem, StepLog
from bdl_train.inference._descent import DescentState, Evaluated, evaluate, take_step
from bdl_train.inference._kernels import Bandwidth
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.atoms import Atoms
from bdl_train.potential import Batch
from bdl_train.priors import BoundPrior


@dataclass(frozen=True, kw_only=True)
class Particles(Method[DescentState]):
    """The optimiser follows a direction that depends on all members; the posterior is one atom a member.

    No member stops early: the others would go on around it, as the particles of another approximation. A member that
    diverges is left out of the kernel from that step on. `trainer.clip_norm` bounds the direction.

    Attributes:
        temperature: T; the particles approximate exp(−N · potential / T). At 0 nothing repels.
        bandwidth: h of the kernel exp(−distance² / h); `median` = median² / log(members), anew at each step.
    """

    temperature: Annotated[float, Field(ge=0)]
    bandwidth: Bandwidth

    num_draws = 1

    @property
    def target_temperature(self) -> float:
        return self.temperature

    def check_prior(self, prior: BoundPrior) -> None:
        if prior.lead:
            raise UsageError(
                "prior.moments=per_member gives each member a posterior of its own, particles need one in common: use "
                "prior.moments=pooled."
            )

    def init(self, problem: Problem) -> DescentState:
        return DescentState(problem)

    def step(self, state: DescentState, batch: Batch) -> StepLog:
        problem = state.problem
        found = evaluate(state, batch)
        direction_MP = self.direction(state, batch, found)
        if (clip_norm := problem.clip_norm) is not None:
            norm_M = torch.linalg.vector_norm(direction_MP, dim=1)
            direction_MP = direction_MP * (clip_norm / norm_M.clamp(min=clip_norm))[:, None]
        lr_factor = problem.schedule.factor(state.step, problem.num_steps)
        state.optimizer.step(direction_MP, lr_factor, found.moving)
        take_step(state, found)
        return found.log

    def posterior(self, state: DescentState) -> list[MemberPosterior]:
        return Atoms.of_stack(state.stack)

    @abstractmethod
    def direction(self, state: DescentState, batch: Batch, found: Evaluated) -> Tensor:
        """What the optimiser takes for the gradient, `[M, P]`, in units of the potential's.

        Args:
            state: Left as it is.
            batch: Of this step.
            found: The potential's gradient there; members that do not move are out of the kernel.
        """
