"""Learning-rate schedules. One module and one YAML a choice; each is a function of the step alone."""

from abc import ABC, abstractmethod


class Schedule(ABC):
    """A factor on the optimiser's learning rate.

    A function of the step, so that a resumed run needs no scheduler state. Schedules that look at the loss
    (ReduceLROnPlateau) are refused: members of one stack would have to share one decision.
    """

    @abstractmethod
    def factor(self, step: int, num_steps: int) -> float:
        """The factor at `step` of `num_steps` (0-based)."""
