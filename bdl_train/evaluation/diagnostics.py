"""Whether chains have mixed, and how many independent draws theirs are worth.

Everything works on ranks, so that heavy tails and the scale of a quantity do not matter. Undefined values are NaN: of a
quantity that is the same in every draw, or is not a number in some.

Source:
    Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021), Bayesian Analysis 16(2), arXiv:1903.08008, Sections 3 and 4.

Shape letters: C chains, K draws of each, n draws of a half chain, S = C·K.
"""

import math

import numpy as np
from scipy import special, stats

LEAST_DRAWS = 4
"""Of a chain: each half needs a variance."""
TAIL = 0.05
ROUNDING = 1e-20
"""A smaller variance of ranks or indicators is 0."""


def split_rhat(chains: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat, the larger one of location and scale; 1 = halves of chains cannot be told apart.

    Args:
        chains: `[..., C, K]` with K of 4 or more; one chain is compared with itself, first half against second.

    Returns:
        `[...]`; infinite if every half stands still at a place of its own.
    """
    halves = split(chains)
    folded = np.abs(halves - np.median(halves, axis=(-2, -1), keepdims=True))
    # fmax: draws of two values only have no scale that could differ.
    return np.fmax(_rhat(rank_normalised(halves)), _rhat(rank_normalised(folded)))


def ess_bulk(chains: np.ndarray) -> np.ndarray:
    """Effective sample size of the rank-normalised draws: how many independent ones locate the middle as well.

    Args:
        chains: `[..., C, K]` with K of 4 or more.

    Returns:
        `[...]`, S · log10(S) at most.
    """
    return effective_size(rank_normalised(split(chains)))


def ess_tail(chains: np.ndarray) -> np.ndarray:
    """Effective sample size of the 5 % and the 95 % quantile, the smaller one.

    Args:
        chains: `[..., C, K]` with K of 4 or more.

    Returns:
        `[...]`.
    """
    halves = split(chains)
    with np.errstate(invalid="ignore"):
        edges = np.quantile(halves, (TAIL, 1 - TAIL), axis=(-2, -1), keepdims=True)
    low, high = (effective_size(np.where(np.isnan(halves), np.nan, halves <= edge)) for edge in edges)
    return np.fmin(low, high)


def rhat_by_chance(num_draws: int, share: float) -> float:
    """What R-hat of one chain of independent draws exceeds in a share of cases.

    For two halves of normal draws n · (R-hat² − (n − 1)/n) follows F(1, 2n − 2). Location and scale are nearly
    independent, and either may be the larger one.

    Args:
        num_draws: K.
        share: Of cases, e.g. 0.05.
    """
    n = num_draws // 2
    return math.sqrt((n - 1) / n + float(stats.f.isf(share / 2, 1, 2 * n - 2)) / n)


# --- parts ------------------------------------------------------------------------------------------------------


def split(chains: np.ndarray) -> np.ndarray:
    """Halves as chains of their own, `[..., 2C, n]`: a chain that drifts differs from itself.

    Raises:
        ValueError: fewer than 4 draws.
    """
    num_draws = chains.shape[-1]
    if num_draws < LEAST_DRAWS:
        raise ValueError(
            f"chains must be [..., chains, draws] with {LEAST_DRAWS} draws or more, got {list(chains.shape)}."
        )
    half = num_draws // 2  # of an odd number the middle one is left out
    return np.concatenate([chains[..., :half], chains[..., num_draws - half :]], axis=-2)


def rank_normalised(chains: np.ndarray) -> np.ndarray:
    """Φ⁻¹((rank − 3/8) / (S + 1/4)) over all chains together, ties at their mean rank."""
    joined = chains.reshape(*chains.shape[:-2], -1)
    ranks = stats.rankdata(joined, axis=-1)
    return special.ndtri((ranks - 0.375) / (joined.shape[-1] + 0.25)).reshape(chains.shape)


def effective_size(chains: np.ndarray) -> np.ndarray:
    """Effective sample size of the mean of all draws, `[...]`.

    Autocorrelations of all chains together are summed in pairs of lags, up to the first pair that is not positive and
    with no pair larger than the one before it (Geyer 1992).

    Args:
        chains: `[..., C, n]`, two or more chains.
    """
    num_chains, n = chains.shape[-2:]
    covariance = autocovariance(chains)
    within = covariance[..., 0].mean(-1)
    total = (n - 1) / n * within + chains.mean(-1).var(-1, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = 1 - (within[..., None] - covariance.mean(-2)) / total[..., None]
    pairs = rho[..., : n - n % 2].reshape(*rho.shape[:-1], -1, 2).sum(-1)
    is_kept = np.logical_and.accumulate(pairs > 0, axis=-1)
    time = -1 + 2 * np.where(is_kept, np.minimum.accumulate(pairs, axis=-1), 0).sum(-1)
    size = num_chains * n
    # Antithetic chains may be better than independent draws, but not without limit.
    found = size / np.maximum(time, 1 / math.log10(size))
    return np.where(total > ROUNDING, found, np.nan)


def autocovariance(chains: np.ndarray) -> np.ndarray:
    """s²ρ_t of each chain at lags 0 to n − 1, `[..., n]`; the variance at lag 0 has the divisor n − 1."""
    n = chains.shape[-1]
    centred = chains - chains.mean(-1, keepdims=True)
    # Zeros behind the draws: without them the ends of a chain would be neighbours.
    length = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, length, axis=-1)
    return np.fft.irfft(np.abs(spectrum) ** 2, length, axis=-1)[..., :n] / (n - 1)


def _rhat(chains: np.ndarray) -> np.ndarray:
    """√(var⁺ / W), `[...]`, of draws whose spread is near 1."""
    n = chains.shape[-1]
    within = chains.var(-1, ddof=1).mean(-1)
    between = chains.mean(-1).var(-1, ddof=1)
    within, between = (np.where(one < ROUNDING, 0, one) for one in (within, between))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt((n - 1) / n + between / within)
