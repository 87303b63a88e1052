"""Gradient descent on the potential of a stack: what every optimising method shares.

Shape letters: M members, P parameters of one member.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdl_train.inference import Problem, State, StepLog
from bdl_train.inference._optimizer import FlatOptimizer
from bdl_train.potential import Batch, Potential
from bdl_train.stack import where_members


class DescentState(State):
    """Weights, optimiser state, health and step of a stack of optimised members."""

    def __init__(self, problem: Problem, potential: Potential | None = None) -> None:
        self.problem = problem
        self.potential = potential or problem.potential
        self.stack = problem.stack
        self.optimizer = FlatOptimizer(problem.make_optimizer, self.stack.flat)
        flags = {"dtype": torch.bool, "device": self.stack.flat.device}
        self.active = torch.ones(self.stack.num_members, **flags)
        self.failed = torch.zeros(self.stack.num_members, **flags)
        self.phase = 0
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "flat": self.stack.flat,
            "buffers": self.stack.buffers,
            "optimizer": self.optimizer.state_dict(),
            "active": self.active,
            "failed": self.failed,
            "phase": self.phase,
            "step": self.step,
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        # In place: the optimiser holds this very tensor.
        self.stack.flat.copy_(stored["flat"])
        device = self.stack.flat.device
        self.stack.buffers = {name: buffer.to(device) for name, buffer in stored["buffers"].items()}
        self.optimizer.load_state_dict(stored["optimizer"])
        self.active = stored["active"].to(device)
        self.failed = stored["failed"].to(device)
        self.phase, self.step = stored["phase"], stored["step"]


@dataclass(frozen=True)
class Evaluated:
    """The potential's gradient at one place, and who may follow it.

    Attributes:
        grad: `[M, P]`.
        moving: `[M]` bool, members that are active and healthy; None = all of them.
        buffers: After the pass.
    """

    log: StepLog
    grad: Tensor
    moving: Tensor | None
    buffers: dict[str, Tensor]

    def where(self, new: Tensor, old: Tensor) -> Tensor:
        """`new` for members that move, `old` for the others; `[M, ...]`."""
        if self.moving is None:
            return new
        return torch.where(self.moving.reshape(-1, *(1,) * (new.ndim - 1)), new, old)


def evaluate(state: DescentState, batch: Batch, flat: Tensor | None = None) -> Evaluated:
    """The gradient of every member at its weights, or at `flat` `[M, P]`.

    A member whose potential or gradient is not finite is marked failed and stays where it was; the others are
    untouched by it. Everything that decides is `[M]`, computed before any value meets another member's.
    """
    stack = state.stack
    value_M, nll_M, grad_MP, buffers = state.potential.value_and_grad(
        stack.flat if flat is None else flat, stack.buffers, batch
    )
    norm_M = torch.linalg.vector_norm(grad_MP, dim=1)
    healthy_M = torch.isfinite(value_M + norm_M) & state.active
    # On a CPU the question costs nothing; on a GPU asking would stall the queue, the mask is cheaper.
    all_healthy = stack.flat.device.type == "cpu" and bool(healthy_M.all())
    if not all_healthy:
        state.failed |= state.active & ~healthy_M
        state.active = healthy_M
    return Evaluated(StepLog(value_M, nll_M, norm_M), grad_MP, None if all_healthy else healthy_M, buffers)


def take_step(state: DescentState, evaluated: Evaluated) -> None:
    """Count one step and take over the buffers of the members that moved."""
    mask, stack = evaluated.moving, state.stack
    stack.buffers = (
        evaluated.buffers if mask is None else where_members(mask, evaluated.buffers, stack.buffers)
    )
    state.step += 1


def descend(state: DescentState, batch: Batch, lr_factor: float) -> StepLog:
    """One optimiser step of every active member on its potential."""
    evaluated, clip_norm = evaluate(state, batch), state.problem.clip_norm
    grad_MP = evaluated.grad
    if clip_norm is not None:
        grad_MP = grad_MP * (clip_norm / evaluated.log.grad_norm.clamp(min=clip_norm))[:, None]
    state.optimizer.step(grad_MP, lr_factor, evaluated.moving)
    take_step(state, evaluated)
    return evaluated.log
