"""Stochastic-gradient MCMC: chains, and the methods that start them from optimised members.

Shape letters: M members, P parameters of one member, N training examples.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Phase, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, Evaluated, descend, evaluate, take_step
from bdl_train.inference._draws import KeepEvery, Kept
from bdl_train.inference._langevin import kick, kinetic_temperature, resting_momentum
from bdl_train.inference._noise import MemberNoise
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch

Preconditioner = Literal["none", "rmsprop"]
FLOOR = 0.1
"""Least root mean square of a weight's gradients, as a share of the mean over its member. With the 1e-5 of Li et al.
(2016) a dead unit, whose gradient is 0, wanders with steps a thousand times as large as those of the others until it
wakes, and the chain blows up."""


class ChainState(DescentState):
    """A chain a member: weights, momentum, preconditioner, noise and the draws kept so far.

    Attributes:
        momentum: `[M, P]`; None for dynamics that forget it at each step, and before the chain begins.
        squares: `[M, P]`, mean of the squared gradients learned from; None before a preconditioner learns.
        num_learned: Gradients in it.
        root: √G, `[M, P]`, of the preconditioner; None = 1.
        kept: Draws, with the potential of the batch whose step led to each, before that step.
    """

    traces: ClassVar[tuple[str, ...]] = ("potential",)
    """What is kept with each draw."""

    def __init__(self, problem: Problem, num_draws: int) -> None:
        super().__init__(problem)
        self.noise = MemberNoise(problem.noise_seeds, self.stack.flat)
        self.kept = Kept(self.stack, num_draws, self.traces)
        self.momentum: Tensor | None = None
        self.squares: Tensor | None = None
        self.num_learned = 0
        self.root: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        learned = {"momentum": self.momentum, "squares": self.squares, "root": self.root}
        return {
            **super().state_dict(),
            **{name: tensor for name, tensor in learned.items() if tensor is not None},
            "num_learned": self.num_learned,
            "noise": self.noise.state_dict(),
            "kept": self.kept.state_dict(),
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.noise.load_state_dict(stored["noise"])
        self.kept.load_state_dict(stored["kept"])
        self.num_learned = stored["num_learned"]
        device = self.stack.flat.device
        self.momentum, self.squares, self.root = (
            stored[name].to(device) if name in stored else None for name in ("momentum", "squares", "root")
        )

    def normal(self, heat: float) -> Tensor | None:
        """Standard normal numbers `[M, P]`; none are drawn for a chain without heat."""
        return self.noise.normal() if heat > 0 else None

    def learn_scale(self, found: Evaluated) -> None:
        """Take a gradient into the mean of squares."""
        self.num_learned += 1
        before = torch.zeros_like(found.grad) if self.squares is None else self.squares
        self.squares = found.where(torch.lerp(before, found.grad.square(), 1 / self.num_learned), before)

    def learned_scale(self) -> Tensor:
        """1 / (√(mean squared gradient) + floor), `[M, P]`; 1 for a member without any gradient."""
        if self.squares is None:
            raise RuntimeError("A preconditioner is asked for before it has seen a gradient.")
        root_MP = self.squares.sqrt()
        mean_M1 = root_MP.mean(1, keepdim=True)
        return torch.where(mean_M1 > 0, 1 / (root_MP + FLOOR * mean_M1), 1.0)


def advance(state: ChainState, found: Evaluated, *, lr: float, heat: float, friction: float) -> None:
    """One step of every healthy chain along `found.grad`: v ← `kick`, θ ← θ + v. `heat` is T/N."""
    flat = state.stack.flat
    kicked_MP = kick(
        state.momentum,
        found.grad,
        state.normal(heat),
        lr=lr,
        heat=heat,
        friction=friction,
        root=state.root,
    )
    flat.copy_(found.where(flat + kicked_MP, flat))
    if state.momentum is not None:
        state.momentum = found.where(kicked_MP, state.momentum)
    take_step(state, found)


class StationaryState(ChainState):
    """A chain of constant step.

    Attributes:
        thin: Steps between two draws, set when the chain begins: a run resumed with more epochs goes on with it.
    """

    thin = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "thin": self.thin}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.thin = stored["thin"]


@dataclass(frozen=True, kw_only=True)
class StochasticGradientMcmc(Method[StationaryState]):
    """Optimise up to `start_epoch`, then follow Langevin dynamics of constant step and keep draws.

    The preconditioner learns in the first half of the burn-in, while the chain moves without it, and is fixed from
    then on: the target stays the posterior, without the correction term that an adaptive one would need. Its geometric
    mean is 1 in each member, so that `lr` keeps its size.

    Attributes:
        lr: Step size of the chain, on the potential (nats per example); the noise follows from it, N and T.
        temperature: T; the chain targets exp(−N · potential / T). 1 = the posterior.
        start_epoch: First epoch (0-based) of the chain, after optimisation with `optimizer` and `scheduler`; null =
            half of `trainer.max_epochs`.
        burn_in_epochs: First epochs of the chain, of which nothing is kept; null = half of the chain.
        thin: Steps between two draws; null = as many as leave room for all draws after the burn-in.
        num_draws: K, draws a member keeps: its last ones.
        preconditioner: `rmsprop` scales step and noise of each weight by G ∝ 1/√(mean squared gradient).
    """

    lr: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(ge=0)]
    start_epoch: Annotated[int, Field(ge=0)] | None
    burn_in_epochs: Annotated[int, Field(ge=0)] | None
    thin: Annotated[int, Field(ge=1)] | None
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]
    preconditioner: Preconditioner

    when_diverged: ClassVar[str] = "lower inference.lr, or optimizer.lr of the warm start"

    @classmethod
    def unused_with(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return ("optimizer", "scheduler") if settings.get("start_epoch") == 0 else ()

    @property
    @abstractmethod
    def share_lost(self) -> float:
        """α: the share of the momentum that a step loses, in (0, 1]; at 1 there is none to keep."""

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
        if self.preconditioner != "none" and self._burn_in(setting) == 0:
            raise UsageError(
                f"inference.preconditioner={self.preconditioner} is learned during the burn-in, and there is none: "
                "set inference.burn_in_epochs to 1 or more; or raise trainer.max_epochs, of whose chain half is "
                "burn-in where inference.burn_in_epochs is null."
            )
        self._keep(setting)

    def phases(self, setting: Setting) -> list[Phase]:
        start, per_epoch = self._start(setting), setting.steps_per_epoch
        chain = Phase("sample", "shuffled", setting.num_epochs - start, per_epoch)
        return [Phase("warm start", "shuffled", start, per_epoch), chain] if start else [chain]

    def init(self, problem: Problem) -> StationaryState:
        state = StationaryState(problem, self.num_draws)
        if not self._start(problem.setting):
            self._begin(state)
        return state

    def enter(self, state: StationaryState) -> None:
        self._begin(state)

    def step(self, state: StationaryState, batch: Batch) -> StepLog:
        problem, setting = state.problem, state.problem.setting
        start = self._start(setting)
        if start and state.phase == 0:
            factor = problem.schedule.factor(state.step, start * setting.steps_per_epoch)
            return descend(state, batch, factor)
        found = evaluate(state, batch)
        if self.preconditioner != "none":
            self._precondition(state, found)
        advance(state, found, lr=self.lr, heat=self._heat(state), friction=self.share_lost)
        if replace(self._keep(setting), thin=state.thin).keeps(state.step):
            state.kept.take(state.stack, {"potential": found.log.potential})
        if state.momentum is None:
            return found.log
        kinetic_M = kinetic_temperature(
            state.momentum,
            lr=self.lr,
            friction=self.share_lost,
            num_data=state.potential.num_data,
            root=state.root,
        )
        return replace(found.log, traces={"kinetic_temperature": kinetic_M})

    def posterior(self, state: StationaryState) -> list[MemberPosterior]:
        return state.kept.posteriors()

    def _begin(self, state: StationaryState) -> None:
        state.thin = self._keep(state.problem.setting).thin
        if self.share_lost < 1:
            heat = self._heat(state)
            state.momentum = resting_momentum(
                state.normal(heat), state.stack.flat, lr=self.lr, heat=heat, friction=self.share_lost
            )

    def _precondition(self, state: StationaryState, found: Evaluated) -> None:
        num_learned = -(-self._burn_in(state.problem.setting) // 2)
        if state.step < num_learned:
            state.learn_scale(found)
        elif state.step == num_learned:
            log_MP = state.learned_scale().log()
            state.root = (0.5 * (log_MP - log_MP.mean(1, keepdim=True))).exp()
            state.squares = None
            if state.momentum is not None:
                # At rest under G = 1, it is at rest under the new G once √G times as large.
                state.momentum = found.where(state.root * state.momentum, state.momentum)

    def _heat(self, state: StationaryState) -> float:
        return self.temperature / state.potential.num_data

    def _start(self, setting: Setting) -> int:
        return setting.num_epochs // 2 if self.start_epoch is None else self.start_epoch

    def _burn_in(self, setting: Setting) -> int:
        chain = setting.num_epochs - self._start(setting)
        epochs = chain // 2 if self.burn_in_epochs is None else self.burn_in_epochs
        return epochs * setting.steps_per_epoch

    def _keep(self, setting: Setting) -> KeepEvery:
        steps = (setting.num_epochs - self._start(setting)) * setting.steps_per_epoch
        return KeepEvery.over(steps, self._burn_in(setting), self.thin, self.num_draws)
