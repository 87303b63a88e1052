"""What the states of chains say, in numbers that mean the same in every chain: predictions at some rows, not weights.

Networks with permuted or sign-flipped units are one function, so that single weights of two chains, or of one chain
before and after a jump, cannot be compared; predictions, the likelihood's parameters and the potential can.

Shape letters: M members, K draws of each, C = M·K components, B rows, V values, F values of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.diagnostics import LEAST_DRAWS
from bdl_train.likelihoods import PREFIX
from bdl_train.posteriors.artefact import Artefact
from bdl_train.posteriors.chain import Chain
from bdl_train.predictive.predict import Predictor
from bdl_train.predictive.stats import class_log_probs

MOST_ROWS, MOST_VALUES = 200, 500
MOST_NUMBERS = 20_000_000
"""Values times draws of all members that are kept."""


@dataclass(frozen=True)
class ChainValues:
    """One number for each draw of each value.

    Attributes:
        values: `[V, M, K]` float64, draws in the order in which the chains visited them.
        rows: `[V]` source row of each value, −1 for a parameter of the likelihood.
        names: What each value is: `mean`, `log std`, `log p(class)` or `likelihood.*`.
        traces: What the sampler said at each draw, `[M, K]` by name, the same for all members.
    """

    values: np.ndarray
    rows: np.ndarray
    names: list[str]
    traces: dict[str, np.ndarray]


def no_chains(artefact: Artefact) -> str | None:
    """Why the members are not chains that can be diagnosed; None if they are."""
    members = artefact.posterior.members
    chains = [one for one in members if isinstance(one, Chain)]
    if len(chains) < len(members):
        kinds = sorted({type(one).__name__ for one in members if not isinstance(one, Chain)})
        held = "single weight vectors or draws in no order" if kinds == ["Atoms"] else "distributions"
        return f"the members of this method are {held} ({', '.join(kinds)}), not chains"
    lengths = sorted({one.num_atoms for one in chains})
    if len(lengths) > 1:
        return f"the chains have different lengths ({lengths[0]} to {lengths[-1]} draws)"
    if lengths[0] < LEAST_DRAWS:
        return (
            f"a chain keeps {lengths[0]} draws, {LEAST_DRAWS} or more are needed: raise inference.num_draws"
        )
    return None


def chain_values(artefact: Artefact, predictor: Predictor, part: Part) -> ChainValues:
    """Predict some rows with every draw, apart.

    Args:
        artefact: Whose members are chains.
        predictor: Of it.
        part: Encoded rows, of which some, spread evenly, are predicted.

    Raises:
        UsageError: there are no chains.
    """
    reason = no_chains(artefact)
    if reason is not None:
        raise UsageError(f"There is no R-hat: {reason}.")
    if predictor.num_draws is not None:  # a share of the draws is another chain
        predictor = Predictor(artefact, device=predictor.device)
    chains = [one for one in artefact.posterior.members if isinstance(one, Chain)]
    num_members, num_draws = len(chains), chains[0].num_atoms
    at = np.linspace(0, len(part) - 1, min(len(part), MOST_ROWS)).round().astype(int)
    row_names, noise = _row_names(artefact), [one for one in artefact.layout.names if one.startswith(PREFIX)]
    # By a fixed shuffle: every n-th value might be the same class in every row.
    most = min(MOST_VALUES, max(1, MOST_NUMBERS // (num_members * num_draws)))
    picked = np.sort(np.random.default_rng(0).permutation(len(at) * len(row_names))[:most])
    predicted_VC = _predictions(artefact, predictor, torch.from_numpy(part.x[at]), picked, len(row_names))
    noise_VC = [
        torch.cat([one.flat[:, artefact.layout.columns([name])] for one in chains]).T for name in noise
    ]
    values_VC = np.concatenate([predicted_VC, *(one.double().numpy() for one in noise_VC)])
    shared = [name for name in chains[0].traces if all(name in one.traces for one in chains)]
    return ChainValues(
        values_VC.reshape(-1, num_members, num_draws),
        np.concatenate([part.rows[at][picked // len(row_names)], np.full(len(noise), -1)]),
        [*(row_names[i % len(row_names)] for i in picked), *noise],
        {name: np.stack([one.traces[name].double().numpy() for one in chains]) for name in shared},
    )


def _predictions(
    artefact: Artefact, predictor: Predictor, x: Tensor, picked: np.ndarray, per_row: int
) -> np.ndarray:
    """The picked ones of F values for each of B rows, row by row, `[V, C]`."""
    found = []
    for start in range(0, len(x), predictor.block_rows):
        stop = start + predictor.block_rows
        own = picked[(picked >= start * per_row) & (picked < stop * per_row)] - start * per_row
        index = torch.from_numpy(own).to(predictor.device)
        chunks = [
            _of_rows(components, artefact, per_row).flatten(1)[:, index].cpu().numpy()
            for components in predictor.each_draw(x[start:stop])
        ]
        found.append(np.concatenate(chunks).T)
    return np.concatenate(found)


def _row_names(artefact: Artefact) -> list[str]:
    """The F values of a row; the first class is what the others leave."""
    classes = artefact.target.classes
    if classes:
        return [f"log p({name})" for name in classes[1:]]
    has_scale = artefact.likelihood.num_outputs(artefact.target) > 1
    return ["mean", "log std"] if has_scale else ["mean"]


def _of_rows(components: Distribution, artefact: Artefact, per_row: int) -> Tensor:
    """`[C, B, F]` float64."""
    if artefact.target.classes:
        return class_log_probs(components)[..., 1:]
    return torch.stack([components.mean, components.stddev.log()], dim=-1)[..., :per_row]
