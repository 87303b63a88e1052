"""The inline launcher: order, ticks, and what it does with results and errors. No training."""

import threading
import time
from typing import Any

import pytest

from bdl_train.build import allowed_packages, allowing
from bdl_train.distributed import Job, inline
from bdl_train.distributed.inline import Inline
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask

LAUNCHER = Inline(members_per_stack=None, cpus_per_stack=1, gpus_per_stack=0)


def tasks(*ids: str) -> list[StackTask]:
    return [StackTask(id=one, members=(2 * i, 2 * i + 1), cpus=1, gpus=0) for i, one in enumerate(ids)]


def launch(monkeypatch, tmp_path, work, *ids: str, tick=lambda: None) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr(inline, "work", work)
    data: Any = None
    return LAUNCHER.launch(tasks(*ids), Job({}, data, RunDir(tmp_path)), tick)


def test_stacks_run_in_order_beside_the_main_thread_while_ticks_go_on(monkeypatch, tmp_path):
    seen, ticks = [], []
    monkeypatch.setattr(inline, "TICK_S", 0.01)

    def work(task, job):
        seen.append((task.id, threading.current_thread() is threading.main_thread(), allowed_packages()))
        time.sleep(0.05)
        return {"status": "done"}

    with allowing(["my_package"]):
        results = launch(monkeypatch, tmp_path, work, "000", "001", tick=lambda: ticks.append(len(seen)))
    assert seen == [("000", False, ("my_package",)), ("001", False, ("my_package",))]
    assert results == {"000": {"status": "done"}, "001": {"status": "done"}}
    assert len(ticks) > 3
    assert ticks[-1] == 2  # the last tick comes after the last stack


def test_a_stack_that_was_cut_goes_on_as_its_halves(monkeypatch, tmp_path):
    seen = []

    def work(task, job):
        seen.append((task.id, task.members))
        return {"status": "split"} if task.id == "000" else {"status": "done"}

    results = launch(monkeypatch, tmp_path, work, "000", "001")
    assert seen == [("000", (0, 1)), ("000a", (0,)), ("000b", (1,)), ("001", (2, 3))]
    assert set(results) == {"000", "000a", "000b", "001"}


def test_wrong_usage_that_shows_late_ends_the_run(monkeypatch, tmp_path):
    def work(task, job):
        raise UsageError("known too late")

    with pytest.raises(UsageError, match="known too late"):
        launch(monkeypatch, tmp_path, work, "000", "001")


def test_a_second_ctrl_c_does_not_wait_for_the_stack(monkeypatch, tmp_path):
    release = threading.Event()

    def work(task, job):
        release.wait(30)
        return {"status": "done"}

    def tick():
        raise KeyboardInterrupt  # where the signal handler raises it

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch(monkeypatch, tmp_path, work, "000", tick=tick)
    assert time.monotonic() - before < 10
    release.set()
