"""Who owns a lock: the living process that wrote it, however long it was silent, and nobody who came after it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdl_train import locks
from bdl_train.errors import UsageError
from bdl_train.files import write_bytes
from bdl_train.locks import lock_is_held, locked
from bdl_train.runs import RunDir, read_json

LONG_AGO = 10 * locks.STALE_S
HOLD = """
import sys, time
from pathlib import Path
from bdl_train.locks import locked
from bdl_train.runs import RunDir
with locked(RunDir(Path(sys.argv[1])).lock):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(str(tmp_path), "tiny")


def change(run: RunDir, **entries: Any) -> None:
    run.lock.write_text(json.dumps({**read_json(run.lock), **entries}))


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_suspended_process_keeps_its_lock_and_a_killed_one_loses_it_at_once(run: RunDir):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        change(run, heartbeat=time.time() - LONG_AGO)
        assert lock_is_held(run.lock)
        with pytest.raises(UsageError, match=f"in use by process {holder.pid} on "), locked(run.lock):
            pass
        holder.kill()
        # Not waited for: its number stays taken, by a process that has ended.
        wait_for(lambda: not lock_is_held(run.lock))
        with locked(run.lock):
            assert read_json(run.lock)["pid"] == os.getpid()


def test_a_new_process_with_the_old_number_does_not_own_the_lock(run: RunDir):
    with locked(run.lock):
        assert lock_is_held(run.lock)
        change(run, started=read_json(run.lock)["started"] - 1)
        assert not lock_is_held(run.lock)


def test_the_start_of_a_process_is_read_right_whatever_its_name(tmp_path: Path):
    odd = tmp_path / "a ) R 1 (b"
    odd.symlink_to("/bin/sleep")
    ticks = os.sysconf("SC_CLK_TCK")
    before = time.clock_gettime(time.CLOCK_BOOTTIME) * ticks
    with subprocess.Popen([str(odd), "60"]) as process:
        after = time.clock_gettime(time.CLOCK_BOOTTIME) * ticks
        started = locks._started_at(process.pid)
        process.kill()
    assert started is not None
    assert before - 2 <= started <= after + 2


@pytest.mark.parametrize("pid", [0, -1, 2**70])
def test_a_number_that_no_process_has_holds_nothing(pid: int, run: RunDir):
    lock = {"pid": pid, "host": socket.gethostname(), "heartbeat": time.time(), "started": 0}
    run.lock.write_text(json.dumps(lock))
    assert not lock_is_held(run.lock)


def test_without_start_times_the_heartbeat_of_a_living_process_decides(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locks, "_stat", lambda pid: [])
    with locked(run.lock):
        assert read_json(run.lock)["started"] is None
        assert lock_is_held(run.lock)
        change(run, heartbeat=time.time() - LONG_AGO)
        assert not lock_is_held(run.lock)


@pytest.mark.parametrize("after", [{"token": "of another", "pid": 1}, None], ids=["taken over", "removed"])
def test_a_lost_lock_is_neither_renewed_nor_removed_and_said_once(
    after: dict[str, Any] | None,
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    with caplog.at_level(logging.ERROR), locked(run.lock):
        if after is None:
            run.lock.unlink()
        else:
            # Whole, between two beats: half a file would be lost too, but by the test's own fault.
            with locks._alone_in(run.path):
                write_bytes(run.lock, json.dumps({**read_json(run.lock), **after}).encode())
        wait_for(lambda: "taken over" in caplog.text)
        time.sleep(0.1)
    assert caplog.text.count("was taken over") == 1
    if after is None:
        assert not run.lock.exists()
    else:
        assert read_json(run.lock)["token"] == "of another"


def test_two_holders_in_turn_have_two_tokens(run: RunDir):
    tokens = set()
    for _ in range(2):
        with locked(run.lock):
            tokens.add(read_json(run.lock)["token"])
    assert len(tokens) == 2


def test_a_lock_that_cannot_be_read_for_a_while_is_still_beaten(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    plain, failures = locks._is_ours, []

    def unreadable(lock: Path, token: str) -> bool:
        if len(failures) < 3:
            failures.append(lock)
            raise OSError("stale file handle")
        return plain(lock, token)

    with locked(run.lock):
        monkeypatch.setattr(locks, "_is_ours", unreadable)
        first = read_json(run.lock)["heartbeat"]
        wait_for(lambda: read_json(run.lock)["heartbeat"] > first)
    assert len(failures) == 3
    assert not run.lock.exists()
    assert caplog.text == ""


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def put_lock(run: RunDir, **changed: Any) -> None:
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time(), **changed}
    run.lock.write_text(json.dumps(lock))


def test_a_second_holder_is_refused_and_the_lock_is_given_back(run: RunDir):
    with locked(run.lock):
        assert lock_is_held(run.lock)
        before = run.lock.read_bytes()
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "), locked(run.lock):
            pass
        assert run.lock.read_bytes() == before
    assert not run.lock.exists()
    with locked(run.lock):
        pass
    assert os.listdir(run.path) == []


def test_the_lock_is_given_back_after_an_error(run: RunDir):
    with pytest.raises(KeyError), locked(run.lock):
        raise KeyError
    assert not run.lock.exists()


def test_the_lock_of_a_dead_process_is_taken_over(run: RunDir):
    put_lock(run, pid=dead_pid())
    assert not lock_is_held(run.lock)
    with locked(run.lock):
        assert read_json(run.lock)["pid"] == os.getpid()


def test_the_lock_of_a_silent_machine_is_taken_over(run: RunDir):
    put_lock(run, host="elsewhere", pid=1)
    with (
        pytest.raises(UsageError, match=r"process 1 on elsewhere, which was heard [0-9] s ago"),
        locked(run.lock),
    ):
        pass
    put_lock(run, host="elsewhere", pid=1, heartbeat=time.time() - locks.STALE_S - 1)
    with locked(run.lock):
        assert read_json(run.lock)["host"] == socket.gethostname()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1, "host": "x", "heartbeat": null}'])
def test_a_damaged_lock_is_no_lock(content: str, run: RunDir):
    run.lock.write_text(content)
    assert not lock_is_held(run.lock)
    with locked(run.lock):
        assert lock_is_held(run.lock)


def test_of_many_that_start_together_one_wins(run: RunDir):
    put_lock(run, pid=dead_pid())
    start, leave = threading.Barrier(8), threading.Event()
    outcomes: list[str] = []

    def contend() -> None:
        start.wait()
        try:
            with locked(run.lock):
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
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.01)
    failures = []

    def full(path: Path, content: bytes) -> None:
        if len(failures) < 3:
            failures.append(path)
            raise OSError("disk full")
        write_bytes(path, content)

    with locked(run.lock):
        monkeypatch.setattr(locks, "write_bytes", full)
        first = read_json(run.lock)["heartbeat"]
        deadline = time.time() + 10
        while read_json(run.lock)["heartbeat"] == first and time.time() < deadline:
            time.sleep(0.01)
        assert read_json(run.lock)["heartbeat"] > first
    assert len(failures) == 3
