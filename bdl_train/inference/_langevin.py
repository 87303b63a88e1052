"""Langevin dynamics on a potential, with and without momentum: one step, and the law of the momentum.

Shape letters: M members, P parameters of one member, N training examples.
"""

import math

import torch
from torch import Tensor


def kick(
    momentum: Tensor | None,
    grad: Tensor,
    z: Tensor | None,
    *,
    lr: float,
    heat: float,
    friction: float,
    root: Tensor | None,
) -> Tensor:
    """The next momentum v' = (1 − α) v − lr · G ∇potential + N(0, 2α · lr · (T/N) · G), `[M, P]`; θ + v' comes next.

    With friction 1 nothing is left of v, and the step is that of overdamped Langevin dynamics.

    Args:
        momentum: v, `[M, P]`; None = 0.
        grad: Of the potential, `[M, P]`, nats per example.
        z: Standard normal numbers, `[M, P]`; None where `heat` is 0.
        lr: Step on the potential.
        heat: T/N.
        friction: α, in (0, 1].
        root: √G, `[M, P]`, of a diagonal G; None = 1.

    Source:
        Chen, Fox & Guestrin (2014), arXiv:1402.4102, equation 15 with their η = lr · (T/N) · G and β̂ = 0.
    """
    force = grad * -lr if root is None else grad * root * -lr
    if z is not None:
        force.add_(z, alpha=math.sqrt(2 * friction * lr * heat))
    if root is not None:
        force *= root
    return force if momentum is None else force.add_(momentum, alpha=1 - friction)


def resting_momentum(z: Tensor | None, like: Tensor, *, lr: float, heat: float, friction: float) -> Tensor:
    """A momentum `[M, P]` from the law that small steps leave as it is, N(0, lr · (T/N) / (1 − α/2)), for G = 1.

    The continuous dynamics have lr · T/N; a step that loses α of v and adds noise of 2α · lr · T/N has this.

    Args:
        z: Standard normal numbers, `[M, P]`; None where `heat` is 0.
        like: `[M, P]`.
        lr, heat, friction: As in `kick`.
    """
    return torch.zeros_like(like) if z is None else math.sqrt(lr * heat / (1 - friction / 2)) * z


def kinetic_temperature(
    momentum: Tensor, *, lr: float, friction: float, num_data: int, root: Tensor | None
) -> Tensor:
    """mean(v² / G) over its variance at rest under T = 1, `[M]`: T, and more where noisy gradients heat the chain."""
    whitened = momentum if root is None else momentum / root
    return whitened.square().mean(1) * (num_data * (1 - friction / 2) / lr)
