from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Generator

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.priors import BoundGaussian, JointPrior, Prior, join
from bdl_train.priors.laplace import BoundLaplace
from bdl_train.stack import Layout

RNG = np.random.default_rng(0)


def gaussian(scale: float) -> dict[str, Any]:
    return {"_target_": "bdl_train.priors.gaussian.Gaussian", "scale": scale, "fan_in": False}


def laplace(scale: float) -> dict[str, Any]:
    return {"_target_": "bdl_train.priors.laplace.Laplace", "scale": scale, "fan_in": True}


def layerwise(patterns: dict[str, Any], default: dict[str, Any]) -> Prior:
    node = {"_target_": "bdl_train.priors.layerwise.Layerwise", "patterns": patterns, "default": default}
    return build(node, Prior, key="prior")


def test_log_prob_is_the_sum_over_blocks(layout: Layout):
    prior = layerwise({"*.bias": gaussian(0.25), "conv.*": laplace(2.0)}, gaussian(0.5))
    flat = RNG.normal(size=(5, layout.num_params))
    dense_w, dense_b, conv_w, conv_b = np.split(flat, [12, 15, 39], axis=-1)
    expected = (
        scipy.stats.norm.logpdf(dense_w, 0, 0.5).sum(-1)
        + scipy.stats.norm.logpdf(dense_b, 0, 0.25).sum(-1)
        + scipy.stats.norm.logpdf(conv_b, 0, 0.25).sum(-1)
        + scipy.stats.laplace.logpdf(conv_w, 0, 2.0 / np.sqrt(12)).sum(-1)
    )
    bound = prior.bind(layout, [0, 1])
    assert isinstance(bound, JointPrior)
    log_prob = bound.to("cpu", torch.float64).log_prob(torch.tensor(flat))
    # Scales are kept in float32 until the prior is moved.
    np.testing.assert_allclose(log_prob, expected, rtol=1e-6)


def test_the_first_matching_pattern_wins(layout: Layout):
    first = layerwise({"conv.bias": gaussian(3.0), "*.bias": gaussian(2.0)}, gaussian(1.0)).bind(layout, [0])
    assert isinstance(first, BoundGaussian)
    assert first.std.tolist() == [1.0] * 12 + [2.0] * 3 + [1.0] * 24 + [3.0] * 3


def test_gaussian_blocks_become_one_gaussian_and_draws_land_in_their_columns(layout: Layout):
    prior = layerwise({"dense.bias": laplace(1e-6), "conv.*": gaussian(1e3)}, gaussian(1.0))
    draws = prior.bind(layout, [0]).sample(50, Generator().manual_seed(0)).abs()
    assert draws[:, 12:15].max() < 1e-4
    assert draws[:, :12].median() == pytest.approx(0.67, abs=0.2)
    assert draws[:, 15:].median() > 100


def test_no_pattern_is_the_default_alone(layout: Layout):
    bound = layerwise({}, laplace(1.0)).bind(layout, [0]).to("cpu", torch.float64)
    alone = build(laplace(1.0), Prior, key="prior").bind(layout, [0]).to("cpu", torch.float64)
    flat = torch.tensor(RNG.normal(size=(5, layout.num_params)))
    torch.testing.assert_close(bound.log_prob(flat), alone.log_prob(flat))


def test_patterns_may_claim_every_parameter(layout: Layout):
    bound = layerwise({"*": gaussian(2.0)}, gaussian(1.0)).bind(layout, [0])
    assert isinstance(bound, BoundGaussian)
    assert bound.std.tolist() == [2.0] * layout.num_params


def test_a_pattern_without_a_parameter_is_refused_with_the_names(layout: Layout):
    prior = layerwise({"head.*": gaussian(2.0)}, gaussian(1.0))
    with pytest.raises(UsageError, match=r"'head\.\*' matches no parameter") as caught:
        prior.bind(layout, [0])
    assert all(name in str(caught.value) for name in layout.names)


def test_patterns_look_at_case(layout: Layout):
    with pytest.raises(UsageError, match=r"'DENSE\.\*' matches no parameter"):
        layerwise({"DENSE.*": gaussian(2.0)}, gaussian(1.0)).bind(layout, [0])


def test_a_pattern_behind_a_broader_one_is_refused(layout: Layout):
    prior = layerwise({"*.bias": gaussian(2.0), "dense.bias": gaussian(3.0)}, gaussian(1.0))
    with pytest.raises(UsageError, match=r"'dense\.bias' has no parameter left.*\(dense\.bias\)"):
        prior.bind(layout, [0])


def test_wrong_nested_settings_are_refused_when_built():
    with pytest.raises(UsageError, match=r"prior: patterns\.\*\.bias\.scale.*greater than 0, got -2\.0"):
        layerwise({"*.bias": gaussian(-2.0)}, gaussian(1.0))
    with pytest.raises(UsageError, match=r"default\.scale.*greater than 0, got -1\.0"):
        layerwise({}, gaussian(-1.0))
    with pytest.raises(UsageError, match=r"default must be a mapping with a '_target_'"):
        layerwise({}, {"scale": 1.0})
    with pytest.raises(UsageError, match=r"patterns\.\*\._target_.*Prior"):
        layerwise({"*": {"_target_": "bdl_train.schedulers.constant.Constant"}}, gaussian(1.0))
    with pytest.raises(UsageError, match=r"default\._target_ is 'os\.system', which is outside the allowed"):
        layerwise({}, {"_target_": "os.system"})


def test_a_prior_that_starts_members_is_refused_inside():
    node = {
        "_target_": "bdl_train.priors.from_posterior.FromPosterior",
        "run": "runs/yesterday",
        "moments": "pooled",
        "tempering": 1.0,
        "min_std": 1e-3,
    }
    with pytest.raises(UsageError, match=r"default\._target_.*FromPosterior.*use it alone"):
        layerwise({}, node)


def test_join_with_a_block_of_each_member():
    own = BoundGaussian(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
    shared = BoundGaussian(torch.tensor([9.0]), torch.tensor([0.5]))
    joined = join([(own, torch.tensor([2, 0])), (shared, torch.tensor([1]))])
    assert isinstance(joined, BoundGaussian)
    assert joined.mean.tolist() == [[2.0, 9.0, 1.0], [4.0, 9.0, 3.0]]
    assert joined.std.tolist() == [[1.0, 0.5, 1.0]] * 2


def test_a_block_that_members_share_is_drawn_anew_for_each_of_them():
    own = BoundGaussian(torch.zeros(2, 1), torch.ones(2, 1))
    joined = join([(own, torch.tensor([1])), (BoundLaplace(torch.ones(2)), torch.tensor([0, 2]))])
    assert isinstance(joined, JointPrior)
    assert joined.lead == (2,)
    draws = joined.sample(5000, Generator().manual_seed(0))
    assert draws.shape == (5000, 2, 3)
    correlation = np.corrcoef(draws.flatten(1).T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(5000)
    flat = torch.tensor(RNG.normal(size=(2, 3)))
    by_hand = scipy.stats.norm.logpdf(flat[:, 1]) + scipy.stats.laplace.logpdf(flat[:, [0, 2]]).sum(-1)
    np.testing.assert_allclose(joined.to("cpu", torch.float64).log_prob(flat), by_hand, rtol=1e-12)
