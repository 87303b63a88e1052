"""Hamiltonian dynamics of a stack: H(θ, r) = N · potential(θ) / T + ½ rᵀ M⁻¹ r, with a diagonal mass M of each member.

Shape letters: M members, P parameters of one member, N training examples.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdl_train.potential import Batch, Gradient, Potential, compiled_or_eager

MAX_ENERGY_ERROR = 1000.0
"""Nats. A trajectory whose energy changes by more has diverged: the step is beyond what is stable there."""


class Point(NamedTuple):
    """Where the trajectories stand.

    Attributes:
        flat, momentum: θ and r, `[M, P]`.
        grad: Of the potential at θ, `[M, P]`.
        potential, nll: `[M]`, nats per example.
    """

    flat: Tensor
    momentum: Tensor
    grad: Tensor
    potential: Tensor
    nll: Tensor


class Hamiltonian:
    """Energies and leapfrog steps of every member side by side.

    Args:
        potential: Of the stack.
        temperature: T.
        compiled: Compile a leapfrog step with torch.compile.
    """

    def __init__(self, potential: Potential, temperature: float, *, compiled: bool) -> None:
        self._potential = potential
        self._scale = potential.num_data / temperature
        self._run: Callable[..., Point] = self._eager
        # A compiled step holds no collective operation.
        if compiled and potential.reduce is None:
            self._potential = replace(potential, compile=False)
            self._run = compiled_or_eager(self._traceable, self._eager, potential.network)

    def energy(self, at: Point, inverse_mass: Tensor) -> Tensor:
        """H in nats, up to a constant, `[M]` float64; `inverse_mass` is `[M, P]`."""
        kinetic_M = 0.5 * (at.momentum.double().square() * inverse_mass.double()).sum(1)
        return self._scale * at.potential.double() + kinetic_M

    def leapfrog(
        self,
        start: Point,
        step_size: Tensor,
        inverse_mass: Tensor,
        num_steps: int,
        buffers: Mapping[str, Tensor],
        batch: Batch,
    ) -> Point:
        """Follow the dynamics for `num_steps` steps of size `step_size` `[M]` float64.

        The map is reversible, keeps volume, and its energy error is of second order in the step.

        Source:
            Neal (2011), arXiv:1206.1901, Section 2.3, equations 2.28 to 2.30.
        """
        at, size_M1 = start, step_size.to(start.flat.dtype)[:, None]
        for _ in range(num_steps):
            at = self._run(at.flat, at.momentum, at.grad, size_M1, inverse_mass, buffers, batch)
        return at

    def _eager(self, *args: Any) -> Point:
        return self._advance(self._potential.value_and_grad, *args)

    def _traceable(self, *args: Any) -> Point:
        return self._advance(self._potential.traceable_value_and_grad, *args)

    def _advance(
        self,
        value_and_grad: Callable[..., Gradient],
        flat: Tensor,
        momentum: Tensor,
        grad: Tensor,
        size: Tensor,
        inverse_mass: Tensor,
        buffers: Mapping[str, Tensor],
        batch: Batch,
    ) -> Point:
        kick_M1 = 0.5 * self._scale * size
        half_MP = momentum - kick_M1 * grad
        new_MP = flat + size * inverse_mass * half_MP
        found = value_and_grad(new_MP, buffers, batch)
        return Point(new_MP, half_MP - kick_M1 * found.grad, found.grad, found.potential, found.nll)


def acceptance(energy_error: Tensor) -> Tensor:
    """Metropolis probability min(1, exp(−ΔH)) of trajectories, `[M]`; 0 for one that diverged or gave NaN."""
    # |ΔH| and not ΔH: the reverse of a refused trajectory is refused too, so the target stays invariant.
    stable = energy_error.abs() <= MAX_ENERGY_ERROR
    return torch.where(stable, (-energy_error).clamp(max=0).exp(), 0.0)
