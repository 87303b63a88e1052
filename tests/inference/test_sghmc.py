"""SGHMC: its steps on a linear model against the paper's by hand, its momentum at rest, its limits.

Shape letters: M members, S draws, P parameters.
"""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from langevin_chains import assert_second_moments, by_hand, measured, stationary
from linear_gaussian import NOISE_STD, PRIOR_STD, LinearGaussian, draws_of
from tiny_problems import example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method
from bdl_train.inference.deep_ensemble import DeepEnsemble
from bdl_train.inference.sghmc import Sghmc
from bdl_train.inference.sgld import Sgld

MODEL = LinearGaussian.make()
NUM_DATA = len(MODEL.y)
ONES = torch.ones(4, dtype=torch.float64)
ROOT = torch.tensor([1.3, 0.6, 1.6, 1 / (1.3 * 0.6 * 1.6)], dtype=torch.float64)


def chain(**changed: Any) -> Sghmc:
    """From the first step on."""
    settings = {**node_of("inference", "sghmc"), "start_epoch": 0, "burn_in_epochs": 0, **changed}
    method = build(settings, Method, key="inference")
    assert isinstance(method, Sghmc)
    return method


# --- the target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("friction", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("root", [None, ROOT], ids=["plain", "preconditioned"])
def test_small_steps_leave_the_posterior_as_it_is(temperature: float, friction: float, root: Tensor | None):
    method = chain(lr=1e-5 * friction, friction=friction, temperature=temperature)
    found = stationary(*measured(MODEL, method, root=root))[:4, :4]
    torch.testing.assert_close(found, MODEL.covariance(temperature), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lr", [0.001, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("root", [None, ROOT], ids=["plain", "preconditioned"])
def test_a_step_is_that_of_the_paper(lr: float, temperature: float, root: Tensor | None):
    friction, scale = 0.2, ONES if root is None else root.square()
    moved, pushed = measured(MODEL, chain(lr=lr, friction=friction, temperature=temperature), root=root)
    expected, noise = by_hand(MODEL, lr=lr, friction=friction, temperature=temperature, scale=scale)
    torch.testing.assert_close(moved, torch.from_numpy(expected), rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(pushed @ pushed.T, torch.from_numpy(noise), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("temperature", "lr", "changed"),
    [(1.0, 0.2, {}), (0.5, 0.2, {}), (1.0, 0.1, {"preconditioner": "rmsprop"})],
)
def test_draws_of_a_run_have_the_covariance_of_the_steps(
    temperature: float, lr: float, changed: dict[str, Any]
):
    """The 2P discrete Lyapunov equation, for the preconditioner that each member has learned."""
    method = chain(
        lr=lr, friction=0.2, temperature=temperature, burn_in_epochs=120, num_draws=40, thin=4, **changed
    )
    the_work = MODEL.work(range(200), batch_size=NUM_DATA, num_epochs=120 + 160)
    state = method.init(the_work.problem)
    kinetic = torch.stack([log.traces["kinetic_temperature"] for log in the_work.advance(method, state)])
    scales = ONES.expand(200, -1) if state.root is None else state.root.square()
    assert state.root is None or scales.std(0).min() > 0.01
    joint = torch.stack(
        [
            torch.from_numpy(
                scipy.linalg.solve_discrete_lyapunov(
                    *by_hand(MODEL, lr=lr, friction=0.2, temperature=temperature, scale=scale)
                )
            )
            for scale in scales
        ]
    )
    draws, expected = draws_of(method.posterior(state), 40), joint[:, :4, :4]
    assert expected.mean(0).trace() > 1.05 * MODEL.covariance(temperature).trace()
    assert_second_moments(draws, MODEL.mean, expected, largest_error=0.03)
    # What is logged: v² / G over lr · (T/N) / (1 − α/2) at T = 1, here with the steps' own variance of v.
    at_rest_M = (joint.diagonal(dim1=1, dim2=2)[:, 4:] / scales).mean(1) * NUM_DATA / lr * (1 - 0.2 / 2)
    found_M = kinetic[120:].mean(0)
    error = (found_M - at_rest_M).std() / 200**0.5
    assert error < 0.02 * temperature
    assert ((found_M - at_rest_M).mean() / error).abs() < 4.5


# --- momentum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("friction", [0.05, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_momentum_is_at_rest_under_small_steps(temperature: float, friction: float):
    lr, num_members = 1e-5, 4000
    method = chain(lr=lr, friction=friction, temperature=temperature)
    at_rest = stationary(*measured(MODEL, method))[4:, 4:]
    state = method.init(MODEL.work(range(num_members), batch_size=NUM_DATA, num_epochs=40).problem)
    assert state.momentum is not None
    assert_second_moments(state.momentum[:, None], torch.zeros_like(MODEL.mean), at_rest, largest_error=0.03)
    # From there a preconditioner takes it to its own rest: √G times as large.
    preconditioned = stationary(*measured(MODEL, method, root=ROOT))[4:, 4:]
    torch.testing.assert_close(preconditioned, ROOT.diag() @ at_rest @ ROOT.diag(), rtol=1e-3, atol=1e-9)


def test_the_momentum_is_drawn_where_the_chain_begins_and_kept_when_the_preconditioner_is_fixed():
    the_work = work(example("mlp"), [0, 1], num_epochs=8)
    method = chain(
        start_epoch=2, burn_in_epochs=2, num_draws=1, friction=1e-6, lr=1e-12, preconditioner="rmsprop"
    )
    state = method.init(the_work.problem)
    the_work.advance(method, state, 6)
    assert state.momentum is None
    the_work.advance(method, state, 1)
    assert state.momentum is not None
    first = state.momentum
    assert (first != 0).all()
    the_work.advance(method, state, 3)
    assert state.root is not None
    # Next to no friction, force and noise: it is the same, in the new units.
    torch.testing.assert_close(state.momentum, state.root * first, rtol=1e-2, atol=1e-8)


def test_noisy_gradients_heat_the_chain_by_the_known_factor():
    """Independent batches of gradient variance B: E[F_b Σ F_bᵀ] + lr² B + Q = Σ; T + lr·B·N / (2α) at small lr."""
    friction, num_members = 0.2, 150
    rows_BR = torch.arange(NUM_DATA).reshape(-1, 4)
    design_BRP = MODEL.design[rows_BR]
    prior = torch.eye(4, dtype=torch.float64) / (PRIOR_STD**2 * NUM_DATA)
    hessian_BPP = design_BRP.mT @ design_BRP / (4 * NOISE_STD**2) + prior
    residual_BR = design_BRP @ MODEL.mean - MODEL.y[rows_BR]
    grad_BP = torch.einsum("br,brp->bp", residual_BR, design_BRP) / (4 * NOISE_STD**2) + prior @ MODEL.mean
    grad_PP = (grad_BP.T @ grad_BP / len(grad_BP)).numpy()

    def joint(lr: float) -> Tensor:
        _, noise = by_hand(MODEL, lr=lr, friction=friction, temperature=1.0, scale=ONES)
        eye = np.eye(4)
        twice = np.zeros((64, 64))
        for hessian in hessian_BPP.numpy():
            moved = np.block(
                [[eye - lr * hessian, (1 - friction) * eye], [-lr * hessian, (1 - friction) * eye]]
            )
            twice += np.kron(moved, moved) / len(hessian_BPP)
        noise = noise + lr**2 * np.block([[grad_PP, grad_PP], [grad_PP, grad_PP]])
        return torch.from_numpy(np.linalg.solve(np.eye(64) - twice, noise.ravel()).reshape(8, 8))

    def kinetic_temperature(lr: float) -> float:
        return joint(lr).diagonal()[4:].mean().item() * NUM_DATA / lr * (1 - friction / 2)

    heating = np.trace(grad_PP) / 4 * NUM_DATA / (2 * friction)
    assert (kinetic_temperature(2e-4) - kinetic_temperature(1e-4)) / 1e-4 == pytest.approx(heating, rel=0.1)

    lr = 0.01
    the_work = MODEL.work(range(num_members), batch_size=4, num_epochs=1000)
    method = chain(lr=lr, friction=friction, num_draws=1)
    state = method.init(the_work.problem)
    state.stack.flat.copy_(MODEL.mean.expand(num_members, -1))
    generator, kinetic, draws = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        which_M = torch.randint(len(rows_BR), (num_members,), generator=generator)
        log = method.step(state, the_work.batch(rows_BR[which_M]))
        kinetic.append(log.traces["kinetic_temperature"])
        draws.append(state.stack.flat.clone())
    assert_second_moments(torch.stack(draws[150:], 1), MODEL.mean, joint(lr)[:4, :4], largest_error=0.04)
    found_M = torch.stack(kinetic[150:]).mean(0)
    error = (found_M.std() / num_members**0.5).item()
    expected = kinetic_temperature(lr)
    assert expected > 1.3
    assert error < 0.02
    assert abs(found_M.mean().item() - expected) < 4.5 * error


# --- limits -----------------------------------------------------------------------------------------------------


def test_with_all_momentum_lost_it_is_sgld():
    one, other = (work(example("mlp"), [0, 1], num_epochs=4) for _ in range(2))
    settings = {
        **node_of("inference", "sgld"),
        "start_epoch": 0,
        "burn_in_epochs": 0,
        "lr": 0.01,
        "num_draws": 3,
    }
    method, langevin = chain(friction=1.0, lr=0.01, num_draws=3), build(settings, Method, key="inference")
    assert isinstance(langevin, Sgld)
    state, expected = method.init(one.problem), langevin.init(other.problem)
    one.advance(method, state)
    other.advance(langevin, expected)
    assert state.momentum is None
    assert torch.equal(state.stack.flat, expected.stack.flat)
    assert torch.equal(state.kept.flat, expected.kept.flat)


def test_without_heat_it_is_gradient_descent_with_momentum():
    """torch's SGD: v ← μ v + g, θ ← θ − lr v, for one learning rate the same as v ← μ v − lr g, θ ← θ + v."""
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.02, "momentum": 0.8}
    cold, descent = (work(example("mlp"), [0, 1], optimizer=sgd, num_epochs=6) for _ in range(2))
    method, other = chain(lr=0.02, friction=0.2, temperature=0.0, num_draws=1), DeepEnsemble(patience=None)
    state, expected = method.init(cold.problem), other.init(descent.problem)
    before = state.noise.state_dict()["generators"]
    cold.advance(method, state)
    descent.advance(other, expected)
    torch.testing.assert_close(state.stack.flat, expected.stack.flat, rtol=1e-11, atol=1e-13)
    assert torch.equal(state.noise.state_dict()["generators"], before)


@pytest.mark.parametrize("friction", [0.0, 1.1, -0.1])
def test_a_friction_out_of_range_is_refused(friction: float):
    with pytest.raises(UsageError, match=r"inference.friction"):
        chain(friction=friction)
