"""Anchored ensembles against the exact posterior of the Bayesian linear model.

Shape letters: M members, N training examples, P parameters, T test points.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_problems import KNOWN_NOISE, LEARNED_NOISE, Example, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Setting
from bdl_train.inference.anchored import Anchored, AnchoredState
from bdl_train.likelihoods.categorical import Categorical
from bdl_train.models.mlp import Mlp
from bdl_train.potential import Batch
from bdl_train.priors.gaussian import Gaussian
from bdl_train.priors.laplace import Laplace
from bdl_train.schedulers.cosine import Cosine
from bdl_train.specs import InputSpec

M, N, NOISE_STD, PRIOR_STD = 4000, 20, 0.5, 0.75


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def anchored(**changed: Any) -> Anchored:
    method = build({**node_of("inference", "anchored"), **changed}, Method, key="inference")
    assert isinstance(method, Anchored)
    return method


def linear_example() -> Example:
    """A linear model with a bias, few data and unequal columns, so that prior and data both matter."""
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.6, 0.0], [0.0, 0.5, 0.1], [0.0, 0.0, 0.3]], dtype=torch.float64
    )
    noise = NOISE_STD * torch.randn(N, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64) + 0.5 + noise
    spec = InputSpec((3,), (1, 1, 1))
    return Example(
        spec, x, y, KNOWN_NOISE, lambda: Mlp(hidden=[], activation="relu", dropout=0.0).network(spec, 1)
    )


@dataclass(frozen=True)
class Exact:
    """The conjugate posterior N(A⁻¹b, A⁻¹), A = XᵀX/σ² + Λ, b = Xᵀy/σ², with X's last column one.

    Shapes: x `[N, P]`, y `[N]`, scales `[P]`.
    """

    x: Tensor
    y: Tensor
    scales: Tensor

    @property
    def prior_precision(self) -> Tensor:
        return self.scales.pow(-2).diag()

    @property
    def precision(self) -> Tensor:
        return self.x.T @ self.x / NOISE_STD**2 + self.prior_precision

    @property
    def mean(self) -> Tensor:
        return torch.linalg.solve(self.precision, self.x.T @ self.y / NOISE_STD**2)

    @property
    def covariance(self) -> Tensor:
        return torch.linalg.inv(self.precision)


def with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def exact_of(linear: Example) -> Exact:
    return Exact(with_bias(linear.x), linear.y, torch.full((4,), PRIOR_STD, dtype=torch.float64))


@pytest.fixture(scope="module")
def ensembles() -> dict[bool, tuple[AnchoredState, Tensor, Any]]:
    """Converged ensembles with and without perturbed targets: state, weights `[M, P]`, potential."""
    torch.set_num_threads(1)
    linear, found = linear_example(), {}
    for perturb in (True, False):
        the_work = work(
            linear,
            range(M),
            prior=Gaussian(scale=PRIOR_STD, fan_in=False),
            optimizer={"_target_": "torch.optim.SGD", "lr": 0.15, "momentum": 0.8},
            schedule=Cosine(warmup_fraction=0.0, final_factor=0.5),
            batch_size=N,
            num_epochs=300,
        )
        method = anchored(perturb_targets=perturb)
        state = method.init(the_work.problem)
        whole = Batch(linear.x, linear.y, torch.arange(N), shared=True)
        for _ in range(the_work.problem.num_steps):
            method.step(state, whole)
        weights = torch.cat([posterior.tensors()["atoms"] for posterior in method.posterior(state)])
        found[perturb] = state, weights, the_work.problem.potential
    return found


@pytest.mark.parametrize("perturb", [True, False])
def test_every_member_is_the_minimiser_of_its_own_randomised_problem(ensembles, perturb: bool):
    """θ_m = A⁻¹(Xᵀ(y + ε_m)/σ² + Λ a_m), for its anchor and its noise."""
    state, weights_MP, _ = ensembles[perturb]
    exact = exact_of(linear_example())
    targets_MN = exact.y.expand(M, -1) if state.noise is None else exact.y + state.noise
    right_PM = (targets_MN @ exact.x / NOISE_STD**2 + state.anchors @ exact.prior_precision).T
    expected_MP = torch.linalg.solve(exact.precision, right_PM).T
    torch.testing.assert_close(weights_MP, expected_MP, rtol=0, atol=1e-8)
    assert (state.noise is None) is not perturb


@pytest.mark.parametrize("perturb", [True, False])
def test_mean_and_covariance_over_members_are_the_closed_form(ensembles, perturb: bool):
    _, weights_MP, _ = ensembles[perturb]
    exact = exact_of(linear_example())
    covariance_PP = exact.covariance
    if not perturb:
        covariance_PP = exact.covariance @ exact.prior_precision @ exact.covariance
    variances_P = covariance_PP.diag()
    # Monte Carlo: the mean of M draws is off by √(variance / M), a covariance by √((C_ii C_jj + C_ij²) / M).
    mean_error = (weights_MP.mean(0) - exact.mean) / (variances_P / M).sqrt()
    assert mean_error.abs().max() < 4
    error_PP = ((variances_P[:, None] * variances_P + covariance_PP.square()) / M).sqrt()
    assert ((weights_MP.T.cov() - covariance_PP) / error_PP).abs().max() < 4


def test_the_two_forms_differ_by_far_more_than_monte_carlo_error():
    exact = exact_of(linear_example())
    narrow_PP = exact.covariance @ exact.prior_precision @ exact.covariance
    assert (narrow_PP.diag() < 0.6 * exact.covariance.diag()).any()
    assert (narrow_PP.diag() < 0.9 * exact.covariance.diag()).all()


def test_the_predictive_is_the_exact_one(ensembles):
    _, weights_MP, potential = ensembles[True]
    exact = exact_of(linear_example())
    x_TD = 2 * torch.randn(6, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    params = potential.layout.unflatten(weights_MP)
    outputs, _ = potential.network(params, {}, x_TD, train=False, shared=True)
    component = potential.likelihood.distribution(outputs, params)
    mean_T = component.mean.mean(0)
    variance_T = component.variance.mean(0) + component.mean.var(0)

    x_TP = with_bias(x_TD)
    epistemic_T = (x_TP @ exact.covariance * x_TP).sum(1)
    assert ((mean_T - x_TP @ exact.mean) / (epistemic_T / M).sqrt()).abs().max() < 4
    # A variance estimated from M draws is off by √(2 / M) of itself; the noise part is exact.
    assert ((variance_T - epistemic_T - NOISE_STD**2) / (math.sqrt(2 / M) * epistemic_T)).abs().max() < 4


def test_anchors_are_draws_from_the_prior(ensembles):
    state, *_ = ensembles[True]
    z_MP = state.anchors / PRIOR_STD
    assert (z_MP.mean(0) * math.sqrt(M)).abs().max() < 4
    assert ((z_MP.T.cov() - torch.eye(4, dtype=torch.float64)) * math.sqrt(M / 2)).abs().max() < 4


def test_noise_is_drawn_once_per_member_and_example(ensembles):
    state, *_ = ensembles[True]
    z_MN = state.noise / NOISE_STD
    assert z_MN.shape == (M, N)
    assert (z_MN.mean(0) * math.sqrt(M)).abs().max() < 4.5
    assert ((z_MN.T.cov() - torch.eye(N, dtype=torch.float64)) * math.sqrt(M / 2)).abs().max() < 5


def test_targets_are_perturbed_by_example_whatever_the_batch():
    """Batches of a shuffled order must look up each example's own noise."""
    the_work = work(linear_example(), [0, 1, 2], optimizer={"_target_": "torch.optim.SGD", "lr": 1e-9})
    method = anchored(perturb_targets=True)
    state = method.init(the_work.problem)
    assert state.noise is not None
    index_MB = torch.tensor([[3, 17, 0], [5, 5, 1], [19, 2, 8]])
    log = method.step(state, the_work.batch(index_MB))
    own = replace(
        the_work.batch(index_MB),
        y=torch.stack([the_work.example.y[i] + state.noise[m, i] for m, i in enumerate(index_MB)]),
    )
    fresh = work(linear_example(), [0, 1, 2]).problem.stack.flat
    expected, _ = state.potential(fresh, {}, own)
    torch.testing.assert_close(log.potential, expected, rtol=1e-12, atol=0)


def test_without_a_known_noise_targets_are_kept_by_default():
    for name in ("mlp-dropout", "ft_transformer"):
        assert anchored().init(work(example(name), [0]).problem).noise is None
    assert anchored().init(work(example("mlp"), [0]).problem).noise is not None
    assert anchored(perturb_targets=False).init(work(example("mlp"), [0]).problem).noise is None


@pytest.mark.parametrize("likelihood", [LEARNED_NOISE, Categorical()])
def test_perturbing_targets_without_a_known_noise_is_refused(likelihood):
    setting = Setting(Gaussian(scale=1.0, fan_in=False), likelihood, 10, 40, 8)
    with pytest.raises(UsageError, match=r"inference.perturb_targets=true needs .*learn_noise=false"):
        anchored(perturb_targets=True).check(setting)
    anchored(perturb_targets=False).check(setting)
    anchored(perturb_targets=None).check(setting)


def test_a_prior_that_is_not_gaussian_is_refused():
    the_work = work(example("mlp"), [0], prior=Laplace(scale=1.0, fan_in=False))
    with pytest.raises(UsageError, match="needs a Gaussian prior for every parameter"):
        anchored().check_prior(the_work.problem.potential.prior)


def test_the_anchor_of_a_member_is_the_same_in_any_stack():
    anchors = anchored().init(work(example("mlp"), [0, 1, 2, 3]).problem).anchors
    alone = anchored().init(work(example("mlp"), [2]).problem).anchors
    assert torch.equal(anchors[2:3], alone)
    assert len(anchors.unique(dim=0)) == 4
