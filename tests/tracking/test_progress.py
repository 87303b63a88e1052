"""The progress line from hand-made events."""

import re

from bdl_train.runs import RunDir
from bdl_train.tracking.progress import PLAIN_EVERY_S, Progress


def progress(step, *, num_steps=100, active=2, failed=0, nll=0.5):
    value = {"step": step, "num_steps": num_steps, "active": active, "failed": failed, "nll": nll}
    return {"key": "progress", "member": None, "step": step, "value": value}


def started(members, step=0):
    return {"key": "started", "member": None, "step": step, "value": {"members": members}}


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("bdl_train.tracking.progress.time.monotonic", lambda: self.now)


def test_plain_lines_say_members_steps_loss_throughput_and_time_left(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    view = Progress({"000": 2, "001": 2})
    view.start(RunDir(tmp_path), {})
    for stack, members in (("000", [0, 1]), ("001", [2, 3])):
        view.event(stack, started(members))
    clock.now += 10
    view.event("000", progress(30, nll=0.4))
    view.event("001", progress(50, nll=0.2))
    clock.now += PLAIN_EVERY_S
    view.event("001", progress(50, nll=0.2))
    out = capsys.readouterr().out
    assert "training 4 members in 2 stacks" in out
    # 2·30 + 2·50 member-steps in 15 s; two fifths are done, so half as long again is left at most.
    assert "0/4 members, step 40/100, NLL 0.3, 11 member-steps/s, ≤0:22 left" in out


def test_lines_are_not_repeated_and_not_more_often_than_every_few_seconds(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    view = Progress({"000": 2})
    view.start(RunDir(tmp_path), {})
    view.event("000", started([0, 1]))
    capsys.readouterr()
    for step in range(1, 50):
        clock.now += PLAIN_EVERY_S / 10
        view.event("000", progress(step))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_end_shows_members_done_and_failed(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    view = Progress({"000": 2})
    view.start(RunDir(tmp_path), {})
    view.event("000", started([0, 1]))
    clock.now += 1
    view.event("000", progress(100, active=1, failed=1))
    view.event("000", {"key": "member", "member": 0, "step": 100, "value": "done"})
    view.event("000", {"key": "member", "member": 1, "step": 100, "value": "failed"})
    view.finish("partial", {})
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"1/2 members, 1 failed, step 100/100, .*\[partial\]", last)
    assert "left" not in last


def test_steps_of_an_earlier_session_do_not_count_as_speed(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    view = Progress({"000": 2})
    view.start(RunDir(tmp_path), {})
    view.past("000", started([0, 1]))
    view.past("000", progress(80))
    view.event("000", started([0, 1], step=80))
    clock.now += 10
    view.event("000", progress(90))
    view.finish("complete", {})
    assert "step 90/100, NLL 0.5, 2 member-steps/s" in capsys.readouterr().out


def test_members_that_stopped_early_count_as_done(tmp_path, monkeypatch):
    view = Progress({"000": 2})
    view.event("000", progress(50, active=1))
    assert view._share() == 0.75
