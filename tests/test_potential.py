"""The potential against its definition, written out with an ordinary module and torch's distributions."""

import pytest
import torch
from tiny_problems import EXAMPLES, KNOWN_NOISE, LEARNED_NOISE, Work, example, work
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.distributions import Laplace as LaplaceDistribution

from bdl_train.likelihoods.gaussian import LOG_NOISE
from bdl_train.potential import Batch
from bdl_train.priors.laplace import Laplace

SCALE = torch.tensor(0.5, dtype=torch.float64)  # of the Gaussian prior of tiny_problems, and its noise
ZERO = torch.zeros((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def by_hand(the_work: Work, member: int, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """−mean log p(y|x,θ) − log p(θ) / N of one member as an ordinary module, and the gradient of it."""
    network = the_work.example.make_network().double()
    params = the_work.problem.stack.params
    weights = dict(network.named_parameters())
    with torch.no_grad():
        for name, parameter in weights.items():
            parameter.copy_(params[name][member])
        for name, buffer in network.named_buffers():
            buffer.copy_(the_work.problem.stack.buffers[name][member])
    log_prior = torch.stack([Normal(ZERO, SCALE).log_prob(p).sum() for p in weights.values()]).sum()
    leaves: list[Tensor] = list(weights.values())
    outputs = network.train()(x)
    if the_work.example.likelihood is KNOWN_NOISE:
        log_lik = Normal(outputs[:, 0], SCALE).log_prob(y)
    elif the_work.example.likelihood is LEARNED_NOISE:
        log_noise = params[LOG_NOISE][member].clone().requires_grad_(True)
        log_lik = Normal(outputs[:, 0], log_noise.exp()).log_prob(y)
        log_prior = log_prior + Normal(SCALE.log(), SCALE).log_prob(log_noise)
        leaves.append(log_noise)
    else:
        log_lik = Categorical(logits=outputs).log_prob(y)
    potential = -log_lik.mean() - log_prior / len(the_work.example.y)
    return potential, list(torch.autograd.grad(potential, leaves))


@pytest.mark.parametrize("executor", ["vmap", "loop"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_value_and_gradient_are_those_of_each_member_alone_by_hand(name: str, executor):
    the_work = work(example(name), [0, 1, 2, 3], executor=executor)
    stack, potential = the_work.problem.stack, the_work.problem.potential
    if LOG_NOISE in stack.layout.names:
        stack.flat[:, -1] += torch.tensor([0.0, 0.3, -0.4, 1.0], dtype=torch.float64)
    index_MB = torch.arange(32).reshape(4, 8) % 26
    batch = the_work.batch(index_MB)
    gradient = potential.value_and_grad(stack.flat, stack.buffers, batch)
    value_M, _ = potential(stack.flat, stack.buffers, batch)
    torch.testing.assert_close(gradient.potential, value_M, rtol=0, atol=0)
    for m in range(4):
        expected, grads = by_hand(the_work, m, batch.x[m], batch.y[m])
        # The learned noise's prior mean is kept in float32 before it is cast.
        torch.testing.assert_close(gradient.potential[m], expected.detach(), rtol=1e-8, atol=0)
        expected_grad = torch.cat([grad.flatten() for grad in grads])
        torch.testing.assert_close(gradient.grad[m], expected_grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "ft_transformer"])
def test_it_is_unbiased_over_minibatches(name: str):
    the_work = work(example(name, num_data=24), [0, 1])
    stack, potential = the_work.problem.stack, the_work.problem.potential
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))

    def at(index: Tensor) -> tuple[Tensor, Tensor]:
        index_MB = index.expand(2, -1)
        value_M, _ = potential(stack.flat, stack.buffers, the_work.batch(index_MB), train=False)
        leaf = stack.flat.clone().requires_grad_(True)
        total = potential(leaf, stack.buffers, the_work.batch(index_MB), train=False)[0].sum()
        return value_M, torch.autograd.grad(total, leaf)[0]

    parts = [at(chunk) for chunk in order.chunk(4)]
    whole_value, whole_grad = at(torch.arange(24))
    torch.testing.assert_close(torch.stack([v for v, _ in parts]).mean(0), whole_value, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack([g for _, g in parts]).mean(0), whole_grad, rtol=1e-10, atol=1e-14)


def test_n_times_the_potential_of_all_data_is_the_negative_log_joint():
    the_work = work(example("mlp"), [0])
    stack, potential = the_work.problem.stack, the_work.problem.potential
    value_M, _ = potential(stack.flat, stack.buffers, the_work.batch(torch.arange(26)[None]))
    network = the_work.example.make_network().double()
    nn.utils.vector_to_parameters(stack.flat[0], network.parameters())
    log_lik = Normal(network(the_work.example.x)[:, 0], SCALE).log_prob(the_work.example.y).sum()
    log_prior = Normal(ZERO, SCALE).log_prob(stack.flat[0]).sum()
    torch.testing.assert_close(26 * value_M[0], -(log_lik + log_prior).detach(), rtol=1e-12, atol=0)


def test_a_shared_batch_is_the_same_batch_for_every_member():
    the_work = work(example("mlp-dropout"), [0, 1, 2])
    stack, potential, of = the_work.problem.stack, the_work.problem.potential, the_work.example
    index = torch.arange(5, 12)
    shared = potential.value_and_grad(
        stack.flat, stack.buffers, Batch(of.x[index], of.y[index], index, shared=True)
    )
    own = potential.value_and_grad(stack.flat, stack.buffers, the_work.batch(index.expand(3, -1)))
    torch.testing.assert_close(shared.potential, own.potential, rtol=1e-13, atol=0)
    torch.testing.assert_close(shared.grad, own.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_members_are_summed_not_averaged(executor):
    """Copies of one member: each has the gradient of the member alone, however many stand beside it."""
    alone = work(example("mlp"), [3], executor=executor)
    index_MB = torch.arange(8)[None]
    expected = alone.problem.potential.value_and_grad(alone.problem.stack.flat, {}, alone.batch(index_MB))
    flat = alone.problem.stack.flat.expand(50, -1).clone()
    copies = alone.problem.potential.value_and_grad(flat, {}, alone.batch(index_MB.expand(50, -1)))
    torch.testing.assert_close(copies.grad, expected.grad.expand(50, -1), rtol=1e-12, atol=1e-14)


def test_the_prior_is_the_configured_one():
    the_work = work(example("mlp"), [0], prior=Laplace(scale=0.25, fan_in=False))
    stack = the_work.problem.stack
    batch = the_work.batch(torch.arange(8)[None])
    laplace = LaplaceDistribution(ZERO, SCALE / 2).log_prob(stack.flat).sum(-1)
    gradient = the_work.problem.potential.value_and_grad(stack.flat, {}, batch)
    torch.testing.assert_close(gradient.potential - gradient.nll, -laplace / 26, rtol=1e-10, atol=0)


def test_the_nll_of_a_gradient_is_its_likelihood_part():
    the_work = work(example("conv-batch-norm"), [0, 1])
    stack = the_work.problem.stack
    gradient = the_work.problem.potential.value_and_grad(
        stack.flat, stack.buffers, the_work.batch(torch.arange(16).reshape(2, 8))
    )
    log_prior = Normal(ZERO, SCALE).log_prob(stack.flat).sum(-1)
    torch.testing.assert_close(gradient.potential, gradient.nll - log_prior / 26, rtol=1e-12, atol=0)


def test_an_evaluation_leaves_weights_and_buffers_as_they_were():
    the_work = work(example("conv-batch-norm"), [0, 1])
    stack = the_work.problem.stack
    before = stack.flat.clone(), {name: buffer.clone() for name, buffer in stack.buffers.items()}
    gradient = the_work.problem.potential.value_and_grad(
        stack.flat, stack.buffers, the_work.batch(torch.arange(16).reshape(2, 8))
    )
    assert torch.equal(stack.flat, before[0])
    assert all(torch.equal(stack.buffers[name], before[1][name]) for name in before[1])
    assert not stack.flat.requires_grad
    assert not any(buffer.requires_grad for buffer in gradient.buffers.values())
    assert not torch.equal(
        gradient.buffers["features.1.running_mean"], stack.buffers["features.1.running_mean"]
    )
