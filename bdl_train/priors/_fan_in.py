"""The scale of every parameter, by fan-in when asked: shared by all zero-mean priors."""

import math

import torch
from torch import Tensor

from bdl_train.stack import Layout


def scales(layout: Layout, scale: float, *, fan_in: bool) -> Tensor:
    """Scales `[P]` of one member's parameters.

    With `fan_in`, the scale of a weight with two axes or more is divided by the square root of its number of
    inputs (the product of all axes but the first: torch's `[out, in, ...]`), so that pre-activations keep
    their size whatever the width. Parameters with fewer axes (biases, norm layers) keep `scale`.

    Source:
        Neal (1996), Bayesian Learning for Neural Networks, Section 2.1.
    """
    pieces = []
    for shape, size in zip(layout.shapes, layout.sizes, strict=True):
        num_inputs = math.prod(shape[1:]) if fan_in and len(shape) >= 2 else 1
        pieces.append(torch.full((size,), scale / math.sqrt(num_inputs)))
    return torch.cat(pieces)
