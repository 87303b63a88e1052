"""Stopped, killed, diverged, failed: what is saved, which status, and that resume gives the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from command_line import TINY
from safetensors.torch import load_file

from bdl_train.build import allowing
from bdl_train.distributed import work
from bdl_train.errors import Exit
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.runs import KEEP_STOP, RunDir, find_runs, read_json
from bdl_train.training.callbacks import Checkpoint
from bdl_train.training.train_stack import train_stack
from bdl_train.verbs._runs import load_data

METHODS = {
    "swag": "trainer.max_epochs=8 scheduler=cosine inference.snapshot_every=5",
    "deep_ensemble": "inference=deep_ensemble inference.patience=3 optimizer.lr=0.03 trainer.max_epochs=30",
    "anchored": "inference=anchored optimizer=sgd trainer.max_epochs=8 model.dropout=0.2",
    "batch_norm": "data=images data.name=colour data.batch_size=6 data.augment=flip_crop model=resnet20 model.width=2 "
    "trainer.max_epochs=4 inference.num_draws=2",
}


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


def steps_of(run: RunDir) -> dict[str, int]:
    return {path.parent.name: read_json(path)["steps"] for path in run.path.glob("stacks/*/result.json")}


@contextmanager
def stopping_at(step: int, phase: int = 0) -> Iterator[None]:
    """Every run is asked to stop once a stack has taken so many steps of a phase, as a signal asks."""
    true_end = Checkpoint.on_train_batch_end

    def end(self, trainer, pl_module, *args):
        if (pl_module.state.phase, pl_module.state.step) >= (phase, step):
            self._stop_files[0].touch()
        return true_end(self, trainer, pl_module, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "on_train_batch_end", end)
        yield


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_resumes_to_the_same_bits(name, train, bdl, data_folder):
    words = (*METHODS[name].split(), f"data.root={data_folder}", "trainer.steps_per_call=1")
    whole = train(*words).run
    # In the middle of an epoch, at the end of one, and in the second half.
    for step in (7, 12, 17):
        with stopping_at(step):
            said = train(*words, status=75)
        run = find_runs("runs")[-1]
        assert f"bdl train resume={run.path}" in said.out
        assert run.status() == "interrupted"
        assert not run.manifest.exists()
        checkpoint = torch.load(run.stack("000") / "checkpoint.pt", weights_only=True)
        assert checkpoint["state"]["step"] == step
        said = bdl("train", f"resume={run.path}")
        assert said.status == 0, said.err
        assert hashes(run) == hashes(whole)
        assert read_json(run.metrics) == read_json(whole.metrics)
        assert steps_of(run) == steps_of(whole)
        assert not run.stop_file.exists()
        assert not list(run.path.glob("stacks/*/checkpoint*"))


def test_stacks_in_line_do_not_start_after_a_request_to_stop(train, bdl):
    words = ("num_members=3", "cluster.members_per_stack=1", "inference=deep_ensemble")
    whole = train(*words).run
    with stopping_at(5):
        train(*words, status=75)
    run = find_runs("runs")[-1]
    assert [path.name for path in (run.path / "stacks").iterdir()] == ["000"]
    assert bdl("train", f"resume={run.path}").status == 0
    assert hashes(run) == hashes(whole)


def test_a_job_that_is_asked_to_stop_before_its_driver_is_up_stops(bdl, monkeypatch):
    assert bdl("train", *TINY, "cluster=inline", "plan_only=true").status == 0
    run = find_runs("runs")[0]
    run.stop_file.touch()
    with monkeypatch.context() as patch:
        patch.setenv(KEEP_STOP, "1")
        assert bdl("train", f"resume={run.path}", "cluster=inline").status == Exit.STOPPED
    # Without it a stop file is of the past.
    assert bdl("train", f"resume={run.path}", "cluster=inline").status == Exit.DONE


def test_a_complete_run_has_nothing_to_resume(train, bdl):
    run = train().run
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    said = bdl("train", f"resume={run.path}")
    assert said.status == 0
    assert "is complete: nothing to resume" in said.out
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_more_epochs_are_for_runs_without_a_finished_stack(train, bdl):
    words = (
        "inference=deep_ensemble",
        "inference.patience=null",
        "num_members=2",
        "cluster.members_per_stack=1",
    )
    longer = train(*words, "trainer.max_epochs=6").run
    with stopping_at(20):
        train(*words, status=75)
    run = find_runs("runs")[-1]
    assert bdl("train", f"resume={run.path}", "trainer.max_epochs=6").status == 0
    assert hashes(run) == hashes(longer)
    assert yaml.safe_load(run.config.read_text())["trainer"]["max_epochs"] == 6
    # Once a stack is done, and of course once the run is.
    said = bdl("train", f"resume={run.path}", "trainer.max_epochs=9")
    assert said.status == 2
    assert "trainer.max_epochs=9: 2 stacks" in said.err


@pytest.mark.parametrize(
    ("start", "epochs", "taken"),
    [("null", "12", False), ("4", "12", True), ("null", "8", True)],
    ids=["the start of the chains would move", "their start is fixed", "as before"],
)
def test_more_epochs_of_a_phase_that_is_over_are_refused(start: str, epochs: str, taken: bool, train, bdl):
    words = ("inference=sgld", "inference.num_draws=2", f"inference.start_epoch={start}", "num_members=1")
    words += ("inference.burn_in_epochs=0", "trainer.checkpoint_every_s=0.001")
    with stopping_at(2, phase=1):
        train(*words, "trainer.max_epochs=8", "data.batch_size=1000", status=75)
    run = find_runs("runs")[-1]
    assert read_phase(run) == 1
    said = bdl("train", f"resume={run.path}", f"trainer.max_epochs={epochs}")
    assert said.status == (0 if taken else 2), said.err
    if not taken:
        assert "trainer.max_epochs=12 makes the phase 'warm start' longer, which stack 000 of" in said.err
        assert bdl("train", f"resume={run.path}").status == 0  # nothing is lost


def read_phase(run: RunDir) -> int:
    [path] = run.path.glob("stacks/*/checkpoint.pt")
    return torch.load(path, weights_only=True)["state"]["phase"]


def test_a_run_may_be_resumed_with_another_share_of_the_machine(train, bdl):
    words = ("inference=deep_ensemble", "num_members=2")
    whole = train(*words).run
    with stopping_at(20):
        train(*words, status=75)
    run = find_runs("runs")[-1]
    plan = read_json(run.plan)
    plan["stacks"][0] |= {"cpus": 512, "gpus": 1.0}  # planned on a machine that is not this one
    run.plan.write_text(json.dumps(plan))
    said = bdl("train", f"resume={run.path}", "cluster=inline", "cluster.cpus_per_stack=1")
    assert said.status == 0, said.err
    assert "resumed with 1 CPU and 0 GPUs" in said.out
    assert "continues at step 24" in said.err  # 16 steps a call, 12 an epoch
    assert hashes(run) == hashes(whole)


# --- members and stacks that are lost -------------------------------------------------------------------------


def test_a_member_that_becomes_nan_is_lost_alone(train, bdl, user_package, tmp_path):
    words = ("model=module", f"model._target_={user_package}.Diverging", f"allow=[{user_package}]")
    words += ("inference=deep_ensemble", "num_members=5")
    said = train(*words, status=3)
    run = said.run
    assert run.status() == "partial"
    members = read_json(run.manifest)["members"]
    # By another route: the network of each member's own seed knows whether it is a bad one.
    bad = []
    for member in members:
        torch.manual_seed(member["seed"])
        bad.append(sys.modules[user_package].Diverging().bad)
    assert 0 < sum(bad) < 5
    assert [member["status"] == "failed" for member in members] == bad
    lost = next(member for member in members if member["status"] == "failed")
    assert "NaN" in lost["reason"]
    assert f"member {lost['id']} failed" in said.out
    assert f"{5 - sum(bad)} of 5 members" in said.out
    assert f"{sum(bad)} failed" in said.out
    assert "partial" in bdl("runs").out
    assert f"{5 - sum(bad)}/5 members" in bdl("runs").out

    with allowing([user_package]):
        posterior = read_artefact(run.posterior).posterior
    assert list(posterior.ids) == [m for m in range(5) if not bad[m]]
    (draws,) = posterior.draw(chunk_size=100)
    np.testing.assert_allclose(draws.log_weights.exp(), 1 / (5 - sum(bad)))

    # The stored predictive is the equally weighted mean over the members that are left, by plain torch.
    scored = pd.read_parquet(run.evaluation("test") / "predictions.parquet")
    data = load_data(yaml.safe_load(run.config.read_text()))
    np.testing.assert_array_equal(data.test.rows, scored["row"])
    probs = []
    for m in posterior.ids:
        flat = load_file(run.posterior / f"member-{m:05d}.safetensors")["atoms"][0]
        logits = torch.from_numpy(data.test.x) @ flat[:60].reshape(2, 30).T + flat[60:62]
        probs.append(logits.softmax(1)[:, 1])
    np.testing.assert_allclose(scored["p_benign"], torch.stack(probs).mean(0), atol=1e-6)

    # What is lost by its own mathematics stays lost; nothing is trained again.
    before = hashes_of_done(run)
    assert bdl("train", f"resume={run.path}", f"allow=[{user_package}]").status == 3
    assert hashes_of_done(run) == before


def hashes_of_done(run: RunDir) -> dict[int, str]:
    return {one["id"]: one["sha256"] for one in read_json(run.manifest)["members"] if one["status"] == "done"}


def test_when_every_member_diverges_the_run_failed(train, bdl):
    said = train("optimizer=sgd", "optimizer.lr=1e30", "inference=deep_ensemble", status=1)
    run = said.run
    assert run.status() == "failed"
    assert not run.posterior.exists()
    assert not run.metrics.exists()
    assert [member["status"] for member in read_json(run.manifest)["members"]] == ["failed", "failed"]
    assert "Traceback" not in said.err
    assert "failed" in bdl("runs").out
    assert bdl("evaluate", f"run={run.path}").status == 2


def test_a_stack_that_raises_costs_its_own_members_until_it_is_resumed(train, bdl, monkeypatch):
    words = ("num_members=3", "cluster.members_per_stack=1", "inference=deep_ensemble")
    whole = train(*words).run

    def broken(task, *args):
        if 1 in task.members:
            raise OSError("no space left on device")
        return train_stack(task, *args)

    monkeypatch.setattr(work, "train_stack", broken)
    said = train(*words, status=3)
    run = said.run
    reasons = {one["id"]: one.get("reason") for one in read_json(run.manifest)["members"]}
    assert reasons == {0: None, 1: "OSError: no space left on device", 2: None}
    assert "Traceback" not in said.err
    assert "Traceback" in (run.stack("001") / "log.txt").read_text()
    assert hashes_of_done(run) == {m: hashes(whole)[m] for m in (0, 2)}
    # The cause is gone: only the lost stack is trained.
    monkeypatch.setattr(work, "train_stack", train_stack)
    first = (run.stack("000") / "result.json").stat().st_mtime_ns
    assert bdl("train", f"resume={run.path}").status == 0
    assert hashes(run) == hashes(whole)
    assert (run.stack("000") / "result.json").stat().st_mtime_ns == first


def test_when_every_stack_raises_the_run_failed(train, monkeypatch):
    def broken(*args):
        raise RuntimeError("nothing works")

    monkeypatch.setattr(work, "train_stack", broken)
    said = train(status=1)
    assert said.run.status() == "failed"
    assert "member 0 failed: RuntimeError: nothing works" in said.out


# --- real signals ---------------------------------------------------------------------------------------------


def start(folder: Path, *words: str) -> subprocess.Popen:
    """`bdl` as a process group of its own, as a terminal starts it."""
    code = "import sys; from bdl_train.cli import main; sys.exit(main())"
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "said.txt").read_text()
        for path in folder.glob("runs/*/*/stacks/*/events.jsonl"):
            lines = path.read_text().splitlines()
            if any(line.endswith("}") and json.loads(line)["step"] >= step for line in lines):
                return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in two minutes: {(folder / 'said.txt').read_text()}")


def test_ctrl_c_and_kill_lose_nothing(train, bdl, tmp_path):
    words = (
        "inference=deep_ensemble",
        "inference.patience=null",
        "trainer.max_epochs=400",  # seconds of training: a signal takes a while on a busy machine
        "scheduler=cosine",
    )
    words += ("cluster.members_per_stack=1",)
    process = start(tmp_path, "train", *TINY, *words)
    wait_for_step(tmp_path, 50, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == Exit.STOPPED, (tmp_path / "said.txt").read_text()
    (run,) = find_runs(tmp_path / "runs")
    assert (run.stack("000") / "checkpoint.pt").is_file()
    assert not run.lock.exists()
    stopped_at = torch.load(run.stack("000") / "checkpoint.pt", weights_only=True)["state"]["step"]
    assert 50 <= stopped_at < 4800

    process = start(tmp_path, "train", f"resume={run.path}", "tracking=none")
    wait_for_step(tmp_path, stopped_at + 50, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert run.status() == "interrupted"

    # On a busy machine the stack may have finished before the kill reached it.
    was_done = (run.stack("000") / "result.json").is_file()
    said = bdl("train", f"resume={run.path}")
    assert said.status == 0, said.err
    assert was_done or f"continues at step {stopped_at}" in said.err
    assert hashes(run) == hashes(train(*words).run)


def test_sigterm_stops_as_ctrl_c_does(tmp_path):
    process = start(tmp_path, "train", *TINY, "trainer.max_epochs=2000")
    wait_for_step(tmp_path, 50, process)
    process.terminate()
    # Lightning's own answer to SIGTERM would be to leave with status 0.
    assert process.wait(60) == Exit.STOPPED, (tmp_path / "said.txt").read_text()
    (run,) = find_runs(tmp_path / "runs")
    assert (run.stack("000") / "checkpoint.pt").is_file()


def test_a_job_of_slurm_is_no_business_of_a_stack(train, monkeypatch):
    # Of a job step with two tasks, as its second task: Lightning alone would refuse or take this for rank 1.
    job = {
        "JOB_ID": "1",
        "NTASKS": "2",
        "PROCID": "1",
        "LOCALID": "1",
        "JOB_NAME": "x",
        "STEP_NODELIST": "n0",
    }
    whole = train().run
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert hashes(train().run) == hashes(whole)
