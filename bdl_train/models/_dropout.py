"""Dropout whose mask is a counter-based hash, so that a member draws the same mask alone or in a stack."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_MASK32 = 0xFFFFFFFF

DRAW = -1
"""The step of a posterior draw; those of training count from 0, so no draw repeats a mask of theirs."""


class Dropout(nn.Module):
    """Inverted dropout with rate `rate`: element i is kept iff hash(seed, step, i) ≥ rate · 2³².

    `seed` and `step` are buffers, one of each per member: the seed is drawn at construction under the
    member's own seed, the step counts training passes. The hash is the 32-bit finaliser of MurmurHash3 in 64-bit
    integers, the same bits on every device. At rate 0 the layer returns its input.

    In train mode every example has a mask of its own. In eval mode the values are those of the input, unless `step` is
    `DRAW`: then `seed` names one posterior draw, and one mask over the units serves all examples, whatever the batch.
    A draw is one function; in front of a linear layer it is the same as zeroing columns of the layer's weights.

    Attributes:
        share: (first row, rows) of the batch that this process sees, where several share one batch: the mask of a row
            does not depend on who computes it.
    """

    share: tuple[int, int] | None = None

    seed: Tensor
    step: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"A dropout rate lies in [0, 1), got {rate}.")
        self.rate = rate
        # 62 bits: with 32, some two layers of a thousand-member ensemble would share every mask.
        self.register_buffer("seed", torch.randint(0, 2**62, ()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0:
            return x
        if not self.training:
            return x * self._factor(x)
        before = 0 if self.share is None else self.share[0] * (x.numel() // self.share[1])
        keep = self._keep(torch.arange(before, before + x.numel(), device=x.device)).reshape(x.shape)
        self.step += 1
        return torch.where(keep, x / (1 - self.rate), torch.zeros_like(x))

    def _factor(self, x: Tensor) -> Tensor:
        """On the units of an example in eval mode, `x.shape[1:]`: a draw's 0 or 1 / (1 − rate), else 1."""
        units = x.shape[1:]
        keep = self._keep(torch.arange(math.prod(units), device=x.device)).reshape(units)
        # A choice by value, not by branch: members and draws run side by side, on a device that must not be asked.
        return torch.where(self.step == DRAW, keep.to(x.dtype) / (1 - self.rate), 1.0)

    def _keep(self, element: Tensor) -> Tensor:
        """Which elements stay, by their number."""
        key = _mix(_mix((self.seed ^ _mix(self.step + 0x9E3779B9)) & _MASK32) ^ (self.seed >> 32))
        # Elements are hashed before they meet the key: a key added to a plain counter would make the masks
        # of any two keys shifted copies of each other.
        return _mix(_mix(element) ^ key) >= int(self.rate * 2**32)


def make_dropout(rate: float) -> nn.Module:
    """`Dropout`, or nothing at rate 0, so that a network without dropout carries no seed and no counter."""
    return Dropout(rate) if rate > 0 else nn.Identity()


def dropout_names(network: nn.Module) -> Iterator[str]:
    """Where in a network there is `Dropout` of a rate above 0: the first part of the names of its buffers."""
    for name, module in network.named_modules():
        if isinstance(module, Dropout) and module.rate > 0:
            yield name


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on values in [0, 2³²) held in int64 (products wrap, then are masked)."""
    h = h & _MASK32
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK32
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)
