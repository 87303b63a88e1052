"""SWAG: a Gaussian posterior fitted to a late training trajectory (Maddox et al., 2019).

With several members this is MultiSWAG (Wilson & Izmailov, 2020): a mixture of Gaussians, one around each mode.

Shape letters: M members, K snapshots kept, P parameters of one member.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, descend
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.potential import Batch


@dataclass(kw_only=True)
class Moments:
    """Running moments of the flat parameters; a checkpoint of it is whole.

    Attributes:
        mean: `[M, P]`.
        sum_sq_dev: `[M, P]`, Welford's running sum of squared deviations.
        deviations: `[M, K_max, P]`, snapshot minus the running mean that includes it; a ring over snapshots.
        num_snapshots: How many were taken.
    """

    mean: Tensor
    sum_sq_dev: Tensor
    deviations: Tensor
    num_snapshots: int

    @classmethod
    def zeros(cls, flat: Tensor, max_rank: int) -> "Moments":
        num_members, num_params = flat.shape
        return cls(
            mean=torch.zeros_like(flat),
            sum_sq_dev=torch.zeros_like(flat),
            deviations=flat.new_zeros(num_members, max_rank, num_params),
            num_snapshots=0,
        )

    def update(self, flat: Tensor) -> None:
        """Take a snapshot of the parameters `[M, P]` (Welford, 1962; Maddox et al., Section 3.2 for the deviations)."""
        self.num_snapshots += 1
        before = flat - self.mean
        self.mean += before / self.num_snapshots
        after = flat - self.mean
        # Welford, not E[w²] - E[w]²: float32 cancellation makes the latter negative.
        self.sum_sq_dev += before * after
        max_rank = self.deviations.shape[1]
        if max_rank > 0:
            self.deviations[:, (self.num_snapshots - 1) % max_rank] = after

    def kept_deviations(self) -> Tensor:
        """The columns really held, `[M, K, P]`: fewer than K_max at first."""
        return self.deviations[:, : min(self.num_snapshots, self.deviations.shape[1])]


class SwagState(DescentState):
    """A descent whose trajectory is summarised in `moments` from `start_step` on.

    The start is part of the state: a run resumed with more epochs goes on collecting what it has begun.
    """

    def __init__(self, problem: Problem, max_rank: int, start_step: int) -> None:
        super().__init__(problem)
        self.start_step = start_step
        self.moments = Moments.zeros(self.stack.flat, max_rank)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "start_step": self.start_step, "moments": dict(vars(self.moments))}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        self.start_step = stored["start_step"]
        device = self.stack.flat.device
        moments: dict[str, Any] = {
            name: v.to(device) if torch.is_tensor(v) else v for name, v in stored["moments"].items()
        }
        self.moments = Moments(**moments)


@dataclass(frozen=True, kw_only=True)
class Swag(Method[SwagState]):
    """θ ~ N(mean, ½ diag(variance) + ½ DᵀD / (K − 1)), moments over snapshots of the late trajectory.

    With `max_rank` 0 it is the paper's SWAG-Diagonal, N(mean, diag(variance)).

    Source:
        Maddox et al. (2019), arXiv:1902.02476, Algorithm 1.

    Attributes:
        start_epoch: First epoch (0-based) whose snapshots count; null = half of `trainer.max_epochs`.
        snapshot_every: Optimiser steps between snapshots; null = once an epoch.
        lr_factor: On `optimizer.lr` from `start_epoch` on; the schedule governs the epochs before.
        max_rank: K_max, snapshots kept for the low-rank covariance, 2 or more; 0 = diagonal.
        num_draws: Posterior draws a member contributes to the predictive.
    """

    start_epoch: Annotated[int, Field(ge=0)] | None
    snapshot_every: Annotated[int, Field(ge=1)] | None
    lr_factor: Annotated[float, Field(gt=0)]
    max_rank: Annotated[int, Field(ge=0)]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def unused_with(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        return ("scheduler",) if settings.get("start_epoch") == 0 else ()

    def __post_init__(self) -> None:
        if self.max_rank == 1:
            raise ValueError(
                "max_rank must be 0 (diagonal) or 2 and more: a covariance of one snapshot is undefined, got 1."
            )

    def check(self, setting: Setting) -> None:
        if self.start_epoch is not None and self.start_epoch >= setting.num_epochs:
            raise UsageError(
                f"inference.start_epoch={self.start_epoch} starts SWAG after the last epoch "
                f"(trainer.max_epochs={setting.num_epochs}): lower the first or raise the second."
            )
        start = self._start_step(setting.num_epochs, setting.steps_per_epoch)
        every = self._every(setting.steps_per_epoch)
        taken = (setting.num_epochs * setting.steps_per_epoch - start) // every
        if taken < 2:
            epochs_of_two = -(-2 * every // setting.steps_per_epoch)
            # Null starts after the first half, rounded down: of 2 E - 1 epochs the last E collect.
            enough = 2 * epochs_of_two - 1 if self.start_epoch is None else self.start_epoch + epochs_of_two
            raise UsageError(
                f"SWAG needs 2 snapshots or more, these settings take {taken}: one every {every} steps from epoch "
                f"{start // setting.steps_per_epoch} on, of {setting.num_epochs} epochs of "
                f"{setting.steps_per_epoch} steps. Raise trainer.max_epochs to {enough} or more, or lower "
                "inference.start_epoch or inference.snapshot_every."
            )

    def init(self, problem: Problem) -> SwagState:
        num_epochs = problem.num_steps // problem.steps_per_epoch
        return SwagState(problem, self.max_rank, self._start_step(num_epochs, problem.steps_per_epoch))

    def step(self, state: SwagState, batch: Batch) -> StepLog:
        problem, start = state.problem, state.start_step
        collecting = state.step >= start
        factor = self.lr_factor if collecting else problem.schedule.factor(state.step, max(1, start))
        log = descend(state, batch, factor)
        if collecting and (state.step - start) % self._every(problem.steps_per_epoch) == 0:
            state.moments.update(state.stack.flat)
        return log

    def posterior(self, state: SwagState) -> list[MemberPosterior]:
        moments = state.moments
        if moments.num_snapshots < 2:
            raise RuntimeError(
                f"SWAG samples from 2 snapshots or more, this state has {moments.num_snapshots}: "
                "train longer or lower inference.snapshot_every."
            )
        variance_MP = moments.sum_sq_dev / moments.num_snapshots
        deviations_MKP = moments.kept_deviations()
        return [
            LowRankGaussian(
                mean=moments.mean[m].clone(),
                variance=variance_MP[m],
                deviations=deviations_MKP[m].clone(),
                buffers={name: buffer[m].clone() for name, buffer in state.stack.buffers.items()},
            )
            for m in range(state.stack.num_members)
        ]

    def _start_step(self, num_epochs: int, steps_per_epoch: int) -> int:
        epoch = num_epochs // 2 if self.start_epoch is None else self.start_epoch
        return epoch * steps_per_epoch

    def _every(self, steps_per_epoch: int) -> int:
        return self.snapshot_every or steps_per_epoch
