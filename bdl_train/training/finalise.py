"""Posterior draws of a network with batch norm: made once in training, with statistics re-estimated for each draw."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.atoms import Atoms
from bdl_train.specs import InputSpec
from bdl_train.stack import Layout, StackedNetwork

BatchNorm = nn.modules.batchnorm._BatchNorm


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, BatchNorm) and module.track_running_stats for module in network.modules())


def finalise(
    posterior: MemberPosterior,
    network: StackedNetwork,
    layout: Layout,
    inputs: InputSpec,
    x: Tensor,
    *,
    num_draws: int,
    seed: int,
    batch_size: int,
    max_batches: int,
) -> Atoms:
    """Draw `num_draws` atoms and give each the batch-norm statistics of its own weights.

    Weights that never were on the training path make the running statistics wrong. Each draw passes over the training
    inputs, in train mode, and takes the mean over batches of their means and variances.

    Args:
        posterior: A distribution over weights.
        x: The member's own training inputs as stored, `[N, *shape]`.
        num_draws: Atoms to make.
        seed: Of the draws.
        batch_size: Of the batches, as in training: deeper layers see inputs normalised by it.
        max_batches: Most batches, spread evenly over the rows.

    Source:
        Izmailov et al. (2018), arXiv:1803.05407, Section 3.2; Maddox et al. (2019), Algorithm 1.
    """
    flats, all_buffers = [], []
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)  # for torch's own dropout in a user's network
        for flat, buffers in posterior.draw(num_draws, seed):
            flats.append(flat)
            all_buffers.append(_estimate(network, layout, inputs, flat, buffers, x, batch_size, max_batches))
    names = all_buffers[0]
    return Atoms(
        torch.stack(flats), {name: torch.stack([one[name] for one in all_buffers]) for name in names}
    )


@torch.no_grad()
def _estimate(
    network: StackedNetwork,
    layout: Layout,
    inputs: InputSpec,
    flat: Tensor,
    buffers: dict[str, Tensor],
    x: Tensor,
    batch_size: int,
    max_batches: int,
) -> dict[str, Tensor]:
    norms = [
        (name, module) for name, module in network.template.named_modules() if isinstance(module, BatchNorm)
    ]
    momenta = {name: module.momentum for name, module in norms}
    params = layout.unflatten(flat[None])
    start = {name: buffer[None] for name, buffer in buffers.items()}
    totals: dict[str, Tensor] = {}
    count = 0
    try:
        for _, module in norms:
            module.momentum = 1.0  # running statistics then are those of the last batch alone
        for rows in _batches(len(x), batch_size, max_batches):
            _, after = network(params, start, inputs.prepare(x[rows], flat.dtype), train=True, shared=True)
            count += 1
            for name in _statistics(after):
                totals[name] = totals.get(name, torch.zeros_like(after[name][0])) + after[name][0]
    finally:
        for name, module in norms:
            module.momentum = momenta[name]
    return {**buffers, **{name: total / count for name, total in totals.items()}}


def _batches(num_rows: int, batch_size: int, max_batches: int) -> Iterator[Tensor]:
    """Batches of nearly equal size, spread evenly over the rows when they are many."""
    num_batches = max(1, round(num_rows / batch_size))
    # Strided, so that every batch sees all of a sorted data set.
    chosen = min(num_batches, max_batches)
    for b in range(chosen):
        yield torch.arange(b, num_rows, num_batches)


def _statistics(buffers: dict[str, Tensor]) -> list[str]:
    return [name for name in buffers if name.endswith(("running_mean", "running_var"))]
