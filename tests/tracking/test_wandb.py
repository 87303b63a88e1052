"""wandb: offline for real, and every way in which it may fail."""

import logging
from pathlib import Path

import pytest
import wandb
from wandb.errors import CommError

from bdl_train.build import build
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker
from bdl_train.tracking.wandb import Wandb

NODE = {
    "_target_": "bdl_train.tracking.wandb.Wandb",
    "mode": "offline",
    "project": "tests",
    "entity": None,
    "init_timeout_s": 5.0,
}


class FakeRun:
    def __init__(self):
        self.rows, self.summary, self.finished = [], {}, None

    def define_metric(self, *args, **kwargs): ...

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def fake(monkeypatch):
    run = FakeRun()
    calls = []

    def init(**kwargs):
        calls.append(kwargs)
        return run

    monkeypatch.setattr(wandb, "init", init)
    return run, calls


def tracker(**changed) -> Tracker:
    return build({**NODE, **changed}, Tracker, key="tracking")


def event(key, value, *, member, step):
    return {"key": key, "member": member, "step": step, "value": value}


def test_one_row_holds_what_a_stack_says_at_one_step(tmp_path, fake):
    run, calls = fake
    one = tracker()
    one.start(RunDir(tmp_path / "energy" / "r1"), {"seed": 3})
    one.event("000", event("train/nll", 0.5, member=7, step=10))
    one.event("000", event("val/nll", 0.6, member=7, step=10))
    one.event("000", event("progress", {"step": 10}, member=None, step=10))  # no number: not for a curve
    one.event("000", event("val/stack_nll", 0.55, member=None, step=20))
    one.finish("complete", {"test/nll": 0.4})
    assert run.rows == [
        {"member/07/train/nll": 0.5, "member/07/val/nll": 0.6, "step": 10},
        {"stack/000/val/stack_nll": 0.55, "step": 20},
    ]
    assert run.summary == {"status": "complete", "test/nll": 0.4}
    assert run.finished == 0
    assert calls[0]["mode"] == "offline"
    assert (calls[0]["id"], calls[0]["name"], calls[0]["config"]) == ("r1", "energy/r1", {"seed": 3})


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_one_line_and_never_raises(where, tmp_path, fake, monkeypatch, caplog):
    run, _ = fake

    def broken(*args, **kwargs):
        raise OSError("disk on fire")

    monkeypatch.setattr(wandb if where == "init" else run, where, broken)
    one = tracker()
    with caplog.at_level(logging.WARNING):
        one.start(RunDir(tmp_path), {})
        for step in range(3):
            one.event("000", event("train/nll", 0.5, member=0, step=step))
        one.finish("complete", {})
    assert len(caplog.records) == 1
    assert "disk on fire" in caplog.text


def test_online_that_cannot_start_goes_on_offline_and_says_so(tmp_path, fake, monkeypatch, caplog):
    run, _ = fake
    modes = []

    def init(**kwargs):
        modes.append(kwargs["mode"])
        if kwargs["mode"] == "online":
            raise CommError("no network")
        return run

    monkeypatch.setattr(wandb, "init", init)
    one = tracker(mode="online")
    with caplog.at_level(logging.WARNING):
        one.start(RunDir(tmp_path), {})
    one.finish("failed", {})
    assert modes == ["online", "offline"]
    assert "no network" in caplog.text
    assert run.finished == 1


def test_disabled_never_touches_wandb(tmp_path, fake):
    _, calls = fake
    one = tracker(mode="disabled")
    one.start(RunDir(tmp_path), {})
    one.event("000", event("train/nll", 0.5, member=0, step=0))
    one.finish("complete", {})
    assert calls == []


def test_offline_writes_into_the_run_directory_wherever_the_service_was_started(tmp_path, monkeypatch):
    for name in ("first", "second"):  # one service process for both, in the working directory of the first
        (tmp_path / name / "run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        one = tracker()
        one.start(RunDir(Path("run")), {"seed": 1})
        one.event("000", event("train/nll", 0.5, member=0, step=0))
        one.finish("complete", {"test/nll": 0.1})
        assert len(list((tmp_path / name / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize(("key", "value"), [("mode", "sometimes"), ("init_timeout_s", 0), ("project", "")])
def test_bad_settings_name_the_key_and_the_value(key, value):
    with pytest.raises(UsageError, match=rf"(?s)tracking\.{key}.*{value!r}"):
        tracker(**{key: value})


def test_the_shipped_class_is_a_tracker():
    assert isinstance(tracker(), Wandb)
