"""Hamiltonian Monte Carlo on all rows (Neal, 2011), a chain from each optimised member of an ensemble.

Shape letters: M members, P parameters of one member, N training examples.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Phase, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, Evaluated, descend, evaluate, take_step
from bdl_train.inference._draws import KeepEvery, Kept
from bdl_train.inference._dual_averaging import DualAveraging, reasonable_step
from bdl_train.inference._hamiltonian import Hamiltonian, Point, acceptance
from bdl_train.inference._mass_matrix import FEWEST_STEPS, DiagonalMass, windows
from bdl_train.inference._noise import MemberNoise
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch

EPOCHS = 20
"""Of the chain: members are scored on the validation part about so many times."""
_GOLDEN = (math.sqrt(5) - 1) / 2


class HmcState(DescentState):
    """A descent, then chains.

    Attributes:
        steps: Step sizes of the chains.
        mass: Their mass matrices.
        kept: Draws, with the potential there, and acceptance probability and step size of the trajectory before.
    """

    def __init__(self, problem: Problem, num_draws: int) -> None:
        super().__init__(problem)
        flat = self.stack.flat
        self.noise = MemberNoise(problem.noise_seeds, flat)
        self.steps, self.mass = DualAveraging.start(flat), DiagonalMass.identity(flat)
        self.kept = Kept(self.stack, num_draws, ("potential", "accept_prob", "step_size"))
        self.hamiltonian: Hamiltonian | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "noise": self.noise.state_dict(),
            "steps": self.steps.state_dict(),
            "mass": self.mass.state_dict(),
            "kept": self.kept.state_dict(),
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        device = self.stack.flat.device
        self.noise.load_state_dict(stored["noise"])
        self.steps = DualAveraging.from_state_dict(stored["steps"], device)
        self.mass = DiagonalMass.from_state_dict(stored["mass"], device)
        self.kept.load_state_dict(stored["kept"])


@dataclass(frozen=True, kw_only=True)
class Hmc(Method[HmcState]):
    """Optimise for `trainer.max_epochs`, then follow Hamiltonian trajectories, each accepted or refused.

    The chain's stationary law is exp(−N · potential / T) itself, whatever the step size: no term of the
    discretisation remains. Over the warm-up each chain adapts its step size and mass; after it both are fixed.

    Source:
        Neal (2011), arXiv:1206.1901, Section 3 (the algorithm), 4.2 (varied lengths); Hoffman & Gelman (2014),
        arXiv:1111.4246, Section 3.2 (the step size).

    Attributes:
        patience: As in `deep_ensemble`, for the optimisation before the chain.
        temperature: T; the chain targets exp(−N · potential / T). 1 = the posterior.
        num_warmup: Trajectories that adapt step size and mass, of which nothing is kept.
        num_draws: K, draws a member keeps.
        thin: Trajectories between two draws.
        num_leapfrog: Leapfrog steps of the longest trajectory, a full-batch gradient each; the shortest has half as
            many.
        target_accept: Mean acceptance probability that the step size adapts to.
        mass: `diagonal`: the chain's variances, learned in windows of the warm-up; `identity`.
    """

    patience: Annotated[int, Field(ge=1)] | None
    temperature: Annotated[float, Field(gt=0)]
    num_warmup: Annotated[int, Field(ge=1)]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]
    thin: Annotated[int, Field(ge=1)]
    num_leapfrog: Annotated[int, Field(ge=1)]
    target_accept: Annotated[float, Field(gt=0, lt=1)]
    mass: Literal["diagonal", "identity"]

    needs_per_example_likelihood: ClassVar[bool] = True
    needs_fixed_potential: ClassVar[bool] = True
    when_diverged: ClassVar[str] = "lower optimizer.lr of the warm start"

    @property
    def target_temperature(self) -> float:
        return self.temperature

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    def check(self, setting: Setting) -> None:
        if self.mass != "identity" and not self._windows:
            raise UsageError(
                f"inference.mass={self.mass} is learned in a warm-up of {FEWEST_STEPS} trajectories or more, got "
                f"inference.num_warmup={self.num_warmup}: raise it, or use inference.mass=identity."
            )

    def phases(self, setting: Setting) -> list[Phase]:
        needed = self.num_warmup + self.num_draws * self.thin
        # Whole epochs: the few trajectories more come between the warm-up and the first draw.
        per_epoch = math.ceil(needed / EPOCHS)
        stops = self.patience is not None
        return [
            Phase("warm start", "shuffled", setting.num_epochs, setting.steps_per_epoch, stops),
            Phase("sample", "all", math.ceil(needed / per_epoch), per_epoch),
        ]

    def steps_to_compile(self, setting: Setting) -> int:
        return (self.num_warmup + self.num_draws * self.thin) * self.num_leapfrog

    def init(self, problem: Problem) -> HmcState:
        return HmcState(problem, self.num_draws)

    def step(self, state: HmcState, batch: Batch) -> StepLog:
        if state.phase == 0:
            problem = state.problem
            return descend(state, batch, problem.schedule.factor(state.step, problem.num_steps))
        if state.hamiltonian is None:
            compiled = state.problem.compile_steps
            state.hamiltonian = Hamiltonian(state.potential, self.temperature, compiled=compiled)
        found = evaluate(state, batch)
        buffers, inverse_mass = state.stack.buffers, state.mass.inverse
        if state.step < self.num_warmup and state.step in self._restarts:
            self._restart(state, state.hamiltonian, found, batch)
        start = _start(state, found)
        sizes = state.steps.step_size
        num_steps = trajectory_length(state.step, self.num_leapfrog)
        end = state.hamiltonian.leapfrog(start, sizes, inverse_mass, num_steps, buffers, batch)
        energy_error = state.hamiltonian.energy(end, inverse_mass) - state.hamiltonian.energy(
            start, inverse_mass
        )
        accept_prob = acceptance(energy_error)
        accepted = (state.noise.uniform() < accept_prob) & state.active
        new = Point(*(_where(accepted, one, other) for one, other in zip(end, start, strict=True)))
        state.stack.flat.copy_(new.flat)
        take_step(state, found)
        self._adapt(state, accept_prob)
        traces = {"accept_prob": accept_prob, "step_size": sizes, "energy_error": energy_error}
        if self._keep(state.problem.setting).keeps(state.step):
            state.kept.take(state.stack, {"potential": new.potential, **traces})
        return StepLog(new.potential, new.nll, torch.linalg.vector_norm(new.grad, dim=1), traces)

    def posterior(self, state: HmcState) -> list[MemberPosterior]:
        return state.kept.posteriors()

    def _restart(self, state: HmcState, hamiltonian: Hamiltonian, found: Evaluated, batch: Batch) -> None:
        """Find a step size for the present mass, and adapt from there."""
        start, inverse_mass = _start(state, found), state.mass.inverse
        before = hamiltonian.energy(start, inverse_mass)

        def accept_prob(sizes: Tensor) -> Tensor:
            end = hamiltonian.leapfrog(start, sizes, inverse_mass, 1, state.stack.buffers, batch)
            return acceptance(hamiltonian.energy(end, inverse_mass) - before)

        state.steps.restart(reasonable_step(accept_prob, state.steps.step_size, state.active), state.active)

    def _adapt(self, state: HmcState, accept_prob: Tensor) -> None:
        """Learn from the trajectory after which `state.step` are done."""
        done = state.step
        if done > self.num_warmup:
            return
        state.steps.learn(accept_prob, self.target_accept, state.active)
        for window in self._windows:
            if done - 1 in window:
                state.mass.take(state.stack.flat, state.active)
            if done == window.stop:
                state.mass.adopt(state.active)
        if done == self.num_warmup:
            state.steps.settle(state.active)

    @cached_property
    def _windows(self) -> tuple[range, ...]:
        return windows(self.num_warmup) if self.mass == "diagonal" else ()

    @cached_property
    def _restarts(self) -> set[int]:
        return {0, *(window.stop for window in self._windows)}

    def _keep(self, setting: Setting) -> KeepEvery:
        num_steps = self.phases(setting)[1].num_steps
        return KeepEvery.over(num_steps, self.num_warmup, self.thin, self.num_draws)


def trajectory_length(trajectory: int, most: int) -> int:
    """Leapfrog steps of a trajectory: evenly spread from ⌈most / 2⌉ to `most`, so that none of the periods is met.

    It follows from the number of the trajectory alone: all members of a stack take equally many steps, none waits, and
    each step of the chain leaves the target as it is, which is all that is asked.
    """
    fewest = math.ceil(most / 2)
    return fewest + int((trajectory + 1) * _GOLDEN % 1 * (most - fewest + 1))


def _start(state: HmcState, found: Evaluated) -> Point:
    """The present weights with fresh momenta r ~ N(0, M)."""
    momentum = state.noise.normal() * state.mass.inverse.rsqrt()
    return Point(state.stack.flat, momentum, found.grad, found.log.potential, found.log.nll)


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
