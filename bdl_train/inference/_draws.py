"""What a sampler keeps of its chains, and when.

Shape letters: M members, K draws kept of each, P parameters of one member.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, float64

from bdl_train.errors import UsageError
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.chain import Chain
from bdl_train.stack import Stack


@dataclass(frozen=True)
class KeepEvery:
    """The states after steps `last − (num_draws − 1) · thin`, ..., `last − thin`, `last` of a stretch of steps.

    Attributes:
        last: Number of steps of the stretch, 1 or more.
        thin: Steps between two draws.
        num_draws: K.
    """

    last: int
    thin: int
    num_draws: int

    @classmethod
    def over(cls, num_steps: int, burn_in: int, thin: int | None, num_draws: int) -> "KeepEvery":
        """The last `num_draws` of a stretch of `num_steps`, none of the first `burn_in`.

        Where `thin` is None, draws are as far apart as all of them fit.

        Raises:
            UsageError: there are too few steps for so many draws.
        """
        free = num_steps - burn_in
        every = max(1, free // num_draws) if thin is None else thin
        needed = 1 + (num_draws - 1) * every
        if free < needed:
            raise UsageError(
                f"{num_draws} draws (inference.num_draws), {every} steps apart, need {needed} steps after the "
                f"burn-in, there are {max(0, free)} of {num_steps}: sample for longer, or lower "
                "inference.num_draws, inference.thin or the burn-in."
            )
        return cls(num_steps, every, num_draws)

    def keeps(self, step: int) -> bool:
        """Whether the state after `step` steps, counted from 1, is kept."""
        behind = self.last - step
        return behind >= 0 and behind % self.thin == 0 and behind // self.thin < self.num_draws


class Kept:
    """Draws of the chains of a stack, in the order in which they were visited.

    Attributes:
        flat: `[M, K, P]`, of which the first `count` are taken.
        buffers: `[M, K, ...]` each.
        traces: `[M, K]` each, float64.
        count: Draws taken so far.
    """

    def __init__(self, stack: Stack, num_draws: int, traces: tuple[str, ...]) -> None:
        flat, num_members = stack.flat, stack.num_members
        self.flat = flat.new_zeros(num_members, num_draws, flat.shape[1])
        self.buffers = {
            name: b.new_zeros(num_members, num_draws, *b.shape[1:]) for name, b in stack.buffers.items()
        }
        self.traces = {name: flat.new_zeros(num_members, num_draws, dtype=float64) for name in traces}
        self.count = 0

    def take(self, stack: Stack, traces: Mapping[str, Tensor]) -> None:
        """Keep the present weights, with one number `[M]` for each trace; of more than K, the last ones stay."""
        if self.count == self.flat.shape[1]:
            for taken in (self.flat, *self.buffers.values(), *self.traces.values()):
                taken[:, :-1] = taken[:, 1:].clone()
            self.count -= 1
        self.flat[:, self.count] = stack.flat
        for name, buffer in stack.buffers.items():
            self.buffers[name][:, self.count] = buffer
        for name, trace in self.traces.items():
            trace[:, self.count] = traces[name]
        self.count += 1

    def posteriors(self) -> list[MemberPosterior]:
        """The chain of each member.

        Raises:
            RuntimeError: not all draws are there yet.
        """
        num_members, num_draws, _ = self.flat.shape
        if self.count < num_draws:
            raise RuntimeError(
                f"{self.count} of {num_draws} draws are taken: the chains have not reached their end."
            )
        return [
            Chain(
                self.flat[m].clone(),
                {name: buffer[m].clone() for name, buffer in self.buffers.items()},
                {name: trace[m].clone() for name, trace in self.traces.items()},
            )
            for m in range(num_members)
        ]

    def state_dict(self) -> dict[str, Any]:
        taken = slice(self.count)
        return {
            "flat": self.flat[:, taken].clone(),
            "buffers": {name: buffer[:, taken].clone() for name, buffer in self.buffers.items()},
            "traces": {name: trace[:, taken].clone() for name, trace in self.traces.items()},
        }

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        self.count = stored["flat"].shape[1]
        self.flat[:, : self.count] = stored["flat"]
        for name, buffer in stored["buffers"].items():
            self.buffers[name][:, : self.count] = buffer
        for name, trace in stored["traces"].items():
            self.traces[name][:, : self.count] = trace
