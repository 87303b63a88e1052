"""R-hat and effective sample sizes against closed forms, the paper's formulas term by term, and what chance gives."""

import math

import numpy as np
import pytest
from scipy import stats

from bdl_train.evaluation.diagnostics import (
    autocovariance,
    effective_size,
    ess_bulk,
    ess_tail,
    rank_normalised,
    rhat_by_chance,
    split,
    split_rhat,
)


def autoregressive(rho: float, num_chains: int, num_draws: int, seed: int) -> np.ndarray:
    """Stationary chains x_t = ρ x_{t−1} + √(1 − ρ²) ε_t of variance 1, `[C, K]`."""
    noise = np.random.default_rng(seed).standard_normal((num_chains, num_draws))
    found = noise.copy()
    for t in range(1, num_draws):
        found[:, t] = rho * found[:, t - 1] + math.sqrt(1 - rho**2) * noise[:, t]
    return found


def by_the_paper(chains: np.ndarray) -> float:
    """Effective sample size of chains `[C, n]`, sum by sum in the words of Vehtari et al. (2021), Section 3.2."""
    num_chains, n = chains.shape
    mean = [sum(one) / n for one in chains]
    s2 = [sum((x - m) ** 2 for x in one) / (n - 1) for one, m in zip(chains, mean, strict=True)]
    grand = sum(mean) / num_chains
    b = n / (num_chains - 1) * sum((m - grand) ** 2 for m in mean)
    w = sum(s2) / num_chains
    var_plus = (n - 1) / n * w + b / n

    def rho(t: int) -> float:
        total = 0.0
        for one, m, s in zip(chains, mean, s2, strict=True):
            total += s * sum((one[i] - m) * (one[i + t] - m) for i in range(n - t)) / (n - 1) / s
        return 1 - (w - total / num_chains) / var_plus

    time, last = -1.0, math.inf
    for pair in range(n // 2):
        value = rho(2 * pair) + rho(2 * pair + 1)
        if value <= 0:
            break
        last = min(last, value)
        time += 2 * last
    size = num_chains * n
    return size / max(time, 1 / math.log10(size))


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.6, 0.95])
@pytest.mark.parametrize("num_chains", [2, 3])
def test_effective_size_is_that_of_the_paper(rho: float, num_chains: int):
    chains = autoregressive(rho, num_chains, 41, seed=1) + 0.3 * np.arange(num_chains)[:, None]
    assert effective_size(chains) == pytest.approx(by_the_paper(chains), rel=1e-9)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
def test_effective_size_of_autoregressive_chains(rho: float):
    # The bulk of a Gaussian chain is its mean: S (1 − ρ) / (1 + ρ) in the limit.
    chains = np.stack([autoregressive(rho, 4, 4000, seed) for seed in range(10)])
    found = ess_bulk(chains)
    assert found.shape == (10,)
    # Sums of estimated autocorrelations spread by some 10 % each: over ten, 5 % are above four standard errors at
    # ρ = 0, where the spread is least and the truncation of the sum shortens it by up to 3 %.
    assert found.mean() == pytest.approx(16_000 * (1 - rho) / (1 + rho), rel=0.08)


def test_one_chain_has_the_effective_size_of_its_halves():
    chain = autoregressive(0.5, 1, 8000, seed=3)
    assert ess_bulk(chain) == pytest.approx(8000 / 3, rel=0.15)


def test_tail_size_is_that_of_the_indicators_of_the_quantiles():
    # P(both beyond the quantile) of a bivariate normal gives the autocorrelation of the indicator, lag by lag.
    rho, chains = 0.8, np.stack([autoregressive(0.8, 4, 4000, seed) for seed in range(10)])
    edge = stats.norm.isf(0.05)
    time = 1.0
    for lag in range(1, 60):
        law = stats.multivariate_normal(np.zeros(2), np.array([[1, rho**lag], [rho**lag, 1]]))  # pyright: ignore[reportArgumentType]
        time += 2 * (float(law.cdf([-edge, -edge])) - 0.05**2) / (0.05 * 0.95)
    # The smaller one of two estimates lies below their mean by half a spread of some 8 %.
    assert ess_tail(chains).mean() == pytest.approx(16_000 / time, rel=0.12)
    assert ess_tail(chains).mean() > 1.2 * ess_bulk(chains).mean()


def test_independent_draws_have_an_rhat_of_one():
    chains = np.random.default_rng(0).standard_cauchy((20, 4, 5000))
    found = split_rhat(chains)
    # E[R-hat²] − 1 is about 1/n between 8 half chains.
    assert np.abs(found - 1).max() < 8 / 2500
    assert found.mean() > 1


def test_shifted_chains_have_the_rhat_of_their_distance():
    # Two chains whose ranks do not overlap: z of the lower and the upper half of a normal, of variance 1 − 2/π each and
    # with means ∓√(2/π). Between halves of the same chain there is nothing.
    noise = np.random.default_rng(0).standard_normal((2, 4000))
    noise[1] += 100
    between = 4 / 3 * 2 / math.pi  # variance of four half-chain means, two at each place
    assert split_rhat(noise) == pytest.approx(math.sqrt(1 + between / (1 - 2 / math.pi)), rel=0.01)


def test_a_chain_that_drifts_differs_from_itself():
    drift = np.linspace(0, 3, 1000) + np.random.default_rng(0).standard_normal(1000)
    # Halves of variance 1 + 1.5²/12 whose means are 1.5 apart: two means have the variance 1.5²/2. Ranks change little.
    assert split_rhat(drift[None]) == pytest.approx(math.sqrt(1 + 1.125 / 1.1875), rel=0.03)
    assert split_rhat(np.random.default_rng(1).permutation(drift)[None]) < 1.02


def test_chains_of_different_scales_differ_though_their_means_agree():
    scales = np.random.default_rng(0).standard_normal((4, 1000)) * np.array([1, 1, 1, 10])[:, None]
    halves = rank_normalised(split(scales))
    only_location = math.sqrt(halves.mean(-1).var(ddof=1) / halves.var(-1, ddof=1).mean() + 1)
    assert only_location < 1.02
    assert split_rhat(scales) > 1.1


def test_ranks_ignore_monotone_transforms_and_chains_their_order():
    chains = autoregressive(0.7, 3, 100, seed=2) + np.arange(3)[:, None]
    for statistic in (split_rhat, ess_bulk, ess_tail):
        assert statistic(chains[[2, 0, 1]]) == pytest.approx(statistic(chains))
    assert ess_bulk(np.exp(5 * chains)) == pytest.approx(ess_bulk(chains))
    assert ess_tail(np.exp(5 * chains)) == pytest.approx(ess_tail(chains))


def test_values_are_diagnosed_one_by_one():
    chains = np.stack([autoregressive(rho, 2, 50, seed=i) for i, rho in enumerate((0.0, 0.9, -0.5))])
    for statistic in (split_rhat, ess_bulk, ess_tail):
        assert statistic(chains) == pytest.approx(np.array([statistic(one) for one in chains]))


@pytest.mark.parametrize("num_draws", [30, 200])
def test_chance_exceeds_its_limit_in_a_share_of_cases(num_draws: int):
    chains = np.random.default_rng(0).standard_normal((10_000, 1, num_draws))
    share = (split_rhat(chains) > rhat_by_chance(num_draws, 0.05)).mean()
    # Standard error of a share of 5 % of 10 000: 0.0022. Ranks, and folding, are not quite normal: a hundredth.
    assert share == pytest.approx(0.05, abs=0.01)


def test_rank_normalisation_by_hand():
    found = rank_normalised(np.array([[3.0, 1.0], [2.0, 3.0]]))
    ranks = np.array([[3.5, 1], [2, 3.5]])
    assert found == pytest.approx(stats.norm.ppf((ranks - 3 / 8) / (4 + 1 / 4)))


def test_autocovariance_by_hand():
    chain = np.random.default_rng(0).normal(size=7)
    centred = chain - chain.mean()
    by_hand = [sum(centred[: 7 - t] * centred[t:]) / 6 for t in range(7)]
    assert autocovariance(chain[None])[0] == pytest.approx(by_hand)
    assert autocovariance(chain[None])[0, 0] == pytest.approx(chain.var(ddof=1))


def test_what_never_moves_or_is_no_number_has_no_value():
    same, broken = np.full((1, 8), 0.1), np.r_[np.arange(7.0), np.nan][None]
    for statistic in (split_rhat, ess_bulk, ess_tail):
        assert np.isnan(statistic(same))
        assert np.isnan(statistic(broken))
    stuck = np.repeat([[0.1], [0.3], [0.7]], 20, axis=1)
    assert np.isinf(split_rhat(stuck))


def test_an_odd_draw_in_the_middle_is_left_out_and_few_are_refused():
    assert split(np.arange(5.0)[None]).tolist() == [[0, 1], [3, 4]]
    with pytest.raises(ValueError, match=r"4 draws or more, got \[2, 3\]"):
        split_rhat(np.zeros((2, 3)))
