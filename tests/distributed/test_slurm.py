"""Submission to Slurm by stand-ins of its programs: what is asked for, what is refused, and the state of a job."""

import json
import os
import stat
from pathlib import Path

import pytest
import yaml

from bdl_train.build import build
from bdl_train.distributed import Resources, Submitter
from bdl_train.distributed.slurm import _ranges, seconds_of, state_of, states_of
from bdl_train.runs import RunDir, find_runs, read_json


class Programs:
    """Executables on the PATH that note how they were called and print what they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, said: str = "", *, error: str = "", status: int = 0) -> None:
        path = self.folder / name
        path.write_text(
            f'#!/bin/sh\nprintf "%s\\n" "$0 $*" >> "{self.folder}/calls"\nprintf "%s" "{error}" >&2\n'
            f'printf "%s" "{said}"\nexit {status}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def calls(self, name: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [line.split()[1:] for line in lines if line.split()[0].endswith(f"/{name}")]


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Programs:
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    # Whatever Slurm this machine has must not be asked.
    made = Programs(folder)
    for name in ("squeue", "sacct", "scontrol"):
        made.add(name, status=1)
    return made


TINY = ("num_members=4", "cluster.members_per_stack=1", "trainer.max_epochs=4")


def test_one_job_asks_for_what_the_config_says(programs, bdl):
    programs.add("sbatch", "123;cluster")
    words = ["cluster.nodes=2", "cluster.cpus_per_node=3", "cluster.mem=8G", "cluster.time=60"]
    words += ["cluster.partition=gpu", "cluster.gpus_per_node=2", "cluster.gpus_per_stack=0.5"]
    words += ["cluster.account=a1", "cluster.options=[--exclusive]", "cluster.signal_s=40"]
    words += [
        "cluster.modules=[cuda/12]",
        "cluster.setup=['export A=1']",
        "cluster.container='apptainer exec x'",
    ]
    said = bdl("submit", *TINY, *words)
    assert said.status == 0, said.err
    assert "job 123: `bdl runs` shows its state" in said.out
    ((*options, script, run_path),) = programs.calls("sbatch")
    run = RunDir(Path(run_path))
    assert find_runs("runs")[0].path.absolute() == run.path
    assert {*options} == {
        "--parsable", "--nodes=2", "--cpus-per-task=3", f"--output={run.path}/slurm/job.log", "--mem=8G",
        "--time=60", "--partition=gpu", "--gres=gpu:2", "--account=a1", "--exclusive", "--signal=B:USR1@40",
    }  # fmt: skip
    assert Path(script).read_text().startswith("#!/bin/bash")
    site = (run.path / "slurm" / "site.sh").read_text()
    assert site.splitlines() == [
        "module load cuda/12", "export A=1", "export BDL_PYTHON=python BDL_MAX_RETRIES=2",
        "export BDL_CONTAINER='apptainer exec x'",
    ]  # fmt: skip
    stored = read_json(run.submission)
    assert (stored["system"], stored["ids"], stored["log"]) == ("slurm", ["123"], "slurm/job.log")
    # The plan is for the nodes that were asked for: 2 machines with 2 GPUs, two halves of each.
    assert read_json(run.plan)["num_workers"] == 4


def test_an_array_has_a_task_for_each_stack_and_a_job_that_joins_them(programs, bdl):
    programs.add("sbatch", "77")
    said = bdl("submit", *TINY, "cluster.shape=array", "cluster.nodes=2", "cluster.cpus_per_node=3")
    assert said.status == 0, said.err
    array, collect = programs.calls("sbatch")
    assert "--array=0-3%2" in array
    assert "--cpus-per-task=3" in array
    assert "--dependency=afterany:77" in collect
    assert (Path(array[-2]).name, Path(collect[-2]).name) == ("array.sbatch", "collect.sbatch")
    # What has a result is not submitted again.
    run = find_runs("runs")[0]
    run.stack("001").mkdir(parents=True)
    (run.stack("001") / "result.json").write_text(json.dumps({"status": "done", "members": []}))
    again = ("cluster.shape=array", "cluster.nodes=2", "cluster.cpus_per_node=3")
    assert bdl("submit", f"resume={run.path}", *again).status == 0
    assert "--array=0,2-3%2" in programs.calls("sbatch")[2]


def test_slurms_own_words_and_a_missing_slurm_are_wrong_usage(programs, bdl, monkeypatch, tmp_path):
    programs.add("sbatch", error="sbatch: error: invalid partition specified: nowhere", status=1)
    said = bdl("submit", *TINY, "cluster.partition=nowhere")
    assert said.status == 2
    assert "sbatch refuses the job: invalid partition specified: nowhere" in said.err
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    said = bdl("submit", *TINY)
    assert said.status == 2
    assert "needs Slurm's sbatch" in said.err
    assert find_runs("runs") == []


def test_an_array_that_nobody_would_join_is_taken_back(programs, bdl):
    programs.add("scancel")
    path = programs.folder / "sbatch"
    programs.add("sbatch", "77")
    # The second job is refused.
    refusing = 'case "$*" in *collect.sbatch*) echo "sbatch: error: too many jobs" >&2; exit 1;; esac'
    path.write_text(path.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{refusing}"))
    said = bdl("submit", *TINY, "cluster.shape=array")
    assert said.status == 2
    assert "sbatch refuses the job: too many jobs" in said.err
    assert programs.calls("scancel") == [["77"]]
    assert find_runs("runs") == []


def test_stacks_that_all_have_results_are_only_joined(programs, bdl):
    programs.add("sbatch", "77")
    assert bdl("submit", *TINY, "cluster.shape=array").status == 0
    run = find_runs("runs")[0]
    for stack in read_json(run.plan)["stacks"]:
        run.stack(stack["id"]).mkdir(parents=True)
        (run.stack(stack["id"]) / "result.json").write_text(json.dumps({"status": "done", "members": []}))
    said = bdl("submit", f"resume={run.path}", "cluster.shape=array")
    assert said.status == 0, said.err
    (collect,) = programs.calls("sbatch")[2:]
    assert Path(collect[-2]).name == "collect.sbatch"
    assert not any(word.startswith("--dependency") for word in collect)


@pytest.mark.parametrize("queue", ["PENDING", "RUNNING"])
def test_a_run_is_in_the_queue_once(queue, programs, bdl):
    programs.add("sbatch", "78")
    assert bdl("submit", *TINY).status == 0
    run = find_runs("runs")[0]
    programs.add("squeue", f"78 {queue}")
    said = bdl("submit", f"resume={run.path}")
    assert said.status == 2
    assert f"{run.path} is submitted already: job 78 is" in said.err
    programs.add("squeue", "")  # it has ended
    assert bdl("submit", f"resume={run.path}").status == 0
    assert len(programs.calls("sbatch")) == 2


def test_the_job_around_the_submitting_shell_does_not_leak_into_the_new_one(programs, bdl, monkeypatch):
    programs.add("sbatch", "79")
    path = programs.folder / "sbatch"
    path.write_text(
        path.read_text().replace("#!/bin/sh", f"#!/bin/sh\nenv > '{programs.folder}/environment'")
    )
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SLURM_CONF", "/elsewhere/slurm.conf")
    assert bdl("submit", *TINY).status == 0
    seen = (programs.folder / "environment").read_text().splitlines()
    assert [line for line in seen if line.startswith("SLURM_")] == ["SLURM_CONF=/elsewhere/slurm.conf"]


def test_submit_takes_what_train_takes_and_follow(bdl):
    submit, train = (yaml.safe_load(bdl(verb, "--cfg", "job").out) for verb in ("submit", "train"))
    assert submit.pop("follow") is False
    assert submit.pop("cluster")["_target_"] == "bdl_train.distributed.slurm.Slurm"
    train.pop("cluster")
    assert submit == train


def test_verbs_and_clusters_that_do_not_fit_say_which_does(bdl):
    said = bdl("submit", "cluster=inline")
    assert said.status == 2
    assert "bdl train cluster=inline" in said.err
    said = bdl("train", "cluster=slurm")
    assert said.status == 2
    assert "bdl submit" in said.err
    assert bdl("submit", "num_members=0").status == 2
    assert not Path("runs").exists()


def test_a_limit_shorter_than_a_checkpoint_interval_is_said_with_numbers(programs, bdl, caplog):
    programs.add("sbatch", "5")
    assert bdl("submit", *TINY, "cluster.time=2").status == 0
    assert "cluster.time=2 leaves 30 s" in caplog.text
    assert "trainer.checkpoint_every_s=60" in caplog.text
    caplog.clear()
    assert bdl("submit", *TINY, "cluster.time=3").status == 0
    assert "leaves" not in caplog.text


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:01", 3601), ("2-3", 183600), ("1-2:03", 93780), ("1-0:0:1", 86401)],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit, seconds):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize("limit", ["soon", "1:2:3:4", "x-1", "infinite"])
def test_other_limits_are_left_to_slurm(limit):
    assert seconds_of(limit) is None


def test_stacks_are_listed_as_ranges():
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert _ranges([4]) == "4"


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ({"squeue": "9 RUNNING"}, "running"),
        ({"squeue": "8 RUNNING\n9 PENDING"}, "queued"),
        ({"squeue": "9 PENDING\n9 RUNNING"}, "running"),  # tasks of an array
        ({"squeue": "9 PENDING"}, "queued"),
        ({"squeue": "", "sacct": "9|REQUEUED"}, "queued"),
        ({"squeue": "", "sacct": "9_1|COMPLETED\n9_[2-4]|PENDING"}, "queued"),
        ({"squeue": "", "sacct": "9|COMPLETED"}, "ended"),
        ({"squeue": "", "sacct": "9|CANCELLED by 0"}, "ended"),
        ({"sacct": "9|FAILED"}, "ended"),
        ({"scontrol": "JobId=9 JobName=bdl JobState=PENDING Reason=BeginTime"}, "queued"),
        (
            {"scontrol": "JobId=11 ArrayJobId=9 ArrayTaskId=1 JobState=RUNNING\nJobId=12 JobState=PENDING"},
            "running",
        ),
        ({"squeue": "", "scontrol": "JobId=9 JobState=COMPLETED"}, "ended"),
        ({"squeue": ""}, "ended"),
        ({}, "unknown"),
    ],
)
def test_the_state_comes_from_whichever_program_knows(said, state, programs):
    for name, text in said.items():
        programs.add(name, text)
    assert state_of({"ids": ["9"]}) == state


def test_each_program_is_asked_once_for_all_runs(programs):
    programs.add("squeue", "1 RUNNING\n2 PENDING")
    programs.add("sacct", "3|COMPLETED\n4|REQUEUED")
    programs.add("scontrol", "JobId=5 JobState=RUNNING")
    submissions = [{"ids": [one]} for one in ("5", "4", "3", "2", "1", "x")] + [{"ids": ["2", "1"]}, {}]
    states = ["running", "queued", "ended", "queued", "running", "unknown", "running", "unknown"]
    assert states_of(submissions) == states
    assert [len(programs.calls(name)) for name in ("squeue", "sacct", "scontrol")] == [1, 1, 1]


def test_ids_that_are_no_numbers_reach_no_program(programs):
    assert state_of({"ids": ["--help; rm"]}) == "unknown"
    assert programs.calls("squeue") == []


@pytest.mark.parametrize(
    ("queue", "began", "shown"),
    [
        ("PENDING", False, "queued"), ("PENDING", True, "requeued"), ("RUNNING", True, "running"),
        ("COMPLETED", True, "interrupted"), (None, False, "queued"),
    ],
)  # fmt: skip
def test_bdl_runs_shows_the_state_of_the_queue(queue, began, shown, programs, bdl):
    programs.add("sbatch", "8")
    assert bdl("submit", *TINY).status == 0
    run = find_runs("runs")[0]
    if began:
        run.stack("000").mkdir(parents=True)
        (run.stack("000") / "events.jsonl").write_text("")
    if queue is not None:
        programs.add("squeue", f"8 {queue}")
    assert f"  {shown}  " in bdl("runs").out


def test_resources_are_those_of_the_nodes(tmp_path):
    node = read_yaml_node() | {"nodes": 3, "cpus_per_node": 2, "gpus_per_node": 1}
    one = build(node, Submitter, key="cluster")
    assert one.resources() == Resources.of_nodes([(2, 1), (2, 1), (2, 1)])
    assert build(node | {"shape": "array"}, Submitter, key="cluster").cpus_per_stack == 2
    with pytest.raises(ValueError, match=r"ranks_per_stack=2 needs Ray"):
        build(node | {"shape": "array", "ranks_per_stack": 2}, Submitter, key="cluster")


def read_yaml_node() -> dict:
    from bdl_train.schema import shipped

    return yaml.safe_load((shipped() / "cluster" / "slurm.yaml").read_text())


def test_the_templates_are_shells_own_grammar():
    folder = Path(__file__).parents[2] / "slurm"
    for path in folder.glob("*.sbatch"):
        assert os.system(f"bash -n '{path}'") == 0
