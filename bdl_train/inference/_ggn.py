"""Sums over a batch of the generalised Gauss-Newton matrix: of the last layer, its diagonal, its Kronecker factors.

G = Σ_n J_nᵀ L_n L_nᵀ J_n with the Jacobian J of the outputs in the weights and the root L of the Fisher information
(`_fisher`). Everything here is for one member; `over_members` runs it for a stack, and `loop` and `vmap` agree.

Shape letters: M members, B batch, T positions at which a layer is applied to one example, I inputs and O outputs of
a layer, R columns of L, P parameters of one member.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold
from torch.utils._pytree import tree_map

from bdl_train.stack import StackedNetwork

Params = Mapping[str, Tensor]
PER_EXAMPLE_BYTES = 256 * 2**20
"""Room for gradients of single examples."""


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer whose weights are its own and which runs once in a forward pass.

    Attributes:
        shape: Of its output in the pass that found it.
        is_last: Whether its output is the network's, as it is.
    """

    module: nn.Linear | nn.Conv2d
    shape: torch.Size
    is_last: bool

    @property
    def num_inputs(self) -> int:
        """I, a bias counted as one."""
        return self.module.weight[0].numel() + (self.module.bias is not None)

    @property
    def num_outputs(self) -> int:
        return self.module.weight.shape[0]

    def rows_in(self, x: Tensor) -> Tensor:
        """What the weights are multiplied with, `[B · T, I]`."""
        module = self.module
        if isinstance(module, nn.Conv2d):
            assert not isinstance(module.padding, str)
            x = unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).transpose(1, 2)  # pyright: ignore[reportArgumentType]
        rows = x.reshape(-1, x.shape[-1])
        return rows if module.bias is None else torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)

    def rows_out(self, g: Tensor) -> Tensor:
        """A gradient in the layer's output as `[B · T, O]`."""
        if isinstance(self.module, nn.Conv2d):
            g = g.movedim(1, -1)
        return g.reshape(-1, g.shape[-1])


def find_layers(network: StackedNetwork, params: Params, buffers: Params, x: Tensor) -> dict[str, Layer]:
    """Layers with a Kronecker form, by name: found by running one member's network on `x` `[B, ...]`."""
    template = network.template.eval()
    owners = [id(p) for module in template.modules() for p in module.parameters(recurse=False)]
    plain = {
        name: module
        for name, module in template.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and _is_plain(module)
        and all(owners.count(id(p)) == 1 for p in module.parameters())
    }
    seen: dict[str, list[Tensor]] = {name: [] for name in plain}
    with torch.no_grad(), _hooks(plain, lambda name, _x, out: seen[name].append(out)):
        outputs = _call(template, params, buffers, x)
    return {
        name: Layer(module, seen[name][0].shape, seen[name][0] is outputs)
        for name, module in plain.items()
        if len(seen[name]) == 1
    }


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def over_members(network: StackedNetwork, run: Callable[..., Any], *stacked: Any) -> Any:
    """`run` for each member of a stack: arguments and results are trees of tensors `[M, ...]`."""
    if network.executor == "vmap":
        return torch.vmap(run)(*stacked)
    num_members = next(iter(stacked[0].values())).shape[0]
    results = [run(*tree_map(lambda t, m=m: t[m], stacked)) for m in range(num_members)]
    return tree_map(lambda *one: torch.stack(one), *results)


def last_layer(
    network: StackedNetwork, name: str, layer: Layer, params: Params, buffers: Params, x: Tensor, root: Tensor
) -> Tensor:
    """Σ_n of G `[D, D]` over the D weights of the layer whose output is the network's, in their own order.

    The Jacobian of its outputs in its weights is the layer's input, so one forward pass is enough.
    """
    found: list[Tensor] = []
    with _hooks({name: layer.module}, lambda _name, given, _out: found.append(given)):
        _call(network.template, params, buffers, x)
    has_bias = layer.module.bias is not None
    inputs_BI = layer.rows_in(found[0])
    weights_BRD = torch.einsum("bor,bi->broi", root, inputs_BI[:, : layer.num_inputs - has_bias]).flatten(2)
    jacobian_BRD = torch.cat([weights_BRD, root.transpose(1, 2)], dim=-1) if has_bias else weights_BRD
    rows = jacobian_BRD.flatten(0, 1)
    return rows.T @ rows


def kronecker_factors(
    network: StackedNetwork,
    layers: Mapping[str, Layer],
    params: Params,
    buffers: Params,
    x: Tensor,
    root: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Σ_n of A `[I, I]`, mean over positions of a aᵀ, and of B `[O, O]`, sum over positions of g gᵀ, by layer.

    G of a layer is then about (1/N) · (Σ A) ⊗ (Σ B), exact where a and g do not vary together.

    Source:
        Martens & Grosse (2015), arXiv:1503.05671, Section 3; Grosse & Martens (2016), arXiv:1602.01407, Section 3, for
        convolutions ("expand" of Eschenhagen et al., 2023, arXiv:2311.00636).
    """

    def shifted(shifts: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        inputs: dict[str, Tensor] = {}

        def hook(name: str, given: Tensor, out: Tensor) -> Tensor:
            inputs[name] = given.detach()
            return out + shifts[name]

        with _hooks({name: layer.module for name, layer in layers.items()}, hook):
            return _call(network.template, params, buffers, x), inputs

    zeros = {name: root.new_zeros(layer.shape) for name, layer in layers.items()}
    _, pull, inputs = torch.func.vjp(shifted, zeros, has_aux=True)  # pyright: ignore[reportAssignmentType]
    outer = {name: root.new_zeros(layer.num_outputs, layer.num_outputs) for name, layer in layers.items()}
    for column in root.unbind(-1):
        (grads,) = pull(column)
        for name, layer in layers.items():
            rows = layer.rows_out(grads[name])
            outer[name] = outer[name] + rows.T @ rows
    factors = {}
    for name, layer in layers.items():
        rows = layer.rows_in(inputs[name])
        factors[name] = (rows.T @ rows * (len(x) / len(rows)), outer[name])
    return factors


def diagonal(
    network: StackedNetwork,
    names: Sequence[str],
    params: Params,
    buffers: Params,
    x: Tensor,
    root: Tensor,
    rows: int,
) -> dict[str, Tensor]:
    """Σ_n of the diagonal of G for the named parameters, from gradients of `rows` examples at a time."""
    own = {name: params[name] for name in names}
    rest = {name: value for name, value in params.items() if name not in own}

    def squares(x_one: Tensor, root_OR: Tensor) -> dict[str, Tensor]:
        def outputs(mine: dict[str, Tensor]) -> Tensor:
            return _call(network.template, {**rest, **mine}, buffers, x_one[None])[0]

        _, pull = torch.func.vjp(outputs, own)  # pyright: ignore[reportAssignmentType]
        total = {name: torch.zeros_like(value) for name, value in own.items()}
        for column in root_OR.unbind(-1):
            grads: dict[str, Tensor] = pull(column)[0]  # pyright: ignore[reportArgumentType]
            total = {name: total[name] + grads[name].square() for name in total}
        return total

    total = {name: torch.zeros_like(value) for name, value in own.items()}
    for x_part, root_part in zip(x.split(rows), root.split(rows), strict=True):
        found: Any = torch.vmap(squares)(x_part, root_part)
        total = {name: total[name] + found[name].sum(0) for name in total}
    return total


def rows_at_a_time(num_params: int, num_members: int, element_bytes: int) -> int:
    """Examples whose single gradients fit."""
    return max(1, PER_EXAMPLE_BYTES // (num_params * num_members * element_bytes))


def _call(template: nn.Module, params: Params, buffers: Params, x: Tensor) -> Tensor:
    # The network may write to its buffers; it gets copies.
    own = {name: value.clone() for name, value in buffers.items()}
    return torch.func.functional_call(template, {**params, **own}, (x,))


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], hook: Callable[[str, Tensor, Tensor], Any]) -> Iterator[None]:
    """Call `hook(name, input, output)` after each module; a tensor that it returns replaces the output."""

    def named(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        return lambda _module, given, out: hook(name, given[0], out)

    handles = [module.register_forward_hook(named(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
