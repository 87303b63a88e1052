"""Cyclical stochastic-gradient MCMC (Zhang et al., 2020): chains that leave a mode for another in every cycle.

Shape letters: M members, P parameters of one member, N training examples.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Phase, Problem, Setting, StepLog
from bdl_train.inference._descent import Evaluated, evaluate
from bdl_train.inference._draws import KeepEvery
from bdl_train.inference._sgmcmc import ChainState, Preconditioner, advance
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch

Kernel = Literal["sgld", "sghmc"]
FRICTION: dict[Kernel, float] = {"sgld": 1.0, "sghmc": 0.1}
"""α where the setting is null: Langevin dynamics keep no momentum, and 0.9 of it is what descent usually keeps."""


@dataclass(frozen=True)
class Cycles:
    """Steps in cycles, each of an exploration stage and a sampling stage.

    Attributes:
        num_steps: K, of the cycles planned; later ones have the same lengths.
        num_cycles: C. Their lengths differ by one step at most; where C divides K they are K/C, as in the paper.
        exploration: β, share of a cycle that explores.
    """

    num_steps: int
    num_cycles: int
    exploration: float

    def cycle(self, step: int) -> int:
        """Number of the step's cycle, 0-based."""
        return ((step + 1) * self.num_cycles - 1) // self.num_steps

    def place(self, step: int) -> tuple[int, int]:
        """Where in its cycle the step is, 0-based, and the length of the cycle."""
        cycle = self.cycle(step)
        start, stop = (self.num_steps * c // self.num_cycles for c in (cycle, cycle + 1))
        return step - start, stop - start

    def lr_factor(self, step: int) -> float:
        """½ (cos(π r / L) + 1) at place r of a cycle of L steps (Zhang et al., equation 1)."""
        at, length = self.place(step)
        return 0.5 * (math.cos(math.pi * at / length) + 1)

    def momentum_factor(self, step: int) -> float:
        """√(lr_k / lr_{k−1}), what a momentum at rest is to be multiplied by; 0 at the start of a cycle."""
        at, _ = self.place(step)
        return math.sqrt(self.lr_factor(step) / self.lr_factor(step - 1)) if at else 0.0

    def sampling_starts(self, length: int) -> int:
        """The first place r of a cycle with r / L ≥ β (Zhang et al., Algorithm 1); L if there is none."""
        return bisect_left(range(length), self.exploration, key=lambda at: at / length)

    def samples(self, step: int) -> bool:
        """Whether the step belongs to a sampling stage."""
        at, length = self.place(step)
        return at >= self.sampling_starts(length)

    def keeps(self, step: int, per_cycle: int) -> bool:
        """Whether the state after the step is one of the draws, spread evenly over the sampling stage up to its end."""
        at, length = self.place(step)
        start = self.sampling_starts(length)
        return KeepEvery.over(length - start, 0, None, per_cycle).keeps(at - start + 1)

    @property
    def fewest_sampling_steps(self) -> int:
        """Of one cycle."""
        shortest = self.num_steps // self.num_cycles
        return shortest - self.sampling_starts(shortest)


class CyclicalState(ChainState):
    """A chain in cycles.

    Attributes:
        num_steps: Of the cycles as planned at the start: a run resumed with more epochs adds cycles of that length.
    """

    traces = ("potential", "cycle")

    def __init__(self, problem: Problem, num_draws: int) -> None:
        super().__init__(problem, num_draws)
        self.num_steps = problem.num_steps

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.num_steps = stored["num_steps"]


@dataclass(frozen=True, kw_only=True)
class CyclicalSgmcmc(Method[CyclicalState]):
    """Cycles of a falling step size over the whole of `trainer.max_epochs`; draws come from the late part of each.

    A cycle starts with steps large enough to leave a mode. Its first share β descends without noise, the rest follows
    Langevin dynamics of the same step sizes, with the noise that belongs to them:

        lr_k = lr / 2 · (cos(π r / L) + 1)   at step r = 0, ..., L − 1 of a cycle of L steps.

    A momentum starts each cycle at 0 and is kept in units of √lr_k, as it is where dynamics change their time step:
    v ← √(lr_k / lr_{k−1}) v. Taken over as it is, as the paper has it, it is too large for the smaller steps to come:
    draws at the end of a cycle of 160 steps are then 1.6 times too wide with α = 0.1 and lr · curvature near 0.1.

    Source:
        Zhang et al. (2020), arXiv:1902.03932, equation 1 and Algorithm 1.

    Attributes:
        lr: Step size at the start of a cycle, on the potential (nats per example) unless preconditioned.
        temperature: T; sampling stages target exp(−N · potential / T). 1 = the posterior.
        num_cycles: C.
        exploration: β, share of a cycle that descends without noise.
        kernel: Dynamics without (`sgld`) or with momentum (`sghmc`), in both stages.
        friction: α of `sghmc`, the share of the momentum that a step loses; null = 0.1. `sgld` takes none.
        preconditioner: `rmsprop` scales the steps of each weight by G = 1/√(mean squared gradient), learned while
            each cycle explores and fixed while it samples, where it scales the noise too; `lr` is then in units of
            weights, as Adam's. The paper has none: plain descent from the start of a cycle asks for another `lr` for
            each data set.
        num_draws: K, draws a member keeps: K / C of each cycle.
    """

    lr: Annotated[float, Field(gt=0)]
    temperature: Annotated[float, Field(ge=0)]
    num_cycles: Annotated[int, Field(ge=1)]
    exploration: Annotated[float, Field(ge=0, lt=1)]
    kernel: Kernel
    friction: Annotated[float, Field(gt=0, le=1)] | None
    preconditioner: Preconditioner
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    unused_groups = ("optimizer", "scheduler")
    when_diverged = "lower inference.lr"

    def __post_init__(self) -> None:
        if self.num_draws % self.num_cycles:
            raise UsageError(
                f"inference.num_draws={self.num_draws} must be a multiple of inference.num_cycles={self.num_cycles}: "
                "each cycle gives as many draws as the others."
            )
        if self.preconditioner != "none" and self.exploration == 0:
            raise UsageError(
                f"inference.preconditioner={self.preconditioner} is learned while exploring: set inference.exploration "
                "above 0, or inference.preconditioner=none."
            )
        if self.friction is not None and FRICTION[self.kernel] == 1:
            raise UsageError(
                f"inference.friction={self.friction} means nothing to inference.kernel={self.kernel}, which keeps no "
                "momentum: set it to null, or use inference.kernel=sghmc."
            )

    @property
    def target_temperature(self) -> float:
        return self.temperature

    @property
    def share_lost(self) -> float:
        """α."""
        return FRICTION[self.kernel] if self.friction is None else self.friction

    def check(self, setting: Setting) -> None:
        found, needed = (
            self.cycles(setting.num_steps).fewest_sampling_steps,
            self.num_draws // self.num_cycles,
        )
        if found < needed:
            raise UsageError(
                f"{needed} draws a cycle (inference.num_draws / inference.num_cycles) need as many sampling steps, "
                f"there are {found} in a cycle of {setting.num_steps // self.num_cycles} steps with "
                f"inference.exploration={self.exploration}: raise trainer.max_epochs, or lower inference.num_draws, "
                "inference.num_cycles or inference.exploration."
            )

    def phases(self, setting: Setting) -> list[Phase]:
        return [Phase("cycles", "shuffled", setting.num_epochs, setting.steps_per_epoch)]

    def init(self, problem: Problem) -> CyclicalState:
        state = CyclicalState(problem, self.num_draws)
        if self.share_lost < 1:
            state.momentum = torch.zeros_like(state.stack.flat)
        return state

    def step(self, state: CyclicalState, batch: Batch) -> StepLog:
        cycles, at = self.cycles(state.num_steps), state.step
        samples, lr = cycles.samples(at), self.lr * cycles.lr_factor(at)
        found = evaluate(state, batch)
        heat = self.temperature / state.potential.num_data if samples else 0.0
        if self.preconditioner != "none" and not samples:
            state.num_learned, _ = cycles.place(at)  # each cycle learns anew
            state.learn_scale(found)
            root_MP = state.learned_scale().sqrt()
            state.root = root_MP if state.root is None else found.where(root_MP, state.root)
        if state.momentum is not None:
            state.momentum = found.where(cycles.momentum_factor(at) * state.momentum, state.momentum)
        # A clipped gradient would be another target: only the descent is clipped.
        moved = found if samples else _clipped(found, state.problem.clip_norm)
        advance(state, moved, lr=lr, heat=heat, friction=self.share_lost)
        if cycles.keeps(at, self.num_draws // self.num_cycles):
            cycle_M = torch.full_like(found.log.potential, cycles.cycle(at))
            state.kept.take(state.stack, {"potential": found.log.potential, "cycle": cycle_M})
        lr_M = torch.full_like(found.log.potential, lr)
        return replace(found.log, traces={"lr": lr_M})

    def posterior(self, state: CyclicalState) -> list[MemberPosterior]:
        return state.kept.posteriors()

    def cycles(self, num_steps: int) -> Cycles:
        """How the steps divide into cycles."""
        return Cycles(num_steps, self.num_cycles, self.exploration)


def _clipped(found: Evaluated, clip_norm: float | None) -> Evaluated:
    if clip_norm is None:
        return found
    factor_M = clip_norm / found.log.grad_norm.clamp(min=clip_norm)
    return replace(found, grad=found.grad * factor_M[:, None])
