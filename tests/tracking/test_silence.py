"""Lost heartbeats, on a clock of the test's own."""

import logging

import pytest

from bdl_train.events import EventWriter
from bdl_train.runs import RunDir
from bdl_train.tracking import Follower
from bdl_train.tracking.progress import Progress
from bdl_train.tracking.silence import after, after_decisions, silent


def event(key, value=None, member=None):
    return {"key": key, "member": member, "step": 0, "value": value}


def started(*members, **where):
    return event("started", {"members": list(members), **where})


def test_a_stack_that_writes_nothing_for_a_minute_is_silent_and_counted_by_the_drivers_clock():
    signs = after({}, [("000", started(0)), ("001", started(1))], now=100.0)
    signs = after(signs, [("001", event("progress"))], now=130.0)
    assert silent(signs, 159.9) == {}
    assert silent(signs, 160.0) == {"000": 60.0}
    assert silent(signs, 200.0) == {"000": 100.0, "001": 70.0}
    assert silent(after(signs, [("000", event("progress"))], 200.0), 200.0) == {"001": 70.0}


@pytest.mark.parametrize(
    "end",
    [
        [event("member", "done", 0), event("member", "failed", 1)],
        [event("stopped", "on request")],
        [event("split", ["000a", "000b"])],
    ],
)
def test_a_stack_that_ended_is_not_expected_to_speak(end):
    signs = after({}, [("000", started(0, 1))], now=0.0)
    assert (
        silent(
            after(signs, [("000", end[0])] if len(end) == 1 else [("000", one) for one in end], 1.0), 999.0
        )
        == {}
    )


def test_of_a_stack_all_members_have_to_end():
    signs = after({}, [("000", started(0, 1)), ("000", event("member", "done", 0))], now=0.0)
    assert silent(signs, 999.0) == {"000": 999.0}


@pytest.mark.parametrize("key", ["retry", "given_up", "node_lost", "drained", "split"])
def test_a_stack_that_the_driver_took_away_is_not_expected_to_speak_until_it_starts_again(key):
    signs = after({}, [("000", started(0)), ("001", started(1))], now=0.0)
    signs = after_decisions(signs, [event(key, {"stack": "000", "reason": "its worker died"})])
    assert silent(signs, 99.0) == {"001": 99.0}
    assert silent(after(signs, [("000", started(0))], 50.0), 120.0) == {"000": 70.0, "001": 120.0}
    assert after_decisions(signs, [event("launched", {"stack": "001"}), event(key, "x")]) == signs


def test_the_driver_warns_once_with_stack_host_and_age_and_once_when_it_is_back(
    tmp_path, monkeypatch, caplog, capsys
):
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    run = RunDir(tmp_path)
    view = Progress({"000": 1})
    follower = Follower(run, [view])
    follower.start({})
    writer = EventWriter(run.stack("000") / "events.jsonl")
    writer.write("started", [(None, {"members": [0], "host": "node7"})], step=0)
    writer.flush()
    with caplog.at_level(logging.WARNING):
        for _ in range(15):
            follower.tick()
            clock[0] += 6.0
        lines = [record.getMessage() for record in caplog.records]
        assert lines == [
            "stack 000 on node7 has written nothing for 60 s: it is busy with something long, or lost"
        ]
        assert "1 stack silent for 84 s" in view._line()
        writer.write(
            "progress", [(None, {"step": 1, "num_steps": 9, "active": 1, "failed": 0, "nll": 1})], step=1
        )
        writer.close()
        follower.tick()
        follower.tick()
    assert [record.getMessage() for record in caplog.records][1:] == ["stack 000 is back after 84 s"]
    assert "silent" not in view._line()
