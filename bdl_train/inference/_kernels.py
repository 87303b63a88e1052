"""The RBF kernel between the members of a stack, and the force with which it drives them apart.

Shape letters: M members, D coordinates of a point (weights or outputs), n members in the kernel.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

Bandwidth = Literal["median"] | Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Kernel:
    """k(p_i, p_j) = exp(−‖p_i − p_j‖² / h) over the members that are in.

    Attributes:
        points: `[M, D]`, 0 for members that are out.
        matrix: `[M, M]`, symmetric, 1 on the diagonal; 0 in the rows and columns of members that are out.
        bandwidth: h, a scalar in squared units of the points.
    """

    points: Tensor
    matrix: Tensor
    bandwidth: Tensor

    @property
    def num_inside(self) -> Tensor:
        """n, at least 1, a scalar."""
        return self.matrix.diagonal().sum().clamp(min=1)

    def smooth(self, values: Tensor) -> Tensor:
        """Σ_j k(p_j, p_i) v_j, `[M, ...]` like `values`; what members that are out hold does not count."""
        inside_M = self.matrix.diagonal() > 0
        return self.matrix @ torch.where(inside_M[:, None], values, 0)

    def repulsion(self) -> Tensor:
        """Σ_j ∇_{p_j} k(p_j, p_i) = (2/h) Σ_j k(p_i, p_j) (p_i − p_j), `[M, D]`: away from the others."""
        mass_M1 = self.matrix.sum(1, keepdim=True)
        return (mass_M1 * self.points - self.matrix @ self.points) * (2 / self.bandwidth)


def rbf(points: Tensor, bandwidth: Bandwidth, inside: Tensor | None) -> Kernel:
    """The kernel between points `[M, D]`.

    The median rule is h = median² / log n over the distances of pairs, so that Σ_j k(p_i, p_j) ≈ 1 + (n − 1)/n; of an
    even number of pairs it takes the lower middle one. A point so far off that its squared distance overflows is
    counted as infinitely far.

    Args:
        points: `[M, D]`; a member with an entry that is not finite is out.
        bandwidth: h itself, or "median".
        inside: `[M]` bool, members that may be in; None = all.

    Source:
        Liu & Wang (2016), arXiv:1608.04471, Section 5, for the median rule.
    """
    inside_M = points.isfinite().all(1)
    if inside is not None:
        inside_M = inside_M & inside
    points_MD = torch.where(inside_M[:, None], points, 0)
    # Not ‖p‖² + ‖q‖² − 2pq: in float32 it cancels between members that lie close together.
    mode = "donot_use_mm_for_euclid_dist"
    square_MM = torch.cdist(points_MD, points_MD, compute_mode=mode).square()
    both_MM = inside_M[:, None] & inside_M
    if bandwidth == "median":
        pair_MM = (
            both_MM & square_MM.isfinite() & ~torch.eye(len(points), dtype=torch.bool, device=points.device)
        )
        median = square_MM.where(pair_MM, math.nan).nanmedian()
        h = median / inside_M.sum().to(points.dtype).log()
        # No pair, or equal members: any width will do, nothing repels.
        h = torch.where(h > 0, h, 1)
    else:
        h = torch.as_tensor(bandwidth, dtype=points.dtype, device=points.device)
    return Kernel(points_MD, torch.where(both_MM, (-square_MM / h).exp(), 0), h)
