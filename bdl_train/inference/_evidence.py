"""The marginal likelihood of Laplace's approximation, and the prior precision that maximises it.

Shape letter: D parameters that the Gaussian covers.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_FACTOR = 1e6
"""Of a prior precision: it stays within this factor of the configured one, up or down."""


@dataclass(frozen=True)
class Evidence:
    """log marginal likelihood, in nats, of one member whose prior precision P is multiplied by a factor.

    With G the generalised Gauss-Newton matrix and λ the eigenvalues of P^−½ G P^−½, the likelihood and the normalised
    prior to the power 1/T give

        log Z(factor) = log p(data | θ) / T − factor · q / 2T + ½ Σ log(factor / (λ + factor)).

    θ and G stay those of the trained network: the mode that another prior would have is not looked for.

    Source:
        MacKay (1992), Neural Computation 4(3), 415-447, Section 4, with the effective number of parameters; Immer et
        al. (2021), arXiv:2104.04975, Section 3, for networks.

    Attributes:
        log_likelihood: log p(data | θ), total over the training examples, nats.
        eigenvalues: λ, `[D]`.
        quadratic: q = (θ − mean)ᵀ P (θ − mean) over the same D parameters.
        temperature: T.
    """

    log_likelihood: float
    eigenvalues: Tensor
    quadratic: float
    temperature: float

    def log_marginal(self, factor: float) -> float:
        """log Z at one factor; at T = 1, it is exact for a linear model with Gaussian noise at its own mode."""
        shrinkage = (factor / (self.eigenvalues + factor)).log().sum()
        fit = self.log_likelihood - 0.5 * factor * self.quadratic
        return fit / self.temperature + 0.5 * float(shrinkage)

    def best_factor(self) -> float:
        """The factor that maximises log Z, by bisection on its logarithm.

        The derivative in log(factor) is ½ (Σ λ / (λ + factor) − factor · q / T), effective parameters minus prior
        energy; it falls from one end to the other, so there is one maximum. One that lies beyond `LARGEST_FACTOR` is
        replaced by that.
        """
        low, high = -math.log(LARGEST_FACTOR), math.log(LARGEST_FACTOR)
        for _ in range(100):
            middle = 0.5 * (low + high)
            factor = math.exp(middle)
            effective = float((self.eigenvalues / (self.eigenvalues + factor)).sum())
            if effective > factor * self.quadratic / self.temperature:
                low = middle
            else:
                high = middle
        return math.exp(0.5 * (low + high))


def whitened_eigenvalues(matrix: Tensor, precision: Tensor) -> Tensor:
    """Eigenvalues of P^−½ G P^−½, at least 0, for G `[D, D]` and diagonal P `[D]`; float64."""
    root = precision.double().sqrt()
    return torch.linalg.eigvalsh(matrix.double() / (root[:, None] * root)).clamp(min=0)
