"""`trainer.compile`: the compiled gradient is the eager one, and a gradient that cannot be compiled says so."""

import logging
from dataclasses import replace

import pytest
import torch
from tiny_problems import EXAMPLES, example, work
from torch import Tensor, nn

from bdl_train.potential import Potential, compiled_or_eager
from bdl_train.stack import StackedNetwork

M = 3


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old parts
@pytest.mark.parametrize(
    ("name", "executor"), [("mlp", "vmap"), ("mlp-dropout", "vmap"), ("conv-batch-norm", "loop")]
)
def test_compiled_and_eager_gradients_agree_step_by_step(name: str, executor, caplog):
    the_work = work(example(name), range(M), executor=executor)
    eager = the_work.problem.potential
    compiled = replace(eager, compile=True)
    flat, buffers = the_work.problem.stack.flat, the_work.problem.stack.buffers
    generator = torch.Generator().manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="bdl_train"):
        for step in range(4):
            batch = the_work.batch(torch.randint(26, (M, 8), generator=generator))
            one = compiled.value_and_grad(flat, buffers, batch)
            other = eager.value_and_grad(flat, buffers, batch)
            torch.testing.assert_close(one.potential, other.potential, rtol=1e-12, atol=0)
            torch.testing.assert_close(one.nll, other.nll, rtol=1e-12, atol=0)
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-13)
            for key in buffers:
                torch.testing.assert_close(one.buffers[key], other.buffers[key], rtol=1e-12, atol=1e-14)
            flat, buffers = flat - 0.05 * other.grad, other.buffers
            if step == 1:  # a validation in between leaves the template in eval mode
                eager(flat, buffers, batch, train=False)
    assert "uncompiled" not in caplog.text


class Times:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def step(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_steps_of_one_function_do_not_take_one_anothers_graph():
    network = work(example("mlp"), range(M)).problem.potential.network
    two, three = (compiled_or_eager(Times(factor).step, Times(factor).step, network) for factor in (2.0, 3.0))
    for rows in (4, 5):
        x = torch.arange(rows) + 0.5
        for _ in range(2):
            assert torch.equal(two(x), 2 * x)
            assert torch.equal(three(x), 3 * x)


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_graph_for_one_tensor_twice_is_not_taken_for_two():
    def step(a: Tensor, b: Tensor) -> Tensor:
        return 2 * a + b

    run = compiled_or_eager(step, step, work(example("mlp"), range(M)).problem.potential.network)
    x, y = torch.ones(3), 5 * torch.ones(3)
    assert torch.equal(run(x, x), 3 * x)
    assert torch.equal(run(x, y), 2 * x + y)


class Branches(nn.Module):
    """Looks at its values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def branching(*, compiled: bool) -> tuple[Potential, Tensor]:
    the_work = work(example("mlp"), range(M), executor="loop")
    network = StackedNetwork(Branches().double(), "loop")
    flat = torch.randn(M, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    potential = replace(
        the_work.problem.potential,
        network=network,
        compile=compiled,
        layout=replace(
            the_work.problem.stack.layout, names=("layer.weight", "layer.bias"), shapes=((1, 4), (1,))
        ),
    )
    prior = potential.prior
    assert hasattr(prior, "mean")
    return replace(potential, prior=type(prior)(prior.mean[:5], prior.std[:5])), flat  # pyright: ignore


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_a_gradient_that_cannot_be_compiled_runs_uncompiled_and_the_log_says_why(caplog):
    potential, flat = branching(compiled=True)
    eager, _ = branching(compiled=False)
    batch = work(example("mlp"), range(M)).batch(torch.arange(24).reshape(M, 8))
    with caplog.at_level(logging.WARNING, logger="bdl_train"):
        first = potential.value_and_grad(flat, {}, batch)
        second = potential.value_and_grad(flat, {}, batch)
    assert len([record for record in caplog.records if "runs uncompiled" in record.message]) == 1
    assert "trainer.compile" in caplog.text
    assert "ata-dependent" in caplog.text
    expected = eager.value_and_grad(flat, {}, batch)
    for one in (first, second):
        assert torch.equal(one.grad, expected.grad)
        assert torch.equal(one.potential, expected.potential)


def test_a_users_own_error_is_not_hidden(monkeypatch):
    potential, flat = branching(compiled=True)
    monkeypatch.setattr(Branches, "forward", lambda self, x: self.missing(x))
    batch = work(example("mlp"), range(M)).batch(torch.arange(24).reshape(M, 8))
    with pytest.raises(AttributeError, match="missing"):
        potential.value_and_grad(flat, {}, batch)


def test_the_form_for_the_compiler_is_the_same_function():
    for name in EXAMPLES:
        the_work = work(example(name), range(M))
        potential, stack = the_work.problem.potential, the_work.problem.stack
        batch = the_work.batch(torch.arange(24).reshape(M, 8))
        nll, grad, buffers = potential.traceable_nll_and_grad(stack.flat, stack.buffers, batch)
        expected = potential.nll_and_grad(stack.flat, stack.buffers, batch)
        torch.testing.assert_close(nll, expected[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(grad, expected[1], rtol=1e-9, atol=1e-14)
        assert buffers.keys() == expected[2].keys()
        assert all(torch.equal(buffers[key], expected[2][key]) for key in buffers)
