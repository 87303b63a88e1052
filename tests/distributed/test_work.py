"""One stack's work: its log, and what becomes of errors. No training."""

import logging
from typing import Any

import pytest

from bdl_train.distributed import Job, work
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.training.ranks import ALONE

TASK = StackTask(id="000", members=(0, 1), cpus=1, gpus=0)


@pytest.fixture
def job(tmp_path) -> Job:
    data: Any = None
    return Job({"seed": 1}, data, RunDir(tmp_path))


def test_a_result_is_handed_on(monkeypatch, job):
    monkeypatch.setattr(work, "train_stack", lambda *args: {"status": "done", "args": args})
    assert work.work(TASK, job) == {"status": "done", "args": (TASK, job.config, job.data, job.run, ALONE)}


def test_an_error_becomes_a_reason_and_its_traceback_goes_to_the_log(monkeypatch, job, caplog):
    def broken(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(work, "train_stack", broken)
    assert work.work(TASK, job) == {"status": "failed", "reason": "MemoryError: no room"}
    text = (job.run.stack("000") / "log.txt").read_text()
    assert "Traceback" in text
    assert "in broken" in text
    assert "Traceback" not in caplog.text
    assert "MemoryError: no room" in caplog.text


def test_wrong_usage_is_no_lost_stack(monkeypatch, job):
    def broken(*args):
        raise UsageError("known too late")

    monkeypatch.setattr(work, "train_stack", broken)
    with pytest.raises(UsageError):
        work.work(TASK, job)


def test_the_log_holds_what_our_modules_say_meanwhile_and_nothing_else(monkeypatch, job):
    ours = logging.getLogger("bdl_train.some.module")

    def speaking(*args):
        ours.info("this network runs in a loop")
        ours.debug("too much")
        logging.getLogger("other").error("of a library")
        return {"status": "done"}

    monkeypatch.setattr(work, "train_stack", speaking)
    before = logging.getLogger("bdl_train").level, list(logging.getLogger("bdl_train").handlers)
    work.work(TASK, job)
    ours.info("afterwards")
    lines = (job.run.stack("000") / "log.txt").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO this network runs in a loop")
    assert before == (logging.getLogger("bdl_train").level, list(logging.getLogger("bdl_train").handlers))


def test_after_a_request_to_stop_nothing_starts(monkeypatch, job):
    def never(*args):
        raise AssertionError("it started")

    monkeypatch.setattr(work, "train_stack", never)
    job.run.stop_file.touch()
    assert work.work(TASK, job) == {"status": "stopped"}
    assert not job.run.stack("000").exists()
