"""The pass over data: row tiles outside, chunks of draws inside, blocks of rows innermost.

Memory grows neither with the rows nor with the draws. Shape letters: C components, B rows of a block, P parameters.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bdl_train.likelihoods import PREFIX
from bdl_train.posteriors import Draws
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.stats import ClassStats, NumberStats, PredictiveStats, log_prob, stats_of
from bdl_train.specs import TargetKind
from bdl_train.stack import Executor, Stack, StackedNetwork, choose_executor

CACHE_BYTES = {"cpu": 4 * 2**20, "cuda": 2**30}
"""Room for what is computed at a time. On a CPU larger arrays leave its cache, and fresh memory costs even more."""
ROOM_BYTES = 192 * 2**20
"""The same where a few rows alone need more."""
MIN_ROWS = 32
"""Fewer rows at a time do not pay."""
DRAWS_BYTES = 64 * 2**20
"""Draws are kept over the tiles of a pass when all of them fit in this, else drawn again: the same draws."""


@dataclass(frozen=True)
class TilePrediction:
    """The predictive of some neighbouring rows.

    Attributes:
        rows: Positions in the pass.
        stats: Merged over all components.
        mixture: All components of these rows, for what needs them at once; None for classes.
        per_component: log p(y) of every component and row, `[C, B]`, when asked for.
        members: `[C]`, the member of each component.
    """

    rows: slice
    stats: PredictiveStats
    mixture: Mixture | None
    per_component: Tensor | None
    members: Tensor


@dataclass
class _Block:
    """What has been gathered of some rows so far, chunk after chunk."""

    rows: slice
    x: Tensor
    y: Tensor | None
    stats: PredictiveStats | None = None
    outputs: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Chunk:
    """Draws on the device, with views of their parameters by name."""

    draws: Draws
    params: dict[str, Tensor]

    @property
    def likelihood_params(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.params.items() if name.startswith(PREFIX)}


class Predictor:
    """Predicts with a posterior on one device.

    Args:
        artefact: What was trained.
        device: Where to compute.
        executor: `auto` decides by rule, so that two processes give the same bits; `measured` times both
            executors once for each size of call and keeps the faster.
        num_draws: Draws a member; None = the method's own number.
        precision: `bf16-mixed` runs the network in bfloat16; uncertainty is computed in float32 or better.

    Attributes:
        chunk_size: Draws that run at a time.
        block_rows: Rows that run at a time.
        tile_rows: Rows for which one pass over all draws is made.

    Raises:
        UsageError: `num_draws` below 1, or above the atoms that the posterior holds.
    """

    def __init__(
        self,
        artefact: Artefact,
        *,
        device: torch.device | str = "cpu",
        executor: Literal["auto", "vmap", "loop", "measured"] = "auto",
        num_draws: int | None = None,
        precision: str = "32-true",
    ) -> None:
        self.device = torch.device(device)
        self.posterior, self.layout, self.likelihood = (
            artefact.posterior,
            artefact.layout,
            artefact.likelihood,
        )
        self.inputs, self.dtype = artefact.inputs, artefact.dtype
        self.is_class = artefact.target.kind is TargetKind.CLASS
        self.num_draws, self.precision = num_draws, precision
        self.template = artefact.network().to(self.device)
        self.num_components = self.posterior.num_components(num_draws)
        self._asked = executor
        if self.device.type == "cpu":
            _keep_freed_memory()
        self._vmapped = StackedNetwork(self.template, "vmap")
        self._by_rule: Executor | None = None
        self._fastest: dict[tuple[int, int], Executor] = {}
        self._cache: list[_Chunk] = []

        example = torch.zeros(1, *self.inputs.shape, dtype=self.dtype, device=self.device)
        row_bytes = 4 * _activation_floats(self.template, example)
        draw_bytes = torch.empty((), dtype=self.dtype).element_size() * self.layout.num_params
        cache = CACHE_BYTES["cpu" if self.device.type == "cpu" else "cuda"]
        most = min(self.num_components, DRAWS_BYTES // draw_bytes, cache // (row_bytes * MIN_ROWS))
        self.chunk_size = max(1, most)
        self._vmap_rows = _rows_in(cache, row_bytes * self.chunk_size)
        # Statistics take a few float64 arrays of the outputs; a mixture or single scores keep all components.
        output_bytes = 32 * self.likelihood.num_outputs(artefact.target)
        kept_bytes = (8 if self.is_class else 96) * self.num_components
        self.block_rows = min(
            _rows_in(cache, row_bytes),
            _rows_in(cache, output_bytes * self.chunk_size),
            _rows_in(ROOM_BYTES, kept_bytes),
        )
        self._keep_draws = draw_bytes * self.num_components <= DRAWS_BYTES
        num_blocks = 1 if self._keep_draws else ROOM_BYTES // (kept_bytes * self.block_rows)
        self.tile_rows = self.block_rows * max(1, num_blocks)

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, per_component: bool = False
    ) -> Iterator[TilePrediction]:
        """Predict block by block, in the order of the rows.

        Args:
            x: `[N, *shape]` as stored in `Data` (uint8 images included), on any device.
            y: `[N]` encoded targets, or None.
            per_component: Also keep log p(y) of every component.

        Raises:
            ValueError: `x` is of another shape than the network's inputs.
        """
        if x.shape[1:] != self.inputs.shape:
            raise ValueError(f"x must be [N, *{list(self.inputs.shape)}], got {list(x.shape)}.")
        for start in range(0, len(x), self.tile_rows):
            yield from self._tile(x, y, range(start, min(start + self.tile_rows, len(x))), per_component)

    @torch.no_grad()
    def _tile(self, x: Tensor, y: Tensor | None, tile: range, per_component: bool) -> list[TilePrediction]:
        blocks = []
        for start in tile[:: self.block_rows]:
            rows = slice(start, min(start + self.block_rows, tile.stop))
            x_block = self.inputs.prepare(x[rows].to(self.device), self.dtype)
            blocks.append(_Block(rows, x_block, None if y is None else y[rows].to(self.device)))
        log_weights, members, params = [], [], []
        for chunk in self._chunks():
            members.append(chunk.draws.members)
            log_weights.append(chunk.draws.log_weights)
            params.append(chunk.likelihood_params)
            for block in blocks:
                self._add(block, chunk, per_component)
        all_params = {name: torch.cat([one[name] for one in params]) for name in params[0]}
        all_members, all_log_weights = torch.cat(members), torch.cat(log_weights)
        predictions = []
        for block in blocks:
            mixture = None
            if not self.is_class:
                components = self.likelihood.distribution(torch.cat(block.outputs), all_params)
                mixture = Mixture(components, all_log_weights)
            log_probs = torch.cat(block.log_probs) if block.log_probs else None
            assert block.stats is not None
            predictions.append(TilePrediction(block.rows, block.stats, mixture, log_probs, all_members))
        return predictions

    def _add(self, block: _Block, chunk: _Chunk, per_component: bool) -> None:
        outputs = self._forward(chunk, block.x)
        components = self.likelihood.distribution(outputs, chunk.params)
        stats = stats_of(components, chunk.draws.log_weights, block.y)
        block.stats = stats if block.stats is None else _merge(block.stats, stats)
        if not self.is_class:
            block.outputs.append(outputs)
        if per_component and block.y is not None:
            block.log_probs.append(log_prob(components, block.y))

    def _chunks(self) -> Iterator[_Chunk]:
        if self._cache:
            yield from self._cache
            return
        kept = []
        for draws in self.posterior.draw(self.num_draws, chunk_size=self.chunk_size):
            flat = draws.flat.to(self.device)
            buffers = {name: buffer.to(self.device) for name, buffer in draws.buffers.items()}
            here = Draws(flat, buffers, draws.log_weights.to(self.device), draws.members)
            chunk = _Chunk(here, self.layout.unflatten(flat))
            if self._keep_draws:
                kept.append(chunk)
            yield chunk
        self._cache = kept

    def _forward(self, chunk: _Chunk, x: Tensor) -> Tensor:
        executor = self._executor(chunk, x)
        self.template.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            return self._vmap(chunk, x) if executor == "vmap" else self._loop(chunk, x)

    def _vmap(self, chunk: _Chunk, x: Tensor) -> Tensor:
        pieces = [
            self._vmapped(chunk.params, chunk.draws.buffers, part, train=False, shared=True)[0]
            for part in x.split(self._vmap_rows)
        ]
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _loop(self, chunk: _Chunk, x: Tensor) -> Tensor:
        """One draw after another, its weights put into the network: faster than `functional_call`."""
        weights = [(slot, chunk.params[name]) for name, slot in self.template.named_parameters()]
        buffers = [(slot, chunk.draws.buffers[name]) for name, slot in self.template.named_buffers()]
        outputs = []
        for c in range(len(chunk.draws)):
            for slot, values in weights:
                slot.data = values[c]
            for slot, values in buffers:
                slot.data = values[c].clone()  # a network may write to its buffers
            outputs.append(self.template(x))
        return torch.stack(outputs)

    def _executor(self, chunk: _Chunk, x: Tensor) -> Executor:
        if self._asked == "vmap" or self._asked == "loop":
            return self._asked
        if len(chunk.draws) == 1:
            return "loop"
        if self._by_rule is None:
            few = Stack(chunk.draws.flat[:2], {k: b[:2] for k, b in chunk.draws.buffers.items()}, self.layout)
            self._by_rule, _ = choose_executor(self.template, few, x[:2], "auto")
        if self._asked == "auto" or self._by_rule == "loop":
            return self._by_rule
        size = (len(chunk.draws), len(x).bit_length())
        if size not in self._fastest:
            self.template.eval()
            faster = self._seconds(self._vmap, chunk, x) <= self._seconds(self._loop, chunk, x)
            self._fastest[size] = "vmap" if faster else "loop"
        return self._fastest[size]

    def _seconds(self, run: Callable[[_Chunk, Tensor], Tensor], chunk: _Chunk, x: Tensor) -> float:
        """The shortest of a few runs, after one to warm up."""
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run(chunk, x)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times[1:])


def _merge(one: PredictiveStats, other: PredictiveStats) -> PredictiveStats:
    if isinstance(one, ClassStats) and isinstance(other, ClassStats):
        return one.merge(other)
    assert isinstance(one, NumberStats)
    assert isinstance(other, NumberStats)
    return one.merge(other)


def _keep_freed_memory() -> None:
    """Let the allocator keep up to some 60 MiB of freed memory instead of returning it to the system.

    glibc returns what lies above a threshold, and takes a page fault for every page it needs again: more than half
    of the time of small networks. The threshold follows the largest block freed so far, up to 32 MiB.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _rows_in(room: int, row_bytes: int) -> int:
    """Rows that fit, but some even where they do not, unless they are huge."""
    return max(1, room // row_bytes, min(MIN_ROWS, ROOM_BYTES // row_bytes))


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
