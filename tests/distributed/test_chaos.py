"""Twenty kills at random times: workers, nodes, the driver. What comes out is what comes out undisturbed."""

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from ray_nodes import RayNodes, ray_nodes

from bdl_train.runs import RunDir, find_runs, read_json

pytestmark = [pytest.mark.ci, pytest.mark.ray, pytest.mark.timeout(900)]

KILLS, SEED = {"worker": 12, "node": 4, "driver": 4}, 7
WORDS = ("num_members=4", "cluster.members_per_stack=1", "inference=deep_ensemble", "inference.patience=null")
WORDS += ("trainer.max_epochs=150", "data.batch_size=8", "trainer.checkpoint_every_s=0.2")
ON_RAY = ("cluster=ray_cluster", "cluster.cpus_per_stack=1", "cluster.max_retries=100")


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


def start(folder: Path, cluster: RayNodes, *words: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "RAY_AUTH_TOKEN": cluster.token, "RAY_AUTH_MODE": "token"}
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "bdl_train", "train", *words],
            cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def working(session: int) -> list[int]:
    """Worker processes of this session that train a stack now."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            if os.getsid(int(path.name)) == session and name.startswith(b"ray::stack-"):
                found.append(int(path.name))
        except (OSError, ProcessLookupError):
            continue
    return found


def test_twenty_kills_leave_no_trace_in_the_posterior(tmp_path, train, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    dice, kills, nodes = random.Random(SEED), Counter(), ["n0", "n1"]
    kinds = list(Counter(KILLS).elements())
    dice.shuffle(kinds)
    end = time.monotonic() + 780
    with ray_nodes(secrets.token_hex(32), *((name, 1) for name in nodes)) as cluster:
        process = start(tmp_path, cluster, *WORDS, *ON_RAY, f"cluster.address={cluster.address}")
        try:
            while kinds:
                assert time.monotonic() < end, (tmp_path / "said.txt").read_text()[-3000:]
                assert process.poll() is None, (
                    f"over after {kills}: {(tmp_path / 'said.txt').read_text()[-3000:]}"
                )
                time.sleep(dice.uniform(0.2, 1.0))
                workers = working(cluster.session)
                if not workers:
                    continue
                kind = kinds.pop()
                kills[kind] += 1
                if kind == "worker":
                    os.kill(dice.choice(workers), signal.SIGKILL)
                elif kind == "node":
                    cluster.tell("kill", nodes.pop(dice.randrange(len(nodes))))
                    nodes.append(f"late{kills[kind]}")
                    cluster.tell("add", nodes[-1], 1)
                else:
                    process.kill()
                    process.wait(60)
                    (run,) = find_runs(tmp_path / "runs")
                    assert run.status() == "interrupted"
                    process = start(tmp_path, cluster, f"resume={run.path}")
            assert process.wait(300) == 0, (tmp_path / "said.txt").read_text()[-3000:]
        finally:
            process.kill()
            process.wait(60)
    (run,) = find_runs(tmp_path / "runs")
    assert kills == KILLS
    assert read_json(run.manifest)["status"] == "complete"
    assert hashes(run) == hashes(train(*WORDS).run)
