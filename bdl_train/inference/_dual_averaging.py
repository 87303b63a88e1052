"""Step sizes that bring the acceptance probability to a target, each chain on its own.

Shape letter: M members.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GAMMA, _T0, _KAPPA = 0.2, 10.0, 0.75
"""Pull towards the centre, weight of the first errors, and how fast the average forgets. The paper's γ is 0.05, for
acceptances averaged over a tree. Those of single trajectories are near 0 or 1: with 0.05 the step swings by a factor 2
to the end of a warm-up, and its average accepts 0.93 to 0.95 where 0.8 was asked (tried)."""
_MOST_DOUBLINGS = 60


@dataclass
class DualAveraging:
    """`[M]` float64 each and a count; a checkpoint of it is whole.

    Attributes:
        log_step: log ε, the step in use.
        log_average: Its weighted average, which is used once adaptation is over.
        error: H̄, running mean of target − acceptance.
        centre: μ, the value that log ε is drawn to.
        count: Trajectories since the last restart.
    """

    log_step: Tensor
    log_average: Tensor
    error: Tensor
    centre: Tensor
    count: int

    @classmethod
    def start(cls, like: Tensor) -> "DualAveraging":
        """Step 1 for all members of `like` `[M, ...]`."""
        zeros = [torch.zeros(len(like), dtype=torch.float64, device=like.device) for _ in range(4)]
        return cls(*zeros, count=0)

    @property
    def step_size(self) -> Tensor:
        """ε, `[M]`."""
        return self.log_step.exp()

    def restart(self, step_size: Tensor, active: Tensor) -> None:
        """Begin anew at `step_size` `[M]`, which is the centre too; `active` `[M]` says for whom."""
        self.count = 0
        log_step = step_size.log()
        self.log_step = torch.where(active, log_step, self.log_step)
        # The paper's centre is ten times as long: a short warm-up would end on steps that are never accepted.
        self.centre = torch.where(active, log_step, self.centre)
        self.error = torch.where(active, 0.0, self.error)
        self.log_average = torch.where(active, log_step, self.log_average)

    def learn(self, accept_prob: Tensor, target: float, active: Tensor) -> None:
        """Take the acceptance probability `[M]` of one trajectory into account.

        Source:
            Hoffman & Gelman (2014), arXiv:1111.4246, Algorithm 5, with another γ and μ.
        """
        self.count += 1
        t = self.count
        error = torch.lerp(self.error, target - accept_prob, 1 / (t + _T0))
        log_step = self.centre - math.sqrt(t) / _GAMMA * error
        # At t = 1 the weight is 1: the average holds nothing of what was before.
        log_average = torch.lerp(self.log_average, log_step, t**-_KAPPA)
        self.error = torch.where(active, error, self.error)
        self.log_step = torch.where(active, log_step, self.log_step)
        self.log_average = torch.where(active, log_average, self.log_average)

    def settle(self, active: Tensor) -> None:
        """Use the average from now on."""
        self.log_step = torch.where(active, self.log_average, self.log_step)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, stored: Mapping[str, Any], device: torch.device) -> "DualAveraging":
        here: dict[str, Any] = {
            name: v.to(device) if isinstance(v, Tensor) else v for name, v in stored.items()
        }
        return cls(**here)


def reasonable_step(accept_prob: Callable[[Tensor], Tensor], start: Tensor, active: Tensor) -> Tensor:
    """The first step size, doubling or halving from `start`, at which acceptance of one step crosses ½.

    Args:
        accept_prob: Of one leapfrog step of size `[M]`, `[M]`.
        start: `[M]` float64.
        active: `[M]` bool; the others keep `start`.

    Source:
        Hoffman & Gelman (2014), arXiv:1111.4246, Algorithm 4, by doublings as there.
    """
    size = start
    grows = accept_prob(size) > 0.5
    searching, factor = active, torch.where(grows, 2.0, 0.5).to(start)
    for _ in range(_MOST_DOUBLINGS):
        size = torch.where(searching, size * factor, size)
        searching = searching & ((accept_prob(size) > 0.5) == grows)
        if not bool(searching.any()):
            break
    return size
