"""What a linear recursion says about Langevin chains on a linear Gaussian model, with no use of their random numbers.

Shape letters: M members, P parameters, D = P for weights alone, 2P for weights and momentum.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor

from bdl_train.inference import Method


@dataclass
class Given:
    """Random numbers that were decided before."""

    z: Tensor

    def normal(self) -> Tensor:
        return self.z


def measured(
    model: LinearGaussian,
    method: Method[Any],
    *,
    root: Tensor | None = None,
    at: int = 0,
    num_epochs: int = 40,
) -> tuple[Tensor, Tensor]:
    """The step of a chain as (θ, v) ← F (θ, v) + L z + constant: F `[D, D]` and L `[D, P]`, on all rows at once.

    Each member of one stack starts at another unit vector: a step of all of them reads off every column.

    Args:
        model: Makes the step affine in weights, momentum and noise.
        method: A chain from the first step on.
        root: √G `[P]`; None = what the method starts with.
        at: Which step.
        num_epochs: Of the run, of one step each.
    """
    num_params = len(model.mean)
    the_work = model.work(range(3 * num_params + 1), batch_size=len(model.y), num_epochs=num_epochs)
    state = method.init(the_work.problem)
    unit = torch.eye(
        3 * num_params + 1, 3 * num_params, dtype=torch.float64
    )  # the last member is the constant
    start, momentum, z = unit.split(num_params, dim=1)
    state.stack.flat.copy_(start)
    state.step = at
    state.noise = Given(z.clone())
    with_momentum = state.momentum is not None
    if with_momentum:
        state.momentum = momentum.clone()
    if root is not None:
        state.root = root.expand(len(unit), -1)
    method.step(state, the_work.all_rows())
    ends = torch.cat([state.stack.flat, state.momentum], dim=1) if with_momentum else state.stack.flat
    columns = (ends - ends[-1])[:-1].T
    moved = columns[:, : ends.shape[1]]
    return moved, columns[:, 2 * num_params :]


def stationary(moved: Tensor, pushed: Tensor) -> Tensor:
    """Σ = F Σ Fᵀ + L Lᵀ, `[D, D]` (discrete Lyapunov)."""
    return torch.from_numpy(scipy.linalg.solve_discrete_lyapunov(moved.numpy(), (pushed @ pushed.T).numpy()))


def by_hand(
    model: LinearGaussian, *, lr: float, friction: float, temperature: float, scale: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """F `[2P, 2P]` and the noise's covariance `[2P, 2P]` of the momentum step, written down from the paper.

    Chen, Fox & Guestrin (2014), equation 15, for the energy (N/T) · potential, whose Hessian is (1/T) · precision:
    their η is lr · (T/N) · G.

    Args:
        model: Whose posterior is the target.
        lr, friction, temperature: The settings.
        scale: G, `[P]`.
    """
    num_params = len(model.mean)
    eye, eta = np.eye(num_params), lr * temperature / len(model.y) * np.diag(scale.numpy())
    pull = -eta @ (model.precision.numpy() / temperature)
    moved = np.block([[eye + pull, (1 - friction) * eye], [pull, (1 - friction) * eye]])
    return moved, 2 * friction * np.block([[eta, eta], [eta, eta]])


def assert_second_moments(draws: Tensor, mean: Tensor, expected: Tensor, *, largest_error: float) -> None:
    """The draws' second moments about the mean are the expected ones, within 4.5 standard errors.

    Members are independent, so the spread of their own averages is the standard error; the largest must be small
    against the largest expected moment, or the test would see nothing.

    Args:
        draws: `[M, S, P]`.
        mean: `[P]`, known.
        expected: `[P, P]`, or `[M, P, P]` where each member has its own.
        largest_error: Largest standard error, as a share of the largest expected moment.
    """
    d = draws - mean
    excess = torch.einsum("msp,msq->mpq", d, d) / d.shape[1] - expected
    error = excess.std(0) / math.sqrt(len(draws))
    assert error.max() < largest_error * expected.abs().max()
    assert (excess.mean(0) / error).abs().max() < 4.5
