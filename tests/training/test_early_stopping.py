"""Early stopping of each member of a stack against a loop written for one."""

import math

import pytest
import torch
from tiny_problems import example, through_disk, work
from torch import Tensor

from bdl_train.inference._descent import DescentState
from bdl_train.training.early_stopping import EarlyStopping

EPOCHS, M = 14, 6


def curves() -> Tensor:
    """Validation NLL `[E, M]` that falls and rises; member 4 is NaN at first, member 5 always."""
    generator = torch.Generator().manual_seed(3)
    nll = torch.randn(EPOCHS, M, generator=generator, dtype=torch.float64).cumsum(0)
    nll[:2, 4] = math.nan
    nll[:, 5] = math.nan
    return nll


def by_hand(nll: list[float], patience: int) -> tuple[int, int]:
    """The best epoch (0: none) and the last epoch trained, for one member."""
    best, best_epoch = math.inf, 0
    for epoch, value in enumerate(nll, start=1):
        if value < best:
            best, best_epoch = value, epoch
        elif epoch - best_epoch >= patience:
            return best_epoch, epoch
    return best_epoch, len(nll)


def state_of_stack() -> DescentState:
    return DescentState(work(example("conv-batch-norm"), range(M)).problem)


def train_one_epoch(state: DescentState, epoch: int) -> None:
    """Marks the weights and buffers of the members that still train with the epoch."""
    state.stack.flat[state.active] = float(epoch)
    state.stack.buffers["features.1.running_mean"][state.active] = float(epoch)


@pytest.mark.parametrize("patience", [1, 2, 3, 20])
def test_every_member_stops_and_keeps_its_best_weights_as_if_alone(patience: int):
    state = state_of_stack()
    start = state.stack.flat.clone()
    stopping = EarlyStopping(state, patience)
    last = torch.zeros(M)
    for epoch, nll in enumerate(curves(), start=1):
        last[state.active] = epoch
        train_one_epoch(state, epoch)
        stopping.update(state, nll, epoch)
    stopping.restore(state)
    for m in range(M):
        best_epoch, last_epoch = by_hand(curves()[:, m].tolist(), patience)
        assert (int(stopping.best_epoch[m]), int(last[m])) == (best_epoch, last_epoch), m
        kept = best_epoch or last_epoch  # never a finite value: nothing is better than where it ended
        assert torch.equal(state.stack.flat[m], torch.full_like(start[m], kept)), m
        assert state.stack.buffers["features.1.running_mean"][m].unique().tolist() == [kept]
        assert bool(state.active[m]) is (last_epoch == EPOCHS and EPOCHS - best_epoch < patience), m


def test_a_failed_member_is_not_revived_and_keeps_what_it_had():
    state = state_of_stack()
    stopping = EarlyStopping(state, 5)
    train_one_epoch(state, 1)
    stopping.update(state, torch.zeros(M, dtype=torch.float64), 1)
    state.failed[2], state.active[2] = True, False
    train_one_epoch(state, 2)
    stopping.update(state, torch.full((M,), -1.0, dtype=torch.float64), 2)
    assert state.active.tolist() == [True, True, False, True, True, True]
    assert stopping.best_epoch.tolist() == [2, 2, 1, 2, 2, 2]


def test_saved_and_loaded_it_goes_on_the_same():
    straight, resumed = state_of_stack(), state_of_stack()
    one, other = EarlyStopping(straight, 3), EarlyStopping(resumed, 3)
    for epoch, nll in enumerate(curves(), start=1):
        train_one_epoch(straight, epoch)
        one.update(straight, nll, epoch)
        if epoch == 4:
            other.load_state_dict(through_disk(one.state_dict()))
            resumed.load_state_dict(through_disk(straight.state_dict()))
        elif epoch > 4:
            train_one_epoch(resumed, epoch)
            other.update(resumed, nll, epoch)
    one.restore(straight)
    other.restore(resumed)
    assert torch.equal(straight.stack.flat, resumed.stack.flat)
    assert torch.equal(straight.active, resumed.active)
    assert torch.equal(one.best_epoch, other.best_epoch)
