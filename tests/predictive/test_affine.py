"""Widened mixtures against the change of variables, draws by scipy, and the moments that must follow."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Distribution, Normal, Poisson, StudentT

from bdl_train.errors import UsageError
from bdl_train.predictive.affine import scaled
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.stats import NumberStats, log_prob, stats_of

LOC = torch.tensor([[-1.0, 4.0], [0.5, 3.0], [2.0, 9.0]], dtype=torch.float64)
SCALE = torch.tensor([[0.3, 1.0], [1.1, 0.2], [0.7, 2.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
FAMILIES: dict[str, Distribution] = {
    "normal": Normal(LOC, SCALE),
    "student_t": StudentT(torch.tensor(4.0, dtype=torch.float64), LOC, SCALE),
}
Y = torch.tensor([0.2, 5.5], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def mixture(request: pytest.FixtureRequest) -> Mixture:
    return Mixture(FAMILIES[request.param], WEIGHTS.log())


def number_stats(mixture: Mixture, y: torch.Tensor | None = None) -> NumberStats:
    found = stats_of(mixture.components, mixture.log_weights, y)
    assert isinstance(found, NumberStats)
    return found


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_it_is_the_change_of_variables(mixture: Mixture, scale: float):
    """P(m + s (Y − m) ≤ v) = F(m + (v − m) / s), its density f(·) / s, its quantiles moved; each from the original."""
    wide, mean = scaled(mixture, scale), WEIGHTS @ LOC
    back = mean + (Y - mean) / scale
    torch.testing.assert_close(wide.cdf(Y), mixture.cdf(back), rtol=1e-12, atol=1e-12)
    log_density = torch.logsumexp(log_prob(mixture.components, back) + WEIGHTS.log()[:, None], dim=0)
    torch.testing.assert_close(number_stats(wide, Y).nll, math.log(scale) - log_density)
    levels = torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)
    torch.testing.assert_close(wide.quantile(levels), mean + scale * (mixture.quantile(levels) - mean))
    # The CRPS is in units of y: it grows with them.
    torch.testing.assert_close(wide.crps(Y), scale * mixture.crps(back), rtol=1e-5, atol=1e-6)


def test_the_mean_stays_and_every_standard_deviation_is_multiplied(mixture: Mixture):
    one, wide = number_stats(mixture), number_stats(scaled(mixture, 3.0))
    torch.testing.assert_close(wide.mean, one.mean)
    for name in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(wide, name), 9 * getattr(one, name))
    torch.testing.assert_close(wide.mean, WEIGHTS @ LOC)


def test_draws_that_are_widened_by_hand_have_its_distribution():
    generator = np.random.default_rng(0)
    which = generator.choice(3, size=4000, p=WEIGHTS.numpy())
    draws = generator.normal(LOC[:, 1].numpy()[which], SCALE[:, 1].numpy()[which])
    mean = float(WEIGHTS @ LOC[:, 1])
    wide = scaled(
        Mixture(Normal(LOC[:, 1:].expand(3, 4000), SCALE[:, 1:].expand(3, 4000)), WEIGHTS.log()), 1.8
    )
    pit = wide.cdf(torch.from_numpy(mean + 1.8 * (draws - mean))).numpy()
    assert scipy.stats.kstest(pit, "uniform").pvalue > 0.01


def test_float32_components_with_one_spread_for_all_rows():
    loc, spread = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.5], [1.5]])
    wide = scaled(Mixture(Normal(loc, spread), torch.tensor([0.5, 0.5]).log()), 2.0)
    assert isinstance(wide.components, Normal)
    torch.testing.assert_close(wide.components.loc, torch.tensor([[-1.0, 0.0], [3.0, 4.0]]).double())
    torch.testing.assert_close(wide.components.scale, torch.tensor([[1.0, 1.0], [3.0, 3.0]]).double())


def test_counts_and_senseless_factors_are_refused():
    counts = Mixture(Poisson(torch.ones(2, 3)), torch.tensor([0.5, 0.5]).log())
    with pytest.raises(UsageError, match="Poisson components follows from their mean"):
        scaled(counts, 2.0)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"above 0, got {scale}"):
            scaled(Mixture(FAMILIES["normal"], WEIGHTS.log()), scale)
