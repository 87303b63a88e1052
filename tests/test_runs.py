"""The run directory: whole files or none, strict JSON, one holder of the lock, events without torn lines."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdl_train import runs
from bdl_train.errors import UsageError
from bdl_train.runs import (
    EventReader,
    EventWriter,
    RunDir,
    find_runs,
    glance_at_config,
    is_run,
    lock_is_held,
    locked,
    read_json,
    sha256,
    to_json,
    write_bytes,
    write_json,
)
from bdl_train.specs import TargetKind


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.create(str(tmp_path), "breast_cancer")
    made.config.write_text("seed: 0\n")
    made.plan.write_text("{}")
    return made


# --- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file_and_no_litter(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "manifest.json"
    write_bytes(path, b"old")

    def crash(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    if step == "write":
        monkeypatch.setattr(runs.os, "fsync", lambda fd: os.write(fd, b"half") and crash())
    elif step == "fsync":
        monkeypatch.setattr(runs.os, "fsync", crash)
    else:
        monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from bdl_train.runs import write_bytes\n"
        "for i in range(10**9):\n"
        "    write_bytes(Path(sys.argv[1]), bytes([65 + i % 26]) * 100_000)\n"
        "    i or print('started', flush=True)"
    )
    path = tmp_path / "checkpoint"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "started\n"
    for _ in range(200):
        content = path.read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
    writer.kill()
    writer.wait()
    writer.stdout.close()
    assert len(set(path.read_bytes())) == 1


def test_folders_are_made_and_files_replaced(tmp_path: Path):
    path = tmp_path / "a" / "b" / "c.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert read_json(path) == {"x": 2}
    assert os.listdir(path.parent) == ["c.json"]
    assert sha256(path) == sha256(path)
    assert len(sha256(path)) == 64


def test_json_is_strict():
    value = {
        "nan": math.nan,
        "inf": [-math.inf, (math.inf, 1.5)],
        "numpy": np.float32(0.5),
        "nan of numpy": np.float64("nan"),
        "count": np.int64(3),
        "yes": np.bool_(True),
        "array": np.array([[1.0, np.nan]]),
        "tensor": torch.tensor(2.5),
        "tensors": torch.tensor([1, 2]),
        "path": Path("a/b"),
        "kind": TargetKind.CLASS,
        7: None,
    }
    text = json.dumps(to_json(value), allow_nan=False)
    assert json.loads(text) == {
        "nan": None,
        "inf": [None, [None, 1.5]],
        "numpy": 0.5,
        "nan of numpy": None,
        "count": 3,
        "yes": True,
        "array": [[1.0, None]],
        "tensor": 2.5,
        "tensors": [1, 2],
        "path": "a/b",
        "kind": "class",
        "7": None,
    }


def test_written_json_holds_null_for_nan(tmp_path: Path):
    write_json(tmp_path / "metrics.json", {"test/nll": math.nan, "test/ece": 0.25})
    assert (tmp_path / "metrics.json").read_text() == '{\n  "test/nll": null,\n  "test/ece": 0.25\n}\n'


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "[" * 100_000, '"\udc80"'])
def test_json_that_cannot_be_read_names_its_file(text: str, tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"plan\.json cannot be read"):
        read_json(path)
    with pytest.raises(UsageError, match=r"other\.json is missing"):
        read_json(tmp_path / "other.json")


def test_a_file_of_an_unfinished_run_that_is_missing_says_how_to_finish_the_run(tmp_path: Path):
    run = RunDir(tmp_path)
    path = run.posterior / "posterior.json"
    write_json(run.plan, {})
    with pytest.raises(UsageError) as caught:
        read_json(path)
    assert str(caught.value).endswith(f"Finish it with: bdl train resume={tmp_path}")
    write_json(run.manifest, {})
    with pytest.raises(UsageError) as caught:
        read_json(path)
    assert "resume" not in str(caught.value)


# --- run directories ------------------------------------------------------------------------------------------


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path):
    made = {RunDir.create(str(tmp_path), "x").path for _ in range(20)}
    assert len(made) == 20
    assert all(path.parent == tmp_path / "x" and path.is_dir() for path in made)


def test_an_output_dir_that_cannot_be_made_is_the_users_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="change output_dir"):
        RunDir.create(str(tmp_path / "file"), "x")


def test_what_is_no_run_is_refused(tmp_path: Path, run: RunDir):
    assert RunDir.open(run.path) == run
    with pytest.raises(UsageError, match=r"run=.*nowhere is not a directory"):
        RunDir.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"resume=.* holds no run: config\.yaml is missing"):
        RunDir.open(tmp_path / "empty", key="resume")
    with pytest.raises(UsageError, match=r"^run= is empty: `bdl runs` lists the runs\.$"):
        RunDir.open("")


def test_of_a_folder_of_runs_the_newest_is_suggested(tmp_path: Path):
    for name in ("b/20260101-120000-aaaaaa", "a/20260102-120000-bbbbbb", "c/20251231-120000-cccccc"):
        (tmp_path / name / "stacks").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    with pytest.raises(
        UsageError, match=r"run=.*a folder of runs: .* newest is .*/a/20260102-120000-bbbbbb\.$"
    ):
        RunDir.open(tmp_path)


@pytest.mark.parametrize("status", ["complete", "partial", "failed"])
def test_status_comes_from_the_manifest_even_while_locked(status: str, run: RunDir):
    write_json(run.manifest, {"status": status})
    assert run.status() == status
    with locked(run):
        assert run.status() == status


def test_without_a_manifest_the_lock_decides(run: RunDir):
    assert run.status() == "interrupted"
    with locked(run):
        assert run.status() == "running"
    assert run.status() == "interrupted"


@pytest.mark.parametrize("content", ["{}", "[]", "3"])
def test_a_manifest_without_status_is_damaged(content: str, run: RunDir):
    run.manifest.write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json has no status"):
        run.status()


def test_runs_are_found_at_any_depth_oldest_first(tmp_path: Path):
    names = ["b/20260102-000000-aaaaaa", "a/x/20260101-000000-bbbbbb", "a/20260103-000000-cccccc"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / names[0] / "plan.json").write_text("{}")
    (tmp_path / names[1] / "stacks").mkdir()
    assert not is_run(tmp_path / names[2])
    assert [run.path for run in find_runs(tmp_path)] == [tmp_path / names[1], tmp_path / names[0]]
    assert find_runs(tmp_path / names[0]) == [RunDir(tmp_path / names[0])]
    assert find_runs(tmp_path / "nowhere") == []


# --- lock -----------------------------------------------------------------------------------------------------


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def put_lock(run: RunDir, **changed: Any) -> None:
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time(), **changed}
    run.lock.write_text(json.dumps(lock))


def test_a_second_holder_is_refused_and_the_lock_is_given_back(run: RunDir):
    with locked(run):
        assert lock_is_held(run.lock)
        before = run.lock.read_bytes()
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "), locked(run):
            pass
        assert run.lock.read_bytes() == before
    assert not run.lock.exists()
    with locked(run):
        pass
    assert sorted(os.listdir(run.path)) == ["config.yaml", "plan.json"]


def test_the_lock_is_given_back_after_an_error(run: RunDir):
    with pytest.raises(KeyError), locked(run):
        raise KeyError
    assert not run.lock.exists()


def test_the_lock_of_a_dead_process_is_taken_over(run: RunDir):
    put_lock(run, pid=dead_pid())
    assert not lock_is_held(run.lock)
    with locked(run):
        assert read_json(run.lock)["pid"] == os.getpid()


def test_the_lock_of_a_silent_machine_is_taken_over(run: RunDir):
    put_lock(run, host="elsewhere", pid=1)
    with pytest.raises(UsageError, match=r"process 1 on elsewhere, which was heard [0-9] s ago"), locked(run):
        pass
    put_lock(run, host="elsewhere", pid=1, heartbeat=time.time() - runs.STALE_S - 1)
    with locked(run):
        assert read_json(run.lock)["host"] == socket.gethostname()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1, "host": "x", "heartbeat": null}'])
def test_a_damaged_lock_is_no_lock(content: str, run: RunDir):
    run.lock.write_text(content)
    assert not lock_is_held(run.lock)
    with locked(run):
        assert lock_is_held(run.lock)


def test_of_many_that_start_together_one_wins(run: RunDir):
    put_lock(run, pid=dead_pid())
    start, leave = threading.Barrier(8), threading.Event()
    outcomes: list[str] = []

    def contend() -> None:
        start.wait()
        try:
            with locked(run):
                outcomes.append("held")
                leave.wait(10)
        except UsageError:
            outcomes.append("refused")
            if outcomes.count("refused") == 7:
                leave.set()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 7


def test_the_heart_beats_and_survives_a_full_disk(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "HEARTBEAT_S", 0.01)
    failures = []

    def full(path: Path, content: bytes) -> None:
        if len(failures) < 3:
            failures.append(path)
            raise OSError("disk full")
        write_bytes(path, content)

    with locked(run):
        monkeypatch.setattr(runs, "write_bytes", full)
        first = read_json(run.lock)["heartbeat"]
        deadline = time.time() + 10
        while read_json(run.lock)["heartbeat"] == first and time.time() < deadline:
            time.sleep(0.01)
        assert read_json(run.lock)["heartbeat"] > first
    assert len(failures) == 3


# --- events ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 3\ndata: {split: 1}\n", {"seed": 3, "data": {"split": 1}}),
        ("[" * 100_000, {}),  # libyaml's loader would overflow the stack
        ("- " * 100_000, {}),
        ("seed: [3\n", {}),
        ("- 3\n", {}),
        ("!!python/object/apply:os.getcwd []\n", {}),
    ],
)
def test_a_listing_reads_what_it_can_of_a_config(text, expected, run: RunDir):
    run.config.parent.mkdir(parents=True, exist_ok=True)
    run.config.write_text(text)
    assert glance_at_config(run) == expected
    run.config.unlink()
    assert glance_at_config(run) == {}
