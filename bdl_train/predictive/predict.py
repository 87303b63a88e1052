"""The pass over data: tiles of rows outside, chunks of draws inside, blocks of rows innermost.

Memory grows neither with the rows nor with the draws. Shape letters: C components, B rows of a block, P parameters.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive._forward import Chunk, Forward, rows_in
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.stats import (
    ClassStats,
    NumberStats,
    PredictiveStats,
    class_probs,
    log_normaliser,
    log_prob,
    stats_of,
)
from bdl_train.specs import TargetKind
from bdl_train.stack import Stack

STATS_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}
"""Room for the statistics of one block of rows."""
ROOM_BYTES = 128 * 2**20
"""Room for what is kept of all components of some rows, and for their inputs."""
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
        member_probs: For classes, each member's own probabilities `[M, B, K]`, members ascending; when asked for.
        energy: For classes, the mean over components of −log Σ_k exp(logit_k), `[B]` (Liu et al. 2020,
            arXiv:2010.03759, equation 3); when asked for.
    """

    rows: slice
    stats: PredictiveStats
    mixture: Mixture | None
    per_component: Tensor | None
    members: Tensor
    member_probs: Tensor | None = None
    energy: Tensor | None = None

    @classmethod
    def of_rows(cls, tiles: "Sequence[TilePrediction]") -> "TilePrediction":
        """Neighbouring tiles of one pass as one."""
        first = tiles[0]
        stats = first.stats.of_rows([tile.stats for tile in tiles])  # pyright: ignore[reportArgumentType]
        mixtures = [tile.mixture for tile in tiles if tile.mixture is not None]
        return cls(
            slice(first.rows.start, tiles[-1].rows.stop),
            stats,
            Mixture.of_rows(mixtures) if mixtures else None,
            _cat([tile.per_component for tile in tiles], 1),
            first.members,
            _cat([tile.member_probs for tile in tiles], 1),
            _cat([tile.energy for tile in tiles], 0),
        )

    @classmethod
    def joined(cls, parts: "Sequence[TilePrediction]") -> "TilePrediction":
        """One tile from those of disjoint members, predicted apart: each part's weights sum to 1, and every member
        counts the same. Parts may come in any order."""
        parts = sorted(parts, key=lambda part: int(part.members.min()))
        counts = [len(part.members.unique()) for part in parts]
        shares = [count / sum(counts) for count in counts]
        stats = functools.reduce(
            _merge, [part.stats.scaled(share) for part, share in zip(parts, shares, strict=True)]
        )
        mixtures = [part.mixture for part in parts if part.mixture is not None]
        energies = [part.energy for part in parts if part.energy is not None]
        return cls(
            parts[0].rows,
            stats,
            Mixture.joined(mixtures, shares) if mixtures else None,
            _cat([part.per_component for part in parts], 0),
            torch.cat([part.members for part in parts]),
            _cat([part.member_probs for part in parts], 0),
            sum((share * one for share, one in zip(shares, energies, strict=True)), torch.zeros(()))
            if energies
            else None,
        )


def _cat(tensors: "Sequence[Tensor | None]", dim: int) -> Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(there, dim=dim) if there else None


@dataclass
class _Block:
    """What has been gathered of some rows so far, chunk after chunk."""

    rows: slice
    x: Tensor
    y: Tensor | None
    stats: PredictiveStats | None = None
    outputs: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    member_probs: Tensor | None = None
    energy: Tensor | None = None


@dataclass(frozen=True)
class _Components:
    """What is small of the draws, and kept of all of them: `[C]` each."""

    log_weights: Tensor
    members: Tensor
    likelihood_params: dict[str, Tensor]

    @classmethod
    def of(cls, chunk: Chunk) -> "_Components":
        # Clones: a view would keep the whole chunk in memory.
        params = {name: value.clone() for name, value in chunk.likelihood_params.items()}
        return cls(chunk.draws.log_weights, chunk.draws.members, params)

    @classmethod
    def joined(cls, parts: list["_Components"]) -> "_Components":
        return cls(
            torch.cat([part.log_weights for part in parts]),
            torch.cat([part.members for part in parts]),
            {
                name: torch.cat([part.likelihood_params[name] for part in parts])
                for name in parts[0].likelihood_params
            },
        )


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
        block_rows: Rows that are scored at a time.
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
        self._given = (artefact, device, executor, num_draws, precision)
        self.device = torch.device(device)
        self.posterior, self.layout = artefact.posterior, artefact.layout
        self.likelihood, self.inputs, self.dtype = artefact.likelihood, artefact.inputs, artefact.dtype
        self.is_class = artefact.target.kind is TargetKind.CLASS
        self.num_draws = num_draws
        self.num_components = self.posterior.num_components(num_draws)
        if self.device.type == "cpu":
            _keep_freed_memory()

        few = Chunk.of(next(self.posterior.draw(num_draws, chunk_size=2)), self.layout, self.device).draws
        self._forward = Forward(
            artefact.network().to(self.device),
            Stack(few.flat, few.buffers, self.layout),
            executor,
            self.inputs.shape,
            precision,
        )
        draw_bytes = few.flat.element_size() * self.layout.num_params * (1 if few.centres is None else 2)
        self._keep_draws = draw_bytes * self.num_components <= DRAWS_BYTES
        draws_room = DRAWS_BYTES if self._keep_draws else DRAWS_BYTES // 4
        self.chunk_size = max(1, min(self.num_components, draws_room // draw_bytes, self._forward.most_draws))
        # Statistics take a few float64 arrays of the outputs; a mixture or single scores keep all components.
        output_bytes = 32 * self.likelihood.num_outputs(artefact.target)
        input_bytes = 12 * torch.Size(self.inputs.shape).numel()
        kept_bytes = (8 if self.is_class else 96) * self.num_components + input_bytes
        if self.is_class:
            kept_bytes += 4 * artefact.target.num_classes * self.posterior.num_members
        stats_bytes = STATS_BYTES["cpu" if self.device.type == "cpu" else "cuda"]
        self.block_rows = min(
            rows_in(stats_bytes, output_bytes * self.chunk_size), rows_in(ROOM_BYTES, kept_bytes)
        )
        num_blocks = 1 if self._keep_draws else ROOM_BYTES // (kept_bytes * self.block_rows)
        self.tile_rows = self.block_rows * max(1, num_blocks)
        self._ids = torch.tensor(sorted(self.posterior.ids))
        self._kept: list[Chunk] = []
        self._all: _Components | None = None

    def another(self) -> "Predictor":
        """One of the same kind, for another thread."""
        artefact, device, executor, num_draws, precision = self._given
        return Predictor(artefact, device=device, executor=executor, num_draws=num_draws, precision=precision)

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, per_component: bool = False
    ) -> Iterator[TilePrediction]:
        """Predict block by block, in the order of the rows.

        Args:
            x: `[N, *shape]` as stored in `Data` (uint8 images included), on any device.
            y: `[N]` encoded targets, or None.
            per_component: Also keep log p(y) of every component, and of classes what each member says.

        Raises:
            ValueError: `x` is of another shape than the network's inputs.
        """
        if x.shape[1:] != self.inputs.shape:
            raise ValueError(f"x must be [N, *{list(self.inputs.shape)}], got {list(x.shape)}.")
        for start in range(0, len(x), self.tile_rows):
            yield from self._tile(x, y, range(start, min(start + self.tile_rows, len(x))), per_component)

    @torch.no_grad()
    def each_draw(self, x: Tensor) -> Iterator[Distribution]:
        """What every draw predicts by itself for a block of rows, in chunks of draws, member after member.

        Args:
            x: `[B, *shape]` as stored in `Data`, `block_rows` at most.

        Yields:
            Components of batch shape `[C, B]`, from outputs in float64.
        """
        x = self.inputs.prepare(x.to(self.device), self.dtype)
        for chunk in self._chunks():
            yield self.likelihood.distribution(self._forward(chunk, x).double(), chunk.params)

    @torch.no_grad()
    def _tile(self, x: Tensor, y: Tensor | None, tile: range, per_component: bool) -> list[TilePrediction]:
        blocks = []
        for start in tile[:: self.block_rows]:
            rows = slice(start, min(start + self.block_rows, tile.stop))
            x_block = self.inputs.prepare(x[rows].to(self.device), self.dtype)
            blocks.append(_Block(rows, x_block, None if y is None else y[rows].to(self.device)))
        for chunk in self._chunks():
            for block in blocks:
                self._add(block, chunk, per_component)
        return [self._prediction(block) for block in blocks]

    def _add(self, block: _Block, chunk: Chunk, per_component: bool) -> None:
        outputs = self._forward(chunk, block.x)
        components = self.likelihood.distribution(outputs, chunk.params)
        stats = stats_of(components, chunk.draws.log_weights, block.y)
        block.stats = stats if block.stats is None else _merge(block.stats, stats)
        if not self.is_class:
            block.outputs.append(outputs)
        if per_component and block.y is not None:
            block.log_probs.append(log_prob(components, block.y))
        if per_component and self.is_class:
            self._add_members(block, chunk, components, outputs)

    def _add_members(self, block: _Block, chunk: Chunk, components: Distribution, outputs: Tensor) -> None:
        probs_CBK = class_probs(components)
        weights_C = chunk.draws.log_weights.exp()
        if block.member_probs is None:
            shape = (self.posterior.num_members, *probs_CBK.shape[1:])
            block.member_probs = probs_CBK.new_zeros(shape)
            block.energy = torch.zeros(shape[1], dtype=torch.float64, device=outputs.device)
        own_C = torch.searchsorted(self._ids, chunk.draws.members).to(outputs.device)
        # Each member's own mixture: its weights are those of the whole times M.
        scaled_C = (weights_C * self.posterior.num_members).to(probs_CBK.dtype)
        block.member_probs.index_add_(0, own_C, probs_CBK.mul_(scaled_C[:, None, None]))
        assert block.energy is not None
        block.energy -= weights_C @ log_normaliser(components, outputs).double()

    def _prediction(self, block: _Block) -> TilePrediction:
        assert block.stats is not None
        assert self._all is not None
        mixture = None
        if not self.is_class:
            outputs = torch.cat(block.outputs)
            components = self.likelihood.distribution(outputs, self._all.likelihood_params)
            mixture = Mixture(components, self._all.log_weights)
        log_probs = torch.cat(block.log_probs) if block.log_probs else None
        return TilePrediction(
            block.rows, block.stats, mixture, log_probs, self._all.members, block.member_probs, block.energy
        )

    def _chunks(self) -> Iterator[Chunk]:
        if self._kept:
            yield from self._kept
            return
        kept, parts = [], []
        for draws in self.posterior.draw(self.num_draws, chunk_size=self.chunk_size):
            chunk = Chunk.of(draws, self.layout, self.device)
            parts.append(_Components.of(chunk))
            if self._keep_draws:
                kept.append(chunk)
            yield chunk
        self._kept, self._all = kept, _Components.joined(parts)


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
