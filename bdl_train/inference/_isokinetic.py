"""Isokinetic dynamics: motion at unit speed whose direction bends towards lower energy.

Positions θ and directions u, |u| = 1, follow dθ = u dt, du = −(I − uuᵀ) ∇S(θ) / (P − 1) dt, and u is refreshed a
little all the time; with the target exp(−S) for θ, whatever the speed, the stationary law is that target for exact
steps. Shape letters: M members, P parameters of one member.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdl_train.potential import Batch, Gradient, Potential, compiled_or_eager

_LAMBDA = 0.1931833275037836
"""Of the minimal-norm splitting (McLachlan, 1995): its fourth-order error has the least norm."""

INTEGRATORS: dict[str, tuple[tuple[str, float], ...]] = {
    "leapfrog": (("kick", 0.5), ("drift", 1.0), ("kick", 0.5)),
    "mclachlan": (
        ("kick", _LAMBDA),
        ("drift", 0.5),
        ("kick", 1 - 2 * _LAMBDA),
        ("drift", 0.5),
        ("kick", _LAMBDA),
    ),
}
"""Shares of a step in order. A gradient follows each drift; the last one serves the next step too."""


def normalise(u: Tensor) -> Tensor:
    """Directions of unit length, `[M, P]`."""
    return u / torch.linalg.vector_norm(u, dim=1, keepdim=True)


def kick(u: Tensor, grad: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Bend directions along the force for a path of some length.

    Args:
        u: `[M, P]`, of unit length.
        grad: ∇S, `[M, P]`.
        length: `[M]` float64.

    Returns:
        The new directions and the gain in kinetic energy ΔK `[M]` float64, with
        exp(−ΔK) the contraction of the volume of directions.

    Source:
        Ver Steeg & Galstyan (2021), arXiv:2111.02434, equation 12; Robnik et al. (2022), arXiv:2212.08549,
        Section 4, for ΔK.
    """
    dim = u.shape[1] - 1
    norm_M = torch.linalg.vector_norm(grad, dim=1)
    e_MP = -grad / norm_M.clamp(min=torch.finfo(grad.dtype).tiny)[:, None]
    c_M = (u * e_MP).sum(1).double()
    delta_M = length * norm_M.double() / dim
    zeta_M = torch.exp(-delta_M)
    turned_M = (1 - zeta_M) * (1 + zeta_M + c_M * (1 - zeta_M))
    new = (2 * zeta_M).to(u.dtype)[:, None] * u + turned_M.to(u.dtype)[:, None] * e_MP
    # log((1 + c + (1 − c) ζ²) / 2), written so that neither a short nor a long path loses digits.
    short_M = torch.log1p(0.5 * (1 - c_M) * torch.expm1(-2 * delta_M.clamp(max=1.0)))
    far_M = torch.log((0.5 * (1 + c_M) + 0.5 * (1 - c_M) * zeta_M.square()).clamp(min=1e-300))
    return normalise(new), dim * (delta_M + torch.where(delta_M < 1, short_M, far_M))


def refresh(u: Tensor, z: Tensor, length: Tensor, decoherence: Tensor) -> Tensor:
    """Partially forget directions over a path of some length.

    Args:
        u: `[M, P]`.
        z: Standard normal numbers, `[M, P]`.
        length, decoherence: The path and the length L over which directions are forgotten, `[M]`.

    Source:
        Robnik & Seljak (2023), arXiv:2303.18221, equation 13.
    """
    nu_M = torch.sqrt(torch.expm1(2 * length / decoherence) / u.shape[1])
    return normalise(u + nu_M.to(u.dtype)[:, None] * z)


class Moved(NamedTuple):
    """Chains after a step; `energy_error` is ΔE of the proposed step, `taken` where it led to finite numbers."""

    flat: Tensor
    direction: Tensor
    grad: Tensor
    energy: Tensor
    energy_error: Tensor
    nll: Tensor
    taken: Tensor


class Kernel:
    """One step of every chain of a stack: half a refresh, the integrator, half a refresh.

    A step that leads to NaN or infinity is not taken: the chain stays and turns round.

    Args:
        potential: The target is exp(−N · potential / T).
        temperature: T.
        integrator: One of `INTEGRATORS`.
        compiled: Compile the whole step with torch.compile.
    """

    def __init__(self, potential: Potential, temperature: float, integrator: str, *, compiled: bool) -> None:
        self._potential = replace(potential, compile=False)
        self._scale = potential.num_data / temperature
        self._parts = INTEGRATORS[integrator]
        self._run: Callable[..., Moved] = self._eager
        if compiled:
            self._run = compiled_or_eager(self._traceable, self._eager, potential.network)

    def __call__(
        self,
        flat: Tensor,
        direction: Tensor,
        grad: Tensor,
        energy: Tensor,
        size: Tensor,
        decoherence: Tensor,
        noise: tuple[Tensor, Tensor],
        active: Tensor,
        buffers: Mapping[str, Tensor],
        batch: Batch,
    ) -> Moved:
        """
        Args:
            flat, direction, grad: `[M, P]`; the last is ∇S.
            energy: S, `[M]` float64.
            size, decoherence: ε and L, `[M]` float64.
            noise: Two `[M, P]` of standard normal numbers.
            active: `[M]` bool; the other chains stay as they are.
            buffers: Of the network.
            batch: All training examples.
        """
        return self._run(flat, direction, grad, energy, size, decoherence, noise, active, buffers, batch)

    def energy(self, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """S `[M]` float64 and ∇S `[M, P]` from the potential and its gradient."""
        return self._scale * value.double(), self._scale * grad

    def _eager(self, *args: Any) -> Moved:
        return self._advance(self._potential.value_and_grad, *args)

    def _traceable(self, *args: Any) -> Moved:
        return self._advance(self._potential.traceable_value_and_grad, *args)

    def _advance(
        self,
        value_and_grad: Callable[..., Gradient],
        flat: Tensor,
        direction: Tensor,
        grad: Tensor,
        energy: Tensor,
        size: Tensor,
        decoherence: Tensor,
        noise: tuple[Tensor, Tensor],
        active: Tensor,
        buffers: Mapping[str, Tensor],
        batch: Batch,
    ) -> Moved:
        x, g, error = flat, grad, -energy
        found: Gradient | None = None
        u = refresh(direction, noise[0], 0.5 * size, decoherence)
        for part, share in self._parts:
            if part == "kick":
                u, gain = kick(u, g, share * size)
                error = error + gain
            else:
                x = x + (share * size).to(x.dtype)[:, None] * u
                found = value_and_grad(x, buffers, batch)
                g = self._scale * found.grad
        assert found is not None
        new_energy = self._scale * found.potential.double()
        error = error + new_energy
        u = refresh(u, noise[1], 0.5 * size, decoherence)
        taken = torch.isfinite(error + g.sum(1).double()) & active
        taken_M1, active_M1 = taken[:, None], active[:, None]
        return Moved(
            torch.where(taken_M1, x, flat),
            torch.where(taken_M1, u, torch.where(active_M1, -direction, direction)),
            torch.where(taken_M1, g, grad),
            torch.where(taken, new_energy, energy),
            error,
            found.nll,
            taken,
        )
