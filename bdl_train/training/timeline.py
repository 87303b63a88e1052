"""Where a stack stands in the phases of its method."""

from collections.abc import Sequence
from dataclasses import dataclass

from bdl_train.inference import Phase, State


@dataclass(frozen=True)
class Timeline:
    """The phases of a method as one line of steps and epochs.

    A phase that ends early, because all its members have stopped, leaves a gap: steps count as planned.
    """

    phases: Sequence[Phase]

    @property
    def num_steps(self) -> int:
        return sum(phase.num_steps for phase in self.phases)

    @property
    def num_epochs(self) -> int:
        return sum(phase.num_epochs for phase in self.phases)

    def phase(self, state: State) -> Phase:
        """The present one."""
        return self.phases[state.phase]

    def step(self, state: State) -> int:
        """Steps up to here, counted over all phases."""
        return sum(phase.num_steps for phase in self.phases[: state.phase]) + state.step

    def shuffled_step(self, state: State) -> int:
        """The same over phases of shuffled batches alone: what the data order follows."""
        before = self.phases[: state.phase]
        return sum(phase.num_steps for phase in before if phase.rows == "shuffled") + state.step

    def epoch(self, state: State) -> int:
        """Epochs finished, counted over all phases."""
        before = sum(phase.num_epochs for phase in self.phases[: state.phase])
        return before + state.step // self.phase(state).steps_per_epoch

    def at_epoch_end(self, state: State) -> bool:
        return state.step % self.phase(state).steps_per_epoch == 0

    def is_over(self, state: State) -> bool:
        """Whether the present phase is: its steps are done, or nobody is left to take them."""
        return state.step >= self.phase(state).num_steps or not bool(state.active.any())

    def is_last(self, state: State) -> bool:
        return state.phase == len(self.phases) - 1
