"""Stochastic gradient Hamiltonian Monte Carlo (Chen, Fox & Guestrin, 2014), with an ensemble of chains.

Shape letters: N training examples.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from bdl_train.inference._sgmcmc import StochasticGradientMcmc


@dataclass(frozen=True, kw_only=True)
class Sghmc(StochasticGradientMcmc):
    """v ← (1 − α) v − lr · G ∇potential + N(0, 2α · lr · (T/N) · G), then θ ← θ + v, with a fixed diagonal G.

    The dynamics behind it have the energy N · potential / T + ½ rᵀ 𝓜⁻¹ r of a mass 𝓜 and a friction C:

        dθ = 𝓜⁻¹ r dt,   dr = −(N/T) ∇potential dt − C 𝓜⁻¹ r dt + N(0, 2C dt),

    which leave exp(−N · potential / T) · N(r; 0, 𝓜) as it is. One step dt with v = dt 𝓜⁻¹ r, and the mass chosen as
    dt² 𝓜⁻¹ = lr · (T/N) · G, C = α 𝓜 / dt, is the update above: G is an inverse mass, so it scales the force and the
    noise by itself and leaves friction alone. At rest the dynamics have v ~ N(0, lr · (T/N) · G) and their steps, of
    which each loses α at once, 1 / (1 − α/2) times that variance: the first v is drawn from it.

    Without noise (T = 0, G = 1) this is gradient descent of learning rate lr with heavy-ball momentum 1 − α; over long
    times it moves as `sgld` with a step of lr / α. A minibatch gradient of variance B heats the chain by the factor
    1 + lr·B·N/(2αT): the paper's estimate β̂ of it is 0 here. `trace/kinetic_temperature` shows it against T.

    Source:
        Chen, Fox & Guestrin (2014), arXiv:1402.4102, equations 9 and 15.

    Attributes:
        friction: α, the share of the momentum that a step loses; 1 = `sgld`.
    """

    friction: Annotated[float, Field(gt=0, le=1)]

    @property
    def share_lost(self) -> float:
        return self.friction
