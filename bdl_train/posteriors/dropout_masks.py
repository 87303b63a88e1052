"""The posterior of MC dropout: one vector of weights, whose units are dropped anew for each draw."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdl_train.models._dropout import DRAW
from bdl_train.posteriors import MemberPosterior, prefixed, unprefixed
from bdl_train.seeds import Stream, member_seed
from bdl_train.stack import Stack

_DROPOUT = "dropout:"


@dataclass(frozen=True)
class DropoutMasks(MemberPosterior):
    """Draws differ in the seeds of the dropout layers alone, which are buffers: the weights are stored once.

    A mask is a value for each unit, shared by all rows, so a draw is one function.

    Source:
        Gal & Ghahramani (2016), arXiv:1506.02142, Section 3: W = M · diag(z), z of Bernoulli variables.

    Attributes:
        flat: `[P]`.
        buffers: Of the network, those of its dropout layers left out; shared by all draws.
        layers: `[2]` int64 for each dropout layer by its name in the network: seed and step as training left them.
    """

    flat: Tensor
    buffers: dict[str, Tensor]
    layers: dict[str, Tensor]

    at_trained_weights: ClassVar[bool] = True

    @classmethod
    def of_stack(cls, stack: Stack, layers: Sequence[str]) -> list[MemberPosterior]:
        """The masks around each member's present weights.

        Args:
            stack: The members.
            layers: Names of the dropout layers in the network.
        """
        own = {name: tuple(stack.buffers[buffer] for buffer in _buffers_of(name)) for name in layers}
        others = set(stack.buffers) - {buffer for name in layers for buffer in _buffers_of(name)}
        return [
            cls(
                stack.flat[m].clone(),
                {name: b[m].clone() for name, b in stack.buffers.items() if name in others},
                {name: torch.stack([seed[m], step[m]]) for name, (seed, step) in own.items()},
            )
            for m in range(stack.num_members)
        ]

    @property
    def num_params(self) -> int:
        return self.flat.shape[0]

    @property
    def num_atoms(self) -> None:
        return None

    def draw(self, num_samples: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        # Sorted: a file gives its tensors back in an order of its own, and the draws must not follow it.
        names = sorted(self.layers)
        for i in range(num_samples):
            generator = torch.Generator().manual_seed(member_seed(seed, i, Stream.DRAWS))
            seeds = torch.randint(2**62, (len(names),), generator=generator).to(self.flat.device)
            buffers = dict(self.buffers)
            for name, mask_seed in zip(names, seeds, strict=True):
                seed_name, step_name = _buffers_of(name)
                buffers |= {seed_name: mask_seed, step_name: torch.full_like(mask_seed, DRAW)}
            yield self.flat, buffers

    def moments(self) -> tuple[Tensor, Tensor]:
        """The weights, and 0: masks act on units, so the parameters themselves do not vary."""
        return self.flat, torch.zeros_like(self.flat)

    def tensors(self) -> dict[str, Tensor]:
        layers = {_DROPOUT + name: layer for name, layer in self.layers.items()}
        return {"weights": self.flat, **prefixed(self.buffers), **layers}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "DropoutMasks":
        if "weights" not in tensors or tensors["weights"].ndim != 1:
            raise ValueError("Dropout masks need a tensor 'weights' of shape [P].")
        layers = {
            name.removeprefix(_DROPOUT): layer for name, layer in tensors.items() if name.startswith(_DROPOUT)
        }
        for name, layer in layers.items():
            if layer.shape != (2,) or layer.dtype != torch.int64:
                raise ValueError(
                    f"The dropout layer '{name}' needs a seed and a step, [2] of torch.int64, got "
                    f"{list(layer.shape)} of {layer.dtype}."
                )
        return cls(tensors["weights"], unprefixed(tensors), layers)


def _buffers_of(layer: str) -> tuple[str, str]:
    """The names of its seed and step; the network itself may be a dropout layer, with the empty name."""
    start = f"{layer}." if layer else ""
    return f"{start}seed", f"{start}step"
