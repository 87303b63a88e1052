"""Snapshot ensembles: the learning rate of the paper, and weights kept at the ends of its cycles alone."""

import math
from typing import Any

import pytest
import torch
from tiny_problems import (
    KNOWN_NOISE,
    SGD,
    Example,
    Work,
    config_of,
    data_of,
    example,
    node_of,
    through_disk,
    work,
)
from torch import Tensor

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.inference import Method, Setting
from bdl_train.posteriors.atoms import Atoms
from bdl_train.priors.gaussian import Gaussian
from bdl_train.training.problem import Recipe

STEPS = 3
"""Of an epoch: 26 examples in batches of 8."""
PRIOR_STD, NOISE_STD = 0.5, 0.5


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def snapshot(**changed: Any) -> Method[Any]:
    return build({**node_of("inference", "snapshot"), **changed}, Method, key="inference")


def paper_lr(t: int, num_iterations: int, num_cycles: int) -> float:
    """α(t) / α₀ at iteration t, counted from 1: equation 2 of Huang et al. (2017), as printed."""
    length = math.ceil(num_iterations / num_cycles)
    return 0.5 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)


def rates(num_cycles: int, num_epochs: int) -> list[float]:
    """The learning rate that the optimiser had at each step, over the configured one."""
    method = snapshot(num_cycles=num_cycles, num_draws=1)
    the_work = work(example("mlp"), [0], num_epochs=num_epochs)
    state, found = method.init(the_work.problem), []
    for _ in range(num_epochs * STEPS):
        the_work.advance(method, state, 1)
        found.append(state.optimizer.optimizer.param_groups[0]["lr"] / SGD["lr"])
    return found


@pytest.mark.parametrize(("num_cycles", "num_epochs"), [(1, 4), (2, 4), (3, 6), (5, 5)])
def test_the_learning_rate_is_that_of_the_paper(num_cycles: int, num_epochs: int):
    total = num_epochs * STEPS
    assert rates(num_cycles, num_epochs) == pytest.approx(
        [paper_lr(t, total, num_cycles) for t in range(1, total + 1)], rel=1e-12
    )


def test_cycles_that_do_not_divide_the_steps_differ_by_one_step_and_are_all_there():
    # 15 steps in 4 cycles; the paper's, of 4 steps, would leave the last one with 3 steps at its largest rates.
    found = rates(4, 5)
    starts = [i for i, rate in enumerate(found) if rate == 1.0]
    assert starts == [0, 3, 7, 11]
    for start, stop in zip(starts, [*starts[1:], 15], strict=True):
        expected = [0.5 * (1 + math.cos(math.pi * i / (stop - start))) for i in range(stop - start)]
        assert found[start:stop] == pytest.approx(expected, rel=1e-12)


# --- the snapshots ------------------------------------------------------------------------------------------------


def plain_torch(
    the_work: Work, of: Example, member: int, num_cycles: int, num_epochs: int
) -> dict[int, Tensor]:
    """Weights of one member after every epoch, by torch's SGD on a network of its own and the potential in full."""
    network = of.make_network().double()
    start = the_work.problem.stack.members([member]).params
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(start[name][0])
    optimizer = torch.optim.SGD(network.parameters(), lr=SGD["lr"], momentum=SGD["momentum"])
    method = snapshot(num_cycles=num_cycles, num_draws=1)
    state, weights, t = method.init(the_work.problem), {}, 0
    feed = the_work.feed(the_work.timeline(method), state)
    for epoch in range(1, num_epochs + 1):
        for call in feed:
            assert torch.is_tensor(call)
            rows, t = call[0, member], t + 1
            for group in optimizer.param_groups:
                group["lr"] = SGD["lr"] * paper_lr(t, num_epochs * STEPS, num_cycles)
            nll = (network(of.x[rows])[:, 0] - of.y[rows]).square().mean() / (2 * NOISE_STD**2)
            norm = torch.stack([parameter.square().sum() for parameter in network.parameters()]).sum()
            optimizer.zero_grad()
            (nll + norm / (2 * PRIOR_STD**2) / len(of.y)).backward()
            optimizer.step()
        state.step = epoch * STEPS  # the next epoch's order
        weights[epoch] = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    return weights


def learned(method: Method[Any], the_work: Work) -> list[Atoms]:
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    posteriors = method.posterior(state)
    assert all(isinstance(one, Atoms) for one in posteriors)
    return posteriors  # pyright: ignore[reportReturnType]


def problem(num_epochs: int, members: tuple[int, ...] = (0, 1)) -> Work:
    return work(example("mlp"), members, num_epochs=num_epochs, prior=Gaussian(scale=PRIOR_STD, fan_in=False))


def test_snapshots_are_the_weights_at_the_ends_of_the_last_cycles_and_at_no_other_epoch():
    of = example("mlp")
    assert of.likelihood is KNOWN_NOISE
    found = learned(snapshot(num_cycles=4, num_draws=3), problem(8))
    for member, posterior in enumerate(found):
        by_epoch = plain_torch(problem(8), of, member, num_cycles=4, num_epochs=8)
        assert posterior.num_atoms == 3
        for atom, epoch in zip(posterior.flat, (4, 6, 8), strict=True):
            torch.testing.assert_close(atom, by_epoch[epoch], rtol=1e-9, atol=1e-12)
            distance = {e: (atom - weights).abs().max() for e, weights in by_epoch.items()}
            assert min(distance, key=lambda e: float(distance[e])) == epoch
            assert all(d > 1e-4 for e, d in distance.items() if e != epoch)


def test_keeping_fewer_keeps_the_last():
    many, few = (learned(snapshot(num_cycles=5, num_draws=k), problem(5)) for k in (5, 2))
    for all_of_them, last in zip(many, few, strict=True):
        assert torch.equal(all_of_them.flat[3:], last.flat)
    assert len({tuple(atom.tolist()) for atom in many[0].flat}) == 5


def test_each_snapshot_has_the_buffers_of_its_time():
    method, the_work = (
        snapshot(num_cycles=3, num_draws=2),
        work(example("conv-batch-norm"), [0, 1], num_epochs=6),
    )
    state, at = method.init(the_work.problem), {}
    for epoch in range(1, 7):
        the_work.advance(method, state, STEPS)
        at[epoch] = {name: buffer.clone() for name, buffer in state.stack.buffers.items()}
    for m, posterior in enumerate(method.posterior(state)):
        for k, epoch in enumerate((4, 6)):
            _, buffers = list(posterior.draw(2, 0))[k]
            assert buffers.keys() == at[epoch].keys()
            assert all(torch.equal(buffers[name], at[epoch][name][m]) for name in buffers)


def test_a_posterior_asked_for_too_early_is_refused():
    method, the_work = snapshot(num_cycles=4, num_draws=3), problem(4)
    state = method.init(the_work.problem)
    the_work.advance(method, state, 2 * STEPS)
    with pytest.raises(RuntimeError, match="2 of 3 snapshots are taken"):
        method.posterior(state)


def test_a_run_resumed_with_more_epochs_keeps_its_last_cycle_ends():
    method = snapshot(num_cycles=2, num_draws=2)
    shorter, longer = problem(4), problem(8)
    state = method.init(shorter.problem)
    shorter.advance(method, state, 3 * STEPS)
    stored, resumed = through_disk(state.state_dict()), method.init(longer.problem)
    resumed.load_state_dict(stored)
    ends = []
    for epoch in range(4, 9):
        longer.advance(method, resumed, STEPS)
        if epoch in (4, 8):
            ends.append(resumed.stack.flat.clone())
    for m, posterior in enumerate(method.posterior(resumed)):
        assert torch.equal(posterior.tensors()["atoms"], torch.stack([end[m] for end in ends]))


# --- settings -----------------------------------------------------------------------------------------------------


def test_more_snapshots_than_cycles_are_refused():
    with pytest.raises(UsageError, match=r"num_draws must be num_cycles=4 at most, .* got 5"):
        snapshot(num_cycles=4, num_draws=5)


def test_more_cycles_than_epochs_are_refused_before_training():
    inference = {**node_of("inference", "snapshot"), "num_cycles": 7}
    with pytest.raises(
        UsageError, match=r"inference.num_cycles=7 needs an epoch .* there are 6: .*max_epochs"
    ):
        Recipe.of(config_of(inference=inference), data_of(example("mlp")))
    Recipe.of(config_of(inference={**inference, "num_cycles": 6}), data_of(example("mlp")))


def test_the_schedule_is_not_used():
    method = snapshot()
    assert method.unused_groups == ("scheduler",)

    class Never:
        def factor(self, step: int, num_steps: int) -> float:
            raise AssertionError("the schedule was asked")

    schedule: Any = Never()
    learned(snapshot(num_cycles=2, num_draws=1), work(example("mlp"), [0], num_epochs=2, schedule=schedule))


def test_as_many_cycles_as_epochs_are_allowed():
    likelihood, prior = example("mlp").likelihood, Gaussian(scale=1.0, fan_in=False)
    method = snapshot(num_cycles=3, num_draws=3)
    method.check(Setting(prior, likelihood, 3, 26, 8))
    the_work = work(example("mlp"), [0], num_epochs=3)
    state = method.init(the_work.problem)
    the_work.advance(method, state)
    assert method.posterior(state)[0].num_atoms == 3
