"""Scoring over the processes of a Ray: equal to one process; a killed worker is replaced, an error stays what it is."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray_tasks
from ray_tasks import die, die_once, double, refuse

from bdl_train.distributed._ray_map import ray_map
from bdl_train.distributed.ray_local import RayLocal
from bdl_train.errors import RunFailedError, UsageError
from bdl_train.runs import RunDir, read_json

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


@pytest.fixture
def kept_ray(ray_session, monkeypatch):
    """The Ray of the test session, which a command does not end."""
    monkeypatch.setattr(RayLocal, "close", lambda self: None)
    ray_session.cloudpickle.register_pickle_by_value(ray_tasks)  # workers do not see the folder of tests
    yield ray_session
    ray_session.cloudpickle.unregister_pickle_by_value(ray_tasks)


@pytest.mark.parametrize("member_shards", [1, 2])
@pytest.mark.parametrize("which", ["class_run", "number_run"])
def test_shards_on_ray_give_the_numbers_of_one_process(
    bdl, kept_ray, request, which: str, member_shards: int, tmp_path: Path
):
    shutil.copytree(request.getfixturevalue(which).path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    words = ("evaluate", f"run={run.path}", "part=train", "robustness=true", "max_rows=50")
    here = bdl(*words, "name=here")
    there = bdl(
        *words, f"name=ray{member_shards}", "cluster=ray_local", "cluster.num_workers=2", "cluster.num_cpus=2",
        f"member_shards={member_shards}",
    )  # fmt: skip
    assert (here.status, there.status) == (0, 0), there.err
    one, other = (
        read_json(run.evaluation(name) / "metrics.json") for name in ("here", f"ray{member_shards}")
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert other[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
    a, b = (
        pd.read_parquet(run.evaluation(name) / "predictions.parquet")
        for name in ("here", f"ray{member_shards}")
    )
    np.testing.assert_array_equal(a["row"], b["row"])
    np.testing.assert_allclose(a["nll"], b["nll"], rtol=1e-4, atol=1e-5)


def test_shards_of_members_need_other_processes(bdl, class_run):
    said = bdl("evaluate", f"run={class_run.path}", "part=val", "member_shards=2")  # refused before it writes
    assert said.status == 2
    assert "member_shards needs processes" in said.err


def test_every_task_is_answered_once_however_many_fly(kept_ray):
    found = ray_map(kept_ray, double, (3,), list(range(7)), cpus=1, gpus=0, at_once=2)
    assert sorted(found) == [0, 3, 6, 9, 12, 15, 18]


def test_a_task_whose_process_died_is_done_again(kept_ray, tmp_path):
    assert sorted(ray_map(kept_ray, die_once, (tmp_path,), [0, 1, 2], cpus=1, gpus=0, at_once=2)) == [0, 1, 2]
    assert (tmp_path / "1").exists()


def test_a_task_that_always_dies_is_an_error_and_wrong_usage_stays_what_it_is(kept_ray):
    with pytest.raises(RunFailedError, match="died 3 times"):
        list(ray_map(kept_ray, die, (), [0], cpus=1, gpus=0, at_once=None))
    with pytest.raises(UsageError, match="task 4 is wrong"):
        list(ray_map(kept_ray, refuse, (), [4], cpus=1, gpus=0, at_once=None))
