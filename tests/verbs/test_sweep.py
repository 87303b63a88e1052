"""Sweeps: what is tried, what chooses, what is pruned, and what is left to do after a stop or a crash."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_line import TINY

from bdl_train.config import compose
from bdl_train.distributed import Resources, ray_local
from bdl_train.distributed.inline import Inline
from bdl_train.distributed.ray_local import RayLocal
from bdl_train.runs import RunDir, find_runs, read_json
from bdl_train.schema import Schema
from bdl_train.sweeps.record import SweepDir, Trial
from bdl_train.verbs import _trials
from bdl_train.verbs import train as train_verb

GRID = ("optimizer.lr=0.001,0.05", "inference=deep_ensemble,swag")


@pytest.fixture
def sweep(bdl):
    """`bdl sweep` with tiny settings."""

    def call(*words: str, status: int = 0):
        said = bdl("sweep", *TINY, *words)
        assert said.status == status, said.out + said.err
        return said

    return call


def trials_of(path: Path | str) -> list[Trial]:
    return [trial for _, trial in sorted(SweepDir(Path(path)).trials().items())]


def weights(folder: Path, trial: Trial) -> list[str]:
    return [member["sha256"] for member in read_json(RunDir(folder / trial.run).manifest)["members"]]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# --- what can be given ------------------------------------------------------------------------------------------


def test_a_sweep_takes_every_key_of_a_training_with_the_same_default():
    train, sweep = Schema.of("train"), Schema.of("sweep")
    assert sweep.groups == train.groups
    known = {key.name: key for key in sweep.keys}
    for key in train.keys:
        assert key.name in known
        if key.name not in ("name", "resume"):  # of the sweep itself
            assert known[key.name] == key
    own = compose("sweep", ["num_members=3", "data=csv", "data.path=a.csv", "data.target=y"])
    alone = compose("train", ["num_members=3", "data=csv", "data.path=a.csv", "data.target=y"])
    assert {key: own[key] for key in alone} == alone


def test_help_and_the_composed_config(bdl):
    said = bdl("sweep", "--help")
    assert said.status == 0
    assert "sampler=grid" in said.out
    assert "num_members=8" in said.out
    said = bdl("sweep", "--cfg", "job", "model=lenet,mlp", "optimizer.lr=interval(0.1,1)")
    assert said.status == 0
    assert "# several values: optimizer.lr=interval(0.1,1)" in said.out
    assert "bdl_train.models.lenet" in said.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["optimzer.lr=1,2"],
            "Unknown key 'optimzer.lr' (from 'optimzer.lr=1'). Did you mean 'optimizer.lr'?",
        ),
        (["num_trial=3", "seed=1,2"], "Did you mean 'num_trials'?"),
        (["model=mlp,mpl"], "Unknown model 'mpl'. Did you mean 'mlp'?"),
        (["seed=1"], "Nothing to sweep"),
        (["optimizer.lr=interval(0.1,1)"], "is an interval, and sampler=grid tries listed values"),
        (["optimizer.lr=interval(1,0.1)", "sampler=random"], "goes from a number up to a larger one"),
        (["optimizer.lr=tag(log,interval(0,1))", "sampler=random"], "begins above 0"),
        (["optimizer.lr=tag(exp,interval(0,1))", "sampler=random"], "has the tag exp"),
        (["seed=1,2", "sampler=rndom"], "Did you mean 'random'?"),
        (["seed=1,2", "sampler=random"], "num_trials=20"),
        (["seed=1,2", "objective=test/nll"], "objective=test/nll is no metric of the validation part"),
        (["sampler=grid,random", "seed=1,2"], "all trials of a sweep share this one"),
        (["cluster=inline,ray_local", "seed=1,2"], "all trials of a sweep share this one"),
        (["seed=1,2", "plan_only=true"], "is for one training"),
        (["seed=1,2", "+model.api_key=abc"], "named like a secret"),
        (["seed=1,2", "name=../x"], "name='../x'"),
        (["resume=nowhere"], "holds no sweep"),
        (["resume=nowhere", "seed=1"], "seed cannot change when a sweep goes on"),
        (["seed=1,2", "data.val_fraction=0"], "set data.val_fraction above 0"),
        (["seed=1,2", "num_members=0"], "num_members"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(words, said, bdl, tmp_path):
    answer = bdl("sweep", "cluster=inline", *words)
    assert answer.status == 2, answer.out
    assert said in answer.err
    assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


def test_an_objective_that_these_runs_do_not_have_ends_the_sweep(sweep):
    said = sweep("seed=1,2", "objective=val/rmse", status=2)
    assert "Unknown objective 'val/rmse'" in said.err
    assert "val/nll" in said.err


# --- a grid -----------------------------------------------------------------------------------------------------


def test_a_grid_tries_every_combination_and_the_validation_part_chooses(sweep, bdl):
    said = sweep(*GRID, "name=grid")
    folder = Path("runs/grid")
    trials = trials_of(folder)
    assert [trial.words for trial in trials] == [
        (f"optimizer.lr={lr}", f"inference={method}")
        for lr in (0.001, 0.05)
        for method in ("deep_ensemble", "swag")
    ]
    assert {trial.status for trial in trials} == {"complete"}
    for trial in trials:
        run = RunDir(folder / trial.run)
        metrics = read_json(run.metrics)
        assert (
            trial.objective
            == metrics["val/nll"]
            == read_json(run.evaluation("val") / "metrics.json")["val/nll"]
        )
        assert "test/nll" in metrics
        assert trial.curve[-1][0] == 4
    best = min(trials, key=lambda one: one.objective or 0)
    assert f"best: trial {best.number}, run: {folder / best.run}" in said.out
    assert "not used for selection" in said.out
    assert read_json(folder / "results.json")["trials"][0]["number"] == best.number
    # A trial is the training that its words name.
    alone = bdl("train", *TINY, *trials[3].words)
    assert read_json(alone.run.metrics)["test/nll"] == (trials[3].metrics or {})["test/nll"]
    assert weights(folder, trials[3]) == [one["sha256"] for one in read_json(alone.run.manifest)["members"]]
    compared = bdl("compare", "runs=runs/grid/*", "metrics=[val/nll,test/nll]", "output=table.csv")
    assert compared.status == 0, compared.err
    assert len(Path("table.csv").read_text().splitlines()) == 5


def test_the_same_words_again_do_only_what_is_missing(sweep):
    folder = Path(sweep(*GRID).out.split(":")[0])
    assert folder.parent == Path("runs")
    before = trials_of(folder)
    kept = {trial.number: times(folder / trial.run) for trial in before}
    SweepDir(folder).trial(2).unlink()
    said = sweep(*GRID)
    assert "3 of them are done already" in said.out
    assert said.out.count(" starts: ") == 1
    after = trials_of(folder)
    assert [trial.words for trial in after] == [trial.words for trial in before]
    assert weights(folder, after[2]) == weights(folder, before[2])
    for number in (0, 1, 3):
        assert after[number] == before[number]
        assert times(folder / after[number].run) == kept[number]
    # Other words are another sweep, unless it is told to lie in the same folder.
    said = sweep("seed=1,2", f"name={folder.name}", status=2)
    assert "holds another sweep (axes" in said.err


def test_a_folder_with_something_else_is_no_place_for_a_sweep(sweep, train):
    train("name=taken")
    assert "exists and is no sweep" in sweep(*GRID, "name=taken", status=2).err


def test_a_trial_that_fails_does_not_end_the_sweep(sweep, bdl):
    said = sweep("data.batch_size=32,0", "seed=1,2", "name=mixed", status=2)
    assert [trial.status for trial in trials_of("runs/mixed")] == ["complete", "complete", "failed", "failed"]
    assert "data.batch_size" in trials_of("runs/mixed")[2].reason
    assert "trial 2 failed" in said.out
    assert len(find_runs("runs/mixed")) == 2
    # Taken up again it is not tried again, until its record is removed.
    assert " starts: " not in bdl("sweep", "resume=runs/mixed").out
    SweepDir(Path("runs/mixed")).trial(2).unlink()
    assert bdl("sweep", "resume=runs/mixed").out.count(" starts: ") == 1


def test_members_that_are_lost_show_in_trial_and_status(sweep, user_package):
    words = ("model=module", f"model._target_={user_package}.Diverging", f"allow=[{user_package}]")
    said = sweep(*words, "inference=deep_ensemble", "num_members=5", "seed=0,1", "name=lost", status=3)
    found = trials_of("runs/lost")
    assert "partial" in {trial.status for trial in found}
    lost = next(trial for trial in found if trial.status == "partial")
    assert "members lost" in lost.reason
    assert lost.objective is not None
    assert user_package not in json.loads(Path("runs/lost/sweep.json").read_text())["fixed"]
    assert said.err.count("Traceback") == 0


# --- a search ---------------------------------------------------------------------------------------------------


def test_a_search_goes_on_with_more_trials(sweep, bdl):
    words = ("sampler=tpe", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "name=search")
    sweep(*words, "num_trials=2")
    first = trials_of("runs/search")
    said = bdl("sweep", "resume=runs/search", "num_trials=3")
    assert said.status == 0, said.err
    assert trials_of("runs/search")[:2] == first
    assert len(trials_of("runs/search")) == 3
    sweep(*words[:2], "name=whole", "num_trials=3")
    assert [trial.words for trial in trials_of("runs/whole")] == [
        trial.words for trial in trials_of("runs/search")
    ]


def test_a_search_over_few_settings_tries_each_once(sweep):
    sweep("sampler=random", "optimizer.lr=0.001,0.05", "name=few", "num_trials=5")
    assert sorted(trial.words for trial in trials_of("runs/few")) == [
        ("optimizer.lr=0.001",), ("optimizer.lr=0.05",)
    ]  # fmt: skip


LONG = (
    "trainer.max_epochs=3000",
    "trainer.steps_per_call=1",
    "inference=deep_ensemble",
    "inference.patience=20",
)
PRUNED = ("prune=median", "prune_after_trials=1", "prune_after_epochs=5", "optimizer.lr=0.03,1e-6")


def test_a_hopeless_trial_is_pruned_and_a_good_one_is_not(sweep, bdl):
    # Two stacks: the second one must not start.
    said = sweep(*LONG, *PRUNED, "cluster.members_per_stack=1", "name=pruned")
    good, hopeless = trials_of("runs/pruned")
    assert (good.status, hopeless.status) == ("complete", "pruned")
    assert "the median of 1 others there is" in hopeless.reason
    assert hopeless.curve[-1][0] < 3000
    run = RunDir(Path("runs/pruned") / hopeless.run)
    assert [path.name for path in (run.path / "stacks").iterdir()] == ["000"]
    assert run.status() == "pruned"
    assert "trial 1 pruned: validation NLL" in said.out
    assert "pruned" in bdl("runs", "root=runs/pruned").out
    # It is not taken up again.
    before = times(run.path)
    again = bdl("sweep", "resume=runs/pruned")
    assert again.status == 0, again.err
    assert "2 of them are done already" in again.out
    assert times(run.path) == before


def test_a_pruned_run_that_somebody_goes_on_with_is_pruned_no_more(train, bdl):
    run = RunDir(Path(train("plan_only=true").out.rpartition("resume=")[2].strip()))
    run.pruned_file.write_text("late\n")
    assert run.status() == "pruned"
    assert bdl("train", f"resume={run.path}").status == 0
    assert run.status() == "complete"
    assert not run.pruned_file.exists()


# --- stopped and killed -----------------------------------------------------------------------------------------

CUT = ("trainer.max_epochs=150", "trainer.steps_per_call=1", "trainer.checkpoint_every_s=0.1")
CUT = (*CUT, "inference=deep_ensemble", "inference.patience=null", "seed=1,2,3")


def start(folder: Path, *words: str) -> subprocess.Popen:
    code = "import sys; from bdl_train.cli import main; sys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", *TINY, *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGUSR1])
def test_a_sweep_that_was_cut_off_goes_on_with_what_is_missing(number, tmp_path, bdl):
    folder = tmp_path / "runs" / "cut"
    process = start(tmp_path, *CUT, "name=cut")
    try:
        wait_for(lambda: list(folder.glob("trials/0001.json")), process)
        second = trials_of(folder)[1]
        wait_for(lambda: list((folder / second.run).glob("stacks/*/checkpoint*.pt")), process)
        process.send_signal(number)
        out = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == (-number if number == signal.SIGKILL else 75), out
    first, second = trials_of(folder)
    assert (first.status, second.status) == ("complete", "running")
    assert RunDir(folder / second.run).status() == "interrupted"
    kept = times(folder / first.run)
    if number != signal.SIGKILL:
        assert "bdl sweep resume=runs/cut" in out
    said = (
        bdl("sweep", "resume=runs/cut") if number != signal.SIGKILL else bdl("sweep", *TINY, *CUT, "name=cut")
    )
    assert said.status == 0, said.out + said.err
    assert "trial 1 goes on: seed=2" in said.out
    assert "trial 2 starts: seed=3" in said.out
    found = trials_of(folder)
    assert [trial.status for trial in found] == ["complete"] * 3
    assert (found[0], found[1].run) == (first, second.run)
    assert times(folder / first.run) == kept
    assert {run.path.name for run in find_runs(folder)} == {trial.run for trial in found}
    assert bdl("sweep", *TINY, *CUT, "name=whole").status == 0
    whole = trials_of(tmp_path / "runs" / "whole")
    for mine, theirs in zip(found, whole, strict=True):
        assert weights(folder, mine) == weights(folder.parent / "whole", theirs)
        assert mine.objective == theirs.objective


def test_two_drivers_are_refused(sweep):
    folder = Path(sweep(*GRID).out.split(":")[0])
    holder = {
        "pid": os.getppid(),
        "started": None,
        "host": os.uname().nodename,
        "heartbeat": time.time(),
        "token": "x",
    }
    (folder / "lock.json").write_text(json.dumps(holder))
    assert f"{folder} is in use by process {os.getppid()}" in sweep(*GRID, status=2).err


def test_a_run_that_was_made_by_half_is_made_anew(sweep, monkeypatch):
    folder = Path(sweep("seed=1,2").out.split(":")[0])
    record, trial = SweepDir(folder), trials_of(folder)[1]
    run = RunDir(folder / trial.run)
    # As a driver leaves it that is killed right after it has made the folder.
    record.save(Trial(number=1, words=trial.words, run=trial.run))
    for path in sorted(run.path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (run.path / ".config.yaml.tmp").touch()
    assert "trial 1 starts: seed=2" in sweep("seed=1,2").out
    assert trials_of(folder)[1] == trial


def test_a_thread_that_dies_is_a_failed_trial(sweep, monkeypatch):
    def train(*args):
        raise SystemExit(3)

    monkeypatch.setattr(_trials, "train", train)
    sweep("seed=1,2", "name=dead", status=1)
    assert [trial.reason for trial in trials_of("runs/dead")] == ["SystemExit: 3"] * 2


# --- side by side -----------------------------------------------------------------------------------------------


@pytest.mark.ci
@pytest.mark.ray
def test_trials_run_side_by_side_on_one_ray(ray_session, bdl, monkeypatch):
    monkeypatch.setattr(RayLocal, "close", lambda self: None)
    sessions = []
    true_start = ray_local.start

    def start(resources):
        ray = true_start(resources)
        sessions.append(ray.get_runtime_context().get_job_id())
        return ray

    monkeypatch.setattr(ray_local, "start", start)
    words = ("num_members=2", "cluster.num_cpus=2", "trainer.max_epochs=60", "trainer.steps_per_call=1")
    said = bdl(
        "sweep", *words, "inference=deep_ensemble", "inference.patience=null", "seed=1,2,3,4", "name=ray"
    )
    assert said.status == 0, said.out + said.err
    assert "4 trials, 2 at a time" in said.out
    assert len(set(sessions)) == 1
    folder = Path("runs/ray")
    spans, processes = [], []
    for trial in trials_of(folder):
        (path,) = folder.glob(f"{trial.run}/stacks/*/events.jsonl")
        events = [json.loads(line) for line in path.read_text().splitlines()]
        spans.append((events[0]["time"], events[-1]["time"]))
        processes += [event["value"]["pid"] for event in events if event["key"] == "started"]
    assert any(
        one[0] < other[1] and other[0] < one[1] for i, one in enumerate(spans) for other in spans[:i]
    ), spans
    # Worker processes are used again.
    assert len(set(processes)) < 4
    # Never more than the machine has.
    edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    running, most = 0, 0
    for _, change in edges:
        running += change
        most = max(most, running)
    assert most == 2
    assert (
        bdl(
            "sweep",
            *TINY,
            *words[2:],
            "inference=deep_ensemble",
            "inference.patience=null",
            "seed=1,2,3,4",
            "name=one",
        ).status
        == 0
    )
    for mine, theirs in zip(trials_of(folder), trials_of("runs/one"), strict=True):
        assert weights(folder, mine) == weights(Path("runs/one"), theirs)


def test_trials_make_their_data_and_networks_one_at_a_time(sweep, monkeypatch):
    inside, most = [], []

    def alone(true):
        def call(*args):
            inside.append(threading.get_ident())
            most.append(len(inside))
            time.sleep(0.05)
            try:
                return true(*args)
            finally:
                inside.pop()

        return call

    monkeypatch.setattr(train_verb, "checked", alone(train_verb.checked))
    monkeypatch.setattr(train_verb, "_collect", alone(train_verb._collect))
    monkeypatch.setattr(Inline, "concurrent", True)  # threads without the cost of a Ray
    monkeypatch.setattr(Inline, "num_workers", 2)
    monkeypatch.setattr(Inline, "launch", lambda *args: {})  # every stack is lost, and nothing is trained
    monkeypatch.setattr(Inline, "resources", lambda self: Resources(2, 0))
    said = sweep("inference=deep_ensemble", "optimizer.lr=0.01,0.02,0.03", "name=alone", status=1)
    assert "2 at a time" in said.out
    assert len(most) == 6
    assert max(most) == 1
