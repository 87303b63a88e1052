"""A real Slurm of two nodes on this machine: preempted jobs, job arrays, two jobs on one node, states."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bdl_train.distributed import slurm as slurm_module
from bdl_train.runs import RunDir, find_runs, read_json

pytestmark = [
    pytest.mark.ci,
    pytest.mark.slurm,
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(900),  # several starts of Ray, on a machine that may be busy
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "minislurm.sh"
WORDS = ("inference=deep_ensemble", "inference.patience=null", "num_members=4", "cluster.members_per_stack=1")
WORDS += ("cluster.mem=2000", "trainer.checkpoint_every_s=2", "data.batch_size=8")


@pytest.fixture(scope="module")
def _slurm() -> Iterator[Path]:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [
        name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name, path=path)
    ]
    if absent:
        pytest.skip(f"Slurm is not installed ({', '.join(absent)}): scripts/minislurm.sh install")
    folder = Path(tempfile.mkdtemp(prefix="bdl-slurm-"))  # munge wants a path that all may enter
    folder.chmod(0o755)
    subprocess.run(["bash", str(SCRIPT), "start", str(folder), "2", "2"], check=True, timeout=120)
    yield folder
    subprocess.run(["bash", str(SCRIPT), "stop", str(folder)], check=True, timeout=120)
    shutil.rmtree(folder)


@pytest.fixture
def slurm(_slurm, monkeypatch) -> Path:
    monkeypatch.setenv("SLURM_CONF", str(_slurm / "slurm.conf"))
    # As on a cluster that never saw this machine's Ray.
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return _slurm


def ask(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def state(job: str) -> str:
    return ask("scontrol", "--oneliner", "show", "job", job).split("JobState=")[1].split()[0]


def until(
    condition: Callable[[], object], what: str, run: RunDir | None = None, seconds: float = 200
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            logs = (
                {} if run is None else {path.name: path.read_text() for path in run.path.glob("slurm/*.log")}
            )
            raise AssertionError(f"{what}: not in {seconds} s\n{ask('squeue')}\n{logs}")
        time.sleep(0.2)


def release(job: str) -> None:
    """Start a requeued job now; Slurm holds it back for two minutes.

    A start in the second of the requeue would be killed: its node still refuses the credential of the start before.
    """
    time.sleep(3)

    def updated() -> bool:
        words = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
        return subprocess.run(words, capture_output=True).returncode == 0

    until(updated, f"{job} released")


def submitted(said) -> tuple[list[str], RunDir]:
    assert said.status == 0, said.err
    jobs = said.out.split("job ")[1].split(":")[0].split(", ")
    return jobs, find_runs("runs")[-1]


def events(run: RunDir, key: str) -> list[dict]:
    paths = run.path.glob("stacks/*/events.jsonl")
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [line for line in lines if line["key"] == key]


def hashes(run: RunDir) -> list[str]:
    return [member["sha256"] for member in read_json(run.manifest)["members"]]


def test_a_preempted_run_is_queued_again_and_ends_with_the_same_bits(slurm, bdl, train):
    words = (*WORDS, "trainer.max_epochs=150")
    (job,), run = submitted(bdl("submit", *words, "cluster.nodes=2", "cluster.cpus_per_node=1"))
    both = {"n0", "n1"}
    until(lambda: {one["value"]["node"] for one in events(run, "started")} == both, "both nodes train", run)
    until(lambda: any(one["step"] > 500 for one in events(run, "progress")), "500 steps", run)
    assert "  running  " in bdl("runs").out
    # With SLURM_PROCID=1 Lightning would take the second node's members for another rank, and write nothing.
    for one in events(run, "started"):
        inherited = Path(f"/proc/{one['value']['pid']}/environ").read_bytes().split(b"\0")
        assert b"RAY_AUTH_MODE=token" in inherited
        assert not [word for word in inherited if word.startswith((b"SLURM", b"SRUN"))]
    # A job that may take its nodes away: Slurm warns the batch script, and waits for the grace time.
    urgent = ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 1"
    ).strip()
    until(lambda: state(job) == "PENDING", "queued again", run)
    assert "  requeued  " in bdl("runs").out
    assert list(run.path.glob("stacks/*/checkpoint.pt"))
    assert not run.lock.exists()  # the driver ended by itself
    until(lambda: state(urgent) == "COMPLETED", "the urgent job is done")
    release(job)
    until(lambda: state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end", run)
    log = (run.path / "slurm" / "job.log").read_text()
    assert state(job) == "COMPLETED", log
    assert "asked to stop: members save their state" in log
    assert "start 1" in log
    assert "continues at step" in log + "".join(
        path.read_text() for path in run.path.glob("stacks/*/log.txt")
    )
    assert events(run, "stopped")
    assert hashes(run) == hashes(train(*words[:2], "num_members=4", "cluster.members_per_stack=1",
                                       "data.batch_size=8", "trainer.max_epochs=150").run)  # fmt: skip
    # The second node's members told as much as the first's, and nothing is left behind.
    told = {
        path.parent.name for path in run.path.glob("stacks/*/events.jsonl") if '"val/nll"' in path.read_text()
    }
    assert told == {"000", "001", "002", "003"}
    assert not list(run.path.glob("slurm/head-*"))
    assert not list(Path("/tmp").glob(f"bdl-{os.getuid()}-{job}-*"))


def test_two_jobs_of_one_user_share_a_node(slurm, bdl):
    words = (
        *WORDS,
        "num_members=2",
        "trainer.max_epochs=60",
        "cluster.cpus_per_node=1",
        "cluster.options=[-wn0]",
    )
    jobs, runs = [], []
    for _ in range(2):
        (job,), run = submitted(bdl("submit", *words))
        jobs.append(job)
        runs.append(run)
        time.sleep(1.1)  # runs are told apart by their second
    until(lambda: all(events(run, "started") for run in runs), "both train at once", runs[0])
    until(lambda: all(state(job) == "COMPLETED" for job in jobs), "both are done", runs[1])
    assert hashes(runs[0]) == hashes(runs[1])
    spans = []
    for run in runs:
        times = [json.loads(line)["time"] for path in run.path.glob("stacks/*/events.jsonl")
                 for line in path.read_text().splitlines()]  # fmt: skip
        spans.append((min(times), max(times)))
    assert max(start for start, _ in spans) < min(end for _, end in spans)


def test_an_array_loses_one_stack_requeues_another_and_joins_the_rest(slurm, bdl, train):
    words = (*WORDS, "num_members=3", "trainer.max_epochs=200")
    array_words = (
        "cluster.shape=array",
        "cluster.nodes=3",
        "cluster.cpus_per_node=1",
        "cluster.max_retries=0",
    )
    (array, collect), run = submitted(bdl("submit", *words, *array_words))

    def trains(stack: str) -> bool:
        path = run.stack(stack) / "events.jsonl"
        return path.is_file() and '"progress"' in path.read_text()

    until(lambda: trains("001") and trains("002"), "stacks 1 and 2 train", run)
    ask("scancel", "--batch", "--signal=USR1", f"{array}_1")
    # Its process dies; with max_retries=0 nobody tries again.
    os.kill(read_json(run.stack("002") / "owner.json")["pid"], signal.SIGKILL)
    until(lambda: '"stopped"' in (run.stack("001") / "events.jsonl").read_text(), "stack 1 saved", run)
    until(lambda: "PENDING" in ask("squeue", "-h", "-r", f"--jobs={array}", "--format=%T"), "requeued", run)
    release(f"{array}_1")
    until(lambda: state(collect) in ("COMPLETED", "FAILED"), "joined", run)
    log = (run.path / "slurm" / "collect.log").read_text()
    manifest = read_json(run.manifest)
    assert manifest["status"] == "partial", log
    assert [one["status"] for one in manifest["members"]] == ["done", "done", "failed"]
    assert "ExitCode=3:0" in ask("scontrol", "--oneliner", "show", "job", collect)
    whole = read_json(train(*WORDS[:2], "num_members=3", "cluster.members_per_stack=1", "data.batch_size=8",
                            "trainer.max_epochs=200").run.manifest)["members"]  # fmt: skip
    assert [one["sha256"] for one in manifest["members"][:2]] == [one["sha256"] for one in whole[:2]]
    # What was lost is trained later, by anything.
    assert bdl("train", f"resume={run.path}", "cluster=inline").status == 0
    assert hashes(run) == [one["sha256"] for one in whole]


@pytest.mark.parametrize("shape", ["ray", "array"])
def test_a_cancelled_run_stays_away_until_it_is_submitted_again(shape, slurm, bdl):
    words = (*WORDS, "num_members=1", "trainer.max_epochs=20000", f"cluster.shape={shape}")
    jobs, run = submitted(bdl("submit", *words, "cluster.cpus_per_node=1"))
    until(lambda: events(run, "progress"), "it trains", run)
    again = bdl("submit", f"resume={run.path}", "cluster.cpus_per_node=1")
    assert again.status == 2
    assert " is running" in again.err or "in use by another process" in again.err
    ask("scancel", *jobs)
    # The step is asked to stop as when a job is preempted, but nobody wants this one back.
    until(lambda: not ask("squeue", "-h", f"--jobs={','.join(jobs)}"), "it has left the queue", run)
    assert state(jobs[0]) == "CANCELLED"
    assert "Restarts=0" in ask("scontrol", "--oneliner", "show", "job", jobs[0])
    assert "  interrupted  " in bdl("runs").out


def test_a_run_that_is_asked_to_stop_while_ray_starts_is_queued_again(slurm, bdl):
    (job,), run = submitted(bdl("submit", *WORDS, "num_members=1", "cluster.cpus_per_node=1"))
    until(lambda: state(job) == "RUNNING" and (run.path / "slurm" / "job.log").is_file(), "it runs", run)
    until(lambda: "start 0" in (run.path / "slurm" / "job.log").read_text(), "its script waits", run)
    ask("scancel", "--batch", "--signal=USR1", job)
    until(lambda: state(job) == "PENDING", "queued again", run)
    assert events(run, "progress") == []
    ask("scancel", job)


def test_follow_shows_the_log_and_ends_with_the_runs_status(slurm, bdl):
    said = bdl(
        "submit", *WORDS, "num_members=1", "trainer.max_epochs=4", "cluster.cpus_per_node=1", "follow=true"
    )
    assert said.status == 0, said.out + said.err
    assert "[complete]" in said.out
    refused = bdl("submit", *WORDS, "cluster.partition=nowhere")
    assert refused.status == 2
    assert "sbatch refuses the job" in refused.err
    assert "partition" in refused.err
    # A job that Slurm forgot long ago: squeue answers, and does not know it.
    assert slurm_module.state_of({"ids": ["99999"]}) == "ended"
    assert slurm_module.state_of({"ids": ["99998", "99999"]}) == "ended"
