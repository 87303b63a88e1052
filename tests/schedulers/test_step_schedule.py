import pytest
import torch

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.schedulers import Schedule
from bdl_train.schedulers.step import Step


def test_factors_are_those_of_torchs_multistep():
    schedule = Step(milestones=[0.3, 0.7, 0.9], gamma=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    torchs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 7, 9], gamma=0.5)
    for step in range(10):
        assert schedule.factor(step, 10) == pytest.approx(torchs.get_last_lr()[0])
        optimizer.step()
        torchs.step()


def test_a_milestone_falls_at_the_same_share_of_a_longer_run():
    # In floating point 0.07 * 100 is more than 7.
    schedule = Step(milestones=[0.07], gamma=0.1)
    for num_steps in (100, 1000, 10_000):
        first = next(step for step in range(num_steps) if schedule.factor(step, num_steps) < 1)
        assert first == 7 * num_steps // 100


@pytest.mark.parametrize("milestones", [[0.5, 0.5], [0.75, 0.5]])
def test_milestones_that_do_not_increase_are_refused(milestones: list[float]):
    node = {"_target_": "bdl_train.schedulers.step.Step", "milestones": milestones, "gamma": 0.1}
    with pytest.raises(UsageError) as caught:
        build(node, Schedule, key="scheduler")
    assert str(caught.value) == f"scheduler: milestones must increase, got {milestones}."


@pytest.mark.parametrize("milestone", [0.0, 1.0, 30.0])
def test_milestones_are_shares_of_the_run(milestone: float):
    node = {"_target_": "bdl_train.schedulers.step.Step", "milestones": [milestone], "gamma": 0.1}
    with pytest.raises(UsageError, match=rf"scheduler\.milestones\[0\].*got {milestone}\.$"):
        build(node, Schedule, key="scheduler")
