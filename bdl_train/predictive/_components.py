"""The components of a univariate mixture, and what is exact about their weighted sum.

Shape letters: C components, B rows, K counts.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Self

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import Normal as NormalDistribution
from torch.distributions import Poisson as PoissonDistribution
from torch.distributions import StudentT as StudentTDistribution

from bdl_train.predictive import _solve

MAX_PAIRS = 512
"""Components up to which all pairs cost less than quadrature."""
MAX_COUNTS = 4096
"""Counts up to which they are summed one by one."""
SMOOTH_RATE = 1000.0
"""From this rate on a sum over counts is an integral to all digits that matter."""


class Components(ABC):
    """C distributions side by side for each of B rows, computed with in float64.

    Arguments `v` are values `[B]`, `weights` are `[C]` and sum to 1.
    """

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """`[C, B]`."""

    @abstractmethod
    def rows(self, rows: slice | Tensor) -> Self:
        """The same components of some rows."""

    @abstractmethod
    def cdf(self, v: Tensor) -> Tensor:
        """P(Y ≤ v), `[C, B]`."""

    @abstractmethod
    def pdf(self, v: Tensor) -> Tensor:
        """The derivative of `cdf`, or nearly: it only guides a search."""

    @abstractmethod
    def distance(self, v: Tensor) -> Tensor:
        """E|Y − v|, `[C, B]`."""

    @abstractmethod
    def edges(self, level: float) -> tuple[Tensor, Tensor]:
        """Values `[B]` that the quantile of any weighting of these components lies between."""

    def below(self, v: Tensor) -> Tensor:
        """P(Y < v), `[C, B]`."""
        return self.cdf(v)

    def quantiles(self, weights: Tensor, levels: Sequence[float]) -> Tensor:
        """`[Q, B]`."""
        return torch.stack([_solve.quantile(self, weights, level) for level in levels])

    def crps(self, weights: Tensor, y: Tensor) -> Tensor:
        """E|Y − y| − ½ E|Y − Y'| (Gneiting & Raftery, 2007, equation 21), `[B]`."""
        return weights @ self.distance(y) - _solve.half_mean_difference(self, weights)


@dataclass(frozen=True)
class Normal(Components):
    """Gaussian components, `[C, B]` each."""

    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    def rows(self, rows: slice | Tensor) -> Self:
        return type(self)(self.loc[:, rows], self.scale[:, rows])

    def cdf(self, v: Tensor) -> Tensor:
        # erfc keeps the lower tail; torch's ndtr is the same number at four times the cost.
        return torch.erfc((self.loc - v) / self.scale * math.sqrt(0.5)).mul_(0.5)

    def pdf(self, v: Tensor) -> Tensor:
        z = (v - self.loc) / self.scale
        return z.square_().mul_(-0.5).exp_().div_(self.scale * math.sqrt(2 * math.pi))

    def distance(self, v: Tensor) -> Tensor:
        return _gaussian_distance(v - self.loc, self.scale)

    def edges(self, level: float) -> tuple[Tensor, Tensor]:
        own_CB = self.loc + self.scale * float(special.ndtri(level))
        return own_CB.min(0).values, own_CB.max(0).values

    def crps(self, weights: Tensor, y: Tensor) -> Tensor:
        """Closed form over pairs of components (Grimit et al., 2006, equation 5); by quadrature when they are many."""
        if len(weights) > MAX_PAIRS:
            return super().crps(weights, y)
        score = weights @ self.distance(y)
        variance = self.scale.square()
        for i in range(len(weights)):
            # Each pair once, with the weight of both orders; a component with itself has the half of that.
            pair_C = weights[i] * weights[i:]
            pair_C[0] *= 0.5
            std = (variance[i:] + variance[i]).sqrt_()
            score -= pair_C @ _gaussian_distance(self.loc[i:] - self.loc[i], std)
        return score


def _gaussian_distance(mean: Tensor, std: Tensor) -> Tensor:
    """E|X| of X ~ N(mean, std²)."""
    z = mean / std
    distance = torch.erf(z * math.sqrt(0.5)).mul_(mean)
    return distance.add_(z.square_().mul_(-0.5).exp_().mul_(std), alpha=math.sqrt(2 / math.pi))


@dataclass(frozen=True)
class StudentT(Components):
    """Student-t components of common degrees of freedom above 1; `loc` and `scale` are `[C, B]`."""

    df: float
    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    def rows(self, rows: slice | Tensor) -> Self:
        return type(self)(self.df, self.loc[:, rows], self.scale[:, rows])

    def cdf(self, v: Tensor) -> Tensor:
        return self._standard_cdf((v - self.loc) / self.scale)

    def pdf(self, v: Tensor) -> Tensor:
        return self._standard_pdf((v - self.loc) / self.scale) / self.scale

    def distance(self, v: Tensor) -> Tensor:
        z, df = (v - self.loc) / self.scale, self.df
        inner = z * (2 * self._standard_cdf(z) - 1)
        return self.scale * (inner + 2 * self._standard_pdf(z) * (df + z.square()) / (df - 1))

    def edges(self, level: float) -> tuple[Tensor, Tensor]:
        own_CB = self.loc + self.scale * float(special.stdtrit(self.df, level))
        return own_CB.min(0).values, own_CB.max(0).values

    def _standard_cdf(self, z: Tensor) -> Tensor:
        table = _t_table(self.df).to(z.device)
        at = (torch.atan(z) / math.pi).add_(0.5).mul_(len(table))
        index = at.long().clamp_(0, len(table) - 1)
        r = at - index
        c = table[index]
        cubic = c[..., 3].mul(r).add_(c[..., 2]).mul_(r).add_(c[..., 1]).mul_(r).add_(c[..., 0])
        return cubic.clamp_(0, 1)

    def _standard_pdf(self, z: Tensor) -> Tensor:
        half = 0.5 * self.df
        log_norm = math.lgamma(half + 0.5) - math.lgamma(half) - 0.5 * math.log(math.pi * self.df)
        return (z.square() / self.df).log1p_().mul_(-half - 0.5).add_(log_norm).exp_()


@functools.lru_cache(maxsize=8)
def _t_table(df: float, size: int = 8192) -> Tensor:
    """Cubic pieces of the distribution function over θ = atan(t), `[size, 4]`, lowest power first.

    The exact function costs 450 ns a value, the table a tenth of that; it is off by less than 1e-12 where df ≥ 3
    and by 1e-8 at the outermost tail where df is near 2.
    """
    theta = np.linspace(-math.pi / 2, math.pi / 2, size + 1)[1:-1]
    t = np.tan(theta)
    value = np.concatenate([[0.0], special.stdtr(df, t), [1.0]])
    slope = np.concatenate([[0.0], stats.t.pdf(t, df) * (1 + t**2), [0.0]]) * (math.pi / size)
    rise = np.diff(value)
    columns = (
        value[:-1],
        slope[:-1],
        3 * rise - 2 * slope[:-1] - slope[1:],
        slope[:-1] + slope[1:] - 2 * rise,
    )
    return torch.from_numpy(np.stack(columns, axis=1))


def _half_difference(rates: np.ndarray, weights: np.ndarray) -> float:
    """½ E|Y − Y'| = Σ_k F(k)(1 − F(k)) of a mixture of Poisson rates `[C]`, some small and some large.

    Summed up to the last count of the small ones; beyond, where F changes over √v counts, integrated by Gauss-Legendre
    in cells of half of that (Euler-Maclaurin: the sum from k on is the integral from k − ½).
    """

    def spread(counts: np.ndarray) -> np.ndarray:
        cdf = weights @ special.gammaincc(counts[None] + 1, rates[:, None])
        return cdf * (1 - cdf)

    small = rates[rates < SMOOTH_RATE]
    last = math.ceil(small.max() + 9 * math.sqrt(small.max()) + 40)
    total = float(spread(np.arange(last + 1.0)).sum())
    stop = rates.max() + 9 * math.sqrt(rates.max()) + 40
    edges = [last + 0.5]
    while edges[-1] < stop:
        edges.append(edges[-1] + 0.5 * math.sqrt(edges[-1]))
    nodes, node_weights = np.polynomial.legendre.leggauss(8)
    for chunk in np.array_split(np.arange(len(edges) - 1), max(1, len(edges) // 256)):
        left, right = np.array(edges)[chunk], np.array(edges)[chunk + 1]
        middle, half = (left + right) / 2, (right - left) / 2
        values = spread((middle[:, None] + half[:, None] * nodes).ravel()).reshape(len(chunk), -1)
        total += float((values @ node_weights * half).sum())
    return total


@dataclass(frozen=True)
class Poisson(Components):
    """Poisson components of rates `[C, B]`.

    Rows whose counts spread over more than `MAX_COUNTS` are searched and integrated over a continuous `v`: there the
    distribution function is so smooth that sums over counts are integrals (Euler-Maclaurin).
    """

    rate: Tensor

    @property
    def mean(self) -> Tensor:
        return self.rate

    def rows(self, rows: slice | Tensor) -> Self:
        return type(self)(self.rate[:, rows])

    def cdf(self, v: Tensor) -> Tensor:
        return self._smooth_cdf(v.floor())

    def below(self, v: Tensor) -> Tensor:
        return self._smooth_cdf(v.ceil() - 1)

    def pdf(self, v: Tensor) -> Tensor:
        return self._mass(v.clamp(min=0))

    def distance(self, v: Tensor) -> Tensor:
        """At whole v."""
        return (v - self.rate) * (2 * self._smooth_cdf(v) - 1) + 2 * self.rate * self._mass(v)

    def edges(self, level: float) -> tuple[Tensor, Tensor]:
        low_B, high_B = self._bounds(-math.log(level), -math.log1p(-level))
        return low_B - 1, high_B

    def quantiles(self, weights: Tensor, levels: Sequence[float]) -> Tensor:
        found_QB = self.rate.new_empty(len(levels), self.rate.shape[1])
        for rows, is_wide in self._groups():
            some = self.rows(rows)
            found_QB[:, rows] = (
                some._wide_quantiles(weights, levels) if is_wide else some._searched(weights, levels)
            )
        return found_QB

    def _searched(self, weights: Tensor, levels: Sequence[float]) -> Tensor:
        low, cdf_KB = self._sums(weights)
        found = torch.stack([low + (cdf_KB < level).sum(0) for level in levels]).double()
        return torch.where(cdf_KB[-1].isnan(), torch.nan, found)

    def _wide_quantiles(self, weights: Tensor, levels: Sequence[float]) -> Tensor:
        return torch.stack([self._wide_quantile(weights, level) for level in levels])

    def _wide_quantile(self, weights: Tensor, level: float) -> Tensor:
        # Whole numbers around the continuous solution, the smallest that reaches the level.
        near_B = _solve.quantile(_Smooth(self.rate), weights, level).round()
        found_B = near_B + 2
        for shift in (1, 0, -1, -2):
            reaches = weights @ self.cdf(near_B + shift) >= level
            found_B = torch.where(reaches & (near_B + shift >= 0), near_B + shift, found_B)
        return found_B

    def crps(self, weights: Tensor, y: Tensor) -> Tensor:
        """Σ over counts k ≥ 0 of (F(k) − 1{k ≥ y})²."""
        score_B = torch.empty_like(y)
        for rows, is_wide in self._groups():
            some = self.rows(rows)
            score_B[rows] = some._integrated(weights, y[rows]) if is_wide else some._summed(weights, y[rows])
        return score_B

    def _integrated(self, weights: Tensor, y: Tensor) -> Tensor:
        half_B = _solve.half_mean_difference(_Smooth(self.rate), weights)
        # A small rate rises from count to count: beside it the sum is no integral.
        for b in (self.rate.min(0).values < SMOOTH_RATE).nonzero().flatten().tolist():
            half_B[b] = _half_difference(self.rate[:, b].cpu().numpy(), weights.cpu().numpy())
        return weights @ self.distance(y) - half_B

    def _summed(self, weights: Tensor, y: Tensor) -> Tensor:
        low, cdf_KB = self._sums(weights)
        high = low + len(cdf_KB) - 1
        k_K1 = torch.arange(low, high + 1, dtype=y.dtype, device=y.device)[:, None]
        inside = (cdf_KB - (k_K1 >= y).double()).square().sum(0)
        # Every count between a far target and the counts that matter adds 1.
        return inside + (low - y).clamp(min=0) + (y - 1 - high).clamp(min=0)

    def _groups(self) -> Iterator[tuple[Tensor, bool]]:
        """Rows that may share one range of counts, and whether they are too wide for it: a row's own counts decide,
        never those of the rows beside it."""
        low_B, high_B = self._bounds(37.0, 37.0)  # e^-37 is rounding
        # A rate that overflowed or is NaN has no counts to sum: it is left to the sums, which give NaN.
        is_wide = ((high_B - low_B) >= MAX_COUNTS) & high_B.isfinite()
        if bool(is_wide.any()):
            yield is_wide.nonzero().flatten(), True
        narrow = (~is_wide).nonzero().flatten()
        lows, highs = low_B[narrow].tolist(), high_B[narrow].tolist()
        group: list[int] = []
        start = 0.0
        for i in sorted(range(len(lows)), key=lambda i: (not math.isfinite(highs[i]), lows[i])):
            if group and (not math.isfinite(highs[i]) or highs[i] - start >= 2 * MAX_COUNTS):
                yield narrow[torch.tensor(group)], False
                group = []
            if not group:
                start = lows[i]
            group.append(i)
        if group:
            yield narrow[torch.tensor(group)], False

    def _sums(self, weights: Tensor) -> tuple[int, Tensor]:
        """The first count that matters, and F of it and its followers, `[K, B]`."""
        low_B, high_B = self._bounds(37.0, 37.0)
        if not bool(high_B.isfinite().all()):
            return 0, torch.full_like(high_B, torch.nan)[None]
        low, high = int(low_B.min().floor()), int(high_B.max().ceil())
        log_rate = self.rate.log()
        masses = [weights @ self._mass_at(k, log_rate) for k in range(low, high + 1)]
        return low, torch.stack(masses).cumsum(0)

    def _bounds(self, below: float, above: float) -> tuple[Tensor, Tensor]:
        """Counts `[B]` outside which no component has more than e^-below and e^-above of its mass (Bernstein)."""
        low = (self.rate - (2 * below * self.rate).sqrt()).min(0).values
        high = (self.rate + above / 3 + ((above / 3) ** 2 + 2 * above * self.rate).sqrt()).max(0).values
        return low.clamp(min=0), high

    def _mass_at(self, k: int, log_rate: Tensor) -> Tensor:
        if k == 0:
            return (-self.rate).exp_()
        return (log_rate * k).sub_(self.rate).sub_(math.lgamma(k + 1)).exp_()

    def _mass(self, v: Tensor) -> Tensor:
        return (torch.special.xlogy(v, self.rate) - self.rate - (v + 1).lgamma()).exp_()

    def _smooth_cdf(self, v: Tensor) -> Tensor:
        # P(Y ≤ k) is the regularised upper incomplete gamma function at (k + 1, rate).
        below = torch.special.gammaincc((v + 1).clamp(min=1).expand_as(self.rate), self.rate)
        return torch.where(v < 0, torch.zeros_like(below), below)


class _Smooth(Poisson):
    """The same with a distribution function that is continuous in v."""

    def cdf(self, v: Tensor) -> Tensor:
        return self._smooth_cdf(v)


@singledispatch
def components_of(distribution: Distribution) -> Components:
    """Components of a torch distribution of batch shape `[C, B]`.

    Raises:
        TypeError: one that no likelihood here gives.
    """
    raise TypeError(f"No distribution function is known for {type(distribution).__name__} components.")


@components_of.register
def _(distribution: NormalDistribution) -> Components:
    return Normal(distribution.loc.double(), distribution.scale.double())


@components_of.register
def _(distribution: StudentTDistribution) -> Components:
    df = distribution.df.flatten()
    if not bool((df == df[0]).all()):
        raise ValueError("Student-t components of one mixture must have the same degrees of freedom.")
    return StudentT(float(df[0]), distribution.loc.double(), distribution.scale.double())


@components_of.register
def _(distribution: PoissonDistribution) -> Components:
    return Poisson(distribution.rate.double())


def blocks(num_components: int, num_rows: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose `[C, B]` arrays fit in a processor's cache."""
    elements = 1 << 16 if device.type == "cpu" else 1 << 24
    size = max(1, elements // num_components)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
