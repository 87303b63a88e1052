"""wandb: offline for real, online against a small server, and every way in which it may fail."""

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import wandb
from fake_wandb import ENTITY

from bdl_train.errors import UsageError
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking import Follower
from bdl_train.tracking._wandb_service import server as server_url
from bdl_train.tracking._wandb_service import service_process
from bdl_train.tracking.wandb import MOST_MEMBER_RUNS, Wandb

from .conftest import KEY, write

ID = "20260101-120000-a1b2c3"


def event(key, value, *, member, step):
    return {"key": key, "member": member, "step": step, "value": value}


def both_stacks(run: RunDir, *steps: int) -> None:
    """Losses of four members at these steps: the member's number plus the step."""
    for stack, members in (("000", (0, 1)), ("001", (2, 3))):
        for step in steps:
            write(run, stack, *(("train/nll", member, step, float(member + step)) for member in members))
            write(run, stack, ("val/stack_nll", None, step, 1.0))


def offline_folders(run: RunDir) -> list[Path]:
    return sorted((run.path / "wandb").glob("offline-run-*"))


# --- what is logged -----------------------------------------------------------------------------------------------


def test_one_row_holds_what_a_stack_says_at_one_step(run, fake, tracker):
    wandb_run, calls = fake
    one = tracker(mode="offline")
    one.start(run, {"seed": 3})
    one.event("000", event("train/nll", 0.5, member=1, step=10))
    one.event("000", event("val/nll", 0.6, member=1, step=10))
    one.event("000", event("progress", {"step": 10}, member=None, step=10))  # no number: not for a curve
    one.event("000", event("val/stack_nll", 0.55, member=None, step=20))
    one.finish("stopped", {"test/nll": 0.4})
    assert wandb_run.rows == [
        {"member/01/train/nll": 0.5, "member/01/val/nll": 0.6, "step": 10},
        {"stack/000/val/stack_nll": 0.55, "step": 20},
    ]
    assert wandb_run.summary == {"status": "stopped", "test/nll": 0.4}
    assert wandb_run.finished == 0
    assert calls[0]["mode"] == "offline"
    assert (calls[0]["id"], calls[0]["name"], calls[0]["config"]) == (ID, f"energy/{ID}", {"seed": 3})


def test_the_ensemble_has_a_mean_and_a_spread_of_its_own(run, fake, tracker):
    wandb_run, _ = fake
    follower = Follower(run, [tracker(mode="offline")])
    follower.start({})
    both_stacks(run, 10, 20)
    follower.tick()
    follower.finish("complete", {})
    rows = [row for row in wandb_run.rows if "ensemble/train/nll/mean" in row]
    # Of 10, 11, 12, 13: mean 11.5, population variance 1.25.
    assert [(row["step"], row["ensemble/train/nll/mean"]) for row in rows] == [(10, 11.5), (20, 21.5)]
    assert rows[0]["ensemble/train/nll/std"] == pytest.approx(1.25**0.5)
    assert rows[0]["ensemble/train/nll/num_members"] == 4


# --- online and offline -------------------------------------------------------------------------------------------


def test_auto_is_online_with_a_key_and_the_server_has_every_row(server, run, tracker, caplog):
    follower = Follower(run, [tracker()])
    with caplog.at_level(logging.INFO):
        follower.start({"seed": 3})
        both_stacks(run, 10, 20)
        follower.tick()
        follower.finish("complete", {"test/nll": 0.4})
    assert follower.lost == []
    assert server.curve(ID, "member/03/train/nll") == [(10, 13.0), (20, 23.0)]
    assert server.curve(ID, "ensemble/train/nll/mean") == [(10, 11.5), (20, 21.5)]
    assert server.summaries[ID]["test/nll"] == 0.4
    assert server.summaries[ID]["status"] == "complete"
    assert f"{ENTITY['name']}/tests/runs/{ID}" in caplog.text
    assert KEY not in caplog.text
    assert KEY not in "".join(
        path.read_text(errors="replace") for path in run.path.rglob("*") if path.is_file()
    )


def test_a_key_in_a_netrc_file_is_found_too(server, run, tracker, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    tracker(mode="online").check(4)
    one = tracker()
    one.start(run, {})
    one.finish("stopped", {})
    assert server.summaries[ID]["status"] == "stopped"


def test_auto_without_a_key_is_offline_and_says_so_in_one_line(no_key, run, tracker, caplog):
    one = tracker()
    with caplog.at_level(logging.INFO):
        one.check(4)
        one.start(run, {})
        one.finish("stopped", {})
    assert [record.getMessage() for record in caplog.records if record.name.startswith("bdl_train")] == [
        f"wandb writes offline (no key for {server_url()} in WANDB_API_KEY or a netrc file); send it later: "
        f"wandb sync {offline_folders(run)[0]}"
    ]


def test_the_environment_can_hold_auto_offline(server, run, tracker, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    one = tracker()
    one.start(run, {})
    one.finish("stopped", {})
    assert "WANDB_MODE=offline" in caplog.text
    assert server.asked == []
    with pytest.raises(UsageError, match=r"tracking\.mode=online, but .*WANDB_MODE=offline"):
        tracker(mode="online").check(4)


@pytest.mark.parametrize(("key", "why"), [(None, "no key for"), ("short", "has 5")])
def test_online_without_a_usable_key_is_refused_before_any_work(key, why, no_key, tracker, monkeypatch):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UsageError, match=rf"tracking\.mode=online, but .*{why}.*wandb login"):
        tracker(mode="online").check(4)


@pytest.mark.parametrize("mode", ["auto", "online"])
@pytest.mark.parametrize("behaviour", ["fails", "hangs", "refuses"])
def test_a_server_that_does_not_answer_means_offline_within_the_bound(
    behaviour, mode, server, run, tracker, caplog
):
    server.behaviour = behaviour
    if behaviour == "refuses":
        server.shutdown()
        server.server_close()
    one = tracker(mode=mode, init_timeout_s=1.0)
    one.check(4)
    start = time.monotonic()
    one.start(run, {})
    for member in range(4):
        one.event("000", event("train/nll", 0.5, member=member, step=1))
    one.finish("stopped", {})
    assert time.monotonic() - start < 20  # 1 s, and what a busy machine takes to start a process twice
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("bdl_train")]
    assert "wandb writes offline" in line
    (folder,) = offline_folders(run)
    assert b"member/03/train/nll" in (folder / f"run-{ID}.wandb").read_bytes()


# --- a server, or a service, that dies in the middle --------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["fails", "hangs", "refuses"])
def test_a_server_that_dies_holds_up_neither_events_nor_the_end(behaviour, server, run, tracker, caplog):
    follower = Follower(run, [tracker(finish_timeout_s=2.0)])
    follower.start({})
    server.behaviour = behaviour
    if behaviour == "refuses":
        server.shutdown()
        server.server_close()
    start = time.monotonic()
    both_stacks(run, *range(200))
    follower.tick()
    assert time.monotonic() - start < 5
    write_json(
        run.manifest, {"members": [{"id": 0, "status": "done"}]}
    )  # for a table, which asks the server first
    follower.finish("complete", {})
    assert time.monotonic() - start < 30
    assert "wandb took no tables or plots" in caplog.text
    assert "2 s were too short to send all that is left; send it later: wandb sync" in caplog.text
    (folder,) = (run.path / "wandb").glob("run-*")
    assert b"member/03/train/nll" in (folder / f"run-{ID}.wandb").read_bytes()


def test_a_service_that_hangs_is_ended_and_holds_up_nothing(no_key, run, tracker, caplog, monkeypatch):
    monkeypatch.setattr("bdl_train.tracking.wandb.SLACK_S", 0.5)
    follower = Follower(run, [tracker(mode="offline", finish_timeout_s=0.5)])
    follower.start({})
    process = service_process()
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    start = time.monotonic()
    both_stacks(run, *range(50))
    follower.tick()
    follower.finish("complete", {})
    assert time.monotonic() - start < 15
    assert "cannot finish, it hangs" in caplog.text
    assert process.wait(10) == -signal.SIGKILL


def test_a_service_that_dies_is_one_line(no_key, run, tracker, caplog):
    follower = Follower(run, [tracker(mode="offline")])
    follower.start({})
    process = service_process()
    assert process is not None
    process.kill()
    process.wait()
    for step in range(3):
        both_stacks(run, step)
        follower.tick()
    follower.finish("complete", {})
    assert caplog.text.count("the run goes on without it") == 1
    assert len(follower.lost) == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failure_of_wandb_is_one_line_and_ends_no_training(where, run, fake, tracker, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise OSError("disk on fire")

    monkeypatch.setattr(wandb if where == "init" else fake[0], where, broken)
    follower = Follower(run, [tracker(mode="offline")])
    with caplog.at_level(logging.WARNING):
        follower.start({})
        for step in range(3):
            both_stacks(run, step)
            follower.tick()
        follower.finish("complete", {})
    assert len(caplog.records) == 1
    assert "disk on fire" in caplog.text


# --- sessions -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_logs_nothing_twice(server, run, tracker):
    for steps, status in (((10,), "stopped"), ((20, 30), "complete")):
        follower = Follower(run, [tracker()])
        follower.start({})
        both_stacks(run, *steps)
        follower.tick()
        follower.finish(status, {})
        assert follower.lost == []
    assert list(server.rows) == [ID]
    assert server.curve(ID, "member/02/train/nll") == [(10, 12.0), (20, 22.0), (30, 32.0)]
    assert server.curve(ID, "ensemble/train/nll/mean") == [(10, 11.5), (20, 21.5), (30, 31.5)]
    assert server.summaries[ID]["status"] == "complete"


def test_a_step_that_a_stop_cut_in_two_reaches_the_ensemble_once_and_whole(server, run, tracker):
    def losses(stack, first):
        write(
            run,
            stack,
            ("train/nll", first, 10, 1.0),
            ("train/nll", first + 1, 10, 2.0),
            ("stopped", None, 10, ""),
        )

    for stack, first in (("000", 0), ("001", 2)):
        follower = Follower(run, [tracker()])
        follower.start({})
        losses(stack, first)
        follower.tick()
        follower.finish("stopped" if stack == "000" else "complete", {})
    assert server.curve(ID, "ensemble/train/nll/num_members") == [(10, 4)]
    assert server.curve(ID, "member/00/train/nll") == [(10, 1.0)]


def test_what_waits_offline_is_not_logged_again_offline_but_completes_an_online_run(
    server, run, tracker, monkeypatch
):
    def session(mode, step):
        follower = Follower(run, [tracker(mode=mode)])
        follower.start({})
        both_stacks(run, step)
        follower.tick()
        follower.finish("stopped", {})

    session("offline", 10)
    session("offline", 20)
    first, second = (folder / f"run-{ID}.wandb" for folder in offline_folders(run))
    assert first.read_bytes().count(b"member/00/train/nll") == second.read_bytes().count(
        b"member/00/train/nll"
    )
    session("online", 30)
    assert server.curve(ID, "member/00/train/nll") == [(10, 10.0), (20, 20.0), (30, 30.0)]


# --- runs of members ----------------------------------------------------------------------------------------------


def test_member_runs_stand_in_a_group_with_curves_of_their_own(server, run, tracker):
    follower = Follower(run, [tracker(member_runs=True)])
    follower.start({})
    both_stacks(run, 10, 20)
    for stack, members in (("000", (0, 1)), ("001", (2, 3))):
        write(run, stack, *(("member", m, 20, "failed" if m == 3 else "done") for m in members))
    follower.tick()
    follower.finish("partial", {})
    assert follower.lost == []
    assert set(server.rows) == {ID, *(f"{ID}-m{m:02d}" for m in range(4))}
    assert server.groups[f"{ID}-m02"] == {"groupName": ID, "jobType": "member"}
    assert server.groups[ID]["groupName"] == ID
    assert server.curve(f"{ID}-m02", "train/nll") == [(10, 12.0), (20, 22.0)]
    assert server.summaries[f"{ID}-m03"]["status"] == "failed"
    assert server.curve(ID, "member/02/train/nll") == [(10, 12.0), (20, 22.0)]


def test_too_many_member_runs_are_refused_before_any_work(tracker):
    tracker(member_runs=True, mode="offline").check(MOST_MEMBER_RUNS)
    with pytest.raises(UsageError, match=r"tracking\.member_runs=true makes .* 51 here, and 50 at most"):
        tracker(member_runs=True, mode="offline").check(MOST_MEMBER_RUNS + 1)


# --- settings -----------------------------------------------------------------------------------------------------


def test_disabled_never_touches_wandb(run, fake, tracker):
    one = tracker(mode="disabled")
    one.start(run, {})
    one.event("000", event("train/nll", 0.5, member=0, step=0))
    one.finish("complete", {})
    assert fake[1] == []


def test_offline_writes_into_the_run_directory_wherever_the_service_was_started(
    no_key, tmp_path, monkeypatch, tracker
):
    for name in ("first", "second"):  # one service process for both, in the working directory of the first
        (tmp_path / name / "run").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        one = tracker(mode="offline")
        one.start(RunDir(Path("run")), {"seed": 1})
        one.event("000", event("train/nll", 0.5, member=0, step=0))
        one.finish("stopped", {"test/nll": 0.1})
        assert len(list((tmp_path / name / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "sometimes"),
        ("init_timeout_s", 0),
        ("finish_timeout_s", -1),
        ("project", ""),
        ("member_runs", 3),
    ],
)
def test_bad_settings_name_the_key_and_the_value(key, value, tracker):
    with pytest.raises(UsageError, match=rf"(?s)tracking\.{key}.*{value!r}"):
        tracker(**{key: value})


def test_the_shipped_class_is_a_tracker(tracker):
    assert isinstance(tracker(), Wandb)


def test_a_damaged_memory_of_earlier_sessions_is_no_memory(no_key, run, tracker):
    write_json(run.tracking, {"wandb offline": 3})
    one = tracker(mode="offline")
    one.start(run, {})
    one.finish("stopped", {})
    assert len(offline_folders(run)) == 1
