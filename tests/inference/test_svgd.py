"""SVGD: its direction against a loop in numpy, two particles in closed form, many against the exact posterior."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import PRIOR_STD, LinearGaussian
from tiny_problems import config_of, data_of, example, node_of, work
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method
from bdl_train.inference._kernels import rbf
from bdl_train.inference.svgd import stein_direction
from bdl_train.priors import BoundGaussian
from bdl_train.training.problem import Recipe

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def method_of(name: str = "svgd", **changed: Any) -> Method[Any]:
    return build({**node_of("inference", name), **changed}, Method, key="inference")


def points(num_points: int = 6, num_coordinates: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_points, num_coordinates, generator=generator, dtype=torch.float64)


def phi_by_loop(theta: np.ndarray, score: np.ndarray, bandwidth: float | None = None) -> np.ndarray:
    """Equation 8 of Liu & Wang, term by term; None = median² / log n over the pairs, the lower middle one."""
    n = len(theta)
    if bandwidth is None:
        squares = sorted(np.sum((theta[i] - theta[j]) ** 2) for i in range(n) for j in range(i))
        h = float(squares[(len(squares) - 1) // 2]) / math.log(n)
    else:
        h = bandwidth
    phi = np.zeros_like(theta)
    for i in range(n):
        for j in range(n):
            k = math.exp(-float(np.sum((theta[j] - theta[i]) ** 2)) / h)
            phi[i] += (k * score[j] - 2 / h * (theta[j] - theta[i]) * k) / n
    return phi


@pytest.mark.parametrize("h", [None, 0.7])
@pytest.mark.parametrize("num_points", [2, 5, 6])
def test_the_direction_is_minus_t_over_n_times_phi(num_points: int, h: float | None):
    theta, num_data, temperature = points(num_points), 40, 0.3
    grad = points(num_points, seed=1)
    found = stein_direction(grad, rbf(theta, h or "median", None), temperature, num_data)
    phi = phi_by_loop(theta.numpy(), -num_data / temperature * grad.numpy(), h)
    torch.testing.assert_close(found, torch.from_numpy(-temperature / num_data * phi), rtol=1e-11, atol=1e-13)


def test_repulsion_is_the_kernels_gradient_by_autograd():
    theta = points()
    found = rbf(theta, 0.9, None).repulsion()
    for i in range(len(theta)):
        others = theta.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad((-(others - theta[i]).square().sum(1) / 0.9).exp().sum(), others)
        torch.testing.assert_close(found[i], grad.sum(0), rtol=1e-12, atol=1e-14)


def test_members_that_are_out_change_nothing_for_the_others():
    theta, grad = points(5), points(5, seed=1)
    inside = torch.tensor([True, False, True, True, False])
    theta[1], grad[1], theta[4], grad[4] = math.nan, math.nan, 1e9, math.inf
    found = stein_direction(grad, rbf(theta, "median", inside), 1.0, 7)
    alone = stein_direction(grad[inside], rbf(theta[inside], "median", None), 1.0, 7)
    torch.testing.assert_close(found[inside], alone, rtol=1e-12, atol=1e-14)
    assert not found[~inside].any()


def test_a_member_too_far_off_for_float32_leaves_the_others_finite():
    theta = points(4).float()
    theta[2] = 1e30
    kernel = rbf(theta, "median", None)
    assert kernel.matrix[2].tolist() == [0, 0, 1, 0]
    # The median is that of the other three, over the logarithm of four.
    alone = rbf(theta[[0, 1, 3]], "median", None).bandwidth * math.log(3) / math.log(4)
    torch.testing.assert_close(kernel.bandwidth, alone)
    near = rbf(theta[[0, 1, 3]], float(alone), None)
    torch.testing.assert_close(kernel.matrix[[0, 1, 3]][:, [0, 1, 3]], near.matrix)
    assert bool(kernel.repulsion().isfinite().all())


def test_equal_members_do_not_repel_and_do_not_divide_by_zero():
    kernel = rbf(torch.ones(3, 2), "median", None)
    assert kernel.matrix.unique().tolist() == [1]
    assert not kernel.repulsion().any()


def test_differences_of_close_members_with_large_weights_survive_float32():
    """‖p‖² + ‖q‖² − 2pq would lose them: at 1000 its rounding is 0.1, and the distance² is 1e-3."""
    offsets = 0.01 * points(4, 10)
    near, far = (rbf((offsets + shift).float(), "median", None).matrix for shift in (0.0, 1000.0))
    torch.testing.assert_close(far, near, rtol=0, atol=0.02)


def trained(of: LinearGaussian, num_members: int, num_steps: int, **changed: Any) -> Tensor:
    """Weights `[M, P]` after full-batch steps."""
    lr = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    the_work = of.work(range(num_members), batch_size=len(of.y), optimizer=lr, num_epochs=num_steps)
    method = method_of(**changed)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    assert not state.failed.any()
    return state.stack.flat


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("bandwidth", ["median", 0.02])
def test_two_particles_stand_where_pull_and_repulsion_balance(bandwidth: Any, temperature: float):
    """θ = mean ± δ/2 with δ along the widest direction of the posterior, of precision λ.

    Equation 8 at one of them: λ (δ/2) (1 − k) = (2/h) k δ T, so k = 1 / (1 + 4T / (hλ)). The median rule sets k = 1/2:
    h = 4T/λ and δ² = h log 2.
    """
    of = LinearGaussian.make()
    values, vectors = torch.linalg.eigh(of.precision)
    rate = float(values[0])
    if bandwidth == "median":
        square = 4 * temperature * math.log(2) / rate
    else:
        square = bandwidth * math.log(1 + 4 * temperature / (bandwidth * rate))
    one, other = trained(of, 2, 400, temperature=temperature, bandwidth=bandwidth)
    torch.testing.assert_close((one + other) / 2, of.mean, rtol=0, atol=1e-6)
    along = torch.linalg.vecdot(one - other, vectors[:, 0])
    assert float((one - other).square().sum()) == pytest.approx(square, rel=1e-4)
    assert float(along.square()) == pytest.approx(square, rel=1e-4)


def test_many_particles_have_the_posteriors_mean_and_about_its_spread():
    """40 particles in 3 dimensions: the mean to a tenth of a standard deviation, variances within a factor of 2.

    Their stationarity is asserted with the loop above. The spread is the known error of the median rule at this size.
    """
    of = LinearGaussian.make(num_inputs=2)
    found = trained(of, 40, 300)
    score = -(found - of.mean) @ of.precision
    rest = phi_by_loop(found.numpy(), score.numpy())
    assert np.abs(rest).max() < 1e-3 * score.abs().mean()
    std = of.covariance().diagonal().sqrt()
    assert ((found.mean(0) - of.mean).abs() / std).max() < 0.1
    _, vectors = torch.linalg.eigh(of.precision)
    ratio = (found @ vectors).var(0, correction=0) / (vectors.T @ of.covariance() @ vectors).diagonal()
    assert bool(((ratio > 0.5) & (ratio < 2)).all()), ratio


def test_at_temperature_zero_all_particles_gather_at_the_map_estimate():
    of = LinearGaussian.make()
    found = trained(of, 3, 400, temperature=0.0)
    torch.testing.assert_close(found, of.mean.expand(3, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
@pytest.mark.parametrize("name", ["svgd", "repulsive_ensemble"])
def test_one_particle_is_a_deep_ensemble_of_one_bit_for_bit(name: str, mixed: bool):
    def run(method: Method[Any]) -> Tensor:
        the_work = work(
            example("mlp-dropout"), [3], optimizer=ADAM, num_epochs=5, clip_norm=0.2, dtype=torch.float32
        )
        state = method.init(the_work.problem)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            the_work.advance(method, state)
        return state.stack.flat

    assert torch.equal(run(method_of(name)), run(method_of("deep_ensemble", patience=None)))


@pytest.mark.parametrize("name", ["svgd", "repulsive_ensemble"])
def test_a_member_that_diverges_leaves_the_others_as_if_it_had_never_been(name: str):
    of = example("mlp-dropout")

    def run(members: list[int], lost: int | None) -> Tensor:
        the_work = work(of, members, batch_size=len(of.y), num_epochs=12)
        if lost is not None:
            the_work.problem.stack.flat[lost] = math.nan
        method = method_of(name)
        state = method.init(the_work.problem)
        the_work.advance(method, state)
        return state.stack.flat

    torch.testing.assert_close(run([0, 1, 2], lost=1)[[0, 2]], run([0, 2], lost=None), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["svgd", "repulsive_ensemble"])
def test_a_member_that_diverges_later_is_frozen_with_its_optimiser(name: str):
    the_work = work(example("mlp"), [0, 1, 2], optimizer=ADAM, num_epochs=6)
    method = method_of(name)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 6)
    state.stack.flat[1] = 1e200
    moments = state.optimizer.state_dict()["state"][0]
    before = {key: moments[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    the_work.advance(method, state)
    assert state.failed.tolist() == [False, True, False]
    for key, tensor in before.items():
        assert torch.equal(moments[key][1], tensor[1])
        assert not torch.equal(moments[key][0], tensor[0])


@pytest.mark.parametrize("name", ["svgd", "repulsive_ensemble"])
def test_clipping_bounds_the_direction(name: str):
    the_work = work(
        example("mlp"), [0, 1, 2], optimizer={"_target_": "torch.optim.SGD", "lr": 1.0}, clip_norm=0.01
    )
    before = the_work.problem.stack.flat.clone()
    method = method_of(name, temperature=1e4)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 1)
    moved = torch.linalg.vector_norm(state.stack.flat - before, dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["svgd", "repulsive_ensemble"])
def test_what_would_give_members_posteriors_of_their_own_is_refused(name: str):
    node = node_of("inference", name)
    data = data_of(example("mlp"))
    Recipe.of(config_of(inference=node), data)
    with pytest.raises(UsageError, match=rf"on_divergence=retry would train.*{name} a step of each member"):
        Recipe.of(config_of(inference=node, trainer={"on_divergence": "retry"}), data)
    with pytest.raises(UsageError, match=r"member_fraction=0\.5 gives each member a posterior of its own"):
        Recipe.of(config_of(inference=node, trainer={"member_fraction": 0.5}), data)
    own = BoundGaussian(torch.zeros(2, 3), torch.full((2, 3), PRIOR_STD))
    with pytest.raises(UsageError, match=r"use prior\.moments=pooled"):
        method_of(name).check_prior(own)


@pytest.mark.parametrize(("name", "refused"), [("svgd", False), ("repulsive_ensemble", True)])
def test_a_kernel_of_weights_splits_batches_and_one_of_outputs_does_not(name: str, refused: bool):
    data = data_of(example("mlp"))
    recipe = Recipe.of(config_of(inference=node_of("inference", name)), data)
    if refused:
        with pytest.raises(UsageError, match=r"inference=repulsive_ensemble needs all rows of a batch"):
            recipe.check_ranks(data, 2)
    else:
        recipe.check_ranks(data, 2)
