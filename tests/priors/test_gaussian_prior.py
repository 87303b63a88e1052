import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Generator

from bdl_train.priors import BoundGaussian
from bdl_train.priors.gaussian import Gaussian
from bdl_train.stack import Layout

RNG = np.random.default_rng(0)


def test_log_prob_is_scipys(layout: Layout):
    bound = Gaussian(scale=0.75, fan_in=False).bind(layout, [0]).to("cpu", torch.float64)
    flat = RNG.normal(size=(5, layout.num_params))
    expected = scipy.stats.norm.logpdf(flat, 0, 0.75).sum(-1)
    np.testing.assert_allclose(bound.log_prob(torch.tensor(flat)), expected, rtol=1e-12)


def test_fan_in_divides_the_scale_of_weights_only(layout: Layout):
    bound = Gaussian(scale=2.0, fan_in=True).bind(layout, [0])
    # 4 inputs; a bias; 3 channels × 2 × 2 = 12 inputs; a bias.
    expected = [2.0 / 2] * 12 + [2.0] * 3 + [2.0 / math.sqrt(12)] * 24 + [2.0] * 3
    torch.testing.assert_close(bound.std, torch.tensor(expected))
    torch.testing.assert_close(bound.precision, torch.tensor(expected) ** -2)


def test_fan_in_keeps_the_size_of_pre_activations():
    variances = []
    for width in (25, 400):
        bound = Gaussian(scale=1.5, fan_in=True).bind(Layout(("w",), ((1, width),)), [0])
        variances.append(bound.sample(20_000, Generator().manual_seed(0)).sum(-1).var().item())
    # A variance from n draws is off by sqrt(2 / n) of itself; allow five times that.
    np.testing.assert_allclose(variances, 1.5**2, rtol=5 * math.sqrt(2 / 20_000))


def test_members_may_have_densities_of_their_own():
    mean, std = torch.tensor(RNG.normal(size=(2, 3, 5))).unbind(0)
    std = std.exp()
    bound = BoundGaussian(mean, std)
    flat = RNG.normal(size=(3, 5))
    expected = scipy.stats.norm.logpdf(flat, mean, std).sum(-1)
    np.testing.assert_allclose(bound.log_prob(torch.tensor(flat)), expected, rtol=1e-12)
    draws = bound.sample(40_000, Generator().manual_seed(0))
    assert draws.shape == (40_000, 3, 5)
    # Five standard errors of a mean, std / sqrt(n), and of a variance, sqrt(2 / n) of itself.
    assert ((draws.mean(0) - mean).abs() < 5 * std / math.sqrt(40_000)).all()
    torch.testing.assert_close(draws.var(0), std.square(), rtol=5 * math.sqrt(2 / 40_000), atol=0)


@pytest.mark.parametrize("which", ["mean", "std"])
def test_recentred_keeps_the_spread_and_draws_for_each_member(which: str):
    shared, own = torch.full((5,), 0.5), torch.full((2, 5), 0.5)
    centres = torch.tensor([[10.0], [-10.0]]).expand(2, 5)
    bound = BoundGaussian(torch.zeros(5), shared if which == "mean" else own)
    moved = bound.recentred(centres if which == "mean" else centres[0])
    assert moved.lead == (2,)
    draws = moved.sample(1000, Generator().manual_seed(0))
    assert draws.shape == (1000, 2, 5)
    residuals = draws - moved.mean
    # One noise for both members would be a correlation of 1; five standard errors of a correlation at 0.
    correlation = np.corrcoef(residuals[:, 0].flatten(), residuals[:, 1].flatten())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(5000)
