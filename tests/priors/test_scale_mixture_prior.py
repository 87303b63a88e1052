import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from torch import Generator

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.priors import Prior
from bdl_train.priors.scale_mixture import ScaleMixture
from bdl_train.stack import Layout

RNG = np.random.default_rng(0)
PRIOR = ScaleMixture(weight=0.25, wide_std=2.0, narrow_std=0.125, fan_in=False)


def scipys(x: np.ndarray) -> np.ndarray:
    logpdfs = [scipy.stats.norm.logpdf(x, 0, 2.0), scipy.stats.norm.logpdf(x, 0, 0.125)]
    weights = np.array([0.25, 0.75]).reshape(2, *[1] * x.ndim)
    return np.asarray(scipy.special.logsumexp(logpdfs, axis=0, b=weights))


def test_log_prob_is_scipys(layout: Layout):
    bound = PRIOR.bind(layout, [0]).to("cpu", torch.float64)
    flat = RNG.normal(scale=0.5, size=(5, layout.num_params))
    np.testing.assert_allclose(bound.log_prob(torch.tensor(flat)), scipys(flat).sum(-1), rtol=1e-12)


def test_density_integrates_to_one():
    bound = PRIOR.bind(Layout(("w",), ((1,),)), [0]).to("cpu", torch.float64)
    total, _ = scipy.integrate.quad(
        lambda x: bound.log_prob(torch.tensor([x], dtype=torch.float64)).exp().item(),
        -20,
        20,
        points=[-0.5, 0.0, 0.5],
        limit=200,
    )
    assert abs(total - 1) < 1e-9


def test_fan_in_divides_both_components(layout: Layout):
    bound = ScaleMixture(weight=0.5, wide_std=2.0, narrow_std=0.5, fan_in=True).bind(layout, [0])
    divisors = torch.tensor([2.0] * 12 + [1.0] * 3 + [math.sqrt(12)] * 24 + [1.0] * 3)
    torch.testing.assert_close(bound.wide, 2.0 / divisors)
    torch.testing.assert_close(bound.narrow, 0.5 / divisors)


def test_draws_follow_the_density():
    num = 200_000
    bound = PRIOR.bind(Layout(("w",), ((num,),)), [0])
    draws = bound.sample(1, Generator().manual_seed(0)).flatten().double().numpy()
    variance = 0.25 * 4 + 0.75 * 0.125**2
    fourth = 3 * (0.25 * 2.0**4 + 0.75 * 0.125**4)
    # Five standard errors of a mean and of a variance.
    assert abs(draws.mean()) < 5 * math.sqrt(variance / num)
    assert abs(draws.var() - variance) < 5 * math.sqrt((fourth - variance**2) / num)

    def cdf(x: np.ndarray) -> np.ndarray:
        return 0.25 * scipy.stats.norm.cdf(x, 0, 2.0) + 0.75 * scipy.stats.norm.cdf(x, 0, 0.125)

    assert scipy.stats.kstest(draws, cdf).pvalue > 1e-6


@pytest.mark.parametrize("narrow", [1.0, 3.0])
def test_a_narrow_component_that_is_not_narrower_is_refused(narrow: float):
    node = {
        "_target_": "bdl_train.priors.scale_mixture.ScaleMixture",
        "weight": 0.5,
        "wide_std": 1.0,
        "narrow_std": narrow,
        "fan_in": False,
    }
    with pytest.raises(UsageError, match=rf"prior: narrow_std must be smaller.*narrow_std={narrow}"):
        build(node, Prior, key="prior")
