"""Early stopping per member: each keeps the weights of its own best epoch."""

from typing import Any

import torch
from torch import Tensor

from bdl_train.inference import State
from bdl_train.stack import where_members


class EarlyStopping:
    """Best validation NLL, and the weights that had it, for every member of a stack.

    Args:
        state: The method's state; members are stopped through its `active`.
        patience: Epochs without a better validation NLL.
    """

    def __init__(self, state: State, patience: int) -> None:
        self.patience = patience
        flat = state.stack.flat
        self.best_nll = torch.full((len(flat),), torch.inf, dtype=torch.float64, device=flat.device)
        self.best_epoch = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        self.best_flat = flat.clone()
        self.best_buffers = {name: buffer.clone() for name, buffer in state.stack.buffers.items()}
        self.best_beside = {name: tensor.clone() for name, tensor in state.beside_weights.items()}

    def update(self, state: State, nll: Tensor, epoch: int) -> None:
        """Take one epoch's validation NLL `[M]` into account (NaN is never better) and stop members in place."""
        better = state.active & (nll < self.best_nll)
        self.best_nll = torch.where(better, nll, self.best_nll)
        self.best_epoch = torch.where(better, epoch, self.best_epoch)
        self.best_flat = torch.where(better[:, None], state.stack.flat, self.best_flat)
        self.best_buffers = where_members(better, state.stack.buffers, self.best_buffers)
        self.best_beside = where_members(better, state.beside_weights, self.best_beside)
        state.active &= (epoch - self.best_epoch) < self.patience

    def restore(self, state: State) -> None:
        """Give every member that had a finite validation NLL its best weights back."""
        had_one = torch.isfinite(self.best_nll)
        state.stack.flat.copy_(torch.where(had_one[:, None], self.best_flat, state.stack.flat))
        state.stack.buffers = where_members(had_one, self.best_buffers, state.stack.buffers)
        for name, tensor in where_members(had_one, self.best_beside, state.beside_weights).items():
            state.beside_weights[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        names = ("best_nll", "best_epoch", "best_flat", "best_buffers", "best_beside")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        device = self.best_flat.device
        for name in ("best_nll", "best_epoch", "best_flat"):
            setattr(self, name, stored[name].to(device))
        self.best_buffers = {name: buffer.to(device) for name, buffer in stored["best_buffers"].items()}
        self.best_beside = {name: tensor.to(device) for name, tensor in stored["best_beside"].items()}
