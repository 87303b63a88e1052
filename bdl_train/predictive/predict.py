"""The pass over data: row tiles outside, chunks of draws inside, so memory does not grow with either.

Shape letters: C components, B rows of a tile, O outputs, P parameters.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from bdl_train.likelihoods import PREFIX
from bdl_train.posteriors import Draws
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.stats import ClassStats, NumberStats, PredictiveStats, stats_of
from bdl_train.specs import TargetKind
from bdl_train.stack import Executor, Stack, StackedNetwork, choose_executor

WORKSPACE_BYTES = 192 * 2**20
"""Room for activations and for the components of one tile."""
DRAWS_BYTES = 128 * 2**20
"""Draws are kept over the tiles of a pass when all of them fit in this, else drawn again: the same draws."""


@dataclass(frozen=True)
class TilePrediction:
    """The predictive of a tile of rows.

    Attributes:
        rows: Positions in the pass.
        stats: Merged over all components.
        mixture: All components of the tile, for what needs them at once; None for classes.
        per_component: log p(y) of every component and row, `[C, B]`, when asked for.
        members: `[C]`, the member of each component.
    """

    rows: slice
    stats: PredictiveStats
    mixture: Mixture | None
    per_component: Tensor | None
    members: Tensor


class Predictor:
    """Predicts with a posterior on one device.

    Args:
        artefact: What was trained.
        device: Where to compute.
        executor: `auto` decides by rule, so that two processes give the same bits; `measured` times both
            executors once for each size of call and keeps the faster.
        num_draws: Draws a member; None = the method's own number.
        precision: `bf16-mixed` runs the network in bfloat16; uncertainty is computed in float32 or better.
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
        self._chosen: dict[tuple[int, int], Executor] = {}
        self._cache: list[Draws] = []

        floats = _activation_floats(
            self.template, torch.zeros(1, *self.inputs.shape, dtype=self.dtype, device=self.device)
        )
        rows_at_once = max(1, WORKSPACE_BYTES // (4 * floats))
        draw_bytes = torch.empty((), dtype=self.dtype).element_size() * self.layout.num_params
        self.chunk_size = max(1, min(self.num_components, rows_at_once // 32, DRAWS_BYTES // draw_bytes))
        self._keep_draws = draw_bytes * self.num_components <= DRAWS_BYTES
        self.tile_rows = max(1, rows_at_once // self.chunk_size)
        if not self.is_class:
            # The mixture's arrays are float64, a dozen of them at a time.
            self.tile_rows = max(1, min(self.tile_rows, WORKSPACE_BYTES // (96 * self.num_components)))

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, per_component: bool = False
    ) -> Iterator[TilePrediction]:
        """Predict rows tile by tile.

        Args:
            x: `[N, *shape]` as stored in `Data` (uint8 images included), on any device.
            y: `[N]` encoded targets, or None.
            per_component: Also keep log p(y) of every component.
        """
        for start in range(0, len(x), self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, len(x)))
            x_tile = self.inputs.prepare(x[rows].to(self.device), self.dtype)
            y_tile = None if y is None else y[rows].to(self.device)
            yield self._tile(rows, x_tile, y_tile, per_component)

    @torch.no_grad()
    def _tile(self, rows: slice, x: Tensor, y: Tensor | None, per_component: bool) -> TilePrediction:
        merged: list[PredictiveStats] = []
        outputs, params, log_weights, members, log_probs = [], [], [], [], []
        for draws in self._draws():
            chunk_params = self.layout.unflatten(draws.flat)
            out = self._forward(chunk_params, draws, x)
            components = self.likelihood.distribution(out, chunk_params)
            merged.append(stats_of(components, draws.log_weights, y))
            members.append(draws.members)
            if per_component and y is not None:
                log_probs.append(components.log_prob(y))
            if not self.is_class:
                outputs.append(out)
                params.append({name: chunk_params[name] for name in chunk_params if name.startswith(PREFIX)})
                log_weights.append(draws.log_weights)
        mixture = None
        if not self.is_class:
            joined = {name: torch.cat([one[name] for one in params]) for name in params[0]}
            mixture = Mixture(
                self.likelihood.distribution(torch.cat(outputs), joined), torch.cat(log_weights)
            )
        return TilePrediction(
            rows, _merge(merged), mixture, torch.cat(log_probs) if log_probs else None, torch.cat(members)
        )

    def _draws(self) -> Iterator[Draws]:
        if self._cache:
            yield from self._cache
            return
        kept = []
        for draws in self.posterior.draw(self.num_draws, chunk_size=self.chunk_size):
            here = Draws(
                draws.flat.to(self.device),
                {name: buffer.to(self.device) for name, buffer in draws.buffers.items()},
                draws.log_weights.to(self.device),
                draws.members,
            )
            if self._keep_draws:
                kept.append(here)
            yield here
        self._cache = kept

    def _forward(self, params: dict[str, Tensor], draws: Draws, x: Tensor) -> Tensor:
        key = (len(draws), x.shape[0])
        if key not in self._chosen:
            self._chosen[key] = self._choose(params, draws, x)
        return self._run(self._chosen[key], params, draws, x)

    def _run(self, executor: Executor, params: dict[str, Tensor], draws: Draws, x: Tensor) -> Tensor:
        network = StackedNetwork(self.template, executor)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            return network(params, draws.buffers, x, train=False, shared=True)[0]

    def _choose(self, params: dict[str, Tensor], draws: Draws, x: Tensor) -> Executor:
        if self._asked == "vmap" or self._asked == "loop":
            return self._asked
        stack = Stack(draws.flat, draws.buffers, self.layout)
        by_rule, _ = choose_executor(self.template, stack, x[:2], "auto")
        if self._asked == "auto" or by_rule == "loop":
            return by_rule
        seconds: dict[Executor, float] = {}
        for executor in ("vmap", "loop"):
            self._run(executor, params, draws, x)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                self._run(executor, params, draws, x)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                times.append(time.perf_counter() - start)
            seconds[executor] = min(times)
        return "vmap" if seconds["vmap"] <= seconds["loop"] else "loop"


def _merge(stats: list[PredictiveStats]) -> PredictiveStats:
    if isinstance(stats[0], ClassStats):
        return reduce(ClassStats.merge, [one for one in stats if isinstance(one, ClassStats)])
    return reduce(NumberStats.merge, [one for one in stats if isinstance(one, NumberStats)])


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
