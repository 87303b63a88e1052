"""Dropout whose mask is a counter-based hash, so that a member draws the same mask alone or in a stack."""

import torch
from torch import Tensor, nn

_MASK32 = 0xFFFFFFFF


class Dropout(nn.Module):
    """Inverted dropout with rate `rate`: element i is kept iff hash(seed, step, i) ≥ rate · 2³².

    `seed` and `step` are buffers, one of each per member: the seed is drawn at construction under the
    member's own seed, the step counts training passes. A posterior draw of MC dropout is a value of `seed`.
    The hash is the 32-bit finaliser of MurmurHash3 in 64-bit integers, the same bits on every device. In eval
    mode, or at rate 0, the layer returns its input.

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
        if not self.training or self.rate == 0:
            return x
        key = _mix(_mix((self.seed ^ _mix(self.step + 0x9E3779B9)) & _MASK32) ^ (self.seed >> 32))
        # Elements are hashed before they meet the key: a key added to a plain counter would make the masks
        # of any two keys shifted copies of each other.
        before = 0 if self.share is None else self.share[0] * (x.numel() // self.share[1])
        element = _mix(torch.arange(before, before + x.numel(), device=x.device)).reshape(x.shape)
        keep = _mix(element ^ key) >= int(self.rate * 2**32)
        self.step += 1
        return torch.where(keep, x / (1 - self.rate), torch.zeros_like(x))


def make_dropout(rate: float) -> nn.Module:
    """`Dropout`, or nothing at rate 0, so that a network without dropout carries no seed and no counter."""
    return Dropout(rate) if rate > 0 else nn.Identity()


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on values in [0, 2³²) held in int64 (products wrap, then are masked)."""
    h = h & _MASK32
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK32
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)
