"""Snapshot ensembles: several minima of one member, found along a cyclic learning rate (Huang et al., 2017).

Shape letters: M members, K snapshots kept of each, P parameters of one member.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from bdl_train.errors import UsageError
from bdl_train.inference import Method, Problem, Setting, StepLog
from bdl_train.inference._descent import DescentState, descend
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.atoms import Atoms
from bdl_train.potential import Batch


class SnapshotState(DescentState):
    """A descent with the weights that stood at the end of its last cycles.

    Attributes:
        kept_flat: `[M, K, P]`, a ring over snapshots.
        kept_buffers: `[M, K, ...]` each, of the same.
        num_taken: Snapshots taken so far, those that were overwritten included.
    """

    def __init__(self, problem: Problem, num_kept: int) -> None:
        super().__init__(problem)
        stack = self.stack
        self.kept_flat = stack.flat.new_zeros(stack.num_members, num_kept, stack.flat.shape[1])
        self.kept_buffers = {
            name: b.new_zeros(stack.num_members, num_kept, *b.shape[1:]) for name, b in stack.buffers.items()
        }
        self.num_taken = 0

    def take(self) -> None:
        """Keep the present weights in the place of the oldest."""
        place = self.num_taken % self.kept_flat.shape[1]
        self.kept_flat[:, place] = self.stack.flat
        for name, buffer in self.stack.buffers.items():
            self.kept_buffers[name][:, place] = buffer
        self.num_taken += 1

    def state_dict(self) -> dict[str, Any]:
        kept = {"flat": self.kept_flat, "buffers": self.kept_buffers, "num_taken": self.num_taken}
        return {**super().state_dict(), "kept": kept}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        super().load_state_dict(stored)
        kept = stored["kept"]
        self.kept_flat.copy_(kept["flat"])
        for name, buffer in kept["buffers"].items():
            self.kept_buffers[name].copy_(buffer)
        self.num_taken = kept["num_taken"]


@dataclass(frozen=True, kw_only=True)
class Snapshot(Method[SnapshotState]):
    """lr(t) = ½ · `optimizer.lr` · (1 + cos(π · t / L)) at step t of a cycle of L; the ends of cycles are atoms.

    As in the paper only the learning rate restarts: weights and the optimiser's moments go on. The paper's cycles are
    of ⌈T / C⌉ steps, T in all and C cycles; where C does not divide T its last cycle is cut off or missing. Here cycle
    c ends at step ⌊c · T / C⌋: the same cycles where C divides T, else lengths that differ by one step. A run resumed
    with a larger `trainer.max_epochs` lays its cycles anew over all of them.

    Source:
        Huang et al. (2017), arXiv:1704.00109, equation 2 and Section 3.

    Attributes:
        num_cycles: C, over `trainer.max_epochs`.
        num_draws: K, snapshots a member keeps: those at the end of its last cycles.
    """

    num_cycles: Annotated[int, Field(ge=1)]
    num_draws: Annotated[int, Field(ge=1)]  # pyright: ignore[reportIncompatibleVariableOverride]

    unused_groups: ClassVar[tuple[str, ...]] = ("scheduler",)

    def __post_init__(self) -> None:
        if self.num_draws > self.num_cycles:
            raise ValueError(
                f"num_draws must be num_cycles={self.num_cycles} at most, a snapshot a cycle, got {self.num_draws}."
            )

    def check(self, setting: Setting) -> None:
        if self.num_cycles > setting.num_epochs:
            raise UsageError(
                f"inference.num_cycles={self.num_cycles} needs an epoch or more for each cycle, there are "
                f"{setting.num_epochs}: lower it, with inference.num_draws, or raise trainer.max_epochs."
            )

    def init(self, problem: Problem) -> SnapshotState:
        return SnapshotState(problem, self.num_draws)

    def step(self, state: SnapshotState, batch: Batch) -> StepLog:
        start, stop = self._cycle(state.step, state.problem.num_steps)
        log = descend(state, batch, 0.5 * (1 + math.cos(math.pi * (state.step - start) / (stop - start))))
        if state.step == stop:
            state.take()
        return log

    def posterior(self, state: SnapshotState) -> list[MemberPosterior]:
        if state.num_taken < self.num_draws:
            raise RuntimeError(
                f"{state.num_taken} of {self.num_draws} snapshots are taken: training has not reached its last cycle."
            )
        in_time = [(state.num_taken + k) % self.num_draws for k in range(self.num_draws)]
        return [
            Atoms(
                state.kept_flat[m, in_time],
                {name: buffer[m, in_time] for name, buffer in state.kept_buffers.items()},
            )
            for m in range(state.stack.num_members)
        ]

    def _cycle(self, step: int, num_steps: int) -> tuple[int, int]:
        """First step (0-based) of the cycle that `step` is in, and of the next."""
        cycle = ((step + 1) * self.num_cycles - 1) // num_steps
        start, stop = (num_steps * c // self.num_cycles for c in (cycle, cycle + 1))
        return start, stop
