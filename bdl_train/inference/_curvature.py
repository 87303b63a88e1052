"""Which part of the generalised Gauss-Newton matrix Laplace's approximation keeps, and how it is summed over a batch.

Shape letters: M members, B batch, I inputs and O outputs of a layer, R columns of a root, P parameters of one member.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.inference._ggn import (
    Layer,
    diagonal,
    find_layers,
    kronecker_factors,
    last_layer,
    over_members,
    rows_at_a_time,
)
from bdl_train.likelihoods import PREFIX
from bdl_train.posteriors.kronecker_gaussian import block_columns
from bdl_train.priors import BoundGaussian
from bdl_train.stack import Layout, Stack, StackedNetwork

WIDEST = 8192
"""Rows of the widest matrix that is decomposed: half a GiB in float64, and minutes."""


@dataclass(frozen=True)
class Place:
    """Where a block's weights lie in the flat vector: `block_columns` of its factors' sizes.

    Attributes:
        start: Position of the first.
        has_bias: Whether a bias that lies behind the weights is the last column.
    """

    start: int
    has_bias: bool


@dataclass(frozen=True)
class Pass:
    """One batch of a stack, and the root of the Fisher information of its outputs.

    Attributes:
        x: `[M, B, ...]`.
        root: `[M, B, O, R]`; None before it is known.
    """

    network: StackedNetwork
    stack: Stack
    x: Tensor
    root: Tensor | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Of the network, `[M, ...]` each."""
        return {name: w.detach() for name, w in self.stack.params.items() if not name.startswith(PREFIX)}

    def layers(self) -> dict[str, Layer]:
        """Layers that may form a block, as the first member's run shows them."""
        first = {name: w[0] for name, w in self.weights.items()}
        return find_layers(self.network, first, {n: b[0] for n, b in self.stack.buffers.items()}, self.x[0])


class Structure(ABC):
    """A block-diagonal part of the matrix: blocks of layers, and a diagonal for some of the other parameters."""

    @abstractmethod
    def blocks(self, batch: Pass, prior: BoundGaussian) -> dict[str, Layer]:
        """The layers whose weights form a block, by name.

        Raises:
            UsageError: the network has no such layers, or they or their prior do not suit.
        """

    @abstractmethod
    def place(self, layer: Layer, start: int) -> Place:
        """Where the block of a layer lies whose first weight is at `start`."""

    @abstractmethod
    def independent(self, layout: Layout, blocks: Mapping[str, object]) -> list[str]:
        """Names of the parameters with a variance of their own."""

    @abstractmethod
    def factors(self, batch: Pass, blocks: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        """A `[M, I, I]` and B `[M, O, O]` of each block, summed over the batch: the block is (Σ B) ⊗ (Σ A) / N.

        A full block is the A of one row, whose B counts the examples.
        """


class LastLayer(Structure):
    """The full matrix of the linear layer whose output is the network's."""

    def blocks(self, batch: Pass, prior: BoundGaussian) -> dict[str, Layer]:
        layers = {name: layer for name, layer in batch.layers().items() if layer.is_last}
        if not layers:
            raise UsageError(
                "inference.structure=last_layer needs a network whose output is that of one torch.nn.Linear, as it is "
                "and with weights of its own: this one has none. Use inference.structure=kfac or diagonal."
            )
        _refuse_wide({n: layer.num_inputs * layer.num_outputs for n, layer in layers.items()}, "kfac")
        return layers

    def place(self, layer: Layer, start: int) -> Place:
        return Place(start, has_bias=False)  # one row, in the order of the flat vector

    def independent(self, layout: Layout, blocks: Mapping[str, object]) -> list[str]:
        return []

    def factors(self, batch: Pass, blocks: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        ((name, layer),) = blocks.items()
        run = partial(last_layer, batch.network, name, layer)
        full = over_members(batch.network, run, batch.weights, batch.stack.buffers, batch.x, batch.root)
        return {name: (full, full.new_full((len(full), 1, 1), batch.x.shape[1]))}


class Diagonal(Structure):
    """The diagonal over all parameters of the network."""

    def blocks(self, batch: Pass, prior: BoundGaussian) -> dict[str, Layer]:
        return {}

    def place(self, layer: Layer, start: int) -> Place:
        return Place(start, layer.module.bias is not None)

    def independent(self, layout: Layout, blocks: Mapping[str, object]) -> list[str]:
        in_blocks = {f"{name}.{part}" if name else part for name in blocks for part in ("weight", "bias")}
        return [n for n in layout.names if not n.startswith(PREFIX) and n not in in_blocks]

    def factors(self, batch: Pass, blocks: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        return {}


class Kfac(Diagonal):
    """Kronecker factors of each linear and convolutional layer, a diagonal over all other parameters."""

    def blocks(self, batch: Pass, prior: BoundGaussian) -> dict[str, Layer]:
        layers = batch.layers()
        _refuse_wide({n: max(layer.num_inputs, layer.num_outputs) for n, layer in layers.items()}, "diagonal")
        for name, layer in layers.items():
            place = self.place(layer, start_of(batch.stack.layout, name))
            columns = block_columns(place.start, layer.num_outputs, layer.num_inputs, place.has_bias)
            precision = prior.precision[..., columns.to(prior.precision.device)]
            if not bool((precision == precision[..., :1, :]).all()):
                raise UsageError(
                    "inference.structure=kfac needs a prior with one variance for all weights of a layer that meet the "
                    f"same input, and that of '{name}' varies with the output: use inference.structure=diagonal or "
                    "last_layer, or another prior."
                )
        return layers

    def factors(self, batch: Pass, blocks: Mapping[str, Layer]) -> dict[str, tuple[Tensor, Tensor]]:
        if not blocks:
            return {}
        run = partial(kronecker_factors, batch.network, blocks)
        return over_members(batch.network, run, batch.weights, batch.stack.buffers, batch.x, batch.root)


STRUCTURES: dict[str, Structure] = {"last_layer": LastLayer(), "kfac": Kfac(), "diagonal": Diagonal()}


def diagonal_of(batch: Pass, names: list[str]) -> Tensor:
    """The diagonal summed over the batch for the named parameters, `[M, P]`; 0 elsewhere.

    Raises:
        UsageError: the network has no gradients of single examples.
    """
    stack, network = batch.stack, batch.network
    total = torch.zeros_like(stack.flat)
    if not names:
        return total
    own = stack.layout.select(names)
    num_members = stack.num_members if network.executor == "vmap" else 1
    rows = rows_at_a_time(own.num_params, num_members, stack.flat.element_size())
    run = partial(diagonal, network, names, rows=rows)
    try:
        found = over_members(network, run, batch.weights, stack.buffers, batch.x, batch.root)
    except RuntimeError as error:
        raise UsageError(
            f"The curvature of {names[0]} needs gradients of single examples, which torch.vmap cannot take of this "
            f"network ({error}): use inference.structure=last_layer."
        ) from error
    total[:, stack.layout.columns(names).to(total.device)] = own.flatten(found)
    return total


def start_of(layout: Layout, name: str) -> int:
    """Position of a layer's first weight in the flat vector; its bias lies behind its weights."""
    return int(layout.columns([f"{name}.weight" if name else "weight"])[0])


def _refuse_wide(sizes: Mapping[str, int], instead: str) -> None:
    for name, size in sizes.items():
        if size > WIDEST:
            raise UsageError(
                f"The curvature of layer '{name}' would have a matrix of {size} × {size}, at most {WIDEST} rows are "
                f"decomposed: use inference.structure={instead}, or a narrower layer."
            )
