"""IVON: its steps against Algorithm 1 in numpy, its fixed point on a linear model.

Shape letters: M members, P parameters of one member.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import NOISE_STD, LinearGaussian, posteriors_of
from tiny_problems import Work, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method
from bdl_train.inference.ivon import Ivon, next_curvature
from bdl_train.posteriors.low_rank_gaussian import LowRankGaussian
from bdl_train.potential import Batch
from bdl_train.priors import BoundGaussian, BoundPrior, Prior
from bdl_train.priors.layerwise import Layerwise
from bdl_train.schedulers.cosine import Cosine


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def ivon(**changed: Any) -> Ivon:
    method = build({**node_of("inference", "ivon"), **changed}, Method, key="inference")
    assert isinstance(method, Ivon)
    return method


def with_prior(the_work: Work, prior: BoundGaussian) -> Work:
    potential = replace(the_work.problem.potential, prior=prior)
    return replace(the_work, problem=replace(the_work.problem, potential=potential))


# --- Algorithm 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_radius", [None, 0.05])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_steps_are_those_of_algorithm_1(num_samples: int, clip_radius: float | None):
    """Written from the paper, for the loss of a linear model, a prior N(m0, s0²) with other numbers for each weight."""
    problem, temperature, beta_1, beta_2, lr, num_steps = LinearGaussian.make(), 0.5, 0.8, 0.9, 0.3, 4
    prior_mean, prior_std = np.array([0.3, -0.2, 0.0, 1.0]), np.array([0.5, 0.7, 1.0, 0.2])
    schedule = Cosine(warmup_fraction=0.0, final_factor=0.1)
    the_work = with_prior(
        problem.work([0], batch_size=40, num_epochs=num_steps, schedule=schedule),
        BoundGaussian(torch.from_numpy(prior_mean), torch.from_numpy(prior_std)),
    )
    noise = torch.Generator().manual_seed(the_work.problem.noise_seeds[0])
    x, y, num_data = problem.design.numpy(), problem.y.numpy(), len(problem.y)

    delta, weight = 1 / prior_std**2 / num_data, num_data / temperature  # the paper's δ and λ
    m, h, g = the_work.problem.stack.flat[0].numpy().copy(), np.full(4, 0.7), np.zeros(4)
    for t in range(1, num_steps + 1):
        sigma = 1 / np.sqrt(weight * (h + delta))
        g_hat, h_hat = np.zeros(4), np.zeros(4)
        for s in range(num_samples):
            if s % 2 == 0:
                z = torch.empty(4, dtype=torch.float64).normal_(generator=noise).numpy()
            theta = m + (sigma * z if s % 2 == 0 else -sigma * z)
            grad = x.T @ (x @ theta - y) / NOISE_STD**2 / num_data
            g_hat += grad / num_samples
            h_hat += grad * (theta - m) / sigma**2 / num_samples
        g = beta_1 * g + (1 - beta_1) * g_hat
        h = beta_2 * h + (1 - beta_2) * h_hat + 0.5 * (1 - beta_2) ** 2 * (h - h_hat) ** 2 / (h + delta)
        change = (g / (1 - beta_1**t) + delta * (m - prior_mean)) / (h + delta)
        if clip_radius is not None:
            change = np.clip(change, -clip_radius, clip_radius)
        m = m - lr * schedule.factor(t - 1, num_steps) * change

    method = ivon(
        lr=lr,
        temperature=temperature,
        initial_curvature=0.7,
        momentum=beta_1,
        curvature_decay=beta_2,
        clip_radius=clip_radius,
        num_train_samples=num_samples,
    )
    state = method.init(the_work.problem)
    batch = Batch(problem.x, problem.y, torch.arange(num_data), shared=True)
    for _ in range(num_steps):
        method.step(state, batch)
    for found, expected in ((state.stack.flat, m), (state.curvature, h), (state.momentum, g)):
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-10)
    (posterior,) = method.posterior(state)
    variance = posterior.moments()[1].numpy()
    np.testing.assert_allclose(variance, 1 / (weight * (h + delta)), rtol=1e-10)


def test_precision_stays_positive_whatever_the_estimate():
    """h + δ is multiplied by ½((1 − u)² + 1), u = (1 − β₂)(h − ĥ)/(h + δ): never by less than one half."""
    h, delta = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    estimate = torch.cat([-torch.logspace(-3, 6, 200), torch.logspace(-3, 6, 200)]).double()
    factor = (next_curvature(h, estimate, delta, 0.9) + delta) / (h + delta)
    u = 0.1 * (h - estimate) / (h + delta)
    torch.testing.assert_close(factor, 0.5 * ((1 - u) ** 2 + 1), rtol=1e-9, atol=0)
    assert factor.min() >= 0.5


def test_initial_curvature_sets_the_initial_std():
    the_work = with_prior(
        LinearGaussian.make().work([0]), BoundGaussian(torch.zeros(4), torch.full((4,), 0.5))
    )
    method = ivon(initial_curvature=2.0, temperature=0.25)
    (posterior,) = method.posterior(method.init(the_work.problem))
    expected = torch.full((4,), 0.25 / (40 * 2.0 + 4.0), dtype=torch.float64)
    torch.testing.assert_close(posterior.moments()[1].double(), expected)


def test_the_trainers_clipping_bounds_the_gradient_and_leaves_the_curvature():
    def after_a_step(clip_norm: float | None) -> tuple[Tensor, Tensor]:
        the_work = LinearGaussian.make().work([0, 1], clip_norm=clip_norm)
        method = ivon(momentum=0.0)
        state = method.init(the_work.problem)
        the_work.advance(method, state, 1)
        return state.momentum, state.curvature

    free, curvature = after_a_step(None)
    bounded, same_curvature = after_a_step(0.1)
    assert bool((free.norm(dim=1) > 0.2).all())
    torch.testing.assert_close(bounded, 0.1 * free / free.norm(dim=1, keepdim=True))
    assert torch.equal(curvature, same_curvature)


# --- the fixed point -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "batch_size"), [(1.0, 40), (0.5, 40), (1.0, 10)])
def test_fixed_point_on_a_linear_model_has_the_exact_mean_and_the_conditional_variances(
    temperature: float, batch_size: int
):
    problem, num_steps, beta_2 = LinearGaussian.make(), 600, 0.99
    method = ivon(lr=0.2, temperature=temperature, curvature_decay=beta_2, clip_radius=None)
    the_work = problem.work(
        range(150),
        batch_size=batch_size,
        num_epochs=num_steps * batch_size // len(problem.y),
        schedule=Cosine(warmup_fraction=0.0, final_factor=0.0),
    )
    posteriors = posteriors_of(the_work, method)
    assert all(isinstance(one, LowRankGaussian) and one.deviations.shape == (0, 4) for one in posteriors)
    mean_MP = torch.stack([one.moments()[0] for one in posteriors])
    precision_MP = torch.stack([temperature / one.moments()[1] for one in posteriors])
    exact_P = problem.precision.diag()
    if batch_size == len(problem.y):
        # Pairs of draws make the gradient in the mean exact.
        torch.testing.assert_close(mean_MP, problem.mean.expand_as(mean_MP), rtol=0, atol=1e-4)
    else:
        error_P = 5 * mean_MP.std(0) / math.sqrt(len(mean_MP))
        assert bool(((mean_MP.mean(0) - problem.mean).abs() < error_P).all())
        assert bool((error_P < 0.1).all())
    # h is a running mean of ĥ: five standard errors over members, and its bias ½ (1 − β₂) Var(ĥ) / (h + δ). A pair
    # z, −z gives ĥ_i = Σ_j H_ij z_i z_j σ_j / σ_i, so its variance is 2 H_ii² + Σ_{j≠i} H_ij² σ_j² / σ_i².
    hessian_PP = (problem.design.T @ problem.design / NOISE_STD**2) / len(problem.y)
    ratio_PP = exact_P[:, None] / exact_P  # σ_j² / σ_i²
    variance_P = (hessian_PP.square() * ratio_PP).sum(1) + hessian_PP.diag().square()
    bias_P = 0.5 * (1 - beta_2) * variance_P / (exact_P / len(problem.y))
    expected_P = exact_P + len(problem.y) * bias_P
    assert bool((expected_P < 1.05 * exact_P).all())
    # Batches differ in their Hessian, which adds to the bias: at most as much again.
    slack_P = 0.3 * (expected_P - exact_P) if batch_size == len(problem.y) else expected_P - exact_P
    error_P = 5 * precision_MP.std(0) / math.sqrt(len(precision_MP)) + slack_P
    assert bool(((precision_MP.mean(0) - expected_P).abs() < error_P).all()), (
        precision_MP.mean(0),
        expected_P,
    )
    assert bool((error_P < 0.1 * exact_P).all())


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_weight_that_the_data_say_nothing_of_takes_its_prior(temperature: float):
    """Mean m₀ and standard deviation √T · s₀, other numbers for each weight."""
    given = LinearGaussian.make()
    problem = LinearGaussian(given.x * torch.tensor([1.0, 0.0, 0.0]), given.y)
    prior = BoundGaussian(
        torch.tensor([0.0, 0.4, -0.7, 0.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 0.9, 1.0], dtype=torch.float64),
    )
    the_work = with_prior(problem.work([0, 1], batch_size=40, num_epochs=600), prior)
    method = ivon(lr=0.1, temperature=temperature, curvature_decay=0.97, clip_radius=None)
    for one in posteriors_of(the_work, method):
        mean, variance = one.moments()
        torch.testing.assert_close(mean[1:3], prior.mean[1:3], rtol=0, atol=1e-3)
        torch.testing.assert_close(variance[1:3], temperature * prior.std[1:3].square(), rtol=1e-3, atol=0)


# --- the method ------------------------------------------------------------------------------------------------


def test_priors_that_are_not_gaussian_are_refused():
    layout = work(example("mlp"), [0]).problem.stack.layout
    gaussian, laplace = (node_of("prior", name) for name in ("gaussian", "laplace"))

    def bound(other: dict[str, Any]) -> BoundPrior:
        return Layerwise(patterns={"*.bias": other}, default=gaussian).bind(layout, [0])

    method = ivon()
    method.check_prior(bound(gaussian))
    alone = build(laplace, Prior, key="prior").bind(layout, [0])
    for prior, name in ((alone, "BoundLaplace"), (bound(laplace), "JointPrior")):
        with pytest.raises(
            UsageError, match=rf"Gaussian prior of every parameter, got {name}.*prior=gaussian"
        ):
            method.check_prior(prior)


def test_it_has_no_use_for_an_optimizer():
    def weights(lr: float) -> Tensor:
        optimizer = {"_target_": "torch.optim.Adam", "lr": lr}
        the_work, method = work(example("mlp"), [0, 1], optimizer=optimizer, num_epochs=2), ivon()
        state = method.init(the_work.problem)
        the_work.advance(method, state)
        return state.stack.flat

    assert Ivon.unused_groups == ("optimizer",)
    assert torch.equal(weights(0.1), weights(10.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0), ("temperature", 0), ("initial_curvature", 0), ("momentum", 1), ("curvature_decay", 1)],
)
def test_settings_out_of_range_are_refused(field: str, value: float):
    with pytest.raises(UsageError, match=f"inference.{field}"):
        ivon(**{field: value})
