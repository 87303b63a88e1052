"""Weight posteriors: what each member learned, in a form that can be stored and drawn from.

Shape letters: M members, K atoms of one member, P parameters of one member, C components (draws) of a chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """A chunk of weighted draws.

    Attributes:
        flat: `[C, P]`.
        buffers: `[C, ...]` each.
        log_weights: `[C]`; over all chunks of a pass the weights sum to 1.
        members: `[C]` int64, the ensemble index of the member each draw belongs to.
    """

    flat: Tensor
    buffers: dict[str, Tensor]
    log_weights: Tensor
    members: Tensor

    def __len__(self) -> int:
        return len(self.log_weights)


class MemberPosterior(ABC):
    """The posterior of one member: atoms, or a distribution to draw from."""

    @property
    @abstractmethod
    def num_params(self) -> int:
        """P."""

    @property
    @abstractmethod
    def num_atoms(self) -> int | None:
        """How many atoms it holds, or None for a distribution."""

    @abstractmethod
    def draw(self, num_samples: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield `num_samples` draws one by one: parameters `[P]` and buffers.

        Draw i depends on (seed, i) alone, so any chunking gives the same draws. Atoms are enumerated, never
        resampled: `num_samples` must then be at most their number.
        """

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance over this member's draws, `[P]` each."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that must be stored, by name."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "MemberPosterior":
        """The inverse of `tensors`.

        Raises:
            ValueError: missing names or shapes that do not fit together.
        """


def prefixed(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Buffers under names that cannot clash with a posterior's own tensors."""
    return {f"buffer:{name}": tensor for name, tensor in buffers.items()}


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers among stored tensors."""
    start = "buffer:"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def stack_draws(
    drawn: list[tuple[Tensor, dict[str, Tensor]]], log_weights: list[float], members: list[int]
) -> Draws:
    """Single draws as one chunk."""
    flats = torch.stack([flat for flat, _ in drawn])
    names = drawn[0][1]
    buffers = {name: torch.stack([one[name] for _, one in drawn]) for name in names}
    return Draws(flats, buffers, torch.tensor(log_weights, dtype=torch.float64), torch.tensor(members))
