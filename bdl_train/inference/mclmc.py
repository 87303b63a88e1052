"""Microcanonical Langevin Monte Carlo (Robnik & Seljak, 2023), a chain from each optimised member of an ensemble.

Shape letters: M members, P parameters of one member, N training examples, C coordinates, T steps.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.inference import Method, Phase, Problem, Setting, StepLog
from bdl_train.inference._autocorrelation import autocorrelation_time
from bdl_train.inference._descent import DescentState, descend, evaluate
from bdl_train.inference._draws import KeepEvery, Kept
from bdl_train.inference._isokinetic import Kernel, Moved, normalise
from bdl_train.inference._noise import MemberNoise
from bdl_train.inference._step_size import StepSizes
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch

log = logging.getLogger(__name__)

ADAPT_SHARE, SPREAD_SHARE = 0.9, 0.8
"""Of the warm-up: step sizes adapt up to the first, and from the second to the first spreads are measured."""
MOST_COORDINATES = 256
"""Of a member, over which the mean autocorrelation time is taken, evenly spread."""
DECOHERENCE = 0.4
"""L over the path of one autocorrelation time."""
MOST_REJECTIONS = 100
"""In a row, after which a chain has nowhere to go: its member has failed."""
EPOCHS = 20
"""Of each phase of the chain: members are scored on the validation part so many times."""


@dataclass
class Chains:
    """Where the chains of a stack are and what they have learned; a checkpoint of it is whole.

    Attributes:
        direction: u, `[M, P]`, of unit length.
        grad, energy: ∇S `[M, P]` and S = N · potential / T `[M]` float64 at the present weights.
        steps: Step sizes ε.
        decoherence: L, the length over which directions are forgotten, `[M]` float64.
        rejections: In a row, `[M]`.
        mean, spread, weight: Mean and sum of squared deviations of the weights, `[M, P]`, weighted by ε, and the sum of
            weights `[M]`.
        path: `[M, T, C]`, some coordinates over the last part of the warm-up.
    """

    direction: Tensor
    grad: Tensor
    energy: Tensor
    steps: StepSizes
    decoherence: Tensor
    rejections: Tensor
    mean: Tensor
    spread: Tensor
    weight: Tensor
    path: Tensor

    def measure(self, flat: Tensor) -> None:
        """Take weights `[M, P]` into mean and spread (West, 1979)."""
        self.weight = self.weight + self.steps.size
        before = flat - self.mean
        self.mean = self.mean + before * (self.steps.size / self.weight).to(flat.dtype)[:, None]
        self.spread = self.spread + self.steps.size.to(flat.dtype)[:, None] * before * (flat - self.mean)

    def tensors(self) -> dict[str, Tensor]:
        own = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return own | {f"steps_{name}": value for name, value in vars(self.steps).items()}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], device: torch.device) -> "Chains":
        here = {name: value.to(device) for name, value in stored.items()}
        sizes = {name: here.pop(f"steps_{name}") for name in ("size", "largest", "ratio", "weight")}
        return cls(**here, steps=StepSizes(**sizes))


class MclmcState(DescentState):
    """A descent, then chains.

    Attributes:
        chains: None during the warm start.
        kept: Draws, with the energy error per dimension and the step size.
    """

    def __init__(self, problem: Problem, num_draws: int) -> None:
        super().__init__(problem)
        self.noise = MemberNoise(problem.noise_seeds, self.stack.flat)
        self.kept = Kept(self.stack, num_draws, ("potential", "energy_variance", "step_size"))
        self.chains: Chains | None = None
        self.kernel: Kernel | None = None
        self.version = -1

    @property
    def is_moved(self) -> bool:
        """Whether the weights were set from outside since the last step: their gradient is another one then."""
        return self.stack.flat._version != self.version

    def move(self, flat: Tensor) -> None:
        """Set the weights `[M, P]` to where the chains are."""
        self.stack.flat.copy_(flat)
        self.version = self.stack.flat._version

    def state_dict(self) -> dict[str, Any]:
        chains = {} if self.chains is None else self.chains.tensors()
        return {
            **super().state_dict(),
            "noise": self.noise.state_dict(),
            "kept": self.kept.state_dict(),
            "chains": chains,
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.noise.load_state_dict(stored["noise"])
        self.kept.load_state_dict(stored["kept"])
        device = self.stack.flat.device
        self.chains = Chains.from_tensors(stored["chains"], device) if stored["chains"] else None
        # Before the first step of a chain its gradient is not known yet.
        self.version = self.stack.flat._version if (self.phase, self.step) > (1, 0) else -1


@dataclass(frozen=True, kw_only=True)
class Mclmc(Method[MclmcState]):
    """Optimise with early stopping, tune each chain, then follow it at constant energy and keep draws.

    Every step sees all training examples. Nothing is rejected but steps that lead to NaN: the bias of the draws is
    governed by the energy error, whose variance per dimension the step sizes hold at a target.

    Source:
        Robnik et al. (2022), arXiv:2212.08549; Robnik & Seljak (2023), arXiv:2303.18221; Sommer et al. (2025),
        arXiv:2502.06335, for the start from an ensemble of optimised networks.

    Attributes:
        patience: Epochs without a better validation NLL after which the optimisation of a member ends; null = it lasts
            `trainer.max_epochs`.
        temperature: T; the chains target exp(−N · potential / T).
        num_warmup: Steps that tune the chains; nothing of them is kept. The last tenth measures autocorrelations, which
            takes 4 steps at least.
        step_size: ε of the first step.
        energy_variance_start, energy_variance_end: Target of the energy error's variance per dimension, falling
            geometrically over the warm-up: large explores, small is exact.
        integrator: `mclachlan` takes two gradients a step, `leapfrog` one.
        num_draws: K, draws a member keeps.
        thin: Steps between two draws.
    """

    patience: Annotated[int, Field(ge=1)] | None
    temperature: Annotated[float, Field(gt=0)]
    num_warmup: Annotated[int, Field(ge=40)]
    step_size: Annotated[float, Field(gt=0)]
    energy_variance_start: Annotated[float, Field(gt=0)]
    energy_variance_end: Annotated[float, Field(gt=0)]
    integrator: Literal["mclachlan", "leapfrog"]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]
    thin: Annotated[int, Field(ge=1)]

    needs_per_example_likelihood: ClassVar[bool] = True
    needs_fixed_potential: ClassVar[bool] = True
    when_diverged: ClassVar[str] = (
        "lower inference.step_size or inference.energy_variance_start, or optimizer.lr of the warm start"
    )

    @property
    def early_stopping(self) -> int | None:
        return self.patience

    @property
    def target_temperature(self) -> float:
        return self.temperature

    def phases(self, setting: Setting) -> list[Phase]:
        [warm_start] = super().phases(setting)
        return [
            replace(warm_start, name="warm start"),
            _in_epochs("tune", self.num_warmup),
            _in_epochs("sample", self.num_draws * self.thin),
        ]

    def steps_to_compile(self, setting: Setting) -> int:
        return self.num_warmup + self.num_draws * self.thin

    def init(self, problem: Problem) -> MclmcState:
        return MclmcState(problem, self.num_draws)

    def enter(self, state: MclmcState) -> None:
        if state.phase == 1:
            state.chains = self._start(state)

    def step(self, state: MclmcState, batch: Batch) -> StepLog:
        chains = state.chains
        if chains is None:
            problem = state.problem
            return descend(state, batch, problem.schedule.factor(state.step, problem.num_steps))
        if state.kernel is None:
            # Ranks meet in the middle of a step, which no graph can hold.
            compiled = state.problem.compile_steps and state.potential.reduce is None
            state.kernel = Kernel(state.potential, self.temperature, self.integrator, compiled=compiled)
        if state.is_moved:
            self._arrive(state, chains, state.kernel, batch)
        sizes = chains.steps.size
        moved = state.kernel(
            state.stack.flat,
            chains.direction,
            chains.grad,
            chains.energy,
            sizes,
            chains.decoherence,
            (state.noise.normal(), state.noise.normal()),
            state.active,
            state.stack.buffers,
            batch,
        )
        state.move(moved.flat)
        chains.direction, chains.grad, chains.energy = moved.direction, moved.grad, moved.energy
        state.step += 1
        chains.rejections = torch.where(moved.taken | ~state.active, 0, chains.rejections + 1)
        stuck = chains.rejections >= MOST_REJECTIONS
        state.failed, state.active = state.failed | stuck, state.active & ~stuck
        if state.phase == 1:
            self._tune(state, chains, moved)
        return self._log(state, chains, moved, sizes)

    def posterior(self, state: MclmcState) -> list[MemberPosterior]:
        if state.kept.count:
            variance = state.kept.traces["energy_variance"][~state.failed]
            log.info(
                "Energy error of the draws, ΔE² / P: %.3g in the mean over draws and members, %.3g in that of the "
                "worst member; the warm-up ended at inference.energy_variance_end=%g",
                float(variance.mean()),
                float(variance.mean(1).max()),
                self.energy_variance_end,
            )
        return state.kept.posteriors()

    def _start(self, state: MclmcState) -> Chains:
        flat = state.stack.flat
        num_members, num_params = flat.shape
        zeros_M = flat.new_zeros(num_members, dtype=torch.float64)
        num_steps = self.num_warmup - self._until(ADAPT_SHARE)
        return Chains(
            direction=normalise(state.noise.normal()),
            grad=torch.zeros_like(flat),
            energy=zeros_M,
            steps=StepSizes.start(self.step_size, flat),
            decoherence=torch.full_like(zeros_M, max(math.sqrt(num_params), 15.0)),
            rejections=torch.zeros_like(zeros_M, dtype=torch.int64),
            mean=torch.zeros_like(flat),
            spread=torch.zeros_like(flat),
            weight=zeros_M,
            path=flat.new_zeros(num_members, num_steps, min(num_params, MOST_COORDINATES)),
        )

    def _arrive(self, state: MclmcState, chains: Chains, kernel: Kernel, batch: Batch) -> None:
        """The energy at weights that no step has led to."""
        found = evaluate(state, batch)
        energy_M, grad_MP = kernel.energy(found.log.potential, found.grad)
        chains.energy, chains.grad = found.where(energy_M, chains.energy), found.where(grad_MP, chains.grad)

    def _tune(self, state: MclmcState, chains: Chains, moved: Moved) -> None:
        adapt, spread = self._until(ADAPT_SHARE), self._until(SPREAD_SHARE)
        if state.step <= adapt:
            done = (state.step - 1) / max(1, adapt - 1)
            ratio = self.energy_variance_end / self.energy_variance_start
            target = self.energy_variance_start * ratio**done
            chains.steps.learn(moved.energy_error, moved.taken, moved.flat.shape[1], target)
            if state.step > spread:
                chains.measure(moved.flat)
            if state.step == adapt:
                variance_MP = chains.spread / chains.weight.to(chains.spread.dtype)[:, None]
                chains.decoherence = variance_MP.double().sum(1).sqrt()
        else:
            columns = _spread_evenly(moved.flat.shape[1], chains.path.shape[2])
            chains.path[:, state.step - adapt - 1] = moved.flat[:, columns]
            if state.step == self.num_warmup:
                tau_M = autocorrelation_time(chains.path).mean(1)
                chains.decoherence = DECOHERENCE * chains.steps.size * tau_M

    def _log(self, state: MclmcState, chains: Chains, moved: Moved, sizes: Tensor) -> StepLog:
        scale = self.temperature / state.potential.num_data
        potential_M = chains.energy * scale
        # A step that is not taken changes no energy.
        variance_M = torch.where(moved.taken, moved.energy_error.square() / moved.flat.shape[1], 0.0)
        if state.phase == 2 and self._keep.keeps(state.step):
            traces = {"potential": potential_M, "energy_variance": variance_M, "step_size": sizes}
            state.kept.take(state.stack, traces)
        norm_M = torch.linalg.vector_norm(chains.grad, dim=1) * scale
        traces = {"energy_variance": variance_M, "step_size": sizes, "decoherence": chains.decoherence}
        return StepLog(potential_M, moved.nll, norm_M, traces)

    @cached_property
    def _keep(self) -> KeepEvery:
        return KeepEvery.over(self.num_draws * self.thin, 0, self.thin, self.num_draws)

    def _until(self, share: float) -> int:
        """Steps of the warm-up up to a share of it."""
        return round(share * self.num_warmup)


def _in_epochs(name: str, num_steps: int) -> Phase:
    """Steps on all rows in about `EPOCHS` epochs."""
    per_epoch = next(
        size for size in range(max(1, num_steps // EPOCHS), num_steps + 1) if num_steps % size == 0
    )
    return Phase(name, "all", num_steps // per_epoch, per_epoch)


def _spread_evenly(num_params: int, num_columns: int) -> Tensor:
    return torch.arange(num_columns) * num_params // num_columns
