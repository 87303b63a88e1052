"""Cosine annealing with linear warm-up."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bdl_train.schedulers import Schedule


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Linear up to 1 at the last step of the warm-up, then half a cosine down to `final_factor`.

    Source:
        Loshchilov & Hutter (2017), arXiv:1608.03983, equation 5, without restarts.

    Attributes:
        warmup_fraction: Share of all steps spent warming up.
        final_factor: Factor at the last step.
    """

    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    final_factor: Annotated[float, Field(ge=0, le=1)]

    def factor(self, step: int, num_steps: int) -> float:
        warmup = round(self.warmup_fraction * num_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, num_steps - 1 - warmup)
        return self.final_factor + (1 - self.final_factor) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, progress))
        )
