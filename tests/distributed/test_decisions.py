"""The driver's record."""

import errno
import json
import logging

from bdl_train.distributed.decisions import Decisions
from bdl_train.events import EventWriter
from bdl_train.runs import RunDir


def test_decisions_are_events_of_the_run_and_survive_the_driver(tmp_path):
    for reason in ("first", "second"):  # two sessions of one run
        made = Decisions(RunDir(tmp_path))
        made.note("retry", "003", reason=reason)
        made.close()
    lines = [json.loads(line) for line in (tmp_path / "driver.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [
        {"stack": "003", "reason": "first"}, {"stack": "003", "reason": "second"},
    ]  # fmt: skip
    assert {(line["key"], line["member"]) for line in lines} == {("retry", None)}


def test_a_full_disk_costs_the_record_and_is_said_once(tmp_path, monkeypatch, caplog):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = Decisions(RunDir(tmp_path))
    monkeypatch.setattr(EventWriter, "flush", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            made.note("launched", "000")
    monkeypatch.undo()
    made.close()
    assert caplog.text.count("No space left on device") == 1
