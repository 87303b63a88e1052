"""Fisher information of p(y | outputs) in the outputs, as a root: the middle of a generalised Gauss-Newton matrix.

Shape letters: B batch, O outputs, R columns of the root, K classes.
"""

from collections.abc import Iterator, Mapping
from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, Poisson, StudentT

from bdl_train.likelihoods import Likelihood


def fisher_root(likelihood: Likelihood, outputs: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """L with L Lᵀ = E_y[−∂² log p(y | f) / ∂f²] at the outputs f, `[..., B, O]` to `[..., B, O, R]`.

    Where log p is linear in y and f (a Gaussian of known noise, categorical, Bernoulli, Poisson), this is the Hessian
    of −log p itself. That of a heteroscedastic Gaussian or a Student-t is not positive for every y; its mean is.

    Args:
        likelihood: Parameters of its own are constants here.
        outputs: Of the network.
        params: The `likelihood.*` parameters.

    Source:
        Martens (2020), arXiv:1412.1193, Sections 9.2 and 12, Fisher and generalised Gauss-Newton matrix.
    """
    constants = {name: value.detach() for name, value in params.items()}
    columns = []
    with torch.enable_grad():
        f = outputs.detach().requires_grad_(True)
        for quantity, information in _independent(likelihood.distribution(f, constants)):
            if not quantity.requires_grad:
                continue
            (slope,) = torch.autograd.grad(quantity.sum(), f, retain_graph=True)
            columns.append(slope * information.detach().sqrt().unsqueeze(-1).to(slope.dtype))
    return torch.stack(columns, dim=-1)


@singledispatch
def _independent(components: Distribution) -> Iterator[tuple[Tensor, Tensor]]:
    """Quantities q_r, `[..., B]`, with weights i_r such that the Fisher information is Σ_r i_r ∂q_r ∂q_rᵀ."""
    raise TypeError(
        f"The Fisher information of {type(components).__name__} is unknown here: it must be Normal, StudentT, Poisson, "
        "Bernoulli or Categorical."
    )


@_independent.register
def _(components: Normal) -> Iterator[tuple[Tensor, Tensor]]:
    precision = components.scale.pow(-2)
    yield components.loc, precision
    yield components.scale, 2 * precision


@_independent.register
def _(components: StudentT) -> Iterator[tuple[Tensor, Tensor]]:
    # Lange, Little & Taylor (1989), Appendix B.
    df, precision = components.df, components.scale.pow(-2)
    yield components.loc, (df + 1) / (df + 3) * precision
    yield components.scale, 2 * df / (df + 3) * precision


@_independent.register
def _(components: Poisson) -> Iterator[tuple[Tensor, Tensor]]:
    yield components.rate, 1 / components.rate


@_independent.register
def _(components: Bernoulli) -> Iterator[tuple[Tensor, Tensor]]:
    logits = components.logits
    yield logits, torch.sigmoid(logits) * torch.sigmoid(-logits)


@_independent.register
def _(components: Categorical) -> Iterator[tuple[Tensor, Tensor]]:
    # E[score scoreᵀ] over the K classes; `logits` of torch are normalised log probabilities.
    for log_prob in components.logits.unbind(-1):
        yield log_prob, log_prob.exp()
