import math

import numpy as np
import scipy.integrate
import scipy.stats
import torch

from bdl_train.likelihoods.gaussian import LOG_NOISE, Gaussian

RNG = np.random.default_rng(0)
MEAN, Y = RNG.normal(size=(2, 3, 20))
KNOWN = Gaussian(noise_std=0.3, learn_noise=False, log_noise_prior_std=1.0)
LEARNED = Gaussian(noise_std=0.3, learn_noise=True, log_noise_prior_std=0.7)


def test_log_prob_with_known_noise_is_scipys():
    log_prob = KNOWN.log_prob(torch.tensor(MEAN)[..., None], torch.tensor(Y), {})
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(Y, MEAN, 0.3), rtol=1e-12)


def test_each_member_has_its_own_learned_noise():
    stds = np.array([0.1, 1.0, 3.0])
    params = {LOG_NOISE: torch.tensor(stds).log()}
    log_prob = LEARNED.log_prob(torch.tensor(MEAN)[..., None], torch.tensor(Y), params)
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(Y, MEAN, stds[:, None]), rtol=1e-12)
    component = LEARNED.distribution(torch.tensor(MEAN)[..., None], params)
    np.testing.assert_allclose(component.mean, MEAN, rtol=1e-12)
    np.testing.assert_allclose(
        component.variance, np.broadcast_to(stds[:, None] ** 2, MEAN.shape), rtol=1e-12
    )


def test_known_noise_ignores_parameters_and_has_none():
    assert KNOWN.params() == {}
    component = KNOWN.distribution(torch.tensor(MEAN)[..., None], {})
    np.testing.assert_allclose(component.variance, 0.09, rtol=1e-12)


def test_learned_noise_starts_at_its_prior_median():
    assert LEARNED.params() == {"log_noise_std": (math.log(0.3), math.log(0.3), 0.7)}


def test_density_integrates_to_one():
    outputs = torch.tensor([[0.4]], dtype=torch.float64)

    def density(y: float) -> float:
        return KNOWN.log_prob(outputs, torch.tensor([y], dtype=torch.float64), {}).exp().item()

    total, _ = scipy.integrate.quad(density, 0.4 - 12 * 0.3, 0.4 + 12 * 0.3)
    assert abs(total - 1) < 1e-9
