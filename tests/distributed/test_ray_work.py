"""Workers of Ray: what they share, what they keep from one stack to the next, and when nobody waits for them."""

import json
import os
import time
from pathlib import Path

import pytest

from bdl_train.data import Data
from bdl_train.distributed import Job, _ray_loop
from bdl_train.distributed.ray_work import BLIND, work_remotely
from bdl_train.runs import RunDir
from bdl_train.tracking import Follower
from bdl_train.training.prepared import StackTask

pytestmark = pytest.mark.ray


def decisions(run: RunDir, key: str) -> list[dict]:
    lines = [json.loads(line) for line in run.driver_events.read_text().splitlines()]
    return [line["value"] for line in lines if line["key"] == key]


def test_workers_read_the_data_in_place_and_take_their_threads_from_the_plan(on_ray, monkeypatch):
    def telling(task, job, packages, rank=0, token=""):
        import torch

        result = true_work(task, job, packages, rank, token)
        x = job.data.train.x
        start = x.__array_interface__["data"][0]
        found = ""
        for line in Path("/proc/self/maps").read_text().splitlines():
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= start < high:
                found = line
        told = {
            "pid": os.getpid(),
            "writeable": x.flags.writeable,
            "map": found,
            "threads": torch.get_num_threads(),
        }
        (job.run.path / f"told-{task.id}.json").write_text(json.dumps(told))
        return result

    true_work = _ray_loop.work_remotely
    monkeypatch.setattr(_ray_loop, "work_remotely", telling)
    told = []
    for cpus in (1, 2):
        run = on_ray("num_members=2", "cluster.members_per_stack=1", f"cluster.cpus_per_stack={cpus}").run
        each = [json.loads(path.read_text()) for path in sorted(run.path.glob("told-*.json"))]
        assert [one["threads"] for one in each] == [cpus, cpus]
        told += each
    # Some worker had another number before: torch keeps the first one unless it is told.
    assert len({one["pid"] for one in told}) < len({(one["pid"], one["threads"]) for one in told})
    assert {one["writeable"] for one in told} == {False}
    # Shared memory of Ray's object store, not of the worker.
    assert all("plasma" in one["map"] and "s " in one["map"] for one in told), told[0]["map"]


def test_a_worker_that_does_not_see_the_run_says_so_and_writes_nothing(ray_session, tmp_path):
    job = Job({}, Data.__new__(Data), RunDir(tmp_path / "elsewhere"))
    task = StackTask(id="000", members=(0,), cpus=1, gpus=0)
    told = ray_session.get(ray_session.remote(work_remotely).remote(task, job, ()))
    assert told["status"] == BLIND
    assert told["id"] == ray_session.nodes()[0]["NodeID"]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stack_on_a_node_that_does_not_see_the_run_is_placed_elsewhere(ranks, on_ray, monkeypatch):
    def blind_once(task, job, packages, rank=0, token=""):
        seen = job.run.path / f"tried-{task.id}-{rank}"
        if task.id == "001" and not seen.exists():
            seen.touch()
            return {"status": "blind", "id": "f" * 56, "node": "far"}
        return true_work(task, job, packages, rank, token)

    true_work = _ray_loop.work_remotely
    monkeypatch.setattr(_ray_loop, "work_remotely", blind_once)
    said = on_ray("cluster.members_per_stack=2", f"cluster.ranks_per_stack={ranks}")
    assert "The node far does not see" in said.err
    assert [one["node"] for one in decisions(said.run, "blind")] == ["far"]
    assert [one["stack"] for one in decisions(said.run, "launched")] == ["000", "001", "001"]
    assert decisions(said.run, "retry") == []


def test_a_stop_does_not_wait_for_those_who_hold_the_machine(on_ray, ray_session, monkeypatch):
    @ray_session.remote(num_cpus=2)
    def hold(path):
        while not Path(path).exists():
            time.sleep(0.1)

    def tick(follower):
        (run,) = Path("runs").glob("*/*")
        if decisions(RunDir(run), "launched"):
            (run / "STOP").touch()
        true_tick(follower)

    over = Path.cwd() / "over"
    held = hold.remote(str(over))
    true_tick = Follower.tick
    monkeypatch.setattr(Follower, "tick", tick)
    try:
        said = on_ray("cluster.members_per_stack=1", "cluster.num_workers=3", status=75)
        assert "stopped on request" in said.out
        (run,) = Path("runs").glob("*/*")
        assert not list(run.glob("stacks/*/events.jsonl"))
        assert ray_session.wait([held], timeout=0)[0] == []
    finally:
        over.touch()
        ray_session.get(held)
