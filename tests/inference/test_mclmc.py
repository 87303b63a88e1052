"""Microcanonical Langevin: its dynamics against integration by other means, its draws against known posteriors.

Shape letters: M members, P parameters, S draws.
"""

import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian, draws_of
from scipy.integrate import solve_ivp
from tiny_problems import Work, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.inference import Method
from bdl_train.inference._autocorrelation import autocorrelation_time
from bdl_train.inference._isokinetic import INTEGRATORS, Kernel, kick, normalise, refresh
from bdl_train.inference._noise import MemberNoise
from bdl_train.inference._step_size import StepSizes
from bdl_train.inference.mclmc import Mclmc, MclmcState
from bdl_train.posteriors.chain import Chain


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def mclmc(**changed: Any) -> Mclmc:
    method = build({**node_of("inference", "mclmc"), "patience": None, **changed}, Method, key="inference")
    assert isinstance(method, Mclmc)
    return method


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- dynamics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1e-4, 0.3, 2.0, 40.0])
def test_a_kick_solves_the_equation_of_directions_under_a_constant_force(length: float):
    """du/dt = −(I − uuᵀ) g / (P − 1), and dK/dt = −u·g: the force's work, in units of the canonical energy."""
    u, grad = normalise(random(1, 6)), 3 * random(1, 6, seed=1)
    new, gain = kick(u, grad, rows(length))
    g = grad[0].numpy()

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        v = state[:6]
        return np.append(-(g - v * (v @ g)) / 5, -v @ g)

    found = solve_ivp(slope, (0, length), np.append(u[0].numpy(), 0.0), rtol=1e-11, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(new[0].numpy(), found[:6], rtol=1e-7, atol=1e-9)
    assert float(gain) == pytest.approx(found[6], rel=1e-7)


def test_a_kick_without_a_force_or_straight_against_it_is_harmless():
    u = normalise(random(1, 4))
    new, gain = kick(u, torch.zeros(1, 4, dtype=torch.float64), rows(1.0))
    torch.testing.assert_close(new, u)
    assert float(gain) == 0
    against, gain = kick(u, 7 * u, rows(3.0))
    torch.testing.assert_close(against.norm(), torch.tensor(1.0, dtype=torch.float64))
    assert math.isfinite(float(gain))


def test_a_refresh_keeps_unit_length_and_forgets_at_the_rate_1_over_l():
    """Of P large, E[u'·u] = e^(−a) for a path a · L: the closed form of the partial refresh (P → ∞)."""
    num_params, path = 20_000, 0.7
    u = normalise(random(1, num_params))
    new = refresh(u, random(1, num_params, seed=1), rows(path * 3.0), rows(3.0))
    assert float(new.norm()) == pytest.approx(1.0)
    assert float((new * u).sum()) == pytest.approx(math.exp(-path), abs=5 / math.sqrt(num_params))


def path_of(the_work: Work, integrator: str, size: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """A path without refreshment from the members' initial weights: end `[M, P]` and total energy error `[M]`."""
    kernel = Kernel(the_work.problem.potential, 1.0, integrator, compiled=False)
    stack, batch = the_work.problem.stack, the_work.all_rows()
    found = the_work.problem.potential.value_and_grad(stack.flat, stack.buffers, batch)
    energy, grad = kernel.energy(found.potential, found.grad)
    flat, u = stack.flat.clone(), normalise(torch.ones_like(stack.flat))
    total, still = torch.zeros_like(energy), (torch.zeros_like(flat), torch.zeros_like(flat))
    for _ in range(num_steps):
        sizes, never = torch.full_like(energy, size), torch.full_like(energy, 1e12)
        moved = kernel(
            flat,
            u,
            grad,
            energy,
            sizes,
            never,
            still,
            torch.ones(len(flat), dtype=torch.bool),
            stack.buffers,
            batch,
        )
        assert bool(moved.taken.all())
        flat, u, grad, energy = moved.flat, moved.direction, moved.grad, moved.energy
        total = total + moved.energy_error
    return flat, total


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_integrators_are_of_second_order_and_conserve_energy(integrator: str):
    """Half the step: a quarter of the error, in the end point and in the energy; the end is that of an ODE solver."""
    ends, errors = zip(
        *(path_of(example_work(), integrator, 0.08 / k, 10 * k) for k in (1, 2, 4)), strict=True
    )
    the_work = example_work()
    stack, batch = the_work.problem.stack, the_work.all_rows()
    num_params, scale = stack.flat.shape[1], the_work.problem.potential.num_data

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        x, u = state[:num_params], state[num_params:]
        grad = the_work.problem.potential.value_and_grad(torch.tensor(x)[None], stack.buffers, batch).grad
        g = scale * grad[0].numpy()
        return np.concatenate([u, -(g - u * (u @ g)) / (num_params - 1)])

    start = np.concatenate([stack.flat[0].numpy(), np.full(num_params, num_params**-0.5)])
    end = solve_ivp(slope, (0, 0.8), start, rtol=1e-10, atol=1e-12).y[:num_params, -1]
    off = [float(np.linalg.norm(one[0].numpy() - end)) for one in ends]
    assert off[0] / off[1] == pytest.approx(4, rel=0.2)
    assert off[1] / off[2] == pytest.approx(4, rel=0.1)
    energy = [abs(float(one[0])) for one in errors]
    assert energy[1] / energy[2] == pytest.approx(4, rel=0.25)


def test_the_minimal_norm_integrator_is_the_more_exact_one_for_the_same_gradients():
    _, [coarse] = path_of(example_work(), "mclachlan", 0.08, 10)
    _, [fine] = path_of(example_work(), "leapfrog", 0.04, 20)
    assert abs(float(coarse)) < abs(float(fine))


def example_work() -> Work:
    return work(example("mlp"), [0])


def test_a_step_into_nan_is_not_taken_and_turns_the_chain_round():
    the_work = work(example("mlp"), [0, 1])
    kernel = Kernel(the_work.problem.potential, 1.0, "mclachlan", compiled=False)
    flat = the_work.problem.stack.flat.clone()
    u, ones = normalise(random(*flat.shape)), torch.ones(2, dtype=torch.float64)
    moved = kernel(
        flat, u, torch.zeros_like(flat), ones, rows(1e200, 1e-3), 10 * ones, (u, u),
        torch.ones(2, dtype=torch.bool), {}, the_work.all_rows(),
    )  # fmt: skip
    assert moved.taken.tolist() == [False, True]
    assert torch.equal(moved.flat[0], flat[0])
    assert torch.equal(moved.direction[0], -u[0])
    assert not torch.equal(moved.flat[1], flat[1])


def test_a_step_that_is_not_taken_leaves_a_draw_without_nan(monkeypatch):
    method, the_work = mclmc(num_warmup=40, num_draws=4, thin=1), work(example("mlp"), [0, 1], num_epochs=1)
    state, calls, normal = method.init(the_work.problem), [], MemberNoise.normal
    the_work.advance(method, state, the_work.timeline(method).num_steps - 4)

    def broken(self: MemberNoise, *shape: int) -> Tensor:
        calls.append(normal(self, *shape))
        if len(calls) == 3:  # of the second step
            calls[-1][0] = torch.nan
        return calls[-1]

    monkeypatch.setattr(MemberNoise, "normal", broken)
    the_work.advance(method, state)
    one, other = method.posterior(state)
    assert isinstance(one, Chain)
    assert isinstance(other, Chain)
    assert torch.equal(one.flat[1], one.flat[0])
    assert not torch.equal(other.flat[1], other.flat[0])
    assert one.traces["energy_variance"][1] == 0
    assert all(bool(torch.isfinite(t).all()) for t in one.tensors().values() if t.is_floating_point())


# --- tuning -----------------------------------------------------------------------------------------------------


def test_step_sizes_come_to_the_target_when_errors_grow_with_the_third_power():
    """ΔE = c ε³ z: the variance per dimension is c² ε⁶ / P, so ε = (v P / c²)^(1/6), but for the weights' discount."""
    num_params, target, c = 50, 0.1, rows(3.0, 300.0)
    steps, generator = StepSizes.start(1e-3, c), torch.Generator().manual_seed(0)
    taken, seen = torch.ones(2, dtype=torch.bool), []
    for _ in range(4000):
        z = torch.randn(2, generator=generator, dtype=torch.float64)
        error = c * steps.size**3 * z.sign()  # of constant size: no outliers to discount
        seen.append(error.square() / num_params)
        steps.learn(error, taken, num_params, target)
    torch.testing.assert_close(steps.size, (target * num_params / c**2) ** (1 / 6), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.stack(seen[2000:]).mean(0), rows(target, target), rtol=0.01, atol=0)


def test_a_step_into_nan_shortens_the_steps_of_its_chain_alone_and_not_for_ever():
    steps, taken = StepSizes.start(0.1, rows(0, 0)), torch.tensor([True, False])
    steps.learn(rows(1.0, math.nan), taken, 10, 0.1)
    assert float(steps.size[1]) == pytest.approx(0.08)
    for _ in range(1000):
        steps.learn(steps.size**3, torch.ones(2, dtype=torch.bool), 10, 0.1)
    assert float(steps.size[1]) > 0.5


def test_autocorrelation_times_of_first_order_chains_are_known():
    """ρ_t = φᵗ: τ = (1 + φ) / (1 − φ); its estimate from T steps has a relative error near sqrt(10 τ / T)."""
    num_steps, phis = 40_000, (0.0, 0.5, 0.9)
    z, chain = random(num_steps, 3), torch.zeros(num_steps, 3, dtype=torch.float64)
    phi = rows(*phis)
    for t in range(1, num_steps):
        chain[t] = phi * chain[t - 1] + z[t]
    tau = autocorrelation_time(chain[None])[0]
    for found, one in zip(tau.tolist(), phis, strict=True):
        expected = (1 + one) / (1 - one)
        assert found == pytest.approx(expected, rel=3 * math.sqrt(10 * expected / num_steps) + 0.02)
    assert autocorrelation_time(torch.ones(1, 50, 1)).item() == 50


# --- posteriors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_draws_have_the_moments_of_a_linear_models_posterior(integrator: str, temperature: float):
    """Twelve chains of 200 draws: at an energy variance of 5e-4 the bias is below what is allowed here."""
    of = LinearGaussian.make(num_inputs=5)
    the_work = of.work(range(12), batch_size=40, num_epochs=300)
    method = mclmc(
        temperature=temperature, num_warmup=1200, energy_variance_end=5e-4, num_draws=200, thin=4,
        integrator=integrator,
    )  # fmt: skip
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    posteriors = method.posterior(state)
    flat = draws_of(posteriors, 200).flatten(0, 1)
    covariance = of.covariance(temperature)
    std = covariance.diag().sqrt()
    assert float(((flat.mean(0) - of.mean) / std).abs().max()) < 0.1
    spectrum = torch.linalg.eigvalsh(whitened(of, flat, temperature).cov())
    assert float(spectrum.mean()) == pytest.approx(1, abs=0.07)
    assert 0.8 < float(spectrum[0]) < float(spectrum[-1]) < 1.25
    x = random(5, 5, seed=4)
    mean, variance = of.predictive(x, temperature)
    outputs = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], 1) @ flat.T
    torch.testing.assert_close(outputs.mean(1), mean, rtol=0, atol=0.1 * float(variance.sqrt().max()))
    torch.testing.assert_close(outputs.var(1) + 0.25, variance, rtol=0.1, atol=0)
    for one in posteriors:
        assert isinstance(one, Chain)
        assert set(one.traces) == {"potential", "energy_variance", "step_size"}


def whitened(of: LinearGaussian, flat: Tensor, temperature: float = 1.0) -> Tensor:
    """Draws `[S, P]` in coordinates in which the posterior is standard normal, `[P, S]`."""
    root = torch.linalg.cholesky(of.covariance(temperature))
    return torch.linalg.solve_triangular(root, (flat - of.mean).T, upper=False)


def test_the_decoherence_length_follows_the_spread_and_then_the_autocorrelation():
    of = LinearGaussian.make(num_inputs=3)
    the_work = of.work([0], batch_size=40, num_epochs=300)
    method = mclmc(num_warmup=2000, num_draws=1, thin=1, energy_variance_end=0.01)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 300 + 1800)
    chains = state.chains
    assert chains is not None
    assert float(chains.decoherence) == pytest.approx(math.sqrt(float(of.covariance().trace())), rel=0.35)
    before = float(chains.steps.size)
    the_work.advance(method, state, 200)
    tau = autocorrelation_time(chains.path).mean()
    assert float(chains.decoherence) == pytest.approx(0.4 * before * float(tau))
    assert float(chains.steps.size) == before


def test_each_chain_has_its_own_step_size_and_a_stiff_member_slows_nobody():
    the_work = work(example("mlp"), [0, 1], num_epochs=10)
    the_work.problem.stack.flat[1] *= 30
    method = mclmc(num_warmup=300, num_draws=2, thin=1)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    assert state.chains is not None
    sizes = state.chains.steps.size
    assert float(sizes.max() / sizes.min()) > 1.05


# --- states -----------------------------------------------------------------------------------------------------


def test_a_chain_that_finds_no_finite_step_fails_alone():
    the_work = work(example("mlp"), [0, 1, 2], num_epochs=3)
    method = mclmc(num_warmup=250, num_draws=2, thin=1)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 9 + 20)
    assert state.chains is not None
    state.chains.direction[1] = math.nan
    the_work.advance(method, state, 99)
    assert not state.failed.any()
    the_work.advance(method, state)
    assert state.failed.tolist() == [False, True, False]
    assert state.active.tolist() == [True, False, True]


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old parts
@pytest.mark.parametrize("network", ["mlp", "conv-group-norm"])
def test_the_compiled_step_is_the_eager_one(network: str, caplog):
    def run(compiled: bool) -> MclmcState:
        the_work = work(example(network), [0, 1], num_epochs=2)
        the_work = replace(the_work, problem=replace(the_work.problem, compile_steps=compiled))
        method = mclmc(num_warmup=40, num_draws=3, thin=2)
        state = method.init(the_work.problem)
        with caplog.at_level(logging.WARNING, logger="bdl_train"):
            the_work.advance(method, state)
        return state

    eager, compiled = run(False), run(True)
    assert "uncompiled" not in caplog.text
    torch.testing.assert_close(compiled.stack.flat, eager.stack.flat, rtol=1e-6, atol=1e-8)
    assert compiled.chains is not None
    assert eager.chains is not None
    torch.testing.assert_close(compiled.chains.energy, eager.chains.energy, rtol=1e-7, atol=0)
