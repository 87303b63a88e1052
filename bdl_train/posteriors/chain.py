"""A posterior made of the successive states of one Markov chain, with what the sampler said on the way."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bdl_train.posteriors.atoms import Atoms

_TRACE = "trace:"


@dataclass(frozen=True)
class Chain(Atoms):
    """K equally weighted states in the order in which they were visited; neighbours are alike.

    Attributes:
        traces: `[K]` each, by name: `potential` in nats per example at the state, `step_size`, ...
    """

    traces: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **{_TRACE + name: trace for name, trace in self.traces.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Chain":
        atoms = Atoms.from_tensors(tensors)
        traces = {name.removeprefix(_TRACE): t for name, t in tensors.items() if name.startswith(_TRACE)}
        for name, trace in traces.items():
            if trace.shape != (atoms.num_atoms,):
                raise ValueError(
                    f"The trace '{name}' {list(trace.shape)} needs one number for each of {atoms.num_atoms} states."
                )
        return cls(atoms.flat, atoms.buffers, traces)
