"""Ray on this machine: the same bits as inline, dead workers, lost stacks, one session for many runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from command_line import ON_RAY, TINY
from safetensors.torch import load_file

from bdl_train.build import build
from bdl_train.distributed import Launcher, Resources, _ray_loop, ray_local
from bdl_train.distributed.ray_local import RayLocal
from bdl_train.errors import Exit, UsageError
from bdl_train.runs import RunDir, find_runs, read_json
from bdl_train.tracking.progress import Progress

pytestmark = pytest.mark.ray


def hashes(run: RunDir) -> list[str | None]:
    return [member.get("sha256") for member in read_json(run.manifest)["members"]]


def weights(run: RunDir) -> list[torch.Tensor]:
    members = [one for one in read_json(run.manifest)["members"] if one["status"] == "done"]
    return [load_file(run.posterior / one["file"])["mean"] for one in members]


def test_one_worker_two_workers_and_none_give_the_same_members(on_ray, train):
    inline = train("num_members=4", "cluster.members_per_stack=2").run
    one = on_ray("cluster.members_per_stack=2", "cluster.num_workers=1").run
    two = on_ray("cluster.members_per_stack=2", "cluster.num_workers=2").run
    assert hashes(one) == hashes(two) == hashes(inline)
    assert read_json(one.metrics) == read_json(inline.metrics)
    # Packed differently the order of sums may differ, and nothing else.
    for size in (1, 4):
        packed = on_ray(f"cluster.members_per_stack={size}").run
        for mine, theirs in zip(weights(packed), weights(inline), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_no_more_stacks_run_at_a_time_than_asked(on_ray):
    run = on_ray("cluster.members_per_stack=1", "cluster.num_workers=1", "trainer.max_epochs=20").run
    spans = []
    for path in run.path.glob("stacks/*/events.jsonl"):
        times = [json.loads(line)["time"] for line in path.read_text().splitlines()]
        spans.append((times[0], times[-1]))
    spans.sort()
    assert len(spans) == 4
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def worker_of(stack: str) -> int | None:
    """The process that trains a stack of this process's Ray."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    for pid in parents:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        above = pid
        while above not in (0, os.getpid()):
            above = parents.get(above, 0)
        if above == os.getpid() and name == f"ray::stack-{stack}":
            return pid
    return None


class Killer:
    """Kills the worker of a stack each time the driver sees it at or past a step, as often as told."""

    def __init__(self, monkeypatch, wanted, *, step: int, times: int) -> None:
        self.times, self.killed = times, []
        true_event = Progress.event

        def event(view, stack, event):
            true_event(view, stack, event)
            if event["key"] == "progress" and event["step"] >= step and wanted(stack) and self.times:
                self.kill(stack)

        monkeypatch.setattr(Progress, "event", event)

    def kill(self, stack: str) -> None:
        pid = worker_of(stack)
        if pid is not None and pid not in [one for one, _ in self.killed]:
            os.kill(pid, signal.SIGKILL)
            self.killed.append((pid, stack))
            self.times -= 1


# About two seconds of training: progress is told twice a second.
LONG = (
    "trainer.max_epochs=60",
    "data.batch_size=8",
    "trainer.checkpoint_every_s=0.2",
    "inference=deep_ensemble",
)
LONG += ("inference.patience=null",)


def test_a_killed_worker_costs_nothing_but_time(on_ray, train, monkeypatch):
    whole = train(*LONG, "cluster.members_per_stack=2").run
    killer = Killer(monkeypatch, lambda stack: True, step=600, times=1)
    said = on_ray(*LONG, "num_members=2", "cluster.members_per_stack=2")
    assert len(killer.killed) == 1
    assert "its worker process died 1 times (WorkerCrashedError), it starts again" in said.err
    assert hashes(said.run) == hashes(whole)
    lines = (said.run.stack("000") / "events.jsonl").read_text().splitlines()
    starts = [event["step"] for event in map(json.loads, lines) if event["key"] == "started"]
    assert len(starts) == 2
    assert starts[0] == 0
    assert 0 < starts[1] <= 3060  # from the checkpoint, not from the start


def test_a_stack_that_always_dies_is_cut_until_the_culprit_is_alone(on_ray, train, monkeypatch):
    words = (*LONG, "trainer.precision=64-true", "cluster.members_per_stack=2")
    whole = train(*words).run
    # Member 1: at first in the whole stack, then alone.
    killer = Killer(monkeypatch, lambda stack: stack in ("000", "000b"), step=300, times=2)
    said = on_ray(*words, "num_members=2", "cluster.max_retries=0", status=3)
    assert [stack for _, stack in killer.killed] == ["000", "000b"]
    members = read_json(said.run.manifest)["members"]
    assert [one["status"] for one in members] == ["done", "failed"]
    assert "its worker process died 1 times" in members[1]["reason"]
    mine, theirs = (
        load_file(one.posterior / "member-00000.safetensors")["atoms"] for one in (said.run, whole)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    lines = (said.run.stack("000a") / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] > 0  # the halves go on where the whole stack was


def test_a_stack_whose_members_interact_is_given_up_whole(on_ray, monkeypatch):
    words = ("inference=svgd", "trainer.max_epochs=60", "data.batch_size=8", "trainer.checkpoint_every_s=0.2")
    killer = Killer(monkeypatch, lambda stack: True, step=300, times=2)
    said = on_ray(*words, "num_members=3", "cluster.max_retries=1", status=1)
    assert [stack for _, stack in killer.killed] == ["000", "000"]
    members = read_json(said.run.manifest)["members"]
    assert [(one["status"], one["stack"]) for one in members] == [("failed", "000")] * 3
    reason = r"its worker process died 2 times \(\w+\), and it is not cut: in svgd a step of each member"
    assert all(re.match(reason, one["reason"]) for one in members)
    assert "all 3 members in one stack: in svgd a step of each member" in said.out


def test_a_stack_that_always_raises_costs_its_own_members(on_ray, monkeypatch):
    def breaking(task, job, packages, rank=0, token=""):
        if 1 in task.members:
            raise RuntimeError("member 1 is no good")
        return true_work(task, job, packages, rank, token)

    true_work = _ray_loop.work_remotely
    monkeypatch.setattr(_ray_loop, "work_remotely", breaking)
    said = on_ray("num_members=3", "cluster.members_per_stack=1", status=3)
    members = read_json(said.run.manifest)["members"]
    assert [one["status"] for one in members] == ["done", "failed", "done"]
    assert members[1]["reason"] == "RuntimeError: member 1 is no good"

    def useless(task, job, packages, rank=0, token=""):
        raise RuntimeError("nothing works")

    monkeypatch.setattr(_ray_loop, "work_remotely", useless)
    assert on_ray("num_members=2", "cluster.members_per_stack=1", status=1).run.status() == "failed"

    def refusing(task, job, packages, rank=0, token=""):
        raise UsageError("known too late")

    monkeypatch.setattr(_ray_loop, "work_remotely", refusing)
    before = find_runs("runs")
    assert "known too late" in on_ray(status=2).err
    assert find_runs("runs") == before


def test_all_jobs_of_a_multirun_share_one_ray(on_ray, bdl, monkeypatch):
    before = ray_local._session
    assert before is not None
    closed = []
    monkeypatch.setattr(RayLocal, "close", lambda self: closed.append(ray_local._session))
    words = ("num_members=2", "trainer.max_epochs=2", "inference=deep_ensemble")
    assert bdl("train", "-m", *ON_RAY, *words, "seed=0,1").status == 0
    assert closed == [before]
    assert len(find_runs("runs")) == 2


def test_a_ray_that_is_too_small_is_refused_not_waited_for(ray_session, monkeypatch):
    # As if somebody else had started it in this process.
    monkeypatch.setattr(ray_local, "_session", None)
    with pytest.raises(UsageError, match=r"64 CPUs .* has 2 "):
        ray_local.start(Resources(64, 0))


def test_resources_are_those_of_the_process_unless_given():
    node = {
        "_target_": "bdl_train.distributed.ray_local.RayLocal",
        "num_workers": None,
        "members_per_stack": None,
        "cpus_per_stack": None,
        "gpus_per_stack": 0,
        "ranks_per_stack": 1,
        "num_cpus": None,
        "num_gpus": None,
        "max_retries": 2,
    }
    assert build(node, Launcher, key="cluster").resources() == Resources(len(os.sched_getaffinity(0)), 0)
    given = build({**node, "num_cpus": 5, "num_gpus": 3, "gpus_per_stack": 0.5}, Launcher, key="cluster")
    assert given.resources() == Resources(5, 3)


OWN_NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(30, 2))
"""


def test_ctrl_c_in_a_terminal_reaches_the_workers_and_not_rays_daemons(bdl, train, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own_net.py").write_text(OWN_NET)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    model = ("model=module", "model._target_=own_net.Net", "allow=[own_net]")
    words = (*model, *LONG, "num_members=2", "cluster.members_per_stack=1")
    code = "import sys; from bdl_train.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "own")}
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", *ON_RAY, *words],
            cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, env=environment,
        )  # fmt: skip
    deadline = time.monotonic() + 180
    while not any(
        '"progress"' in path.read_text() for path in tmp_path.glob("runs/*/*/stacks/*/events.jsonl")
    ):
        assert process.poll() is None, (tmp_path / "said.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A terminal signals the whole group: driver, daemons and workers.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(90) == Exit.STOPPED, (tmp_path / "said.txt").read_text()
    (run,) = find_runs(tmp_path / "runs")
    assert list(run.path.glob("stacks/*/checkpoint.pt"))
    assert not run.manifest.exists()
    # Finished without Ray, it is the run that was never stopped.
    assert bdl("train", f"resume={run.path}", *TINY[:2], "allow=[own_net]").status == 0
    assert hashes(run) == hashes(train(*words).run)
