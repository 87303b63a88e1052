"""Step sizes that hold the variance of the energy error per dimension at a target, each chain on its own.

Shape letter: M members.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_DECAY = 99 / 101
"""Of the running sums: they remember about a hundred steps."""
_POWER = 6.0
"""The variance of a step's energy error grows with this power of its size (second-order integrators)."""
_WIDTH = 1.5
"""Standard deviation, in the log of the step size, of the weight that a step far from its target has."""
_SHRINK, _RECOVER = 0.8, 1.01
"""The largest step allowed falls to this share of one that gave NaN, and grows with every step that did not."""


@dataclass
class StepSizes:
    """`[M]` float64 each; a checkpoint of it is whole.

    Attributes:
        size: ε, the step in use.
        largest: No step may be longer.
        ratio, weight: Running sums of w · ξ / ε⁶ and of w.
    """

    size: Tensor
    largest: Tensor
    ratio: Tensor
    weight: Tensor

    @classmethod
    def start(cls, size: float, like: Tensor) -> "StepSizes":
        """The same first step for all members of `like` `[M, ...]`."""
        full = torch.full((len(like),), size, dtype=torch.float64, device=like.device)
        return cls(full, torch.full_like(full, torch.inf), torch.zeros_like(full), torch.zeros_like(full))

    def learn(self, energy_error: Tensor, taken: Tensor, num_params: int, target: float) -> None:
        """Take one step's energy error `[M]` into account.

        Args:
            energy_error: ΔE, of the step of present size.
            taken: `[M]` bool, steps that gave finite energies.
            num_params: P.
            target: Variance of ΔE per dimension.

        Source:
            Robnik et al. (2022), arXiv:2212.08549, Section 4.2, in the running form of their reference implementation.
        """
        xi = energy_error.square() / (num_params * target) + 1e-8
        w = torch.exp(-0.5 * (xi.log() / (_POWER * _WIDTH)).square())
        ratio = _DECAY * self.ratio + w * xi / self.size**_POWER
        weight = _DECAY * self.weight + w
        self.ratio = torch.where(taken, ratio, self.ratio)
        self.weight = torch.where(taken, weight, self.weight)
        self.largest = torch.where(taken, _RECOVER * self.largest, _SHRINK * self.size)
        wanted = torch.where(self.weight > 0, (self.weight / self.ratio) ** (1 / _POWER), self.size)
        self.size = torch.minimum(wanted, self.largest)
