"""Weight posteriors: what each member learned, in a form that can be stored and drawn from.

Shape letters: M members, K atoms of one member, P parameters of one member, C components (draws) of a chunk.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

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
        centres: `[C, P]`, where the network of each draw is linearised in its weights; None = nowhere.
    """

    flat: Tensor
    buffers: dict[str, Tensor]
    log_weights: Tensor
    members: Tensor
    centres: Tensor | None = None

    def __len__(self) -> int:
        return len(self.log_weights)


class MemberPosterior(ABC):
    """The posterior of one member: atoms, or a distribution to draw from."""

    at_trained_weights: ClassVar[bool] = False
    """Whether a distribution draws no weights but those that were trained: their batch-norm statistics then hold."""

    @property
    @abstractmethod
    def num_params(self) -> int:
        """P."""

    @property
    @abstractmethod
    def num_atoms(self) -> int | None:
        """How many atoms it holds, or None for a distribution."""

    @property
    def centre(self) -> Tensor | None:
        """Weights `[P]` at which the network is linearised to predict: a draw θ then means
        f(centre) + J(centre) (θ − centre). None = a draw is the weights of the network."""
        return None

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
    drawn: list[tuple[Tensor, dict[str, Tensor]]],
    log_weights: list[float],
    members: list[int],
    centres: list[Tensor | None],
) -> Draws:
    """Single draws as one chunk."""
    flats = torch.stack([flat for flat, _ in drawn])
    names = drawn[0][1]
    buffers = {name: torch.stack([one[name] for _, one in drawn]) for name in names}
    # Linearised at itself, a network is what it is: draws with and without a centre fit into one chunk.
    stacked = None
    if any(centre is not None for centre in centres):
        pairs = zip(flats, centres, strict=True)
        stacked = torch.stack([flat if centre is None else centre for flat, centre in pairs])
    return Draws(
        flats, buffers, torch.tensor(log_weights, dtype=torch.float64), torch.tensor(members), stacked
    )
