"""Normalisation of convolutional features, each kind with the activation that belongs to it.

Shape letters: B batch, C channels, H height, W width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Norm = Literal["batch", "group", "filter_response"]

GROUP_CHANNELS = 8  # of `norm: group`: 2 groups in the 16 channels of a CIFAR network's first stage
FRN_EPS = 1e-6  # Singh & Krishnan (2020), Section 3.1


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A normalisation layer for `[B, C, H, W]` features; what stands in front of it needs no bias.

    Args:
        kind: `batch` takes statistics over the batch, so the likelihood of an example depends on its batch.
            `group` (Wu & He, 2018) and `filter_response` look at one example at a time. Groups have 8
            channels, or the largest divisor that 8 and `channels` share.
        channels: C.
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(channels // math.gcd(channels, GROUP_CHANNELS), channels)
    return FilterResponseNorm(channels)


def make_activation(kind: Norm, channels: int) -> nn.Module:
    """What follows the norm: ReLU, or a thresholded linear unit after filter response normalisation."""
    return ThresholdedLinear(channels) if kind == "filter_response" else nn.ReLU()


class FilterResponseNorm(nn.Module):
    """y = γ x / √(ν² + ε) + β with ν² the mean of x² over H and W, per example and channel.

    Source:
        Singh & Krishnan (2020), arXiv:1911.09737, equations 1 to 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale_BC11 = (x.square().mean((-2, -1), keepdim=True) + FRN_EPS).rsqrt()
        return x * scale_BC11 * self.weight[:, None, None] + self.bias[:, None, None]


class ThresholdedLinear(nn.Module):
    """z = max(y, τ) with a learned threshold τ per channel, 0 at the start.

    Without mean-centring the activations may lie far from 0, where a ReLU would cut nothing or everything.

    Source:
        Singh & Krishnan (2020), arXiv:1911.09737, equation 4.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.threshold[:, None, None])
