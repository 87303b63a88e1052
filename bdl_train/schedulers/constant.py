"""A constant learning rate."""

from dataclasses import dataclass

from bdl_train.schedulers import Schedule


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """factor = 1."""

    def factor(self, step: int, num_steps: int) -> float:
        return 1.0
