import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Generator

from bdl_train.priors.student_t import StudentT
from bdl_train.stack import Layout

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("df", [1.0, 2.5, 30.0])
def test_log_prob_is_scipys(df: float, layout: Layout):
    bound = StudentT(scale=0.75, df=df, fan_in=False).bind(layout, [0]).to("cpu", torch.float64)
    flat = RNG.normal(size=(5, layout.num_params))
    expected = scipy.stats.t.logpdf(flat, df, 0, 0.75).sum(-1)
    np.testing.assert_allclose(bound.log_prob(torch.tensor(flat)), expected, rtol=1e-12)


def test_density_integrates_to_one():
    prior = StudentT(scale=0.75, df=3.0, fan_in=False)
    bound = prior.bind(Layout(("w",), ((1,),)), [0]).to("cpu", torch.float64)

    def density(x: float) -> float:
        return bound.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item()

    left, _ = scipy.integrate.quad(density, -np.inf, 0)
    right, _ = scipy.integrate.quad(density, 0, np.inf)
    assert abs(left + right - 1) < 1e-9


@pytest.mark.parametrize("df", [1.0, 4.0, 50.0])
def test_draws_follow_the_density(df: float, layout: Layout):
    bound = StudentT(scale=2.0, df=df, fan_in=True).bind(layout, [0])
    draws = bound.sample(4000, Generator().manual_seed(0))
    scales = torch.tensor([2.0 / 2] * 12 + [2.0] * 3 + [2.0 / math.sqrt(12)] * 24 + [2.0] * 3)
    unit = (draws / scales).flatten().double().numpy()
    assert np.isfinite(unit).all()
    assert scipy.stats.kstest(unit, scipy.stats.t(df).cdf).pvalue > 1e-6


def test_moments_of_draws():
    df, num = 12.0, 200_000
    prior = StudentT(scale=0.5, df=df, fan_in=False)
    draws = prior.bind(Layout(("w",), ((num,),)), [0]).sample(1, Generator().manual_seed(0)).double()
    variance = 0.25 * df / (df - 2)
    # Excess kurtosis 6 / (df − 4): five standard errors of a mean and of a variance.
    assert abs(draws.mean().item()) < 5 * math.sqrt(variance / num)
    assert abs(draws.var().item() / variance - 1) < 5 * math.sqrt((2 + 6 / (df - 4)) / num)


def test_draws_of_different_parameters_are_independent(layout: Layout):
    draws = (
        StudentT(scale=1.0, df=10.0, fan_in=False).bind(layout, [0]).sample(4000, Generator().manual_seed(0))
    )
    correlation = np.corrcoef(draws.T) - np.eye(layout.num_params)
    assert np.abs(correlation).max() < 5.5 / math.sqrt(4000)
