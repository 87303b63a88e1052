"""What a result asks for next, and which result speaks for a member in the end."""

from dataclasses import replace

import pytest

from bdl_train.distributed.follow_ups import follow_ups, in_the_end
from bdl_train.distributed.outcome import member_entries
from bdl_train.distributed.plan import Plan
from bdl_train.errors import UsageError
from bdl_train.training.prepared import StackTask

TASK = StackTask(id="004", members=(8, 9, 10), cpus=2, gpus=0.5)


def test_a_plain_result_asks_for_nothing():
    for result in ({"status": "done", "again": []}, {"status": "done"}, {"status": "failed"}):
        assert follow_ups(TASK, result) == ()


def test_a_cut_asks_for_halves_and_divergence_for_one_more_try():
    first, second = follow_ups(TASK, {"status": "split"})
    assert (first.id, first.members, second.id, second.members) == ("004a", (8,), "004b", (9, 10))
    (retry,) = follow_ups(TASK, {"status": "done", "again": [8, 10]})
    assert retry == StackTask(id="004r", members=(8, 10), cpus=2, gpus=0.5, attempt=1)


@pytest.mark.parametrize("again", [[1], "8", [8, 99]])
def test_members_that_the_stack_does_not_have_are_damage(again):
    with pytest.raises(UsageError, match=r"result\.json of stack 004 is damaged"):
        follow_ups(TASK, {"status": "done", "again": again})


@pytest.mark.parametrize("result", [{"status": "split"}, {"status": "done", "again": [8]}])
def test_members_that_interact_are_never_taken_apart(result):
    task = replace(TASK, together="they feel each other")
    assert follow_ups(task, {"status": "done", "again": []}) == ()
    with pytest.raises(UsageError, match=r"result\.json of stack 004 is damaged.*they feel each other"):
        follow_ups(task, result)


def test_the_retry_speaks_for_its_members():
    def entry(member, status="done", **more):
        return {"id": member, "status": status, **more}

    results = {
        "004": {"status": "done", "again": [8], "members": [entry(8, "failed"), entry(9), entry(10)]},
        "004r": {"status": "done", "members": [entry(8, "done", seed=5)]},
    }
    assert [task.id for task, _ in in_the_end([TASK], results)] == ["004", "004r"]
    entries = member_entries(Plan((TASK,), 1, ()), results)
    assert [(one["id"], one["status"], one["stack"]) for one in entries] == [
        (8, "done", "004r"), (9, "done", "004"), (10, "done", "004"),
    ]  # fmt: skip
