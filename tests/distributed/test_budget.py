"""The budget by values: what is refused, what was used, and when there is no room."""

import pytest
import yaml

from bdl_train.build import build
from bdl_train.distributed.budget import Budget, Spent, device_seconds
from bdl_train.errors import UsageError
from bdl_train.schema import shipped
from bdl_train.training.prepared import StackTask

SHIPPED = yaml.safe_load((shipped() / "budget" / "default.yaml").read_text())


def budget(**settings) -> Budget:
    return build({**SHIPPED, **settings}, Budget, key="budget")


def test_the_shipped_budget_has_no_limit_but_the_number_of_members():
    assert budget().limits == {}
    assert budget().why_not(Spent(1e9, 1e9), Spent(1e9, 1e9)) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": 0}, "budget.tolerance"),
        ({"min_members": 2}, "budget.min_members"),
        ({"wave": 0}, "budget.wave"),
        ({"device_hours": -1}, "budget.device_hours"),
        ({"max_members": 3}, "budget.max_members=3 is below budget.min_members=4"),
        ({"cost": 5}, "budget.cost_per_device_hour"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        budget(**settings)


def test_what_was_used_by_hand():
    spent = Spent(wall_s=20.0, device_s=1800.0) + Spent(wall_s=10.0, device_s=5400.0)
    assert budget().used(spent) == {"wall_time_s": 30.0, "device_hours": 2.0}
    assert budget(cost_per_device_hour=3.5).used(spent)["cost"] == 7.0


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"wall_time_s": 100}, "budget.wall_time_s=100 is spent"),
        ({"wall_time_s": 149}, "budget.wall_time_s=149 has no room for another wave: 100 is spent"),
        ({"wall_time_s": 150}, None),
        ({"device_hours": 2.9}, "budget.device_hours=2.9 has no room"),
        ({"device_hours": 3}, None),
        ({"cost": 11, "cost_per_device_hour": 4}, "budget.cost=11 has no room"),
        ({"cost": 12, "cost_per_device_hour": 4}, None),
    ],
)
def test_a_wave_that_would_pass_a_limit_has_no_room(limits, words):
    why_not = budget(**limits).why_not(Spent(100.0, 7200.0), Spent(50.0, 3600.0))
    assert why_not is None if words is None else why_not is not None and words in why_not


def test_device_time_counts_shares_of_gpus_ranks_and_what_was_trained_again():
    def task(name: str, gpus: float, ranks: int = 1, members: tuple[int, ...] = (0, 1)) -> StackTask:
        return StackTask(id=name, members=members, cpus=1, gpus=gpus, ranks=ranks)

    done = {"status": "done", "seconds": 10.0, "members": []}
    tasks = [task("000", 0), task("001", 0.25), task("002", 1, ranks=4), task("003", 0, members=(7, 8))]
    results = {
        "000": {**done, "again": [1]}, "000r": done,  # a CPU counts as one device: 20
        "001": {"status": "split"}, "001a": done, "001b": {"status": "failed"},  # 2.5
        "002": done,  # 40
    }  # fmt: skip
    assert device_seconds(tasks, results) == 20 + 2.5 + 40
