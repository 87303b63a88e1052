"""A stack: M networks of one architecture on a leading axis, and the two ways to run them.

Shape letters: M members, P parameters of one member, B batch.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bdl_train.dense import DenseNetwork

log = logging.getLogger(__name__)

# The fast path of attention has no batching rule for its backward, and the fused kernels of
# scaled-dot-product attention have none at all: the math kernel is the same function.
torch.backends.mha.set_fastpath_enabled(False)
torch.backends.cuda.enable_flash_sdp(False)  # governs the CPU's kernel too
torch.backends.cuda.enable_mem_efficient_sdp(False)
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Layout:
    """Names and shapes of one member's parameters, in the order in which they lie in a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> "Layout":
        """The layout of one member's parameters (no member axis)."""
        return cls(tuple(params), tuple(tuple(tensor.shape) for tensor in params.values()))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_params(self) -> int:
        return sum(self.sizes)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """`[..., P]` to a dict of `[..., *shape]` views. One split, so that its backward is one `cat`."""
        lead = flat.shape[:-1]
        pieces = flat.split(self.sizes, dim=-1)
        return {
            name: piece.reshape((*lead, *shape))
            for name, shape, piece in zip(self.names, self.shapes, pieces, strict=True)
        }

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """A dict of `[..., *shape]` to `[..., P]`."""
        pieces = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = params[name]
            lead = tensor.shape[: tensor.ndim - len(shape)]
            pieces.append(tensor.reshape((*lead, -1)))
        return torch.cat(pieces, dim=-1)

    def select(self, names: Sequence[str]) -> "Layout":
        """The layout of some of the parameters."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        return Layout(tuple(names), tuple(shapes[name] for name in names))

    def columns(self, names: Sequence[str]) -> Tensor:
        """Positions of the named parameters in the flat vector, in the order of `names`."""
        starts, at = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            starts[name] = torch.arange(at, at + size)
            at += size
        return torch.cat([starts[name] for name in names]) if names else torch.empty(0, dtype=torch.long)


@dataclass
class Stack:
    """Parameters and buffers of M members.

    `flat` holds every parameter, `[M, P]` in the order of `layout`; `buffers` are `[M, ...]` each.
    Parameters of the likelihood stand last, as `likelihood.*`.
    """

    flat: Tensor
    buffers: dict[str, Tensor]
    layout: Layout

    @property
    def num_members(self) -> int:
        return self.flat.shape[0]

    @property
    def params(self) -> dict[str, Tensor]:
        """Views of `flat` by name, `[M, ...]` each."""
        return self.layout.unflatten(self.flat)

    def members(self, index: Sequence[int] | Tensor) -> "Stack":
        """A copy of some members as a stack of their own."""
        rows = torch.as_tensor(index, device=self.flat.device)
        return Stack(
            self.flat[rows].clone(),
            {name: buffer[rows].clone() for name, buffer in self.buffers.items()},
            self.layout,
        )

    def to(self, device: torch.device | str) -> "Stack":
        return Stack(
            self.flat.to(device),
            {name: buffer.to(device) for name, buffer in self.buffers.items()},
            self.layout,
        )


def build_stack(
    make_network: Callable[[], nn.Module],
    seeds: Sequence[int],
    *,
    extra_params: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Stack]:
    """Construct the architecture once per member under that member's own seed.

    Never `deepcopy` plus `reset_parameters`: attention in-projections and class tokens would stay shared.
    The global generators are left as they were.

    Args:
        make_network: Builds one freshly initialised network, on the CPU.
        seeds: One seed per member.
        extra_params: Parameters of the likelihood, `[...]` without member axis; members start equal.
        dtype: Of the parameters and floating buffers; initial values are drawn in float32 and then cast.

    Returns:
        The first member's network, as the template of the forward pass, and the stack.
    """
    flats, buffers, template, layout = [], [], None, None
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device's generator
            network = make_network()
        params = {name: tensor.detach() for name, tensor in network.named_parameters()}
        params.update(extra_params or {})
        if layout is None:
            layout, template = Layout.of(params), network
        flats.append(layout.flatten(params).to(dtype))
        buffers.append(dict(network.named_buffers()))
    if template is None or layout is None:
        raise ValueError("A stack has one member or more, got no seeds.")
    stacked = {name: torch.stack([one[name].detach() for one in buffers]) for name in buffers[0]}
    stacked = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stacked.items()
    }
    return template.to(dtype), Stack(torch.stack(flats), stacked, layout)


Executor = Literal["vmap", "loop"]


class StackedNetwork:
    """The forward pass of one architecture for a whole stack; weights and buffers are arguments.

    Args:
        template: A network of the architecture. Its own weights are never used.
        executor: `vmap` runs all members in one batched call, `loop` one after another. Equal results.
    """

    def __init__(self, template: nn.Module, executor: Executor = "vmap") -> None:
        self.template = template
        self.executor: Executor = executor
        self._names = [name for name, _ in template.named_parameters()]
        self._dense = DenseNetwork.of(template)

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        *,
        train: bool,
        shared: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs `[M, B, O]` and the buffers after the pass.

        Args:
            params: `[M, ...]` each; names that the network does not have (the likelihood's) are ignored.
            buffers: `[M, ...]` each; left unchanged.
            x: `[M, B, ...]`, or `[B, ...]` when `shared`.
            train: Batch norm uses and updates batch statistics, dropout is on.
            shared: Every member sees the same `x`.
        """
        own = {name: params[name] for name in self._names}
        if not torch.compiler.is_compiling():  # a graph cannot hold this change: a compiled caller makes it
            self.template.train(train)
        run = self._vmap if self.executor == "vmap" else self._loop
        return run(own, dict(buffers), x, shared)

    def _one(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # The network may write to its buffers; it gets copies, so that the caller's stay as they were.
        state = {name: buffer.clone() for name, buffer in buffers.items()}
        call_state = {**params, **state}
        outputs = torch.func.functional_call(self.template, call_state, (x,))
        return outputs, {name: call_state[name] for name in state}

    def _vmap(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, shared: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self._dense is not None:
            return self._dense(params, x, shared), buffers
        run = torch.vmap(self._one, in_dims=(0, 0, None if shared else 0), randomness="different")
        return run(params, buffers, x)

    def _loop(
        self, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, shared: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        num_members = next(iter(params.values())).shape[0]
        params_by_member = _unbind(params, num_members)
        buffers_by_member = _unbind(buffers, num_members)
        outputs, states = [], []
        for m in range(num_members):
            out, state = self._one(params_by_member[m], buffers_by_member[m], x if shared else x[m])
            outputs.append(out)
            states.append(state)
        new_buffers = {name: torch.stack([state[name] for state in states]) for name in buffers}
        return torch.stack(outputs), new_buffers


def _unbind(tensors: Mapping[str, Tensor], num_members: int) -> list[dict[str, Tensor]]:
    pieces = {name: tensor.unbind(0) for name, tensor in tensors.items()}
    return [{name: pieces[name][m] for name in pieces} for m in range(num_members)]


def choose_executor(
    template: nn.Module, stack: Stack, x: Tensor, asked: Literal["auto", "vmap", "loop"]
) -> tuple[Executor, str]:
    """Which executor to use, and why.

    Vmappability is tried once on one batch, forward and backward, train and eval: any failure means `loop`.

    Args:
        template: A network of the architecture.
        stack: The members; unchanged.
        x: One batch, `[B, ...]`, shared by all members.
        asked: The setting `trainer.executor`.
    """
    if asked == "loop":
        return "loop", "trainer.executor=loop"
    has_conv = any(isinstance(module, nn.modules.conv._ConvNd) for module in template.modules())
    if asked == "auto" and has_conv and stack.flat.device.type == "cpu":
        # One grouped convolution over members is slower on a CPU: 113 ms against 70 ms for 5 LeNets.
        return "loop", "convolutions on a CPU run faster one member after another"
    if asked == "auto" and stack.num_members == 1:
        return "loop", "one member needs no batching over members"
    try:
        _try_vmap(template, stack, x)
    except Exception as error:  # torch raises several types for a missing batching rule
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        log.warning("This network cannot run under vmap, members run in a loop instead: %s", reason)
        return "loop", f"not vmappable: {reason}"
    return "vmap", "all members in one batched call (tried on one batch, forward and backward)"


def _try_vmap(template: nn.Module, stack: Stack, x: Tensor) -> None:
    network = StackedNetwork(template, "vmap")
    devices = [stack.flat.device] if stack.flat.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        for train in (True, False):
            flat = stack.flat.detach().clone().requires_grad_(True)
            outputs, _ = network(stack.layout.unflatten(flat), stack.buffers, x, train=train, shared=True)
            torch.autograd.grad(outputs.float().sum(), flat)


def where_members(mask: Tensor, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per member, `new` where `mask` `[M]` holds and `old` elsewhere; values are `[M, ...]` each."""
    return {
        name: torch.where(mask.reshape(-1, *(1,) * (tensor.ndim - 1)), tensor, old[name])
        for name, tensor in new.items()
    }
