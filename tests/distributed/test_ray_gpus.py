"""Shares of GPUs on a real Ray whose GPUs are made up: who gets which device, and how many at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, time
from pathlib import Path

from bdl_train.distributed import Resources, _ray_loop, ray_local

folder, share, stacks = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])


def report(task, *rest):
    begin = time.time()
    time.sleep(0.5)
    seen = {"devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "begin": begin, "end": time.time()}
    return {"status": "done", "members": [], **seen}


def main():
    from bdl_train.config import compose
    from bdl_train.distributed import Job
    from bdl_train.files import write_bytes
    from bdl_train.runs import RunDir
    from bdl_train.training.prepared import StackTask
    from bdl_train.verbs._runs import load_data

    ray = ray_local.start(Resources(8, 2))
    _ray_loop.work_remotely = report
    config, run = compose("train", []), RunDir(folder / "run")
    write_bytes(run.config, b"{}")
    loop = _ray_loop.RayLoop(ray, Job(config, load_data(config), run), num_workers=None, max_retries=0)
    tasks = [StackTask(id=f"{i:03d}", members=(i,), cpus=1, gpus=share) for i in range(stacks)]
    results = loop.run(tasks, lambda: None)
    ray_local.stop()
    (folder / "results.json").write_text(json.dumps(list(results.values())))


main()
"""


@pytest.mark.ci
@pytest.mark.ray
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("share", "a_device"), [(0.5, 2), (1, 1)])
def test_a_device_is_shared_by_as_many_stacks_as_fit_and_the_others_wait(share, a_device, tmp_path: Path):
    (tmp_path / "loop.py").write_text(SCRIPT)
    words = [sys.executable, "loop.py", str(tmp_path), str(share), "7"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    stacks = json.loads((tmp_path / "results.json").read_text())
    assert len(stacks) == 7
    assert {one["devices"] for one in stacks} == {"0", "1"}
    for one in stacks:
        together = [
            other for other in stacks
            if other["devices"] == one["devices"] and other["begin"] <= one["begin"] < other["end"]
        ]  # fmt: skip
        assert len(together) <= a_device
