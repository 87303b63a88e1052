"""A Ray of several nodes that others started: real daemons on this machine, a driver in a process of its own."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from ray_nodes import RayNodes, ray_nodes
from safetensors.torch import load_file

from bdl_train.distributed import ray_address
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir, find_runs, read_json

ON_CLUSTER = ("cluster=ray_cluster", "cluster.cpus_per_stack=1")
WORDS = ("num_members=4", "cluster.members_per_stack=1", "inference=deep_ensemble", "inference.patience=null")
WORDS += ("trainer.checkpoint_every_s=0.2", "trainer.max_epochs=10")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The command sets these; they must not reach the Ray of other tests in this process."""
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",
        "RAY_NUM_REDIS_GET_RETRIES": "3",
    }.items():
        monkeypatch.setenv(name, os.environ.get(name, value))


# --- wrong usage, before any Ray ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "token", "expected"),
    [
        (["cluster.address=somewhere"], "t", "must be IP:PORT or auto, got 'somewhere'"),
        (["cluster.address=127.0.0.1:1"], "", "set RAY_AUTH_TOKEN in the environment, or cluster.token_file"),
        (["cluster.address=127.0.0.1:1"], "t", "Nobody answers at cluster.address=127.0.0.1:1 within 5 s"),
        (["cluster.address=127.0.0.1:1", "cluster.token_file=gone"], "", "gone cannot be read"),
        (["cluster.address=127.0.0.1:1", "cluster.token_file=open"], "", "open can be read by others"),
        (["cluster.address=127.0.0.1:1", "cluster.token_file=closed"], "", "Nobody answers"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(words, token, expected, bdl, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    for name, mode in (("open", 0o644), ("closed", 0o600)):
        (tmp_path / name).write_text("secret\n")
        (tmp_path / name).chmod(mode)
    said = bdl("train", *ON_CLUSTER, *words)
    assert said.status == 2
    assert expected in said.err
    assert "secret" not in said.err + said.out
    assert not (tmp_path / "runs").exists()


def test_a_port_that_is_no_ray_is_no_endless_wait(bdl, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        said = bdl("train", *ON_CLUSTER, f"cluster.address={address}", "cluster.connect_timeout_s=0.2")
    assert said.status == 2
    assert f"Nobody answers at cluster.address={address} within 0.2 s (timed out)" in said.err


def test_a_stale_address_of_the_environment_is_no_endless_wait(bdl, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = bdl("train", *ON_CLUSTER)
    assert said.status == 2
    assert "Nobody answers at RAY_ADDRESS=127.0.0.1:1 within 5 s" in said.err


@pytest.mark.parametrize(
    ("running", "noted", "expected"),
    [
        ({"10.0.0.1:1"}, None, "10.0.0.1:1"),
        ({"10.0.0.1:1"}, "10.0.0.9:9", "10.0.0.1:1"),  # what was noted has ended
        ({"10.0.0.1:1", "10.0.0.2:2"}, "10.0.0.2:2", "10.0.0.2:2"),
        (set(), "10.0.0.9:9", "10.0.0.9:9"),
        ({"10.0.0.1:1", "10.0.0.2:2"}, None, "2 Rays run on this machine, 10.0.0.1:1, 10.0.0.2:2: name one"),
        ({"10.0.0.1:1", "10.0.0.2:2"}, "10.0.0.9:9", "name one"),
        (set(), None, "no Ray runs on this machine"),
    ],
)
def test_auto_is_one_ray_or_none(running, noted, expected, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_address, "_running", lambda: set(running))
    monkeypatch.setattr(ray_address, "_noted", lambda: noted)
    try:
        found = ray_address.settled("auto")
    except UsageError as error:
        found = str(error)
    assert expected in found
    assert ray_address.settled("10.0.0.3:3") == "10.0.0.3:3"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.4:4")
    assert ray_address.settled("auto") == "10.0.0.4:4"


# --- a real cluster -----------------------------------------------------------------------------------------------


def driver(folder: Path, token: str, *words: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token"}
    with (folder / "said.txt").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "bdl_train", "train", *ON_CLUSTER, *words],
            cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def train_on(cluster: RayNodes, folder: Path, *words: str, status: int = 0) -> RunDir:
    process = driver(folder, cluster.token, f"cluster.address={cluster.address}", *words)
    assert process.wait(240) == status, (folder / "said.txt").read_text()
    return find_runs(folder / "runs")[-1] if (folder / "runs").exists() else RunDir(folder)


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


def events(run: RunDir, key: str) -> list[dict]:
    files = [*run.path.glob("stacks/*/events.jsonl"), run.driver_events]
    lines = [json.loads(line) for path in files if path.is_file() for line in path.read_text().splitlines()]
    return [line["value"] for line in lines if line["key"] == key]


def wait_until(condition, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, (folder / "said.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayNodes]:
    with ray_nodes(secrets.token_hex(32), ("n0", 1), ("n1", 1)) as cluster:
        yield cluster


@pytest.mark.ci
@pytest.mark.ray
def test_two_nodes_give_the_members_of_one_process(two_nodes, tmp_path, train):
    run = train_on(two_nodes, tmp_path, *WORDS)
    assert hashes(run) == hashes(train(*WORDS).run)
    assert {one["node"] for one in events(run, "started")} == {"n0", "n1"}
    assert len(events(run, "launched")) == 4
    # Nothing of the token is kept.
    assert not any(two_nodes.token in path.read_text(errors="ignore") for path in run.path.rglob("*.*"))


@pytest.mark.ci
@pytest.mark.ray
def test_a_stack_over_two_nodes_is_the_stack_on_one(two_nodes, tmp_path, train):
    words = (*WORDS, "num_members=3", "cluster.members_per_stack=3", "trainer.precision=64-true")
    run = train_on(two_nodes, tmp_path, *words, "cluster.ranks_per_stack=2")
    whole = train(*words).run
    assert events(run, "started")[0]["ranks"] == 2
    for member in range(3):
        mine, theirs = (
            load_file(one.posterior / f"member-{member:05d}.safetensors")["atoms"] for one in (run, whole)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


OWN_NET = """
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(30, 2))
"""


@pytest.mark.ci
@pytest.mark.ray
def test_workers_that_others_started_find_the_classes_of_this_folder(two_nodes, tmp_path):
    (tmp_path / "own_net.py").write_text(OWN_NET)
    own = ("model=module", "model._target_=own_net.Net", "allow=[own_net]")
    run = train_on(two_nodes, tmp_path, *WORDS, *own)
    assert read_json(run.manifest)["status"] == "complete"


@pytest.mark.ci
@pytest.mark.ray
def test_what_the_cluster_cannot_hold_or_does_not_know_is_refused(two_nodes, tmp_path):
    train_on(two_nodes, tmp_path, *WORDS, "cluster.cpus_per_stack=2", status=2)
    text = (tmp_path / "said.txt").read_text()
    assert "cluster.cpus_per_stack=2" in text
    assert "2 machines with 1 CPU and 0 GPUs" in text
    process = driver(tmp_path, "f" * 64, f"cluster.address={two_nodes.address}", *WORDS)
    assert process.wait(120) == 2
    assert "refuses the token" in (tmp_path / "said.txt").read_text()
    assert not (tmp_path / "runs").exists()


LONG = (*WORDS, "trainer.max_epochs=120", "data.batch_size=8")


@pytest.mark.ci
@pytest.mark.ray
def test_lost_and_late_nodes_cost_nothing_but_time(tmp_path, train):
    with ray_nodes(secrets.token_hex(32), ("n0", 1), ("n1", 1)) as cluster:
        process = driver(tmp_path, cluster.token, f"cluster.address={cluster.address}", *LONG)

        def trains(node: str, step: int = 0) -> bool:
            for path in tmp_path.glob("runs/*/*/stacks/*/events.jsonl"):
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                here = [one["value"]["node"] for one in lines if one["key"] == "started"]
                if here and here[-1] == node and lines[-1]["step"] > step:
                    return True
            return False

        wait_until(lambda: trains("n1", 300), process, tmp_path)
        cluster.tell("kill", "n1")
        cluster.tell("add", "late", 1)
        wait_until(lambda: trains("late"), process, tmp_path)
        assert process.wait(240) == 0, (tmp_path / "said.txt").read_text()
    (run,) = find_runs(tmp_path / "runs")
    assert [one["stack"] for one in events(run, "node_lost") + events(run, "retry")]
    assert hashes(run) == hashes(train(*LONG).run)


@pytest.mark.ci
@pytest.mark.ray
def test_a_drained_node_is_no_crash_of_its_stack(tmp_path, train):
    words = (*LONG, "cluster.max_retries=0")
    with ray_nodes(secrets.token_hex(32), ("n0", 1), ("n1", 1)) as cluster:
        process = driver(tmp_path, cluster.token, f"cluster.address={cluster.address}", *words)
        wait_until(
            lambda: any(
                '"node": "n1"' in path.read_text() and '"progress"' in path.read_text()
                for path in tmp_path.glob("runs/*/*/stacks/*/events.jsonl")
            ),
            process,
            tmp_path,
        )
        # Minutes before its end: the stack leaves at once, it does not wait for that.
        cluster.tell("drain", "n1", int(time.time() * 1000) + 600_000)
        assert process.wait(240) == 0, (tmp_path / "said.txt").read_text()
    (run,) = find_runs(tmp_path / "runs")
    assert hashes(run) == hashes(train(*LONG).run)
    assert read_json(run.manifest)["status"] == "complete"
    (drained,) = {one["stack"] for one in events(run, "drained")}
    lines = [json.loads(line) for line in (run.stack(drained) / "events.jsonl").read_text().splitlines()]
    starts = [(line["value"]["node"], line["step"]) for line in lines if line["key"] == "started"]
    (saved,) = [line["step"] for line in lines if line["key"] == "stopped"]
    assert starts == [("n1", 0), ("n0", saved)]  # not a step is lost
    assert not [one for key in ("split", "retry", "node_lost") for one in events(run, key)]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a node with a file system of its own needs root")


def without(folder: Path) -> tuple[str, ...]:
    """What to put before a command that shall see an empty file system in place of a folder."""
    return ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{folder}" && exec "$0" "$@"')


@pytest.mark.ci
@pytest.mark.ray
@needs_root
def test_a_node_that_does_not_see_the_run_is_named(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with ray_nodes(secrets.token_hex(32), ("far", 1), prefix=without(hidden)) as cluster:
        train_on(cluster, tmp_path, *WORDS, f"output_dir={hidden}/runs", status=2)
    text = (tmp_path / "said.txt").read_text()
    assert re.search(r"\bfar\b.* does not see .*hidden/runs.*set output_dir", text), text


@contextmanager
def blind_node(cluster: RayNodes, hidden: Path) -> Iterator[None]:
    """A node that joins late and sees nothing in a folder."""
    words = ["-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "BDL_NODE": "far",
    }  # fmt: skip
    with (hidden.parent / "node.txt").open("wb") as said:
        process = subprocess.Popen(
            [*without(hidden), sys.executable, *words],
            env=environment, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        with suppress(ProcessLookupError):  # its workers
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.ci
@pytest.mark.ray
@needs_root
def test_a_late_node_that_does_not_see_the_run_gets_nothing_and_a_run_without_nodes_can_be_stopped(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    words = (*LONG, "trainer.max_epochs=2000", "output_dir=hidden/runs")
    with ray_nodes(secrets.token_hex(32), ("n0", 1)) as cluster:
        process = driver(tmp_path, cluster.token, f"cluster.address={cluster.address}", *words)

        def noted(key: str) -> list[dict]:
            runs = [RunDir(path.parent) for path in hidden.glob("runs/*/*/config.yaml")]
            return [one for run in runs for one in events(run, key)]

        wait_until(lambda: noted("progress"), process, tmp_path)
        with blind_node(cluster, hidden):
            wait_until(lambda: noted("blind"), process, tmp_path)
            assert {one["node"] for one in noted("blind")} == {"far"}
            cluster.tell("kill", "n0")
            # The blind node is there and idle, and no place for any stack.
            wait_until(lambda: len({one["stack"] for one in noted("waiting")}) == 4, process, tmp_path)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 75, (tmp_path / "said.txt").read_text()
    text = (tmp_path / "said.txt").read_text()
    assert "The node far does not see" in text
    assert "No node that is left has 1 CPU and 0 GPUs" in text
    assert {one["node"] for one in noted("started")} == {"n0"}
