"""The event files and their reader."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdl_train.events import EventReader, EventWriter
from bdl_train.runs import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(str(tmp_path), "tiny")


def events_of(reader: EventReader) -> list[tuple[str, int | None, str, Any]]:
    return [(stack, event["member"], event["key"], event["value"]) for stack, event in reader.read()]


def test_events_of_two_stacks_arrive_once_and_in_order(run: RunDir):
    writers = {name: EventWriter(run.stack(name) / "events.jsonl") for name in ("s0", "s1")}
    reader = EventReader(run)
    assert events_of(reader) == []
    writers["s1"].write("train/nll", [(4, 0.5), (5, math.nan)], step=10)
    writers["s0"].write("started", [(None, {"members": [0, 1]})], step=0)
    assert events_of(reader) == []  # nothing is flushed yet
    for writer in writers.values():
        writer.flush()
    assert events_of(reader) == [
        ("s0", None, "started", {"members": [0, 1]}),
        ("s1", 4, "train/nll", 0.5),
        ("s1", 5, "train/nll", None),
    ]
    assert events_of(reader) == []
    writers["s0"].write("x", [(1, np.float32(2.0))], step=1)
    writers["s0"].close()
    assert events_of(reader) == [("s0", 1, "x", 2.0)]
    writers["s1"].close()


def test_a_line_holds_time_member_step_key_and_value(run: RunDir):
    writer = EventWriter(run.stack("s0") / "events.jsonl")
    before = time.time()
    writer.write("val/nll", [(2, 1.25)], step=30)
    writer.close()
    ((_, event),) = EventReader(run).read()
    assert before - 1 < event.pop("time") < time.time() + 1
    assert event == {"member": 2, "step": 30, "key": "val/nll", "value": 1.25}


def test_the_follower_gives_whole_lines_only(run: RunDir):
    path = run.stack("s0") / "events.jsonl"
    path.parent.mkdir(parents=True)
    line = json.dumps({"member": None, "key": "ünïcode", "value": 1})
    reader, found = EventReader(run), []
    content = (line + "\n").encode() * 2
    for i in range(len(content)):
        with path.open("ab") as file:
            file.write(content[i : i + 1])
        found += [(i, event) for event in events_of(reader)]
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    assert [i for i, _ in found] == ends
    assert all(event == ("s0", None, "ünïcode", 1) for _, event in found)


def test_a_torn_last_line_spoils_nothing_that_follows(run: RunDir):
    path = run.stack("s0") / "events.jsonl"
    first = EventWriter(path)
    first.write("a", [(None, 1)], step=0)
    first.close()
    with path.open("a") as file:
        file.write('{"time": 1, "member": nu')  # killed while writing
    second = EventWriter(path)
    second.write("b", [(None, 2)], step=1)
    second.close()
    assert [key for _, _, key, _ in events_of(EventReader(run))] == ["a", "b"]


def test_lines_that_are_no_events_are_skipped(run: RunDir):
    path = run.stack("s0") / "events.jsonl"
    path.parent.mkdir(parents=True)
    good = json.dumps({"member": 1, "key": "a", "value": 0}).encode()
    path.write_bytes(b"\n".join([b"", b"3", b"[1]", b"{", b"\xff\xfe", good, b""]))
    assert events_of(EventReader(run)) == [("s0", 1, "a", 0)]


def test_appending_goes_on_where_an_earlier_process_stopped(run: RunDir):
    path = run.stack("s0") / "events.jsonl"
    for value in range(3):
        writer = EventWriter(path)
        writer.write("a", [(None, value)], step=value)
        writer.close()
    assert [value for *_, value in events_of(EventReader(run))] == [0, 1, 2]
    assert len(path.read_text().splitlines()) == 3


def test_a_block_that_the_disk_took_in_part_is_an_error_and_tears_no_later_line(run: RunDir):
    path = run.stack("s0") / "events.jsonl"
    writer = EventWriter(path)
    writer.write("a", [(None, 1)], step=0)
    file = writer._file

    class Half:
        def write(self, block):
            return file.write(block[: len(block) // 2])

        name = str(path)
        close = file.close

    writer._file = Half()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    writer._file = file
    writer.write("a", [(None, 2)], step=1)
    writer.close()
    assert [value for *_, value in events_of(EventReader(run))] == [2]
