"""Twenty kills at random times: workers, the driver. What comes out is what comes out undisturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bdl_train.runs import RunDir, find_runs, read_json

pytestmark = [pytest.mark.ci, pytest.mark.ray, pytest.mark.timeout(900)]

KILLS, SEED = 20, 7
WORDS = ("num_members=4", "cluster.members_per_stack=2", "inference=deep_ensemble", "inference.patience=null")
WORDS += ("trainer.max_epochs=250", "data.batch_size=8", "trainer.checkpoint_every_s=0.2")
ON_RAY = ("cluster=ray_local", "cluster.num_cpus=2", "cluster.cpus_per_stack=1", "cluster.max_retries=100")


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


def start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "bdl_train", "train", *words],
            cwd=folder, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def children_of(session: int, name: str) -> list[int]:
    """Processes of this session whose name begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == session and (path / "cmdline").read_bytes().startswith(
                name.encode()
            ):
                found.append(int(path.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def test_twenty_kills_leave_no_trace_in_the_posterior(tmp_path, train, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    dice = random.Random(SEED)
    process = start(tmp_path, *WORDS, *ON_RAY)
    kills = {"worker": 0, "driver": 0}
    end = time.monotonic() + 780
    try:
        while sum(kills.values()) < KILLS:
            assert time.monotonic() < end, (tmp_path / "said.txt").read_text()[-3000:]
            if process.poll() is not None:
                # Finished before all kills: a run that is complete has nothing more to lose.
                break
            time.sleep(dice.uniform(0.2, 1.0))
            workers = children_of(process.pid, "ray::stack-")
            if not workers:
                continue
            if dice.random() < 0.8:
                os.kill(dice.choice(workers), signal.SIGKILL)
                kills["worker"] += 1
                continue
            os.kill(process.pid, signal.SIGKILL)
            process.wait(60)
            kills["driver"] += 1
            # Its Ray ends with it, or is ended: by pid, of this session only.
            for pid in children_of(process.pid, ""):
                os.kill(pid, signal.SIGKILL)
            (run,) = find_runs(tmp_path / "runs")
            assert run.status() == "interrupted"
            process = start(tmp_path, f"resume={run.path}")
        assert process.wait(300) == 0, (tmp_path / "said.txt").read_text()[-3000:]
    finally:
        for pid in children_of(process.pid, ""):
            os.kill(pid, signal.SIGKILL)
    (run,) = find_runs(tmp_path / "runs")
    assert sum(kills.values()) == KILLS, f"the run was over after {kills}: make it longer"
    assert kills["driver"] >= 2
    assert hashes(run) == hashes(train(*WORDS).run)
