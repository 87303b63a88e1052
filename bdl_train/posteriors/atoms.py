"""A posterior made of atoms: point estimates, snapshots, MCMC samples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from bdl_train.posteriors import MemberPosterior, prefixed, unprefixed
from bdl_train.stack import Stack


@dataclass(frozen=True)
class Atoms(MemberPosterior):
    """K equally weighted parameter vectors.

    Attributes:
        flat: `[K, P]`.
        buffers: `[K, ...]` each.
    """

    flat: Tensor
    buffers: dict[str, Tensor]

    @classmethod
    def of_stack(cls, stack: Stack) -> list[MemberPosterior]:
        """One atom a member, at the stack's present weights."""
        return [
            cls(
                stack.flat[m : m + 1].clone(),
                {name: b[m : m + 1].clone() for name, b in stack.buffers.items()},
            )
            for m in range(stack.num_members)
        ]

    @property
    def num_params(self) -> int:
        return self.flat.shape[1]

    @property
    def num_atoms(self) -> int:
        return self.flat.shape[0]

    def draw(self, num_samples: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        if num_samples > self.num_atoms:
            raise ValueError(
                f"This posterior holds {self.num_atoms} atoms a member, {num_samples} draws were asked for: "
                "lower num_draws. Atoms are enumerated, never resampled."
            )
        # Fewer than all: spread evenly, since neighbouring atoms of a chain are alike.
        for i in range(num_samples):
            k = i * self.num_atoms // num_samples
            yield self.flat[k], {name: buffer[k] for name, buffer in self.buffers.items()}

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.flat.mean(0), self.flat.var(0, correction=0)

    def tensors(self) -> dict[str, Tensor]:
        return {"atoms": self.flat, **prefixed(self.buffers)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Atoms":
        if "atoms" not in tensors or tensors["atoms"].ndim != 2 or len(tensors["atoms"]) == 0:
            raise ValueError("Atoms need a tensor 'atoms' of shape [K, P] with K of 1 or more.")
        atoms, buffers = tensors["atoms"], unprefixed(tensors)
        for name, buffer in buffers.items():
            if buffer.ndim == 0 or len(buffer) != len(atoms):
                raise ValueError(
                    f"The buffer '{name}' {list(buffer.shape)} needs one entry for each of {len(atoms)} atoms."
                )
        return cls(atoms, buffers)
