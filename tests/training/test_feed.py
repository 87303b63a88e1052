"""Which examples a member sees at a step."""

import pytest
import torch
from torch import Tensor

from bdl_train.training.feed import StepFeed, order

SEEDS = (11, 2**62 + 5, 12)
N, B = 23, 5  # 4 full batches an epoch, 3 examples left over


def feed(position: int = 0, *, steps_per_call: int = 1, seeds=SEEDS, batch_size: int = B) -> StepFeed:
    return StepFeed(seeds, N, batch_size, steps_per_call, lambda: position)


def steps(of: StepFeed) -> Tensor:
    """All steps of the epoch, `[steps, M, B]`."""
    return torch.cat(list(of))


def test_an_order_is_a_permutation_that_differs_between_members_and_epochs():
    orders = [order(seed, epoch, N) for seed in range(6) for epoch in range(6)]
    assert all(torch.equal(one.sort().values, torch.arange(N)) for one in orders)
    assert len({tuple(one.tolist()) for one in orders}) == 36
    assert torch.equal(order(3, 2, N), order(3, 2, N))


def test_orders_look_uniform_over_members_and_epochs():
    """Each example stands at each place equally often: a chi-square of N − 1 degrees a place."""
    rows = torch.stack([order(seed, epoch, 6) for seed in range(60) for epoch in range(20)])
    counts = torch.stack([(rows == example).sum(0) for example in range(6)]).double()
    assert ((counts - 200).square() / 200).sum(0).max() < 25.7  # 0.9999 quantile of chi-square with 5 degrees


def test_an_epochs_batches_are_the_start_of_the_members_order():
    index_SMB = steps(feed(position=8))  # epoch 2
    assert index_SMB.shape == (4, 3, 5)
    for m, seed in enumerate(SEEDS):
        assert torch.equal(index_SMB[:, m].flatten(), order(seed, 2, N)[:20])


def test_the_examples_left_over_change_from_epoch_to_epoch():
    left = []
    for epoch in range(12):
        used = steps(feed(position=4 * epoch))[:, 0].flatten()
        assert len(used.unique()) == 20
        left.append(frozenset(range(N)) - set(used.tolist()))
    assert all(len(one) == 3 for one in left)
    assert len(set(left)) > 8
    assert len(frozenset().union(*left)) > 15


@pytest.mark.parametrize("steps_per_call", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_from_the_middle_of_an_epoch_the_feed_gives_the_tail(done: int, steps_per_call: int):
    whole = steps(feed(position=4))
    tail = feed(position=4 + done, steps_per_call=steps_per_call)
    calls = list(tail)
    assert torch.equal(torch.cat(calls), whole[done:])
    assert len(calls) == -(-(4 - done) // steps_per_call)
    assert all(len(call) == steps_per_call for call in calls[:-1])


def test_a_members_batches_do_not_depend_on_the_stack():
    assert torch.equal(steps(feed())[:, 1:2], steps(feed(seeds=SEEDS[1:2])))


def test_a_batch_larger_than_the_data_is_all_of_it():
    of = feed(batch_size=100)
    assert (of.batch_size, of.steps_per_epoch, len(list(of))) == (N, 1, 1)
    assert torch.equal(steps(of)[0].sort(1).values, torch.arange(N).expand(3, -1))
