"""Normalisation layers against their formulas in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from bdl_train.models._norm import FilterResponseNorm, Norm, ThresholdedLinear, make_activation, make_norm

torch.set_num_threads(1)

KINDS: dict[Norm, bool] = {"batch": False, "group": True, "filter_response": True}


def features(batch: int = 3, channels: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(1.0, 2.0, (batch, channels, 5, 6))


def test_filter_response_norm_and_threshold_follow_the_papers_equations():
    x = features()
    gamma, beta, tau = (
        np.array([1.0, -2.0, 0.5, 3.0]),
        np.array([0.0, 1.0, -1.0, 0.2]),
        np.array([-0.5, 0.0, 1, 2]),
    )
    norm, threshold = FilterResponseNorm(4).double(), ThresholdedLinear(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gamma))
        norm.bias.copy_(torch.tensor(beta))
        threshold.threshold.copy_(torch.tensor(tau))
    expected = np.empty_like(x)
    for b in range(3):
        for c in range(4):
            nu2 = (x[b, c] ** 2).sum() / 30
            expected[b, c] = np.maximum(gamma[c] * x[b, c] / np.sqrt(nu2 + 1e-6) + beta[c], tau[c])
    torch.testing.assert_close(threshold(norm(torch.tensor(x))), torch.tensor(expected))


def test_a_fresh_filter_response_norm_forgets_scale_and_does_not_centre():
    norm = FilterResponseNorm(4).double()
    x = torch.tensor(features())
    torch.testing.assert_close(norm(1e3 * x), norm(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm(x).square().mean((2, 3)), torch.ones(3, 4).double(), rtol=1e-5, atol=0)
    assert (norm(x + 5).mean((2, 3)) > 0.8).all()


def test_filter_response_norm_of_zeros_is_finite_with_finite_gradient():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    y = FilterResponseNorm(4)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("channels", "groups"), [(16, 2), (32, 4), (64, 8), (8, 1), (4, 1), (12, 3), (20, 5)]
)
def test_group_norm_normalises_groups_of_eight_channels_or_the_largest_shared_divisor(channels, groups):
    x = features(channels=channels)
    grouped = x.reshape(3, groups, -1)
    expected = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    actual = make_norm("group", channels).double()(torch.tensor(x))
    torch.testing.assert_close(actual, torch.tensor(expected.reshape(x.shape)))


def test_only_batch_norm_looks_at_other_examples():
    x = torch.tensor(features(), dtype=torch.float32)
    changed = x.clone()
    changed[1:] += 1
    for kind, alone in KINDS.items():
        norm = make_norm(kind, 4).train()
        assert torch.equal(norm(x)[0], norm(changed)[0]) is alone, kind


def test_each_norm_has_its_activation():
    assert isinstance(make_activation("batch", 4), nn.ReLU)
    assert isinstance(make_activation("group", 4), nn.ReLU)
    assert isinstance(make_activation("filter_response", 4), ThresholdedLinear)
