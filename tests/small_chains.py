"""Small artefacts whose members are chains of random weights, for tests that never train."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from small_posteriors import small_artefact

from bdl_train.data import Part
from bdl_train.posteriors import MemberPosterior
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.chain import Chain


def chain_artefact(
    likelihood: str = "heteroscedastic_gaussian",
    *,
    num_members: int = 3,
    num_draws: int = 40,
    drift: Sequence[float] = (0.0, 0.0, 0.0),
    spread: float = 0.05,
    apart: bool = True,
    method: Mapping[str, object] | None = None,
    traces: Sequence[str] = ("potential", "step_size"),
) -> Artefact:
    """Chains of independent normal draws around random networks.

    Args:
        drift: Of each member, how far all its weights move along the chain, in units of `spread`.
        spread: Standard deviation of every weight.
        apart: Whether each member stands around a network of its own.
        method: Settings of the method.
        traces: Names of independent normal traces, of which the potential drifts as the weights do.
    """
    artefact = small_artefact(likelihood, num_members=num_members)
    generator = torch.Generator().manual_seed(5)
    time = torch.linspace(0, 1, num_draws)
    members: list[MemberPosterior] = []
    for m in range(num_members):
        centre, buffers = next(artefact.posterior.members[m if apart else 0].draw(1, 0))
        noise = torch.randn(num_draws, len(centre), generator=generator)
        flat = centre + spread * (noise + drift[m] * time[:, None])
        held = {name: torch.stack([one] * num_draws) for name, one in buffers.items()}
        said = torch.randn(len(traces), num_draws, generator=generator).double()
        told = {
            name: said[i] + (drift[m] * time if name == "potential" else 0) for i, name in enumerate(traces)
        }
        members.append(Chain(flat, held, told))
    posterior = replace(artefact.posterior, members=members)
    return replace(artefact, posterior=posterior, meta={**artefact.meta, "method": dict(method or {})})


def some_rows(artefact: Artefact, count: int = 30) -> Part:
    """Rows with numbers of their own, from 1000."""
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 3)).astype(np.float32)
    classes = artefact.target.num_classes
    y = random.integers(0, classes, count) if classes else random.normal(size=count).astype(np.float32)
    return Part(x, y, 1000 + np.arange(count))
