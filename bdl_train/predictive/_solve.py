"""Quantiles and the mean difference of a mixture from the distribution functions of its components.

Shape letters: B rows.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from bdl_train.predictive._components import Components

PRECISION = 1e-12
"""Of a quantile, in probability."""
TOLERANCE = 1e-7
"""Of an integral, relative, as estimated; the error is smaller."""
LEVELS = (1e-5, 1e-3, 0.02, 0.15, 0.5, 0.85, 0.98, 1 - 1e-3, 1 - 1e-5)
"""Of the knots between which the distribution function is integrated at first."""


def _lobatto(num_nodes: int) -> dict[float, float]:
    """Node to weight of the Gauss-Lobatto rule on [-1, 1], whose ends are nodes."""
    basis = np.polynomial.Legendre.basis(num_nodes - 1)
    inner = np.real(basis.deriv().roots())
    nodes = [-1.0, *(0.5 * (inner - inner[::-1])).tolist(), 1.0]
    return {x: 2 / (num_nodes * (num_nodes - 1) * float(basis(x)) ** 2) for x in nodes}


ROUGH, FINE = _lobatto(7), _lobatto(9)
"""Two rules that share their ends and the middle; the distance of their results is the error estimate.

With nodes at the ends a step beside one of them cannot be missed by both.
"""


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

    Adaptive Gauss-Lobatto between near-quantiles of the mixture. Beyond the outermost, the square of the tail is
    dropped (1e-5 of it), and the rest is a partial expectation in closed form.
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
    pieces = [(low, high, *_integrate(components, weights, low, high)) for low, high in pairwise(knots)]
    total = total + torch.stack([value for _, _, value, _ in pieces]).sum(0)
    for low, high, value, error in pieces:
        total = total + _refined(components, weights, low, high, value, error, total)
    return total


def _refined(
    components: "Components",
    weights: Tensor,
    low: Tensor,
    high: Tensor,
    value: Tensor,
    error: Tensor,
    total: Tensor,
) -> Tensor:
    """What halving the intervals `[B]` adds to their integrals, until errors are small beside `total`; `[B]`."""
    gain = torch.zeros_like(total)
    rows = torch.arange(len(total), device=total.device)
    for _ in range(100):
        rough = (error > TOLERANCE * total[rows]) & (high - low > 1e-14 * low.abs())
        if not bool(rough.any()):
            break
        rows, low, high, value = rows[rough], low[rough], high[rough], value[rough]
        gain.index_add_(0, rows, -value)
        middle = (low + high) / 2
        rows, low, high = torch.cat([rows, rows]), torch.cat([low, middle]), torch.cat([middle, high])
        value, error = _integrate(components.rows(rows), weights, low, high)
        gain.index_add_(0, rows, value)
    return gain


def _integrate(components: "Components", weights: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """∫ F (1 − F) dv from `low` to `high`, with an estimate of the error; `[B]` each."""
    middle, half = (low + high) / 2, (high - low) / 2
    fine, rough = torch.zeros_like(low), torch.zeros_like(low)
    for node in sorted(ROUGH | FINE):
        cdf = weights @ components.cdf(middle + node * half)
        value = cdf * (1 - cdf)
        fine += FINE.get(node, 0.0) * value
        rough += ROUGH.get(node, 0.0) * value
    return fine * half, (fine - rough).abs() * half
