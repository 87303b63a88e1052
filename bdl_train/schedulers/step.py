"""Piecewise decay: the learning rate drops at given moments of the run."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from bdl_train.errors import UsageError
from bdl_train.schedulers import Schedule


@dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """factor = gamma^k after k milestones.

    Attributes:
        milestones: Shares of the run at which the rate drops, increasing.
        gamma: Factor of each drop.
    """

    milestones: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)]
    gamma: Annotated[float, Field(gt=0, lt=1)]

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in pairwise(self.milestones)):
            raise UsageError(f"milestones must increase, got {self.milestones}.")

    def factor(self, step: int, num_steps: int) -> float:
        # The quotient, not milestone * num_steps: 0.07 * 100 rounds to more than 7.
        return self.gamma ** sum(step / num_steps >= milestone for milestone in self.milestones)
