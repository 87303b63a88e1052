"""Quantiles and the mean difference of a mixture from the distribution functions of its components.

Shape letters: B rows, G nodes.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from bdl_train.predictive._components import Components

PRECISION = 1e-12
"""Of a quantile, in probability."""
LEVELS = (1e-5, 1e-4, 1e-3, 0.01, *np.linspace(0.05, 0.95, 19).tolist(), 0.99, 0.999, 1 - 1e-4, 1 - 1e-5)
NUM_NODES = 6


def quantile(
    components: "Components",
    weights: Tensor,
    level: float,
    *,
    precision: float = PRECISION,
    start: Tensor | None = None,
) -> Tensor:
    """Values `[B]` where the mixture's distribution function is `level`, by Newton steps inside a shrinking bracket.

    A step that leaves the bracket, or is not half as long as the one before, is replaced by halving the bracket.

    Args:
        precision: Stop at |F(v) − level| ≤ precision, or when v cannot move any more.
        start: First guess.
    """
    low, high = components.edges(level)
    v = (low + high) / 2 if start is None else torch.minimum(torch.maximum(start, low), high)
    result, open_rows = v.clone(), torch.arange(len(v), device=v.device)
    last_step = high - low
    for _ in range(2000):
        error = weights @ components.cdf(v) - level
        slope = weights @ components.pdf(v)
        low, high = torch.where(error < 0, v, low), torch.where(error < 0, high, v)
        newton = v - error / slope
        good = (newton > low) & (newton < high) & ((newton - v).abs() <= last_step / 2)
        following = torch.where(good, newton, (low + high) / 2)
        step = (following - v).abs()
        unmoved = step <= 1e-15 * v.abs()
        result[open_rows] = v
        # NaN is never below anything: such rows end at once, as NaN.
        going = (error.abs() > precision) & ~unmoved
        if not bool(going.any()):
            break
        if bool(going.all()):
            v, last_step = following, step
            continue
        keep = going.nonzero().flatten()
        components, open_rows = components.rows(keep), open_rows[keep]
        v, low, high, last_step = following[keep], low[keep], high[keep], step[keep]
    return result


def half_mean_difference(components: "Components", weights: Tensor) -> Tensor:
    """½ E|Y − Y'| = ∫ F (1 − F) dv of two independent draws of the mixture, `[B]`.

    Gauss-Legendre between near-quantiles of the mixture, which follow its scales wherever they lie. Beyond the outermost
    the square of the tail is dropped (1e-5 of it), and the rest is a partial expectation in closed form.
    """
    knots: list[Tensor] = []
    for level in LEVELS:
        rough = 0.05 * min(level, 1 - level)
        found = quantile(components, weights, level, precision=rough, start=knots[-1] if knots else None)
        knots.append(torch.maximum(found, knots[-1]) if knots else found)
    mean = weights @ components.mean
    first, last = knots[0], knots[-1]
    # E(Y - b)+ = (E|Y - b| + EY - b) / 2, and E(a - Y)+ likewise.
    total = 0.5 * (weights @ components.distance(last) + mean - last)
    total = total + 0.5 * (weights @ components.distance(first) + first - mean)
    nodes, node_weights = np.polynomial.legendre.leggauss(NUM_NODES)
    for low, high in zip(knots[:-1], knots[1:], strict=True):
        middle, half = (low + high) / 2, (high - low) / 2
        for node, node_weight in zip(nodes.tolist(), node_weights.tolist(), strict=True):
            cdf = weights @ components.cdf(middle + node * half)
            total = total + half * (node_weight * cdf * (1 - cdf))
    return total
