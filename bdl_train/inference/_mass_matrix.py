"""A diagonal mass matrix, learned in windows of a warm-up: M⁻¹ is the chain's variance, weight by weight.

Shape letters: M members, P parameters of one member.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FEWEST_STEPS = 20
"""Of a warm-up that has a window."""
_FIRST, _BASE, _LAST = 75, 25, 50
"""Steps before the first window, of the first window, and after the last one."""


def windows(num_warmup: int) -> tuple[range, ...]:
    """The steps of a warm-up over which variances are taken: windows that double, after a part without and before one.

    A warm-up shorter than 150 steps has one window, without its first 15 and last 10 percent; shorter than 20, none.

    Source:
        Stan Reference Manual, "Automatic parameter tuning", adaptation schedule.
    """
    if num_warmup < FEWEST_STEPS:
        return ()
    if num_warmup < _FIRST + _BASE + _LAST:
        return (range(int(0.15 * num_warmup), num_warmup - int(0.1 * num_warmup)),)
    found, start, size, end = [], _FIRST, _BASE, num_warmup - _LAST
    while start < end:
        # A window whose successor would not fit takes the rest.
        stop = start + size if start + size + 2 * size <= end else end
        found.append(range(start, stop))
        start, size = stop, 2 * size
    return tuple(found)


@dataclass
class DiagonalMass:
    """`[M, P]` each and a count; a checkpoint of it is whole.

    Attributes:
        inverse: M⁻¹, in use.
        mean, sum_sq_dev: Welford's running moments of the present window.
        count: Weights taken into them.
    """

    inverse: Tensor
    mean: Tensor
    sum_sq_dev: Tensor
    count: int

    @classmethod
    def identity(cls, like: Tensor) -> "DiagonalMass":
        return cls(torch.ones_like(like), torch.zeros_like(like), torch.zeros_like(like), 0)

    def take(self, flat: Tensor, active: Tensor) -> None:
        """Take weights `[M, P]` into the window's moments; `active` `[M]` says whose."""
        self.count += 1
        before = flat - self.mean
        mean = self.mean + before / self.count
        sum_sq_dev = self.sum_sq_dev + before * (flat - mean)
        self.mean = torch.where(active[:, None], mean, self.mean)
        self.sum_sq_dev = torch.where(active[:, None], sum_sq_dev, self.sum_sq_dev)

    def adopt(self, active: Tensor) -> None:
        """End the window: its variance, drawn a little to 1e-3, becomes M⁻¹.

        Source:
            Stan's regularisation, n / (n + 5) · variance + 1e-3 · 5 / (n + 5).
        """
        n = self.count
        variance = self.sum_sq_dev / (n - 1)
        inverse = n / (n + 5) * variance + 1e-3 * 5 / (n + 5)
        self.inverse = torch.where(active[:, None], inverse, self.inverse)
        zeros = torch.zeros_like(inverse)
        self.mean = torch.where(active[:, None], zeros, self.mean)
        self.sum_sq_dev = torch.where(active[:, None], zeros, self.sum_sq_dev)
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, stored: Mapping[str, Any], device: torch.device) -> "DiagonalMass":
        here: dict[str, Any] = {
            name: v.to(device) if isinstance(v, Tensor) else v for name, v in stored.items()
        }
        return cls(**here)
