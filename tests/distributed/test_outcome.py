"""From results to entries and a status."""

import pytest

from bdl_train.distributed.outcome import member_entries, run_status
from bdl_train.distributed.plan import Plan
from bdl_train.training.prepared import StackTask

PLAN = Plan(
    (
        StackTask(id="000", members=(0, 1, 2), cpus=1, gpus=0),
        StackTask(id="001", members=(3,), cpus=1, gpus=0),
    ),
    1,
    (),
)


def done(*members: int) -> dict:
    return {"status": "done", "members": [{"id": m, "status": "done", "file": f"{m}"} for m in members]}


def test_members_stand_in_order_with_the_stack_that_trained_them():
    results = {"001": done(3), "000": {"status": "split"}, "000b": done(1, 2), "000a": done(0)}
    entries = member_entries(PLAN, results)
    assert [(one["id"], one["stack"], one["status"]) for one in entries] == [
        (0, "000a", "done"), (1, "000b", "done"), (2, "000b", "done"), (3, "001", "done"),
    ]  # fmt: skip


def test_lost_members_say_why():
    results = {
        "000": {"status": "split"},
        "000a": {"status": "failed", "reason": "its worker process died 3 times"},
        "000b": {
            "status": "done",
            "members": [{"id": 1, "status": "done"}, {"id": 2, "status": "failed", "reason": "NaN"}],
        },
    }
    entries = member_entries(PLAN, results)
    assert [one.get("reason") for one in entries] == [
        "its worker process died 3 times", None, "NaN", "its stack was never started",
    ]  # fmt: skip
    assert run_status(entries) == "partial"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [(["done", "done"], "complete"), (["done", "failed"], "partial"), (["failed", "failed"], "failed")],
)
def test_status_of_a_run(statuses, expected):
    assert run_status([{"status": status} for status in statuses]) == expected
