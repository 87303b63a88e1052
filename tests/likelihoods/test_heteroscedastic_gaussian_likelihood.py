import numpy as np
import scipy.integrate
import scipy.stats
import torch

from bdl_train.likelihoods.heteroscedastic_gaussian import HeteroscedasticGaussian

RNG = np.random.default_rng(0)
OUTPUTS = RNG.normal(scale=2, size=(3, 20, 2))
Y = RNG.normal(size=(3, 20))
LIKELIHOOD = HeteroscedasticGaussian(min_std=0.05)


def stds() -> np.ndarray:
    return np.log1p(np.exp(OUTPUTS[..., 1])) + 0.05


def test_log_prob_is_scipys():
    log_prob = LIKELIHOOD.log_prob(torch.tensor(OUTPUTS), torch.tensor(Y), {})
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(Y, OUTPUTS[..., 0], stds()), rtol=1e-12)


def test_mean_and_variance_of_the_component():
    component = LIKELIHOOD.distribution(torch.tensor(OUTPUTS), {})
    np.testing.assert_allclose(component.mean, OUTPUTS[..., 0], rtol=1e-12)
    np.testing.assert_allclose(component.variance, stds() ** 2, rtol=1e-12)


def test_the_floor_holds_where_softplus_vanishes():
    component = LIKELIHOOD.distribution(torch.tensor([[0.0, -1e4]]), {})
    np.testing.assert_allclose(component.stddev, 0.05, rtol=1e-6)


def test_density_integrates_to_one():
    outputs = torch.tensor([[0.4, -1.0]], dtype=torch.float64)

    def density(y: float) -> float:
        return LIKELIHOOD.log_prob(outputs, torch.tensor([y], dtype=torch.float64), {}).exp().item()

    total, _ = scipy.integrate.quad(density, -5, 6, points=[0.4])
    assert abs(total - 1) < 1e-9
