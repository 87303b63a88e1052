"""Stochastic-gradient MCMC: what its methods share, namely the warm start, the preconditioner and the kept draws.

Shape letters: M members, P parameters of one member, N training examples.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Phase, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, Evaluated, descend, evaluate, take_step
from bdl_train.inference._draws import KeepEvery, Kept
from bdl_train.inference._noise import MemberNoise
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch

Preconditioner = Literal["none", "rmsprop"]
DECAY, FLOOR = 0.99, 1e-5
"""Of the running mean of squared gradients, and the least root of it (Li et al., 2016, their α and λ)."""


class ChainState(DescentState):
    """A chain a member: weights, momentum, preconditioner, noise and the draws kept so far.

    Attributes:
        momentum: `[M, P]`.
        squares: `[M, P]`, running mean of squared gradients, divided by `weight` to be unbiased.
        kept: Draws with the potential of the batch at which they were taken.
    """

    def __init__(self, problem: Problem, num_draws: int) -> None:
        super().__init__(problem)
        flat = self.stack.flat
        self.noise = MemberNoise(problem.noise_seeds, flat)
        self.momentum, self.squares = torch.zeros_like(flat), torch.zeros_like(flat)
        self.weight = 0.0
        self.kept = Kept(self.stack, num_draws, ("potential",))

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "noise": self.noise.state_dict(),
            "momentum": self.momentum,
            "squares": self.squares,
            "weight": self.weight,
            "kept": self.kept.state_dict(),
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.noise.load_state_dict(stored["noise"])
        self.momentum.copy_(stored["momentum"])
        self.squares.copy_(stored["squares"])
        self.weight = stored["weight"]
        self.kept.load_state_dict(stored["kept"])

    def learn_scale(self, found: Evaluated) -> None:
        """Take a gradient into the running mean of squares."""
        self.squares = found.where(torch.lerp(self.squares, found.grad.square(), 1 - DECAY), self.squares)
        self.weight = DECAY * self.weight + 1 - DECAY

    def scale(self) -> Tensor:
        """The preconditioner G `[M, P]`: positive, of geometric mean 1 in each member, so that `lr` keeps its size."""
        if self.weight == 0:
            return torch.ones_like(self.squares)
        log_root = ((self.squares / self.weight).sqrt() + FLOOR).log()
        return (log_root.mean(1, keepdim=True) - log_root).exp()


@dataclass(frozen=True, kw_only=True)
class StochasticGradientMcmc(Method[ChainState]):
    """Optimise up to `start_epoch`, then follow the kernel of a subclass and keep draws.

    The preconditioner learns during the burn-in alone and is fixed while draws are kept: the target is then the
    posterior, without the correction term that an adaptive one would need.

    Attributes:
        lr: Step size of the kernel, on the potential (nats per example); the noise follows from it, N and T.
        temperature: T; the chain targets exp(−N · potential / T). 1 = the posterior.
        start_epoch: First epoch (0-based) of the chain, after optimisation with `optimizer` and `scheduler`; null =
            half of `trainer.max_epochs`.
        burn_in_epochs: First epochs of the chain, of which nothing is kept.
        thin: Steps between two draws; null = draws are spread evenly over the chain after its burn-in.
        num_draws: K, draws a member keeps: its last ones.
        preconditioner: `rmsprop` scales step and noise of each weight by 1/√(mean squared gradient).
    """

    lr: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(ge=0)]
    start_epoch: Annotated[int, Field(ge=0)] | None
    burn_in_epochs: Annotated[int, Field(ge=0)]
    thin: Annotated[int, Field(ge=1)] | None
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]
    preconditioner: Preconditioner

    @property
    def target_temperature(self) -> float:
        return self.temperature

    def check(self, setting: Setting) -> None:
        start = self._start(setting)
        if start >= setting.num_epochs:
            raise UsageError(
                f"inference.start_epoch={start} starts the chains after the last epoch "
                f"(trainer.max_epochs={setting.num_epochs}): lower the first or raise the second."
            )
        if self.preconditioner != "none" and self.burn_in_epochs == 0:
            raise UsageError(
                f"inference.preconditioner={self.preconditioner} is learned during the burn-in: set "
                "inference.burn_in_epochs to 1 or more."
            )
        self._keep(setting)

    def phases(self, setting: Setting) -> list[Phase]:
        start, per_epoch = self._start(setting), setting.steps_per_epoch
        chain = Phase("sample", "shuffled", setting.num_epochs - start, per_epoch)
        return [Phase("warm start", "shuffled", start, per_epoch), chain] if start else [chain]

    def init(self, problem: Problem) -> ChainState:
        return ChainState(problem, self.num_draws)

    def step(self, state: ChainState, batch: Batch) -> StepLog:
        problem, setting = state.problem, state.problem.setting
        start = self._start(setting)
        if start and state.phase == 0:
            factor = problem.schedule.factor(state.step, start * setting.steps_per_epoch)
            return descend(state, batch, factor)
        found = evaluate(state, batch)
        if self.preconditioner != "none" and state.step < self._burn_in(setting):
            state.learn_scale(found)
        new_MP, momentum_MP = self.move(state, found.grad)
        state.stack.flat.copy_(found.where(new_MP, state.stack.flat))
        state.momentum = found.where(momentum_MP, state.momentum)
        take_step(state, found)
        if self._keep(setting).keeps(state.step):
            state.kept.take(state.stack, {"potential": found.log.potential})
        return found.log

    def posterior(self, state: ChainState) -> list[MemberPosterior]:
        return state.kept.posteriors()

    @abstractmethod
    def move(self, state: ChainState, grad: Tensor) -> tuple[Tensor, Tensor]:
        """One transition of every chain: new weights and momentum, `[M, P]` each.

        Args:
            state: Left as it is, apart from its noise.
            grad: Of the potential at the present weights, `[M, P]`.
        """

    def _start(self, setting: Setting) -> int:
        return setting.num_epochs // 2 if self.start_epoch is None else self.start_epoch

    def _burn_in(self, setting: Setting) -> int:
        return self.burn_in_epochs * setting.steps_per_epoch

    def _keep(self, setting: Setting) -> KeepEvery:
        steps = (setting.num_epochs - self._start(setting)) * setting.steps_per_epoch
        return KeepEvery.over(steps, self._burn_in(setting), self.thin, self.num_draws)
