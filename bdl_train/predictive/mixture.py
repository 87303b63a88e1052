"""Exact quantities of a univariate mixture that need all its components at once.

Shape letters: C components, B rows, Q levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bdl_train.predictive._components import Components, blocks, components_of


@dataclass(frozen=True)
class Mixture:
    """Σ_c w_c p_c, for B rows side by side, computed with in float64.

    Attributes:
        components: Batch shape `[C, B]`: Normal, StudentT (one df for all) or Poisson.
        log_weights: `[C]`, summing to 1 after exp.
    """

    components: Distribution
    log_weights: Tensor

    @property
    def weights(self) -> Tensor:
        return self.log_weights.double().exp()

    def part(self, index: Tensor) -> "Mixture":
        """The mixture of some components alone, `index` `[c]` of them, with their weights brought to sum 1."""
        own = self.components
        params = {name: getattr(own, name)[index] for name in own.arg_constraints}
        log_weights = self.log_weights[index]
        return Mixture(
            type(own)(**params, validate_args=False), log_weights - torch.logsumexp(log_weights, 0)
        )

    @classmethod
    def joined(cls, parts: "Sequence[Mixture]", shares: Sequence[float]) -> "Mixture":
        """The mixture that draws from each part with its share; all parts are of the same rows."""
        return cls(
            _stacked([part.components for part in parts], 0),
            torch.cat(
                [part.log_weights + math.log(share) for part, share in zip(parts, shares, strict=True)]
            ),
        )

    @classmethod
    def of_rows(cls, parts: "Sequence[Mixture]") -> "Mixture":
        """One mixture over the rows of all parts, which have the same components."""
        return cls(_stacked([part.components for part in parts], 1), parts[0].log_weights)

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y ≤ value) per row: `[B]` or `[Q, B]`, like `value`."""
        return self._each(value, lambda part, w, v: w @ part.cdf(v))

    def cdf_below(self, value: Tensor) -> Tensor:
        """P(Y < value) per row, the same as `cdf` except for counts."""
        return self._each(value, lambda part, w, v: w @ part.below(v))

    def quantile(self, levels: Tensor) -> Tensor:
        """The value v with P(Y ≤ v) = level, `[Q, B]` for levels `[Q]` in (0, 1).

        For densities to 1e-12 in probability, or to the last digits of v; for counts the smallest that reaches the
        level.
        """
        all_levels = levels.tolist()
        return self._blocks(lambda part, w, rows: part.quantiles(w, all_levels))

    def crps(self, y: Tensor) -> Tensor:
        """Continuous ranked probability score `[B]` of targets `[B]`, in units of y: ∫ (F(v) − 1{v ≥ y})² dv.

        Exact for Gaussian components and for counts. By quadrature for Student-t, for more than 512 Gaussian
        components and for counts that spread over thousands: to 1e-6 of the spread, or 1e-4 where a hundred narrow
        components lie far apart.
        """
        y = y.double()
        return self._blocks(lambda part, w, rows: part.crps(w, y[rows]))

    def _each(self, value: Tensor, f: Callable[[Components, Tensor, Tensor], Tensor]) -> Tensor:
        v_QB = value.double().reshape(-1, value.shape[-1])
        found = self._blocks(lambda part, w, rows: torch.stack([f(part, w, v[rows]) for v in v_QB]))
        return found.reshape(value.shape)

    def _blocks(self, f: Callable[[Components, Tensor, slice], Tensor]) -> Tensor:
        parts = components_of(self.components)
        num_components, num_rows = parts.mean.shape
        weights = self.weights.to(parts.mean.device)
        slices = blocks(num_components, num_rows, parts.mean.device)
        return torch.cat([f(parts.rows(rows), weights, rows) for rows in slices], dim=-1)


def _stacked(distributions: Sequence[Distribution], dim: int) -> Distribution:
    """Distributions of one kind side by side."""
    kind = distributions[0]
    params: dict[str, Any] = {
        name: torch.cat([getattr(one, name).expand(one.batch_shape) for one in distributions], dim=dim)
        for name in kind.arg_constraints
    }
    return type(kind)(**params, validate_args=False)
