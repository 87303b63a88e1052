"""The forward pass of a chunk of draws: all at once, or one after another, in pieces of rows that fit.

Shape letters: C draws of a chunk, B rows, O outputs, P parameters.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from bdl_train.dense import DenseNetwork
from bdl_train.likelihoods import PREFIX
from bdl_train.posteriors import Draws
from bdl_train.stack import Executor, Layout, Stack, StackedNetwork, choose_executor

CACHE_BYTES = {"cpu": 4 * 2**20, "cuda": 2**30}
"""Room for the activations of many draws. On a CPU what leaves the cache is slower, and fresh memory slower still."""
LOOP_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
"""The same of one draw at a time, which is slow because of its many calls."""
MIN_ROWS = 32
"""Fewer rows at a time do not pay, unless a row alone takes megabytes."""


@dataclass(frozen=True)
class Chunk:
    """Draws on the device, `[C, P]`, with views of their parameters by name."""

    draws: Draws
    params: dict[str, Tensor]
    centres: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, draws: Draws, layout: Layout, device: torch.device) -> "Chunk":
        flat = draws.flat.to(device)
        buffers = {name: buffer.to(device) for name, buffer in draws.buffers.items()}
        centres = None if draws.centres is None else draws.centres.to(device)
        here = Draws(flat, buffers, draws.log_weights.to(device), draws.members, centres)
        return cls(here, layout.unflatten(flat), None if centres is None else layout.unflatten(centres))

    def outputs(self, run: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """What the draws say, `[C, B, O]`, where `run` gives the network's outputs with given weights.

        Draws with a centre c speak for the linearised network, f_c(x) + J_c(x) (θ − c), by one forward derivative.

        Source:
            Immer et al. (2021), arXiv:2008.08217, equation 8.
        """
        if self.centres is None:
            return run(self.params)
        _load_forward_rules()
        tangents = {name: self.params[name] - centre for name, centre in self.centres.items()}
        at_centre, change = torch.func.jvp(run, (self.centres,), (tangents,))  # pyright: ignore[reportAssignmentType]
        return at_centre + change

    @property
    def likelihood_params(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.params.items() if name.startswith(PREFIX)}

    @cached_property
    def by_draw(self) -> list[dict[str, Tensor]]:
        """Parameters and buffers by name, apart for each draw."""
        apart = {name: value.unbind() for name, value in (self.params | self.draws.buffers).items()}
        return [{name: values[c] for name, values in apart.items()} for c in range(len(self.draws))]


@cache
def _load_forward_rules() -> None:
    """Let torch load its rules of forward derivatives, which use what torch itself calls deprecated."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


class Forward:
    """Runs one network with the weights of draws.

    Args:
        template: A network of the architecture, on its device; its weights come and go.
        few: Two draws or one, to try whether the network can be batched over draws.
        asked: `auto` decides by rule, `measured` by timing both executors once for each size of call.
        input_shape: Of one row.

    Attributes:
        most_draws: More than these at a time do not pay.
    """

    def __init__(
        self,
        template: nn.Module,
        few: Stack,
        asked: Literal["auto", "vmap", "loop", "measured"],
        input_shape: tuple[int, ...],
        precision: str,
    ) -> None:
        self._template, self._asked, self._precision = template, asked, precision
        self._device = few.flat.device
        x = torch.zeros(2, *input_shape, dtype=few.flat.dtype, device=self._device)
        row_bytes = 4 * _activation_floats(template, x[:1])
        if asked == "vmap" or asked == "loop":
            self._executor: Executor = asked
        else:
            self._executor, _ = choose_executor(template, few, x, "auto")
        template.eval()
        kind = "cpu" if self._device.type == "cpu" else "cuda"
        self._vmapped, self._dense = StackedNetwork(template, "vmap"), DenseNetwork.of(template)
        self._looped = StackedNetwork(template, "loop")
        self._slots = list(template.named_parameters())
        self._buffer_slots = list(template.named_buffers())
        self._fastest: dict[tuple[int, int], Executor] = {}
        self._row_bytes, self._cache_bytes = row_bytes, CACHE_BYTES[kind]
        self._loop_rows = rows_in(LOOP_BYTES[kind], row_bytes)
        # In a loop the activations of one draw exist at a time.
        self.most_draws = (
            1 << 30 if self._executor == "loop" else max(1, CACHE_BYTES[kind] // (row_bytes * MIN_ROWS))
        )

    def __call__(self, chunk: Chunk, x: Tensor) -> Tensor:
        """Outputs `[C, B, O]` of prepared inputs `[B, ...]`."""
        executor = self._choose(chunk, x)
        if self._precision != "bf16-mixed":
            return self._run(executor, chunk, x)
        with torch.autocast(self._device.type, torch.bfloat16):
            return self._run(executor, chunk, x)

    def _run(self, executor: Executor, chunk: Chunk, x: Tensor) -> Tensor:
        if executor == "vmap":
            size, run = rows_in(self._cache_bytes, self._row_bytes * len(chunk.draws)), self._vmap
        else:
            size, run = self._loop_rows, self._loop
        if len(x) <= size:
            return run(chunk, x)
        return torch.cat([run(chunk, part) for part in x.split(size)], dim=1)

    def _vmap(self, chunk: Chunk, x: Tensor) -> Tensor:
        dense = self._dense
        if dense is not None:  # what `_vmapped` would do, without its bookkeeping
            return chunk.outputs(lambda params: dense(params, x, shared=True))
        return chunk.outputs(lambda params: self._batched(self._vmapped, params, chunk, x))

    def _batched(
        self, network: StackedNetwork, params: Mapping[str, Tensor], chunk: Chunk, x: Tensor
    ) -> Tensor:
        return network(params, chunk.draws.buffers, x, train=False, shared=True)[0]

    def _loop(self, chunk: Chunk, x: Tensor) -> Tensor:
        """One draw after another, its weights put into the network: faster than `functional_call`."""
        if chunk.centres is not None:
            return chunk.outputs(lambda params: self._batched(self._looped, params, chunk, x))
        outputs = []
        for values in chunk.by_draw:
            for name, slot in self._slots:
                slot.data = values[name]
            for name, slot in self._buffer_slots:
                slot.data = values[name].clone()  # a network may write to its buffers
            outputs.append(self._template(x))
        return torch.stack(outputs)

    def _choose(self, chunk: Chunk, x: Tensor) -> Executor:
        if self._asked == "vmap" or self._executor == "loop":
            return self._executor
        if len(chunk.draws) == 1:
            return "loop"
        if self._asked == "auto":
            return self._executor
        size = (len(chunk.draws), len(x).bit_length())
        if size not in self._fastest:
            faster = self._seconds("vmap", chunk, x) <= self._seconds("loop", chunk, x)
            self._fastest[size] = "vmap" if faster else "loop"
        return self._fastest[size]

    def _seconds(self, executor: Executor, chunk: Chunk, x: Tensor) -> float:
        """The shortest of a few runs, after one to warm up."""
        times = []
        for _ in range(4):
            start = time.perf_counter()
            self._run(executor, chunk, x)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            times.append(time.perf_counter() - start)
        return min(times[1:])


def rows_in(room: int, row_bytes: int) -> int:
    """Rows that fit into so many bytes, or `MIN_ROWS` where fewer do, or one where that takes too much."""
    return max(1, room // row_bytes, min(MIN_ROWS, LOOP_BYTES["cpu"] // row_bytes))


def _activation_floats(network: nn.Module, x: Tensor) -> int:
    """The largest sum of one module's input and output sizes, for one example: what a row costs in memory."""
    largest = x.numel()

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        sizes = [one.numel() for one in (*inputs, output) if torch.is_tensor(one)]
        largest = max(largest, sum(sizes))

    handles = [module.register_forward_hook(hook) for module in network.modules()]
    try:
        with torch.no_grad():
            network.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
    # Convolutions on a CPU unfold their input: nine copies of it for a 3 × 3 kernel.
    has_conv = any(isinstance(module, nn.modules.conv._ConvNd) for module in network.modules())
    return largest * (10 if has_conv else 2)
