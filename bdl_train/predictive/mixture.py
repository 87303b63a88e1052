"""Exact quantities of a univariate mixture that need all its components at once.

Shape letters: C components, B rows, Q levels, G nodes.
"""

import math
from dataclasses import dataclass
from functools import singledispatch

import numpy as np
import torch
from scipy import special
from torch import Tensor
from torch.distributions import Distribution, Normal, Poisson, StudentT

_BLOCK = 1 << 22  # elements of one intermediate array


@dataclass(frozen=True)
class Mixture:
    """Σ_c w_c p_c, for B rows side by side.

    Attributes:
        components: Batch shape `[C, B]`; computed with in float64.
        log_weights: `[C]`, summing to 1 after exp.
    """

    components: Distribution
    log_weights: Tensor

    @property
    def weights(self) -> Tensor:
        return self.log_weights.double().exp()

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y ≤ value) per row: `[B]` or `[Q, B]`, like `value`."""
        if value.ndim == 2:
            return torch.stack([self.cdf(one) for one in value])
        return self.weights @ cdf(self.components, value)

    def quantile(self, levels: Tensor) -> Tensor:
        """The smallest value v with P(Y ≤ v) ≥ level, `[Q, B]` for levels `[Q]` in (0, 1).

        By bisection, to 1e-9 of the bracket for densities, to the integer for counts.
        """
        return quantile(self.components, self, levels)

    def crps(self, y: Tensor) -> Tensor:
        """Continuous ranked probability score `[B]` of targets `[B]`, in units of y: ∫ (F(v) − 1{v ≥ y})² dv."""
        return crps(self.components, self, y)


@singledispatch
def cdf(components: Distribution, value: Tensor) -> Tensor:
    """P(Y_c ≤ value) of every component, `[C, B]` float64."""
    raise TypeError(f"No distribution function is known for {type(components).__name__} components.")


@cdf.register
def _(components: Normal, value: Tensor) -> Tensor:
    return torch.special.ndtr((value.double() - components.loc.double()) / components.scale.double())


@cdf.register
def _(components: StudentT, value: Tensor) -> Tensor:
    t = (value.double() - components.loc.double()) / components.scale.double()
    df = components.df.double().expand_as(t)
    return torch.from_numpy(np.asarray(special.stdtr(df.cpu().numpy(), t.cpu().numpy()))).to(t.device)


@cdf.register
def _(components: Poisson, value: Tensor) -> Tensor:
    rate = components.rate.double()
    k = value.double().floor().expand_as(rate)
    # P(Y ≤ k) is the regularised upper incomplete gamma function at (k + 1, rate).
    below = torch.special.gammaincc((k + 1).clamp(min=1), rate)
    return torch.where(k < 0, torch.zeros_like(below), below)


@singledispatch
def quantile(components: Distribution, mixture: Mixture, levels: Tensor) -> Tensor:
    low, high = _bracket(components)
    low_QB, high_QB = (edge.expand(len(levels), -1).clone() for edge in (low, high))
    width = (high - low).max()
    level_Q1 = levels.double().to(low.device)[:, None]
    # Heavy tails: widen until the bracket holds every level.
    for _ in range(200):
        too_high, too_low = mixture.cdf(low_QB) > level_Q1, mixture.cdf(high_QB) < level_Q1
        if not bool((too_high | too_low).any()):
            break
        low_QB = torch.where(too_high, low_QB - width, low_QB)
        high_QB = torch.where(too_low, high_QB + width, high_QB)
        width = width * 2
    for _ in range(36):
        middle = (low_QB + high_QB) / 2
        below = mixture.cdf(middle) < level_Q1
        low_QB, high_QB = torch.where(below, middle, low_QB), torch.where(below, high_QB, middle)
    return (low_QB + high_QB) / 2


@quantile.register
def _(components: Poisson, mixture: Mixture, levels: Tensor) -> Tensor:
    rate_max = components.rate.double().max(0).values
    high = (rate_max + 12 * rate_max.sqrt() + 40).ceil()
    level_Q1 = levels.double().to(high.device)[:, None]
    low_QB, high_QB = (
        torch.full((len(levels), len(high)), -1.0).to(high),
        high.expand(len(levels), -1).clone(),
    )
    while bool((high_QB - low_QB > 1).any()):
        middle = ((low_QB + high_QB) / 2).floor()
        below = mixture.cdf(middle) < level_Q1
        low_QB, high_QB = torch.where(below, middle, low_QB), torch.where(below, high_QB, middle)
    return high_QB


def _bracket(components: Distribution) -> tuple[Tensor, Tensor]:
    mean, std = components.mean.double(), components.variance.double().sqrt()
    return (mean - 8 * std).min(0).values, (mean + 8 * std).max(0).values


@singledispatch
def crps(components: Distribution, mixture: Mixture, y: Tensor) -> Tensor:
    """By Gauss-Legendre quadrature between quantiles of the mixture, and transformed tails beyond them."""
    y = y.double()
    levels = torch.tensor(
        [1e-5, 1e-4, 1e-3, 0.01, 0.05, *np.linspace(0.1, 0.9, 17), 0.95, 0.99, 0.999, 1 - 1e-4, 1 - 1e-5]
    )
    knots_QB = mixture.quantile(levels.double())
    knots_QB = torch.cat([knots_QB, y.clamp(knots_QB[0], knots_QB[-1])[None]]).sort(0).values
    nodes, weights = (torch.from_numpy(one).to(y) for one in np.polynomial.legendre.leggauss(12))
    total = torch.zeros_like(y)
    for low, high in zip(knots_QB[:-1], knots_QB[1:], strict=True):
        half = (high - low) / 2
        v_GB = (low + half) + nodes[:, None] * half
        step = (v_GB >= y).double()
        # The step sits on a knot, so inside an interval it is constant: take it at the middle.
        inside = step[len(nodes) // 2]
        total = total + half * (weights @ (mixture.cdf(v_GB) - inside).square())
    spread = knots_QB[-1] - knots_QB[0]
    nodes, weights = (torch.from_numpy(one).to(y) for one in np.polynomial.legendre.leggauss(64))
    t, w = (nodes + 1) / 2, weights / 2
    for edge, sign in ((knots_QB[0], -1.0), (knots_QB[-1], 1.0)):
        # v = edge ± spread · t / (1 − t) maps the tail to (0, 1).
        v_GB = edge + sign * spread * (t / (1 - t))[:, None]
        survivor = mixture.cdf(v_GB) if sign < 0 else 1 - mixture.cdf(v_GB)
        beyond = (y - edge) * sign  # how far the target lies out in this tail
        reached = (sign * (v_GB - edge) <= beyond).double()
        inner = torch.where(reached.bool(), 1 - survivor, survivor).square() - reached
        total = total + spread * ((w / (1 - t).square()) @ inner) + beyond.clamp(min=0)
    return total


@crps.register
def _(components: Normal, mixture: Mixture, y: Tensor) -> Tensor:
    """Closed form (Grimit et al., 2006, equation 5): Σ w_i A(y − μ_i, σ_i²) − ½ Σ w_i w_j A(μ_i − μ_j, σ_i² + σ_j²)."""
    mean_CB, var_CB = components.loc.double(), components.scale.double().square()
    w_C = mixture.weights.to(mean_CB.device)
    score = w_C @ _expected_distance(y.double() - mean_CB, var_CB)
    num_components = len(w_C)
    block = max(1, _BLOCK // max(1, mean_CB.numel()))
    for start in range(0, num_components, block):
        rows = slice(start, start + block)
        # Each pair once: later components only, the block's own square halved by the weight below.
        d_iCB = mean_CB[rows, None] - mean_CB[None, start:]
        v_iCB = var_CB[rows, None] + var_CB[None, start:]
        pair = w_C[rows, None] * w_C[None, start:]
        size = len(w_C[rows])
        pair[:, size:] *= 2
        score = score - 0.5 * torch.einsum("ic,icb->b", pair, _expected_distance(d_iCB, v_iCB))
    return score


def _expected_distance(mean: Tensor, variance: Tensor) -> Tensor:
    """E|X| of X ~ N(mean, variance)."""
    std = variance.sqrt()
    z = mean / std
    return mean * (2 * torch.special.ndtr(z) - 1) + 2 * std * torch.exp(-0.5 * z.square()) / math.sqrt(
        2 * math.pi
    )


@crps.register
def _(components: Poisson, mixture: Mixture, y: Tensor) -> Tensor:
    """Σ over counts k ≥ 0 of (F(k) − 1{k ≥ y})²."""
    top = int(max(mixture.quantile(torch.tensor([1 - 1e-12])).max(), y.max())) + 1
    total = torch.zeros(y.shape, dtype=torch.float64, device=y.device)
    for k in range(top + 1):
        value = torch.full_like(total, k)
        total = total + (mixture.cdf(value) - (value >= y).double()).square()
    return total
