"""Diagonal Gaussians over the weights of each member: expectations of the potential, and their gradients.

Shape letters: M members, P parameters of one member, S samples, N training examples.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bdl_train.inference import StepLog
from bdl_train.inference._descent import DescentState, Evaluated, evaluate
from bdl_train.inference._noise import MemberNoise
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.potential import Batch
from bdl_train.priors import BoundGaussian
from bdl_train.stack import Stack


class Expected(NamedTuple):
    """E_q[potential] under q = N(mean, diag(std²)) and its gradients in mean and std.

    Attributes:
        at_mean: Its log holds E_q[potential] and E_q[nll]; its gradient `[M, P]` is the one in the mean.
        grad_std: `[M, P]`; divided by std, the diagonal of E_q[∇² potential] (Price's theorem).
    """

    at_mean: Evaluated
    grad_std: Tensor


def expected_potential(
    state: DescentState, batch: Batch, std: Tensor, noise: MemberNoise, num_samples: int
) -> Expected:
    """Estimates from draws θ = mean + std · z, the mean being the stack's weights; z is one for the whole batch.

    Draws come in pairs z, −z, so that odd moments of z cancel: two of them give the exact mean gradient of a quadratic.
    An odd number leaves the last one alone. A Gaussian prior's part is exact instead of sampled.

    Args:
        std: `[M, P]`.
        num_samples: S, each of which costs one gradient.
    """
    mean_MP = state.stack.flat
    z_MP = noise.normal()
    z_sum = z_sq_sum = grad_sum = grad_z_sum = torch.zeros_like(std)
    value_sum = nll_sum = std.new_zeros(len(std))
    for sample in range(num_samples):
        if sample:
            z_MP = -z_MP if sample % 2 else noise.normal()
        found = evaluate(state, batch, mean_MP + std * z_MP)
        z_sum, z_sq_sum = z_sum + z_MP, z_sq_sum + z_MP.square()
        grad_sum, grad_z_sum = grad_sum + found.grad, grad_z_sum + found.grad * z_MP
        value_sum, nll_sum = value_sum + found.log.potential, nll_sum + found.log.nll
    grad_MP, grad_std_MP = grad_sum / num_samples, grad_z_sum / num_samples
    value_M, nll_M = value_sum / num_samples, nll_sum / num_samples
    prior, num_data = state.potential.prior, state.potential.num_data
    if isinstance(prior, BoundGaussian):
        decay = prior.precision / num_data
        grad_MP = grad_MP - decay * std * z_sum / num_samples
        offset_MP = (mean_MP - prior.mean) * z_sum / num_samples + std * (z_sq_sum / num_samples - 1)
        grad_std_MP = grad_std_MP - decay * offset_MP
        value_M = nll_M - expected_log_prob(prior, mean_MP, std) / num_data
    log = StepLog(value_M, nll_M, torch.linalg.vector_norm(grad_MP, dim=1))
    return Expected(Evaluated(log, grad_MP, found.moving, found.buffers), grad_std_MP)


def expected_log_prob(prior: BoundGaussian, mean: Tensor, std: Tensor) -> Tensor:
    """E_q[log p(θ)] under q = N(mean, diag(std²)), total in nats, `[M, P]` to `[M]`."""
    return prior.log_prob(mean) - 0.5 * (prior.precision * std.square()).sum(-1)


def entropy(std: Tensor) -> Tensor:
    """Of N(mean, diag(std²)), total in nats, `[M, P]` to `[M]`."""
    return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def clipped(grad: Tensor, clip_norm: float | None) -> Tensor:
    """A gradient `[M, ...]` with the norm of each member at most `clip_norm`."""
    if clip_norm is None:
        return grad
    norm_M1 = torch.linalg.vector_norm(grad, dim=1, keepdim=True)
    return grad * (clip_norm / norm_M1.clamp(min=clip_norm))


def gaussians(stack: Stack, variance: Tensor) -> list[MemberPosterior]:
    """N(weights, diag(variance)) for each member; `variance` is `[M, P]`."""
    return [
        LowRankGaussian(
            mean=stack.flat[m].clone(),
            variance=variance[m].clone(),
            deviations=variance.new_empty(0, variance.shape[1]),
            buffers={name: buffer[m].clone() for name, buffer in stack.buffers.items()},
        )
        for m in range(stack.num_members)
    ]
