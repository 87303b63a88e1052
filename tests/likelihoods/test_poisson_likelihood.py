import math

import numpy as np
import pytest
import scipy.stats
import torch

from bdl_train.likelihoods.poisson import Poisson
from bdl_train.specs import TargetKind, TargetSpec

RNG = np.random.default_rng(0)
LOG_RATE = RNG.normal(scale=2, size=(3, 20))
Y = RNG.integers(0, 30, size=(3, 20))


def test_log_prob_is_scipys():
    log_prob = Poisson().log_prob(torch.tensor(LOG_RATE)[..., None], torch.tensor(Y), {})
    np.testing.assert_allclose(log_prob, scipy.stats.poisson.logpmf(Y, np.exp(LOG_RATE)), rtol=1e-11)


def test_masses_sum_to_one():
    counts = torch.arange(400)
    for log_rate in (-3.0, 0.5, 4.5):
        log_prob = Poisson().log_prob(torch.full((400, 1), log_rate, dtype=torch.float64), counts, {})
        assert abs(log_prob.exp().sum().item() - 1) < 1e-11


def test_mean_and_variance_are_the_rate():
    component = Poisson().distribution(torch.tensor(LOG_RATE)[..., None], {})
    scipys = scipy.stats.poisson(np.exp(LOG_RATE))
    np.testing.assert_allclose(component.mean, scipys.mean(), rtol=1e-12)
    np.testing.assert_allclose(component.variance, scipys.var(), rtol=1e-12)


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e8])
def test_float32_outputs_keep_their_digits_at_large_rates(rate: float):
    log_rate = torch.tensor([[math.log(rate)]], dtype=torch.float32)
    y = torch.tensor([round(rate + math.sqrt(rate))])
    expected = scipy.stats.poisson.logpmf(y.numpy(), np.exp(log_rate.double().squeeze(-1).numpy()))
    np.testing.assert_allclose(Poisson().log_prob(log_rate, y, {}), expected, rtol=1e-6)


def test_gradient_at_a_large_rate_is_count_minus_rate():
    log_rate = torch.tensor([[80.0]], requires_grad=True)
    log_prob = Poisson().log_prob(log_rate, torch.tensor([3]), {})
    (grad,) = torch.autograd.grad(log_prob.sum(), log_rate)
    assert grad.item() == pytest.approx(3 - math.exp(80), rel=1e-6)


def test_one_output():
    assert Poisson().num_outputs(TargetSpec(TargetKind.COUNT, "visits")) == 1
