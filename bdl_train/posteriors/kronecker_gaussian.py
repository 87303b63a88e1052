"""A Gaussian whose precision is diagonal but for blocks of a Kronecker product plus a diagonal: Laplace's forms.

Shape letters: P parameters, O outputs and I inputs of a layer (a bias is one input more).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bdl_train.posteriors import MemberPosterior, prefixed, unprefixed
from bdl_train.seeds import Stream, member_seed

_BLOCK = "block:"
_PARTS = ("inputs", "outputs", "prior", "start", "has_bias")


@dataclass(frozen=True)
class KroneckerBlock:
    """Weights W `[O, I]` of one layer, with precision B ⊗ A + 1 ⊗ diag(p) in the order of their rows.

    With O = 1 and B = 1 it is a full covariance of neighbouring parameters.

    Attributes:
        inputs: A, `[I, I]`, positive semi-definite.
        outputs: B, `[O, O]`, the same.
        prior: p, `[I]`, positive.
        start: int64 scalar, position of the first weight in the flat vector.
        has_bias: bool scalar; the last column of W is the layer's bias, which lies behind its `O · (I − 1)` weights.
    """

    inputs: Tensor
    outputs: Tensor
    prior: Tensor
    start: Tensor
    has_bias: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """Position of each weight in the flat vector, `[O, I]`."""
        return block_columns(int(self.start), len(self.outputs), len(self.inputs), bool(self.has_bias))

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """V `[O, O]`, U `[I, I]` and the variances `[O, I]` of Vᵀ W p^½ U, float64."""
        root_I = self.prior.double().sqrt()
        # The basis is in no file: where eigenvalues are equal it is arbitrary, while draws do not depend on it.
        input_I, U = torch.linalg.eigh(self.inputs.double() / (root_I[:, None] * root_I))
        output_O, V = torch.linalg.eigh(self.outputs.double())
        precision_OI = 1 + output_O.clamp(min=0)[:, None] * input_I.clamp(min=0)
        return V, U, 1 / precision_OI

    def deviation(self, z: Tensor) -> Tensor:
        """A draw of W − mean from standard normal numbers, `[O, I]` each: by the symmetric root of the covariance."""
        V, U, variance_OI = self._eigen
        root_OI = V @ ((V.T @ z.double() @ U) * variance_OI.sqrt()) @ U.T
        return (root_OI / self.prior.double().sqrt()).to(z.dtype)

    @cached_property
    def variance(self) -> Tensor:
        """Of each weight, `[O, I]`."""
        V, U, variance_OI = self._eigen
        return (V.square() @ variance_OI @ U.square().T / self.prior).to(self.prior.dtype)


def block_columns(start: int, num_outputs: int, num_inputs: int, has_bias: bool) -> Tensor:
    """Positions of the weights of one layer in the flat vector, `[O, I]`; a bias is the last column."""
    columns = torch.arange(start, start + num_outputs * num_inputs)
    if not has_bias:
        return columns.reshape(num_outputs, num_inputs)
    weights, bias = columns[:-num_outputs], columns[-num_outputs:]
    return torch.cat([weights.reshape(num_outputs, num_inputs - 1), bias[:, None]], dim=1)


@dataclass(frozen=True)
class KroneckerGaussian(MemberPosterior):
    """N(mean, Σ): the blocks are independent, and so are all parameters outside of them.

    Source:
        Ritter, Botev & Barber (2018), ICLR, Section 2.3, a matrix normal for each layer; there the prior is folded into
        the factors, here it is added to their product exactly, as in Immer et al. (2021), arXiv:2008.08217, Appendix.

    Attributes:
        mean: `[P]`.
        variance: `[P]`, of the parameters outside of blocks; 0 = known.
        blocks: By the name of the layer.
        linearised: bool scalar; predict with the network linearised at the mean.
        buffers: Of the network, shared by all draws.
    """

    mean: Tensor
    variance: Tensor
    blocks: dict[str, KroneckerBlock]
    linearised: Tensor
    buffers: dict[str, Tensor]

    @property
    def num_params(self) -> int:
        return self.mean.shape[0]

    @property
    def num_atoms(self) -> None:
        return None

    @property
    def centre(self) -> Tensor | None:
        return self.mean if bool(self.linearised) else None

    def draw(self, num_samples: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        std_P = self.variance.sqrt()
        for i in range(num_samples):
            generator = torch.Generator().manual_seed(member_seed(seed, i, Stream.DRAWS))
            z_P = torch.empty(self.mean.shape, dtype=self.mean.dtype).normal_(generator=generator)
            z_P = z_P.to(self.mean.device)
            flat = self.mean + std_P * z_P
            for block in self.blocks.values():
                flat[block.columns] = self.mean[block.columns] + block.deviation(z_P[block.columns])
            yield flat, self.buffers

    def moments(self) -> tuple[Tensor, Tensor]:
        variance = self.variance.clone()
        for block in self.blocks.values():
            variance[block.columns] = block.variance
        return self.mean, variance

    def tensors(self) -> dict[str, Tensor]:
        stored = {"mean": self.mean, "variance": self.variance, "linearised": self.linearised}
        for name, block in self.blocks.items():
            stored |= {f"{_BLOCK}{part}:{name}": getattr(block, part) for part in _PARTS}
        return {**stored, **prefixed(self.buffers)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "KroneckerGaussian":
        missing = {"mean", "variance", "linearised"} - set(tensors)
        if missing:
            raise ValueError(f"A Kronecker Gaussian needs the tensors {', '.join(sorted(missing))}.")
        mean, variance = tensors["mean"], tensors["variance"]
        if mean.ndim != 1 or variance.shape != mean.shape:
            raise ValueError(
                f"mean {list(mean.shape)} and variance {list(variance.shape)} do not fit together."
            )
        if not bool((variance >= 0).all()):
            raise ValueError("A variance is negative or NaN.")
        names = [key.removeprefix(f"{_BLOCK}start:") for key in tensors if key.startswith(f"{_BLOCK}start:")]
        blocks = {name: _read_block(name, tensors, len(mean)) for name in names}
        return cls(mean, variance, blocks, tensors["linearised"], unprefixed(tensors))


def _read_block(name: str, tensors: Mapping[str, Tensor], num_params: int) -> KroneckerBlock:
    parts = {part: tensors.get(f"{_BLOCK}{part}:{name}") for part in _PARTS}
    found = {part: tensor for part, tensor in parts.items() if tensor is not None}
    if len(found) < len(_PARTS):
        raise ValueError(
            f"The block '{name}' needs the tensors {', '.join(sorted(set(parts) - set(found)))}."
        )
    block = KroneckerBlock(**found)
    num_outputs, num_inputs, start = len(block.outputs), len(block.inputs), int(block.start)
    square = block.outputs.shape == (num_outputs, num_outputs) and block.inputs.shape == (
        num_inputs,
        num_inputs,
    )
    if not square or block.prior.shape != (num_inputs,):
        raise ValueError(
            f"The block '{name}' has factors {list(block.inputs.shape)} and {list(block.outputs.shape)} and a prior "
            f"{list(block.prior.shape)}, which do not fit together."
        )
    if start < 0 or start + num_outputs * num_inputs > num_params:
        raise ValueError(f"The block '{name}' lies outside of the {num_params} parameters.")
    if not bool((block.prior > 0).all()):
        raise ValueError(f"A prior precision of the block '{name}' is not positive.")
    return block
