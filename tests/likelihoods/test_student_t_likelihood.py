import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from bdl_train.likelihoods.student_t import LOG_SCALE, StudentT

RNG = np.random.default_rng(0)
LOC, Y = RNG.normal(size=(2, 3, 20))


def known(df: float, scale: float = 0.3) -> StudentT:
    return StudentT(df=df, scale=scale, learn_scale=False, log_scale_prior_std=1.0)


LEARNED = StudentT(df=5.0, scale=0.3, learn_scale=True, log_scale_prior_std=0.7)


@pytest.mark.parametrize("df", [2.1, 4.0, 30.0])
def test_log_prob_with_known_scale_is_scipys(df: float):
    log_prob = known(df).log_prob(torch.tensor(LOC)[..., None], torch.tensor(Y), {})
    np.testing.assert_allclose(log_prob, scipy.stats.t.logpdf(Y, df, LOC, 0.3), rtol=1e-11)


def test_each_member_has_its_own_learned_scale():
    scales = np.array([0.1, 1.0, 3.0])
    params = {LOG_SCALE: torch.tensor(scales).log()}
    log_prob = LEARNED.log_prob(torch.tensor(LOC)[..., None], torch.tensor(Y), params)
    np.testing.assert_allclose(log_prob, scipy.stats.t.logpdf(Y, 5.0, LOC, scales[:, None]), rtol=1e-11)
    component = LEARNED.distribution(torch.tensor(LOC)[..., None], params)
    np.testing.assert_allclose(component.mean, LOC, rtol=1e-12)
    np.testing.assert_allclose(
        component.variance,
        scipy.stats.t.var(5.0, LOC, np.broadcast_to(scales[:, None], LOC.shape)),
        rtol=1e-12,
    )


def test_known_scale_has_no_parameters_and_learned_starts_at_its_prior_median():
    assert known(4.0).params() == {}
    assert LEARNED.params() == {"log_scale": (math.log(0.3), math.log(0.3), 0.7)}


def test_density_integrates_to_one():
    outputs = torch.tensor([[0.4]], dtype=torch.float64)

    def density(y: float) -> float:
        return known(3.0).log_prob(outputs, torch.tensor([y], dtype=torch.float64), {}).exp().item()

    left, _ = scipy.integrate.quad(density, -np.inf, 0.4)
    right, _ = scipy.integrate.quad(density, 0.4, np.inf)
    assert abs(left + right - 1) < 1e-8


def test_many_degrees_of_freedom_are_a_gaussian():
    log_prob = known(1e7).log_prob(torch.tensor(LOC)[..., None], torch.tensor(Y), {})
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(Y, LOC, 0.3), rtol=1e-4)


def test_a_far_outlier_pulls_less_than_a_near_one():
    outputs = torch.zeros(2, 1, requires_grad=True)
    log_prob = known(4.0).log_prob(outputs, torch.tensor([1.0, 100.0]), {})
    (grad,) = torch.autograd.grad(log_prob.sum(), outputs)
    assert 0 < grad[1] < grad[0]
