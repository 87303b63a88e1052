"""Stochastic gradient Langevin dynamics (Welling & Teh, 2011), with an ensemble of chains.

Shape letters: N training examples.
"""

from dataclasses import dataclass

from bdl_train.inference._sgmcmc import StochasticGradientMcmc


@dataclass(frozen=True, kw_only=True)
class Sgld(StochasticGradientMcmc):
    """θ ← θ − lr · G ∇potential + N(0, 2 · lr · (T/N) · G), with a fixed diagonal G.

    With a small step the chain's stationary distribution is exp(−N · potential / T). In a direction in which the
    potential curves by λ, its variance is too large by the factor 1 / (1 − lr·λ/2), and by the variance of the
    minibatch gradient, lr / (2λ) times it. Both vanish with lr.

    Source:
        Welling & Teh (2011), ICML, equation 4 with a constant step ε = 2 · lr / N; Li et al. (2016), arXiv:1512.07666,
        Algorithm 1, for the preconditioner.
    """

    @property
    def share_lost(self) -> float:
        return 1.0
