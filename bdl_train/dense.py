"""Plain dense networks batched over members by hand: the same function as under vmap, with less around it.

Most stacks are many small multilayer perceptrons, whose step is short: there the bookkeeping of vmap costs as much
as the arithmetic. Shape letters: M members, B batch, I inputs and O outputs of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ELEMENTWISE = (
    nn.ELU, nn.GELU, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Tanh,
)  # fmt: skip


@dataclass(frozen=True)
class DenseNetwork:
    """The layers of an `nn.Sequential` in order; a linear layer is its name in the parameters."""

    layers: tuple[str | nn.Module, ...]

    @classmethod
    def of(cls, template: nn.Module) -> "DenseNetwork | None":
        """The layers, or None when the network is anything but linear layers with bias and elementwise activations."""
        # A module that stands in two places has one name.
        if type(template) is not nn.Sequential or len(set(template)) < len(template):
            return None
        layers: list[str | nn.Module] = []
        for name, module in template.named_children():
            if type(module) is nn.Linear and module.bias is not None:
                layers.append(name)
            elif type(module) in ELEMENTWISE or _flattens_examples(module):
                layers.append(module)
            else:
                return None
        return cls(tuple(layers))

    def __call__(self, params: Mapping[str, Tensor], x: Tensor, shared: bool) -> Tensor:
        """Outputs `[M, B, O]` for `x` `[M, B, ...]`, or `[B, ...]` when shared."""
        h = x.flatten(1 if shared else 2).mT.contiguous()
        for layer in self.layers:
            if isinstance(layer, str):
                h = _linear(params[f"{layer}.weight"], params[f"{layer}.bias"], h)
            elif type(layer) is not nn.Flatten:
                h = layer(h)
        return h.mT


def _flattens_examples(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1


def _linear(weight_MOI: Tensor, bias_MO: Tensor, h: Tensor) -> Tensor:
    """`[M, O, B]` for `[M, I, B]`, or for `[I, B]` that all members share: examples last, they are the long axis."""
    if h.ndim == 3:
        return torch.baddbmm(bias_MO.unsqueeze(2), weight_MOI, h)
    num_members, num_outputs, num_inputs = weight_MOI.shape
    # One matrix product over all members.
    joint = weight_MOI.reshape(num_members * num_outputs, num_inputs) @ h
    return joint.unflatten(0, (num_members, num_outputs)) + bias_MO.unsqueeze(2)
