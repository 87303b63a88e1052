"""SGLD: the covariance of its steps on a linear model, its noise on minibatches, its warm start, draws, preconditioner.

Shape letters: M members, S draws, P parameters, B batches.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from langevin_chains import assert_second_moments, measured, stationary
from linear_gaussian import LinearGaussian, draws_of, posteriors_of
from tiny_problems import KNOWN_NOISE, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Setting, StepLog
from bdl_train.inference._descent import Evaluated
from bdl_train.inference._sgmcmc import FLOOR, StationaryState
from bdl_train.inference.deep_ensemble import DeepEnsemble
from bdl_train.inference.sgld import Sgld
from bdl_train.posteriors.chain import Chain
from bdl_train.priors.gaussian import Gaussian
from bdl_train.schedulers.cosine import Cosine

MODEL = LinearGaussian.make()
ROOT = torch.tensor([1.3, 0.6, 1.6, 1 / (1.3 * 0.6 * 1.6)], dtype=torch.float64)


def sgld(**changed: Any) -> Sgld:
    settings = {**node_of("inference", "sgld"), "burn_in_epochs": 0, **changed}
    method = build(settings, Method, key="inference")
    assert isinstance(method, Sgld)
    return method


def chain(**changed: Any) -> Sgld:
    """From the first step on."""
    return sgld(start_epoch=0, **changed)


# --- the target -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("root", [None, ROOT], ids=["plain", "preconditioned"])
def test_small_steps_leave_the_posterior_as_it_is(temperature: float, root: Tensor | None):
    moved, pushed = measured(MODEL, chain(lr=1e-5, temperature=temperature), root=root)
    torch.testing.assert_close(stationary(moved, pushed), MODEL.covariance(temperature), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("lr", [0.02, 0.12])
def test_the_covariance_of_a_step_is_that_of_an_autoregression(lr: float, temperature: float):
    """Along an axis of curvature λ, θ ← (1 − lr·λ) θ + √(2 lr T/N) z has the variance (T/N) / (λ (1 − lr·λ/2))."""
    curvature, axes = torch.linalg.eigh(MODEL.precision / len(MODEL.y))
    variance = temperature / len(MODEL.y) / (curvature * (1 - lr * curvature / 2))
    found = stationary(*measured(MODEL, chain(lr=lr, temperature=temperature)))
    torch.testing.assert_close(found, axes @ variance.diag() @ axes.T, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("lr", [0.02, 0.12])
def test_a_preconditioned_step_scales_force_and_noise_alike(lr: float):
    scale = ROOT.square().diag()
    moved, pushed = measured(MODEL, chain(lr=lr), root=ROOT)
    expected = torch.eye(4, dtype=torch.float64) - lr * scale @ MODEL.precision / len(MODEL.y)
    torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(pushed @ pushed.T, 2 * lr / len(MODEL.y) * scale, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_of_a_run_have_the_covariance_of_the_steps(temperature: float):
    method = chain(lr=0.12, temperature=temperature, burn_in_epochs=60, num_draws=40, thin=4)
    the_work = MODEL.work(range(200), batch_size=len(MODEL.y), num_epochs=60 + 160)
    draws = draws_of(posteriors_of(the_work, method), 40)
    expected = stationary(*measured(MODEL, method, num_epochs=220))
    # Far from the posterior's: a step of this size is 1.9 times too wide in the steepest direction.
    assert expected.trace() > 1.1 * MODEL.covariance(temperature).trace()
    assert_second_moments(draws, MODEL.mean, expected, largest_error=0.03)


def test_draws_of_a_preconditioned_run_have_the_covariance_of_its_steps():
    lr = 0.1
    method = chain(lr=lr, preconditioner="rmsprop", burn_in_epochs=120, num_draws=40, thin=4)
    the_work = MODEL.work(range(150), batch_size=len(MODEL.y), num_epochs=120 + 160)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    assert state.root is not None
    curvature = MODEL.precision / len(MODEL.y)
    expected = []
    for root in state.root:
        moved = torch.eye(4, dtype=torch.float64) - lr * root.square().diag() @ curvature
        expected.append(stationary(moved, math.sqrt(2 * lr / len(MODEL.y)) * root.diag()))
    draws = draws_of(method.posterior(state), 40)
    assert_second_moments(draws, MODEL.mean, torch.stack(expected), largest_error=0.04)


def test_minibatches_widen_the_draws_by_the_variance_of_their_gradients():
    """E[(I − lr H_b) Σ (I − lr H_b)ᵀ] + lr² cov(g_b) + 2 lr (T/N) I = Σ over independent batches b, at the MAP."""
    lr, num_batches, num_members, burn_in, num_draws = 0.05, 10, 150, 100, 250
    rows_BR = torch.arange(len(MODEL.y)).reshape(num_batches, -1)
    design_BRP, y_BR = MODEL.design[rows_BR], MODEL.y[rows_BR]
    prior = torch.eye(4, dtype=torch.float64) / (0.7**2 * len(MODEL.y))
    hessian_BPP = design_BRP.mT @ design_BRP / (0.5**2 * 4) + prior
    residual_BR = design_BRP @ MODEL.mean - y_BR
    grad_BP = (design_BRP.mT @ residual_BR[..., None])[..., 0] / (0.5**2 * 4) + prior @ MODEL.mean
    torch.testing.assert_close(grad_BP.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    moved_BPP = (torch.eye(4, dtype=torch.float64) - lr * hessian_BPP).numpy()
    noise = lr**2 * np.einsum("bp,bq->pq", grad_BP, grad_BP) / num_batches + 2 * lr / len(MODEL.y) * np.eye(4)
    twice = np.mean([np.kron(moved, moved) for moved in moved_BPP], axis=0)
    expected = torch.from_numpy(np.linalg.solve(np.eye(16) - twice, noise.ravel()).reshape(4, 4))
    assert expected.trace() > 1.5 * stationary(*measured(MODEL, chain(lr=lr))).trace()

    the_work = MODEL.work(range(num_members), batch_size=4, num_epochs=1000)
    method = chain(lr=lr, num_draws=1)
    state, draws = method.init(the_work.problem), []
    state.stack.flat.copy_(MODEL.mean.expand(num_members, -1))
    generator = torch.Generator().manual_seed(0)
    for step in range(burn_in + num_draws):
        # Independent batches: those of an epoch's permutation cancel each other.
        which_M = torch.randint(num_batches, (num_members,), generator=generator)
        method.step(state, the_work.batch(rows_BR[which_M]))
        if step >= burn_in:
            draws.append(state.stack.flat.clone())
    assert_second_moments(torch.stack(draws, 1), MODEL.mean, expected, largest_error=0.03)


def test_without_heat_it_is_gradient_descent_and_draws_no_noise():
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.05}
    cold, descent = (work(example("mlp"), [0, 1], optimizer=sgd, num_epochs=4) for _ in range(2))
    method, other = chain(lr=0.05, temperature=0.0, num_draws=1), DeepEnsemble(patience=None)
    state, expected = method.init(cold.problem), other.init(descent.problem)
    before = state.noise.state_dict()["generators"]
    cold.advance(method, state)
    descent.advance(other, expected)
    torch.testing.assert_close(state.stack.flat, expected.stack.flat, rtol=1e-12, atol=1e-14)
    assert torch.equal(state.noise.state_dict()["generators"], before)


# --- warm start and draws ---------------------------------------------------------------------------------------


def test_the_warm_start_is_an_optimisation_with_its_own_schedule():
    """Up to `start_epoch` a chain is a deep ensemble of so many epochs, with the same data order."""
    cosine = Cosine(warmup_fraction=0.2, final_factor=0.1)
    the_work, short = (
        work(example("mlp"), [0, 1], num_epochs=num, schedule=cosine, clip_norm=0.5) for num in (9, 4)
    )
    method, other = sgld(start_epoch=4, num_draws=1), DeepEnsemble(patience=None)
    state, expected = method.init(the_work.problem), other.init(short.problem)
    the_work.advance(method, state, 4 * 3)
    short.advance(other, expected)
    assert torch.equal(state.stack.flat, expected.stack.flat)
    assert [(p.name, p.num_steps) for p in method.phases(the_work.problem.setting)] == [
        ("warm start", 12),
        ("sample", 15),
    ]


def test_a_chain_starts_in_the_middle_where_nothing_is_said():
    setting = Setting(Gaussian(scale=1.0, fan_in=False), KNOWN_NOISE, 9, 40, 8)
    assert [phase.num_epochs for phase in sgld(num_draws=1).phases(setting)] == [4, 5]
    assert [phase.num_epochs for phase in chain(num_draws=1).phases(setting)] == [9]


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({"num_draws": 3}, [13, 18, 23]),  # 8 epochs of 3 steps, of which the last 5 epochs are the chain
        ({"num_draws": 3, "burn_in_epochs": None}, [17, 20, 23]),  # 2 of the 5
        ({"num_draws": 3, "thin": 2}, [19, 21, 23]),
        ({"num_draws": 3, "burn_in_epochs": 3}, [19, 21, 23]),
        ({"num_draws": 5, "burn_in_epochs": 3}, [19, 20, 21, 22, 23]),
    ],
)
def test_draws_are_the_weights_after_these_steps(changed: dict[str, Any], taken: list[int]):
    method, the_work = sgld(start_epoch=3, **changed), work(example("mlp"), [0, 1], num_epochs=8)
    state, weights, potentials = method.init(the_work.problem), [], []
    for _ in range(24):
        (log,) = the_work.advance(method, state, 1)
        weights.append(state.stack.flat.clone())
        potentials.append(log.potential)
    for m, posterior in enumerate(method.posterior(state)):
        assert isinstance(posterior, Chain)
        assert torch.equal(posterior.flat, torch.stack([weights[step][m] for step in taken]))
        expected = torch.stack([potentials[step][m] for step in taken])
        assert torch.equal(posterior.traces["potential"], expected)


@pytest.mark.parametrize("thin", [None, 1, 3])
@pytest.mark.parametrize("before", [14, 20, 23, 27, 35])
def test_a_run_resumed_with_more_epochs_keeps_its_last_draws(thin: int | None, before: int):
    method = sgld(start_epoch=4, num_draws=7, thin=thin)
    short, long = (work(example("mlp"), [0, 1], num_epochs=num) for num in (12, 19))
    state = method.init(short.problem)
    short.advance(method, state, before)
    stored, spacing = state.state_dict(), state.thin
    resumed = method.init(long.problem)
    resumed.load_state_dict(stored)
    weights = []
    for _ in range(19 * 3 - before):
        long.advance(method, resumed, 1)
        weights.append(resumed.stack.flat.clone())
    (posterior, _) = method.posterior(resumed)
    draws = torch.stack([flat for flat, _ in posterior.draw(7, seed=0)])
    for back in range(min(7, 1 + (len(weights) - 1) // spacing)):
        assert torch.equal(draws[-1 - back], weights[-1 - back * spacing][0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start_epoch": 10}, r"inference.start_epoch=10 .*after the last epoch .*trainer.max_epochs=10"),
        ({"num_draws": 26}, r"26 draws .*need 26 steps .* there are 25 of 25"),
        ({"num_draws": 3, "thin": 13}, r"3 draws .*13 steps apart, need 27 steps"),
        (
            {"num_draws": 6, "burn_in_epochs": 4},
            r"6 draws .*need 6 steps after the burn-in, there are 5 of 25",
        ),
        ({"num_draws": 1, "preconditioner": "rmsprop"}, r"preconditioner=rmsprop .*burn_in_epochs to 1"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(changed: dict[str, Any], message: str):
    setting = Setting(Gaussian(scale=1.0, fan_in=False), KNOWN_NOISE, 10, 40, 8)
    with pytest.raises(UsageError, match=message):
        sgld(**changed).check(setting)


@pytest.mark.parametrize(
    "changed", [{"lr": 0.0}, {"temperature": -0.1}, {"num_draws": 0}, {"preconditioner": "adam"}]
)
def test_settings_out_of_range_are_refused(changed: dict[str, Any]):
    with pytest.raises(UsageError, match=f"inference.{next(iter(changed))}"):
        sgld(**changed)


# --- preconditioner ---------------------------------------------------------------------------------------------


def test_the_preconditioner_is_learned_in_the_first_half_of_the_burn_in_and_then_fixed():
    """5 steps of burn-in, of which 3 learn: G ∝ 1/(r + FLOOR · mean r), r² the mean squared gradient."""
    plain, scaled = (chain(num_draws=1, burn_in_epochs=5, preconditioner=one) for one in ("none", "rmsprop"))
    one, other = (work(example("mlp"), [0, 1], batch_size=26, num_epochs=9) for _ in range(2))
    state, expected = scaled.init(one.problem), plain.init(other.problem)
    mean_square = torch.zeros_like(state.stack.flat)
    for _ in range(3):
        flat = state.stack.flat
        index = one.all_rows()
        grad = one.problem.potential.value_and_grad(flat, state.stack.buffers, index).grad
        mean_square += grad.square() / 3
        one.advance(scaled, state, 1)
        other.advance(plain, expected, 1)
        assert state.root is None
        assert torch.equal(state.stack.flat, expected.stack.flat)
    spread = mean_square.sqrt()
    inverse = 1 / (spread + FLOOR * spread.mean(1, keepdim=True))
    scale = inverse / inverse.log().mean(1, keepdim=True).exp()
    one.advance(scaled, state, 1)
    assert state.root is not None
    torch.testing.assert_close(state.root.square(), scale, rtol=1e-9, atol=0)
    fixed = state.root.clone()
    one.advance(scaled, state)
    assert torch.equal(state.root, fixed)
    assert state.squares is None


def test_weights_without_a_gradient_get_no_boundless_steps():
    """Also where a whole member has none: all of its G are 1."""
    state = StationaryState(work(example("mlp"), [0, 1]).problem, 1)
    log = StepLog(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    grad = torch.full_like(state.stack.flat, 2.0)
    grad[0, :3], grad[1] = 0.0, 0.0
    for sign in (1, -1, 1):
        state.learn_scale(Evaluated(log, sign * grad, None, {}))
    scale = state.learned_scale()
    floor = FLOOR * 2.0 * (grad.shape[1] - 3) / grad.shape[1]  # a share of the mean root
    assert scale[0].tolist() == pytest.approx([1 / floor] * 3 + [1 / (2.0 + floor)] * (grad.shape[1] - 3))
    assert torch.equal(scale[1], torch.ones_like(scale[1]))


def test_a_preconditioner_is_not_used_before_it_has_seen_a_gradient():
    state = StationaryState(work(example("mlp"), [0]).problem, 1)
    with pytest.raises(RuntimeError, match="before it has seen a gradient"):
        state.learned_scale()
