import math

import numpy as np
import scipy.integrate
import scipy.stats
import torch
from torch import Generator

from bdl_train.priors.laplace import Laplace
from bdl_train.stack import Layout

RNG = np.random.default_rng(0)


def test_log_prob_is_scipys(layout: Layout):
    bound = Laplace(scale=0.75, fan_in=False).bind(layout, [0]).to("cpu", torch.float64)
    flat = RNG.normal(size=(5, layout.num_params))
    expected = scipy.stats.laplace.logpdf(flat, 0, 0.75).sum(-1)
    np.testing.assert_allclose(bound.log_prob(torch.tensor(flat)), expected, rtol=1e-12)


def test_density_integrates_to_one():
    bound = Laplace(scale=0.75, fan_in=False).bind(Layout(("w",), ((1,),)), [0]).to("cpu", torch.float64)
    total, _ = scipy.integrate.quad(
        lambda x: bound.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item(), -25, 25, points=[0.0]
    )
    assert abs(total - 1) < 1e-9


def test_draws_follow_the_density(layout: Layout):
    bound = Laplace(scale=2.0, fan_in=True).bind(layout, [0])
    draws = bound.sample(4000, Generator().manual_seed(0))
    scales = torch.tensor([2.0 / 2] * 12 + [2.0] * 3 + [2.0 / math.sqrt(12)] * 24 + [2.0] * 3)
    unit = (draws / scales).flatten().double()
    num = unit.numel()
    # Variance 2, excess kurtosis 3: five standard errors, sqrt(2 / n) of a mean, sqrt(5 / n) of a variance.
    assert abs(unit.mean().item()) < 5 * math.sqrt(2 / num)
    assert abs(unit.var().item() / 2 - 1) < 5 * math.sqrt(5 / num)
    assert scipy.stats.kstest(unit.numpy(), scipy.stats.laplace.cdf).pvalue > 1e-6


def test_draws_of_different_parameters_are_independent(layout: Layout):
    draws = Laplace(scale=1.0, fan_in=False).bind(layout, [0]).sample(4000, Generator().manual_seed(0))
    correlation = np.corrcoef(draws.T) - np.eye(layout.num_params)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(4000)
