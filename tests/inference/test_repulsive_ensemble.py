"""Repulsive ensembles: the force against autograd, two members in closed form, disagreement against a deep ensemble."""

import math
from typing import Any

import pytest
import torch
from linear_gaussian import LinearGaussian
from tiny_problems import Work, example, node_of, work
from torch import Tensor
from torch.nn.functional import linear

from bdl_train.build import build
from bdl_train.inference import Method
from bdl_train.inference.repulsive_ensemble import density_score, kernel_rows
from bdl_train.potential import Batch

ADAM = {"_target_": "torch.optim.Adam", "lr": 0.01}
PLAIN_SGD = {"_target_": "torch.optim.SGD", "lr": 1.0}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def method_of(name: str = "repulsive_ensemble", **changed: Any) -> Method[Any]:
    return build({**node_of("inference", name), **changed}, Method, key="inference")


def outputs(num_members: int = 5, num_rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_members, num_rows, 2, generator=generator, dtype=torch.float64)


def log_density(f: Tensor, others: Tensor, h: float) -> Tensor:
    """log Σ_j exp(−‖f − f_j‖² / h) of one member's outputs; its own place among the others counts."""
    return torch.logsumexp(-(f - others).square().flatten(1).sum(1) / h, dim=0)


def test_the_score_is_the_density_estimates_by_autograd():
    f_MBO, h = outputs(), 3.0
    found = density_score(f_MBO, h, None)
    for i in range(len(f_MBO)):
        leaf = f_MBO[i].clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(log_density(leaf, f_MBO, h), leaf)
        torch.testing.assert_close(found[i], -grad, rtol=1e-11, atol=1e-13)


def test_members_that_are_out_have_no_score_and_no_part_in_others():
    f_MBO, inside = outputs(), torch.tensor([True, False, True, True, True])
    f_MBO[1] = math.nan
    found = density_score(f_MBO, "median", inside)
    assert not found[1].any()
    torch.testing.assert_close(
        found[inside], density_score(f_MBO[inside], "median", None), rtol=1e-12, atol=1e-14
    )


def test_a_step_descends_the_potential_plus_the_log_density_of_functions():
    """With plain SGD at lr 1 a step is the direction: autograd of potential + (T/N) log density, others held fixed."""
    of, temperature, h = example("mlp"), 3.0, 2.0
    the_work = work(of, [0, 1, 2], optimizer=PLAIN_SGD, batch_size=len(of.y))
    stack, potential = the_work.problem.stack, the_work.problem.potential
    before = stack.flat.clone()

    def function(flat: Tensor) -> Tensor:
        """The tanh network of the example, written out."""
        w1, b1, w2, b2 = stack.layout.unflatten(flat).values()
        return linear(linear(of.x, w1, b1).tanh(), w2, b2)

    fixed = torch.stack([function(flat) for flat in before])
    expected = []
    for flat in before:
        leaf = flat.clone().requires_grad_(True)
        value, _ = potential(leaf[None], {}, the_work.all_rows())
        aim = value.sum() + temperature / len(of.y) * log_density(function(leaf), fixed, h)
        expected += torch.autograd.grad(aim, leaf)
    method = method_of(temperature=temperature, bandwidth=h)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 1)
    torch.testing.assert_close(before - stack.flat, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
@pytest.mark.parametrize("bandwidth", ["median", 0.1])
def test_two_members_stand_where_pull_and_repulsion_balance(bandwidth: Any, temperature: float):
    """Outputs are Xθ, S = XᵀX and A = S/σ² + 1/τ²: θ = mean ± δ/2 with A δ/2 = T (2/h) k/(1 + k) S δ.

    So δ solves A δ = λ S δ, with the least λ, and k/(1 + k) = hλ/(4T). A kernel
    wider than 2T/λ cannot hold them apart. The median rule sets k = 1/2: h = 4T/(3λ).
    """
    of = LinearGaussian.make()
    gram = of.design.T @ of.design
    sizes, vectors = torch.linalg.eigh(gram)
    size, vector = float(sizes[-1]), vectors[:, -1]
    rate = float(vector @ of.precision @ vector) / size
    if bandwidth == "median":
        square = 4 * temperature / (3 * rate) * math.log(2)
    else:
        share = bandwidth * rate / (4 * temperature)
        square = bandwidth * math.log((1 - share) / share)
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    the_work = of.work([0, 1], batch_size=len(of.y), optimizer=sgd, num_epochs=400)
    method = method_of(temperature=temperature, bandwidth=bandwidth)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    one, other = state.stack.flat
    torch.testing.assert_close((one + other) / 2, of.mean, rtol=0, atol=1e-6)
    assert float((of.design @ (one - other)).square().sum()) == pytest.approx(square, rel=1e-4)
    assert float(torch.linalg.vecdot(one - other, vector).square()) == pytest.approx(square / size, rel=1e-4)


def spread(the_work: Work, method: Method[Any]) -> float:
    """Variance of the members' functions on the training inputs after all steps, mean over inputs."""
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    stack, network = state.stack, state.potential.network
    f, _ = network(stack.params, stack.buffers, the_work.example.x, train=False, shared=True)
    return float(f.var(0, correction=0).mean())


def test_repulsion_makes_functions_disagree_the_more_the_warmer():
    def of(method: Method[Any]) -> float:
        return spread(work(example("mlp"), range(5), num_epochs=60, optimizer=ADAM), method)

    ensemble = of(method_of("deep_ensemble", patience=None))
    warm, warmer = (of(method_of(temperature=t)) for t in (1.0, 3.0))
    assert 4 * ensemble < 2 * warm < warmer


def test_at_temperature_zero_it_is_a_deep_ensemble_bit_for_bit():
    def run(method: Method[Any]) -> Tensor:
        the_work = work(example("mlp-dropout"), [0, 1, 2], num_epochs=5)
        state = method.init(the_work.problem)
        the_work.advance(method, state)
        return state.stack.flat

    assert torch.equal(run(method_of(temperature=0.0)), run(method_of("deep_ensemble", patience=None)))


def test_members_are_compared_on_the_batch_of_each_in_turn_wherever_it_stands():
    x = torch.arange(3.0)[:, None, None].expand(3, 4, 2)
    batch = Batch(x, x[..., 0], torch.zeros(3, 4, dtype=torch.int64))
    assert [float(kernel_rows(batch, [7, 5, 9], step)[0, 0]) for step in range(4)] == [1, 0, 2, 1]
    rows = Batch(x[0], x[0, :, 0], torch.arange(4), shared=True)
    assert kernel_rows(rows, [7, 5, 9], 2) is rows.x


def test_the_pass_of_the_kernel_leaves_dropout_and_running_statistics_alone():
    """One step from the same weights: buffers are those of the deep ensemble's step."""
    for network in ("mlp-dropout", "conv-batch-norm"):
        buffers = []
        for name, changed in (("repulsive_ensemble", {}), ("deep_ensemble", {"patience": None})):
            the_work = work(example(network), [0, 1, 2])
            method = method_of(name, **changed)
            state = method.init(the_work.problem)
            the_work.advance(method, state, 1)
            buffers.append(state.stack.buffers)
        assert buffers[0].keys() == buffers[1].keys()
        assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0])
