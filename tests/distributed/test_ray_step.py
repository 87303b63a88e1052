"""The parts of a Slurm step's Ray that need neither Slurm nor Ray."""

import socket
from pathlib import Path

import pytest

from bdl_train.distributed import ray_step
from bdl_train.distributed.ray_step import (
    PORTS,
    Allocation,
    Step,
    free_ports,
    start_command,
    without_slurm,
)
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir

SLURM = {
    "SLURM_JOB_ID": "1234", "SLURM_PROCID": "1", "SLURMD_NODENAME": "n1", "SLURM_CPUS_PER_TASK": "3",
    "SLURM_MEM_PER_CPU": "1000", "SLURM_RESTART_COUNT": "2", "CUDA_VISIBLE_DEVICES": "0,1",
}  # fmt: skip


def test_resources_are_those_of_the_allocation():
    expected = Allocation(job="1234-2", rank=1, node="n1", cpus=3, gpus=2, memory_mib=3000)
    assert Allocation.of(SLURM) == expected
    assert Allocation.of({**SLURM, "SLURM_MEM_PER_NODE": "512"}).memory_mib == 512
    # sbatch --mem=0: all memory of the node.
    assert Allocation.of({**SLURM, "SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": ""}).memory_mib is None
    with pytest.raises(UsageError, match=r"slurm/ray\.sbatch"):
        Allocation.of({})


def test_workers_inherit_nothing_of_slurm_and_no_stale_address():
    kept = without_slurm(
        {**SLURM, "PATH": "p", "RAY_ADDRESS": "old", "ROCR_VISIBLE_DEVICES": "0", "PMIX_RANK": "1"}
    )
    assert kept == {"PATH": "p", "CUDA_VISIBLE_DEVICES": "0,1"}


def test_a_block_of_ports_that_is_in_use_is_passed_over():
    one = Allocation.of(SLURM)
    first = free_ports(one, "127.0.0.1")
    assert 20000 <= first <= 60000 - PORTS
    with socket.socket() as taken:
        taken.bind(("", first + 3))
        taken.listen()
        assert abs(free_ports(one, "127.0.0.1") - first) >= PORTS
    other = free_ports(Allocation.of({**SLURM, "SLURM_PROCID": "0"}), "127.0.0.1")
    assert abs(other - first) >= PORTS


def test_head_and_node_are_started_within_the_allocation(tmp_path):
    one = Allocation.of(SLURM)
    head = start_command(one, "10.0.0.1", 21000, tmp_path, None)
    node = start_command(one, "10.0.0.2", 22000, tmp_path, "10.0.0.1:21000")
    for words in (head, node):
        # Without it a node would leave its files in the head's folder, where nobody removes them.
        assert f"--temp-dir={tmp_path}" in words
        assert {"--num-cpus=3", "--num-gpus=2", "--block"} <= {*words}
        store, memory = (
            int(next(word for word in words if word.startswith(f"--{name}=")).partition("=")[2])
            for name in ("object-store-memory", "memory")
        )
        assert store + memory == 3000 << 20
    assert {"--head", "--port=21000", "--include-dashboard=false"} <= {*head}
    assert "--address=10.0.0.1:21000" in node
    assert "--head" not in node


@pytest.mark.parametrize("installed", [True, False])
def test_the_client_of_ray_gets_a_port_of_the_job_or_none(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_step.importlib.util, "find_spec", lambda name: object() if installed else None)
    words = start_command(Allocation.of(SLURM), "10.0.0.1", 21000, tmp_path, None)
    assert ("--ray-client-server-port=21001" in words) == installed


def test_a_folder_too_long_for_sockets_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match=r"BDL_RAY_TMP=.*is too long for Ray's sockets"):
        Step(RunDir(tmp_path), Allocation.of(SLURM), {**SLURM, "BDL_RAY_TMP": "/tmp/" + "x" * 40})


def test_the_token_is_for_the_owner_only_and_others_learn_of_a_failed_head(tmp_path, monkeypatch):
    lead = Step(RunDir(tmp_path), Allocation.of({**SLURM, "SLURM_PROCID": "0"}), SLURM)
    lead._publish({"address": "a:1", "token": "t"})
    (meeting,) = Path(tmp_path, "slurm").iterdir()
    assert meeting.stat().st_mode & 0o777 == 0o600
    lead._publish({})
    monkeypatch.setattr(ray_step, "START_S", 5.0)
    assert Step(RunDir(tmp_path), Allocation.of(SLURM), SLURM)._join() == 1


def test_a_stop_that_came_while_ray_started_is_heard(tmp_path, monkeypatch, capsys):
    run = RunDir(tmp_path)
    run.stop_file.touch()
    monkeypatch.setattr(ray_step.subprocess, "Popen", lambda *words, **more: pytest.fail("a driver started"))
    assert Step(run, Allocation.of({**SLURM, "SLURM_PROCID": "0"}), SLURM)._drive("a:1") == 75
    assert "asked to stop before training began" in capsys.readouterr().out


def test_a_node_that_cannot_join_leaves_the_status_to_the_driver(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_step, "START_S", 0.3)
    assert Step(RunDir(tmp_path), Allocation.of(SLURM), SLURM)() == 0
    assert "On n1: the head did not say where it is" in capsys.readouterr().err
