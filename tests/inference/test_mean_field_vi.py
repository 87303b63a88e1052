"""Mean-field VI: its objective by quadrature, its KL from torch, its optimum on a linear model.

Shape letters: M members, P parameters of one member, S draws.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import NOISE_STD, PRIOR_STD, LinearGaussian, posteriors_of
from tiny_problems import example, node_of, work
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method
from bdl_train.inference._variational import clipped, entropy, expected_log_prob, expected_potential
from bdl_train.inference.mean_field_vi import MeanFieldState, MeanFieldVi
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.potential import Batch
from bdl_train.priors import BoundGaussian
from bdl_train.priors.laplace import Laplace
from bdl_train.schedulers.cosine import Cosine

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.05}
PLAIN_SGD = {"_target_": "torch.optim.SGD", "lr": 1.0}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def mean_field_vi(**changed: Any) -> MeanFieldVi:
    method = build({**node_of("inference", "mean_field_vi"), **changed}, Method, key="inference")
    assert isinstance(method, MeanFieldVi)
    return method


def one_dimensional() -> tuple[LinearGaussian, Tensor]:
    """One weight of one input, the bias at a known place: everything can be integrated on a grid."""
    problem = LinearGaussian.make(num_data=12, num_inputs=1)
    return problem, torch.tensor([[0.4, -0.2]], dtype=torch.float64)


def state_at(
    problem: LinearGaussian, mean_MP: Tensor, std: float, num_members: int = 1, **settings: Any
) -> MeanFieldState:
    """Members at one place, which differ by their noise alone."""
    method = mean_field_vi(initial_std=std, **settings)
    members = range(num_members)
    state = method.init(problem.work(members, optimizer=PLAIN_SGD, batch_size=len(problem.y)).problem)
    state.stack.flat.copy_(mean_MP)
    return state


def all_rows(problem: LinearGaussian) -> Batch:
    return Batch(problem.x, problem.y, torch.arange(len(problem.y)), shared=True)


# --- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_prior", [False, True])
def test_kl_divergence_to_a_gaussian_prior_is_that_of_torch(own_prior: bool):
    generator = torch.Generator().manual_seed(0)
    mean_MP, log_std_MP, m0_MP, log_s0_MP = torch.randn(4, 3, 7, generator=generator, dtype=torch.float64)
    if not own_prior:
        m0_MP, log_s0_MP = m0_MP[0], log_s0_MP[0]
    std_MP, prior = log_std_MP.exp(), BoundGaussian(m0_MP, log_s0_MP.exp())
    kl_M = -entropy(std_MP) - expected_log_prob(prior, mean_MP, std_MP)
    expected_M = kl_divergence(Normal(mean_MP, std_MP), Normal(prior.mean, prior.std)).sum(-1)
    torch.testing.assert_close(kl_M, expected_M, rtol=1e-12, atol=1e-12)


def test_gradients_are_clipped_member_by_member():
    grad_MP = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    torch.testing.assert_close(clipped(grad_MP, 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))
    assert clipped(grad_MP, None) is grad_MP


def test_draws_come_in_pairs_and_an_odd_one_is_alone():
    """For two of them the mean gradient of a quadratic is exact; a third brings its own noise."""
    problem, mean_MP = one_dimensional()
    exact_P = (problem.precision @ (mean_MP[0] - problem.mean)) / len(problem.y)
    for num_samples, is_exact in ((1, False), (2, True), (3, False), (4, True)):
        state = state_at(problem, mean_MP, 0.3)
        found, _ = expected_potential(state, all_rows(problem), state.std, state.noise, num_samples)
        assert torch.allclose(found.grad[0], exact_P, rtol=1e-10) is is_exact, num_samples


# --- the objective ---------------------------------------------------------------------------------------------


def objective_by_quadrature(problem: LinearGaussian, mean: Tensor, std: Tensor, temperature: float) -> float:
    """E_q[potential] + T/N E_q[log q] over (weight, bias) on a grid of Gauss-Hermite nodes, densities from numpy."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    x, y = problem.x[:, 0].numpy(), problem.y.numpy()
    num_data, total = len(y), 0.0
    (w0, b0), (sw, sb) = mean.tolist(), std.tolist()

    def log_normal(value: Any, mean: Any, std: float) -> Any:
        return -0.5 * ((value - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)

    for zw, cw in zip(nodes, weights, strict=True):
        for zb, cb in zip(nodes, weights, strict=True):
            w, b = w0 + sw * zw, b0 + sb * zb
            log_joint = log_normal(y, w * x + b, NOISE_STD).sum()
            log_joint += log_normal(w, 0.0, PRIOR_STD) + log_normal(b, 0.0, PRIOR_STD)
            log_q = log_normal(w, w0, sw) + log_normal(b, b0, sb)
            total += cw * cb / (2 * np.pi) * (-log_joint + temperature * log_q) / num_data
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_objective_and_its_gradients_are_those_of_quadrature(temperature: float):
    problem, mean_MP = one_dimensional()
    std, num_members = 0.3, 800
    method = mean_field_vi(initial_std=std, temperature=temperature, num_train_samples=2)
    state = state_at(problem, mean_MP, std, num_members, temperature=temperature)
    values_M = method.step(state, all_rows(problem)).traces["objective"]
    # A step of plain SGD with lr 1 is the negative gradient.
    grads_M4 = torch.cat([mean_MP - state.stack.flat, math.log(std) - state.log_std], dim=1)
    std_P = torch.full((2,), std, dtype=torch.float64)
    expected = objective_by_quadrature(problem, mean_MP[0], std_P, temperature)
    at = torch.cat([mean_MP[0], std_P.log()])
    eps, expected_grad = 1e-4, []
    for i in range(4):
        up, down = at.clone(), at.clone()
        up[i], down[i] = at[i] + eps, at[i] - eps
        sides = [objective_by_quadrature(problem, v[:2], v[2:].exp(), temperature) for v in (up, down)]
        expected_grad.append((sides[0] - sides[1]) / (2 * eps))
    for drawn, exact in (
        (values_M[:, None], torch.tensor([expected])),
        (grads_M4, torch.tensor(expected_grad)),
    ):
        # Five standard errors over members; a gradient that every draw has exactly is held to the differences' error.
        error = 5 * drawn.std(0) / math.sqrt(num_members) + 1e-6
        assert bool(((drawn.mean(0) - exact.double()).abs() < error).all()), (drawn.mean(0), exact, error)
        assert bool((error < 0.2 * exact.abs().max()).all())


def test_a_gaussian_prior_in_closed_form_only_takes_noise_away():
    """The same expectation as by sampling, which any other family gets."""
    problem, mean_MP = one_dimensional()
    num_members, std = 1500, 0.5
    exact_state, sampled_state = (state_at(problem, mean_MP, std, num_members) for _ in range(2))
    prior = exact_state.potential.prior

    class Opaque:
        """The same density without its type."""

        log_prob_and_grad = staticmethod(prior.log_prob_and_grad)

    sampled_state.potential = replace(sampled_state.potential, prior=Opaque())  # pyright: ignore[reportArgumentType]

    def estimates(state: MeanFieldState) -> Tensor:
        found, grad_std = expected_potential(state, all_rows(problem), state.std, state.noise, 1)
        return torch.cat([found.log.potential[:, None], found.grad, grad_std], dim=1)

    # The same noise in both: only the prior's part differs, whose mean is 0 to five standard errors.
    difference = estimates(sampled_state) - estimates(exact_state)
    assert bool((difference.std(0) > 1e-4).all())
    assert bool((difference.mean(0).abs() < 5 * difference.std(0) / math.sqrt(num_members)).all())


# --- the optimum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, 40), (0.5, 40), (1.0, 10)])
def test_optimum_on_a_linear_model_has_the_exact_mean_and_the_conditional_variances(
    temperature: float, batch_size: int
):
    problem, num_steps = LinearGaussian.make(), 300
    method = mean_field_vi(temperature=temperature, initial_std=0.02)
    epochs = num_steps * batch_size // len(problem.y)
    the_work = problem.work(
        range(40),
        optimizer=ADAM,
        batch_size=batch_size,
        num_epochs=epochs,
        schedule=Cosine(warmup_fraction=0.0, final_factor=0.0),
    )
    posteriors = posteriors_of(the_work, method)
    variance_P = temperature / problem.precision.diag()
    marginal_P = problem.covariance(temperature).diag()
    assert bool((variance_P < 0.8 * marginal_P).any())
    for one in posteriors:
        assert isinstance(one, LowRankGaussian)
        assert one.deviations.shape == (0, 4)
    mean_MP = torch.stack([one.moments()[0] for one in posteriors])
    log_ratio_MP = torch.stack([(one.moments()[1] / variance_P).log() for one in posteriors])
    if batch_size == len(problem.y):
        # Pairs of draws make the gradient in the mean exact.
        torch.testing.assert_close(mean_MP, problem.mean.expand_as(mean_MP), rtol=0, atol=1e-4)
    else:
        # Five standard errors over the members, whose batches differ.
        error_P = 5 * mean_MP.std(0) / math.sqrt(len(mean_MP))
        assert bool(((mean_MP.mean(0) - problem.mean).abs() < error_P).all())
        assert bool((error_P < 0.1).all())
    # Five standard errors over members; without the entropy's share T/N, or with twice, the ratio is off by log 2.
    error_P = 5 * log_ratio_MP.std(0) / math.sqrt(len(log_ratio_MP))
    assert bool((log_ratio_MP.mean(0).abs() < error_P + 0.01).all()), log_ratio_MP
    assert bool((error_P < 0.2).all())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("prior", ["gaussian", "laplace"])
def test_a_weight_that_the_data_say_nothing_of_takes_the_best_fit_to_its_prior(
    prior: str, temperature: float
):
    """Of N(0, s²): std √T · s. Of a Laplace density of scale b, E|θ| = std √(2/π): std T · b √(π/2)."""
    given = LinearGaussian.make()
    problem = LinearGaussian(given.x * torch.tensor([1.0, 0.0, 1.0]), given.y)
    the_work = problem.work(
        range(40),
        optimizer=ADAM,
        batch_size=40,
        num_epochs=300,
        schedule=Cosine(warmup_fraction=0.0, final_factor=0.0),
    )
    expected = math.sqrt(temperature) * PRIOR_STD
    if prior == "laplace":
        layout = the_work.problem.stack.layout
        bound = Laplace(scale=0.7, fan_in=False).bind(layout, range(40)).to("cpu", torch.float64)
        potential = replace(the_work.problem.potential, prior=bound)
        the_work = replace(the_work, problem=replace(the_work.problem, potential=potential))
        expected = temperature * 0.7 * math.sqrt(math.pi / 2)
    posteriors = posteriors_of(the_work, mean_field_vi(initial_std=0.1, temperature=temperature))
    mean_M = torch.stack([one.moments()[0][1] for one in posteriors])
    log_ratio_M = torch.stack([(one.moments()[1][1].sqrt() / expected).log() for one in posteriors])
    # The Gaussian's is exact in every draw, the other noisy: five standard errors over members.
    for values in (mean_M, log_ratio_M):
        error = 5 * values.std() / math.sqrt(len(values))
        assert abs(values.mean()) < error + 2e-3, values
        assert error < (0.15 if prior == "laplace" else 0.01), values


# --- the method ------------------------------------------------------------------------------------------------


def test_validation_sees_the_mean_and_the_posterior_is_what_was_trained():
    method, the_work = mean_field_vi(), work(example("mlp-dropout"), [0, 1], num_epochs=4)
    start = the_work.problem.stack.flat.clone()
    state = method.init(the_work.problem)
    torch.testing.assert_close(state.std, torch.full_like(start, 0.01), rtol=1e-12, atol=0)
    assert torch.equal(state.stack.flat, start)
    the_work.advance(method, state)
    assert torch.equal(the_work.problem.stack.flat, start)
    for m, one in enumerate(method.posterior(state)):
        mean, variance = one.moments()
        assert torch.equal(mean, state.stack.flat[m])
        assert torch.equal(variance, state.log_std[m].exp().square())
    stored = {name: tensor.clone() for name, tensor in method.posterior(state)[0].tensors().items()}
    (posterior, _) = method.posterior(state)
    the_work.problem.stack.flat.add_(1.0)
    state.stack.flat.add_(1.0)
    assert torch.equal(posterior.tensors()["mean"], stored["mean"])


def test_trace_is_the_objective_at_the_weights_before_the_step():
    problem, mean_MP = one_dimensional()
    state, method = state_at(problem, mean_MP, 0.3), mean_field_vi(initial_std=0.3)
    log = method.step(state, all_rows(problem))
    num_data = len(problem.y)
    q, p = Normal(mean_MP, 0.3), Normal(0.0, PRIOR_STD)
    elbo_part = kl_divergence(q, p).sum() / num_data
    torch.testing.assert_close(log.traces["objective"][0] - log.nll[0], elbo_part, rtol=1e-12, atol=0)
    entropy_part = q.entropy().sum() / num_data
    torch.testing.assert_close(
        log.potential[0], log.traces["objective"][0] + entropy_part, rtol=1e-12, atol=0
    )


def test_the_noise_of_a_large_initial_std_drowns_the_data():
    of = example("mlp", num_data=64)

    def nll(std: float) -> Tensor:
        the_work = work(of, [0, 1, 2], optimizer=ADAM, batch_size=16, num_epochs=30)
        method = mean_field_vi(initial_std=std)
        logs = the_work.advance(method, method.init(the_work.problem))
        return torch.stack([log.nll for log in logs[-8:]]).mean(0)

    constant = Normal(of.y.mean(), 0.5).log_prob(of.y).mean().neg()
    assert bool((nll(0.01) < 0.6 * constant).all())
    assert bool((nll(2.0) > constant).all())


def test_the_trainers_clipping_bounds_the_gradient_of_mean_and_log_std_together():
    the_work, method = LinearGaussian.make().work([0, 1], optimizer=PLAIN_SGD, clip_norm=0.1), mean_field_vi()
    state = method.init(the_work.problem)
    before = torch.cat([state.stack.flat, state.log_std], dim=1)
    the_work.advance(method, state, 1)
    moved = torch.cat([state.stack.flat, state.log_std], dim=1) - before
    torch.testing.assert_close(moved.norm(dim=1), torch.full((2,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    "field", ["temperature", "initial_std", "num_train_samples", "num_draws", "patience"]
)
def test_settings_out_of_range_are_refused(field: str):
    with pytest.raises(UsageError, match=f"inference.{field}"):
        mean_field_vi(**{field: 0})
