"""Gradient descent on the potential of a stack: what every optimising method shares.

Shape letters: M members, P parameters of one member.
"""

from typing import Any

import torch

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
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "flat": self.stack.flat,
            "buffers": self.stack.buffers,
            "optimizer": self.optimizer.state_dict(),
            "active": self.active,
            "failed": self.failed,
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
        self.step = stored["step"]


def descend(state: DescentState, batch: Batch, lr_factor: float) -> StepLog:
    """One optimiser step of every active member on its potential.

    A member whose potential or gradient is not finite is marked failed and frozen where it was; the others are
    untouched by it. Everything that decides is `[M]`, computed before any value meets another member's.
    """
    stack, clip_norm = state.stack, state.problem.clip_norm
    value_M, nll_M, grad_MP, buffers = state.potential.value_and_grad(stack.flat, stack.buffers, batch)
    norm_M = torch.linalg.vector_norm(grad_MP, dim=1)
    healthy_M = torch.isfinite(value_M + norm_M) & state.active
    # On a CPU the question costs nothing; on a GPU asking would stall the queue, the mask is cheaper.
    all_healthy = stack.flat.device.type == "cpu" and bool(healthy_M.all())
    if not all_healthy:
        state.failed |= state.active & ~healthy_M
        state.active = healthy_M
    if clip_norm is not None:
        grad_MP = grad_MP * (clip_norm / norm_M.clamp(min=clip_norm))[:, None]
    mask = None if all_healthy else healthy_M
    state.optimizer.step(grad_MP, lr_factor, mask)
    stack.buffers = buffers if mask is None else where_members(mask, buffers, stack.buffers)
    state.step += 1
    return StepLog(value_M, nll_M, norm_M)
