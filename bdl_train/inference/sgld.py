"""Stochastic gradient Langevin dynamics (Welling & Teh, 2011), with an ensemble of chains.

Shape letters: M members, P parameters of one member, N training examples.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from bdl_train.inference._sgmcmc import ChainState, StochasticGradientMcmc


@dataclass(frozen=True, kw_only=True)
class Sgld(StochasticGradientMcmc):
    """θ ← θ − lr · G ∇potential + N(0, 2 · lr · (T/N) · G), with a fixed diagonal G.

    With a small step the chain's stationary distribution is exp(−N · potential / T); for a Gaussian of precision Λ/N
    on the potential's scale, its variance is too large by the factor 1 / (1 − lr·Λ/2N).

    Source:
        Welling & Teh (2011), ICML, equation 4 with a constant step ε = 2 · lr / N; Li et al. (2016), arXiv:1512.07666,
        Algorithm 1, for the preconditioner.
    """

    def move(self, state: ChainState, grad: Tensor) -> tuple[Tensor, Tensor]:
        scale = state.scale()
        spread = math.sqrt(2 * self.lr * self.temperature / state.potential.num_data)
        moved = state.stack.flat - self.lr * scale * grad + spread * scale.sqrt() * state.noise.normal()
        return moved, state.momentum
