"""Repulsive ensembles: MAP members that are driven apart as functions (D'Angelo & Fortuin, 2021).

Shape letters: M members, B batch, O outputs, P parameters of one member, N training examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdl_train.inference._descent import DescentState, Evaluated
from bdl_train.inference._kernels import Bandwidth, rbf
from bdl_train.inference._particles import Particles
from bdl_train.likelihoods import at_least_float32
from bdl_train.potential import Batch


def kernel_rows(batch: Batch, seeds: Sequence[int], step: int) -> Tensor:
    """Inputs `[B, ...]` on which all members are compared: the batch of one of them, of each in turn.

    Args:
        batch: Of this step.
        seeds: One a member. Turns go by them and not by places, so that a permuted stack compares on the same rows.
        step: Which turn it is.
    """
    if batch.shared:
        return batch.x
    turns = sorted(range(len(seeds)), key=lambda m: seeds[m])
    return batch.x[turns[step % len(turns)]]


def density_score(outputs: Tensor, bandwidth: Bandwidth, inside: Tensor | None) -> Tensor:
    """−Σ_j ∇_{f_i} k(f_i, f_j) / Σ_j k(f_i, f_j), `[M, ...]` like `outputs`: down the kernel density of the members.

    Args:
        outputs: f_i, `[M, B, O]`.
        bandwidth: h of the kernel, or "median".
        inside: `[M]` bool, members that count; None = all. The others' score is 0.

    Source:
        D'Angelo & Fortuin (2021), arXiv:2106.11642, the kernel density estimate of the Wasserstein gradient flow.
    """
    kernel = rbf(outputs.flatten(1), bandwidth, inside)
    # A member's own part of its density is 1; members that are out have none.
    density_M1 = kernel.matrix.sum(1, keepdim=True).clamp(min=1)
    return (kernel.repulsion() / density_M1).reshape(outputs.shape)


@dataclass(frozen=True, kw_only=True)
class RepulsiveEnsemble(Particles):
    """Descent on ∇potential(θ_i) + (T/N) Jᵢᵀ Σ_j ∇_{f_i} k(f_i, f_j) / Σ_j k(f_i, f_j), f_i the outputs of member i.

    The outputs (logits of classes, mean and log scale of numbers) are those in evaluation mode, on a batch of
    training inputs that is the same for all. The paper's prior over functions is replaced by the prior over weights: a
    single member is the MAP estimate. By the chain rule this is the flow of the weights' posterior under the kernel
    k(f(θ), f(θ')).

    Source:
        D'Angelo & Fortuin (2021), arXiv:2106.11642, the repulsive force in function space.
    """

    members_interact = (
        "in repulsive_ensemble a step of each member is driven away from the outputs of all others"
    )
    # The kernel is a function of all rows at once, not a mean over them.
    splits_batches = False

    def direction(self, state: DescentState, batch: Batch, found: Evaluated) -> Tensor:
        potential, stack = state.potential, state.stack
        x = kernel_rows(batch, state.problem.noise_seeds, state.step)
        leaf = stack.flat.detach().requires_grad_(True)
        outputs, _ = potential.network(
            stack.layout.unflatten(leaf), stack.buffers, x, train=False, shared=True
        )
        with torch.autocast(leaf.device.type, enabled=False):
            score = density_score(at_least_float32(outputs.detach()), self.bandwidth, found.moving)
        (repulsion_MP,) = torch.autograd.grad(outputs, leaf, score.to(outputs.dtype))
        return found.grad - self.temperature / potential.num_data * repulsion_MP
