"""Stein variational gradient descent: members are particles that approximate the posterior together.

Shape letters: M members, P parameters of one member, N training examples, n members in the kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bdl_train.inference._descent import DescentState, Evaluated
from bdl_train.inference._kernels import Kernel, rbf
from bdl_train.inference._particles import Particles
from bdl_train.potential import Batch


def stein_direction(grad: Tensor, kernel: Kernel, temperature: float, num_data: int) -> Tensor:
    """−(T/N) φ, `[M, P]`, with φ(θ_i) = (1/n) Σ_j [k(θ_j, θ_i) ∇ log p(θ_j) + ∇_{θ_j} k(θ_j, θ_i)].

    Here ∇ log p = −(N/T) ∇potential, so that T enters with the repulsion alone. Of one particle it is its gradient.

    Args:
        grad: Of the potential, `[M, P]`.
        kernel: Between weights; members that are out have direction 0.
        temperature: T.
        num_data: N.

    Source:
        Liu & Wang (2016), arXiv:1608.04471, equation 8.
    """
    pull_MP = kernel.smooth(grad) - temperature / num_data * kernel.repulsion()
    return pull_MP / kernel.num_inside


@dataclass(frozen=True, kw_only=True)
class Svgd(Particles):
    """Each particle follows the kernel-weighted mean of all gradients and is driven from the others.

    With a median bandwidth the particles' spread is about right in a few dimensions and too small in many (Ba et al.,
    2022, "Understanding the Variance Collapse of SVGD in High Dimensions"): with far more weights than members, most
    of what stays of the posterior's width is that of different modes. Each gradient is taken on its member's own batch.

    Source:
        Liu & Wang (2016), arXiv:1608.04471, Algorithm 1, with an RBF kernel between weights.
    """

    members_interact = (
        "in svgd a step of each member takes the gradients of all others and its distance from them"
    )

    def direction(self, state: DescentState, batch: Batch, found: Evaluated) -> Tensor:
        flat = state.stack.flat
        # A sum in bfloat16 would round the weights before it takes their differences.
        with torch.autocast(flat.device.type, enabled=False):
            kernel = rbf(flat, self.bandwidth, found.moving)
            return stein_direction(found.grad, kernel, self.temperature, state.potential.num_data)
