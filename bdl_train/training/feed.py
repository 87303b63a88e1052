"""Which examples each member sees at each step: a function of (member seed, attempt, step), so nothing to lose.

Shape letters: M members, N training examples of one member, B batch, K steps of one call.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bdl_train.inference import State
from bdl_train.training.timeline import Timeline

_GOLDEN = 0x9E3779B97F4A7C15
_MASK63 = (1 << 63) - 1


def order(member_seed: int, epoch: int, num_data: int) -> Tensor:
    """The permutation `[N]` in which one member visits the training examples in one epoch."""
    generator = torch.Generator().manual_seed((member_seed + epoch * _GOLDEN) & _MASK63)
    return torch.randperm(num_data, generator=generator)


class StepFeed:
    """One epoch's batches as numbers of each member's own examples, `[K, M, B]`, several steps at a time.

    Each epoch has N // B full batches; the few examples left over differ from epoch to epoch, since every epoch has a
    new order. All batches have one shape, so a compiled step compiles once. Iterating starts at the step
    that `position` reports, in the middle of an epoch after a resume. It has no length: Lightning would ask once, and
    hold every later epoch to the few batches that a resumed one had left.

    Args:
        seeds: Order seed of each member.
        num_data: N.
        batch_size: Asked for; B is at most N.
        steps_per_call: K; the last call of an epoch may hold fewer.
        position: Steps taken so far.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        num_data: int,
        batch_size: int,
        steps_per_call: int,
        position: Callable[[], int],
    ) -> None:
        self.seeds = seeds
        self.num_data = num_data
        self.batch_size = min(batch_size, num_data)
        self.steps_per_epoch = num_data // self.batch_size
        self.steps_per_call = steps_per_call
        self._position = position

    def generators(self, step: int) -> list[torch.Generator]:
        """One generator a member for the random views of one step's examples: a function of (member seed, step)."""
        # Epochs use the multiples of the golden ratio's word; the inverted seed keeps the two families apart.
        seeds = [(~seed + step * _GOLDEN) & _MASK63 for seed in self.seeds]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def __iter__(self) -> Iterator[Tensor]:
        epoch, first = divmod(self._position(), self.steps_per_epoch)
        order_MN = torch.stack([order(seed, epoch, self.num_data) for seed in self.seeds])
        used = order_MN[:, : self.steps_per_epoch * self.batch_size]
        index_SMB = used.reshape(len(self.seeds), self.steps_per_epoch, self.batch_size).transpose(0, 1)
        for start in range(first, self.steps_per_epoch, self.steps_per_call):
            yield index_SMB[start : start + self.steps_per_call]


class PhaseFeed:
    """One epoch of whatever phase the state is in: batches as `StepFeed` gives them, or a number of steps on all rows.

    Args:
        shuffled: The members' own orders; its position is the state's.
        timeline: The phases.
        state: Where the stack stands.
    """

    def __init__(self, shuffled: StepFeed, timeline: Timeline, state: State) -> None:
        self.shuffled, self.timeline, self.state = shuffled, timeline, state

    def __iter__(self) -> Iterator[Tensor | int]:
        phase = self.timeline.phase(self.state)
        first = self.state.step % phase.steps_per_epoch
        if phase.rows == "shuffled":
            yield from self.shuffled
        elif phase.rows == "all":
            for start in range(first, phase.steps_per_epoch, self.shuffled.steps_per_call):
                yield min(self.shuffled.steps_per_call, phase.steps_per_epoch - start)
        else:
            in_order = torch.arange(self.shuffled.num_data).expand(1, len(self.shuffled.seeds), -1)
            yield from in_order.split(self.shuffled.batch_size, dim=-1)[first:]
