"""What `bdl train` leaves behind: files, keys, order, places."""

import json
import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import bdl_train.runs
from bdl_train.files import sha256
from bdl_train.posteriors.artefact import read_artefact
from bdl_train.priors.from_posterior import FromPosterior
from bdl_train.runs import RunDir, find_runs, read_json
from bdl_train.verbs import train as train_verb


def files(run: RunDir) -> set[str]:
    return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}


def test_files_of_a_complete_run(class_run):
    assert files(class_run) == {
        "config.yaml",
        "plan.json",
        "manifest.json",
        "metrics.json",
        "stacks/000/events.jsonl",
        "stacks/000/owner.json",
        "stacks/000/result.json",
        "posterior/posterior.json",
        "posterior/rows.safetensors",
        "posterior/moments.safetensors",
        "posterior/member-00000.safetensors",
        "posterior/member-00001.safetensors",
        *(f"evaluation/test/{name}" for name in EVALUATION),
    }


EVALUATION = ("metrics.json", "metrics_detail.parquet", "predictions.parquet", "hashes.json")


def test_run_directories_are_named_by_experiment_time_and_six_hex_digits(class_run):
    assert class_run.path.parent.name == "breast_cancer"
    stamp, _, digits = class_run.path.name.rpartition("-")
    assert time.strptime(stamp, "%Y%m%d-%H%M%S")
    assert len(digits) == 6
    assert int(digits, 16) >= 0


def test_manifest_says_what_was_done_with_what(class_run):
    manifest = read_json(class_run.manifest)
    assert manifest["status"] == "complete"
    assert manifest["temperature"] == 1.0
    # 569 rows: a fifth is the test part, a tenth of the rest the validation part.
    assert manifest["num_data"] == 569 - 114 - 46
    assert set(manifest["data"]) >= {"name", "fingerprint", "augment"}
    assert manifest["hashes"] == {
        "config.yaml": sha256(class_run.config),
        "plan.json": sha256(class_run.plan),
        "posterior/posterior.json": sha256(class_run.posterior / "posterior.json"),
    }
    assert set(manifest["packages"]) >= {"torch", "numpy", "ray"}
    assert set(manifest["hardware"]) == {"machine", "cpus", "gpus"}
    assert 0 < manifest["device_time_s"] < manifest["wall_time_s"] < 600
    assert manifest["steps"] == {"000": 4 * (409 // 32)}
    seeds = read_json(class_run.plan)["stacks"][0]["seeds"]
    for member in manifest["members"]:
        assert member["seed"] == seeds[member["id"]]
        assert member["sha256"] == sha256(class_run.posterior / member["file"])


def test_posterior_json_holds_what_prediction_needs(class_run):
    meta = read_json(class_run.posterior / "posterior.json")
    assert meta["schema_version"] == 1
    assert set(meta) >= {
        "method", "num_data", "prior", "temperature", "architecture", "likelihood", "inputs", "target", "transform",
        "batch_norm", "members", "files",
    }  # fmt: skip
    for entry in meta["members"]:
        assert set(entry) >= {"id", "seed", "status", "train_rows", "file", "sha256"}
    for name, entry in meta["files"].items():
        assert entry["sha256"] == sha256(class_run.posterior / name)


def test_events_are_whole_json_lines_of_five_keys(class_run):
    lines = (class_run.stack("000") / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert all(set(event) == {"time", "member", "step", "key", "value"} for event in events)
    assert {event["key"] for event in events} == {
        "started", "progress", "train/nll", "val/nll", "val/stack_nll", "val/disagreement", "member",
    }  # fmt: skip
    # One validation an epoch and member, at the epoch's last step.
    steps = [event["step"] for event in events if event["key"] == "val/nll" and event["member"] == 1]
    assert steps == [12, 24, 36, 48]


def test_metrics_are_those_of_the_predictions_table(class_run):
    rows = pd.read_parquet(class_run.evaluation("test") / "predictions.parquet")
    metrics = read_json(class_run.metrics)
    assert len(rows) == 114
    probs = rows[["p_malignant", "p_benign"]].to_numpy()
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    nll = -np.log(probs[np.arange(114), rows["y"]])
    assert metrics["test/nll"] == pytest.approx(nll.mean(), rel=1e-6)
    assert metrics["test/accuracy"] == pytest.approx((probs.argmax(1) == rows["y"]).mean())
    detail = pd.read_parquet(class_run.evaluation("test") / "metrics_detail.parquet")
    assert list(detail.columns) == [
        "key",
        "slice",
        "value",
        "low",
        "high",
        "n",
        "unit",
        "meaning",
        "better",
        "reason",
    ]
    assert set(detail["key"]) == set(metrics)


def test_the_manifest_is_written_last(train, monkeypatch):
    written = []
    true_replace = bdl_train.runs.Path.replace
    monkeypatch.setattr(
        bdl_train.runs.Path,
        "replace",
        lambda self, target: written.append(target.name) or true_replace(self, target),
    )
    run = train().run
    own = [name for name in written if name != "lock.json"]
    assert own[-1] == "manifest.json"
    assert own.index("posterior.json") > own.index("member-00001.safetensors")
    assert own.index("config.yaml") < own.index("plan.json") < own.index("result.json")
    assert not run.lock.exists()


def test_the_manifest_counts_a_share_of_a_gpu_as_such(train, monkeypatch):
    plain = train_verb.trained

    def on_quarters(*args: Any) -> Any:
        the_plan, results = plain(*args)
        return replace(the_plan, stacks=[replace(task, gpus=0.25) for task in the_plan.stacks]), results

    monkeypatch.setattr(train_verb, "trained", on_quarters)
    run = train().run
    seconds = [read_json(file)["seconds"] for file in run.path.glob("stacks/*/result.json")]
    assert read_json(run.manifest)["device_time_s"] == pytest.approx(0.25 * sum(seconds))


def test_a_run_without_a_manifest_is_interrupted_not_complete(train, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(train_verb, "write_manifest", fail)
    said = train(status=1)
    assert "the disk is full" in said.err
    (run,) = find_runs("runs")
    assert run.status() == "interrupted"


def test_ctrl_c_while_scoring_says_how_to_finish_the_run(train, bdl, monkeypatch):
    def press(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_verb, "write_manifest", press)
        said = train(status=75)
    (run,) = find_runs("runs")
    assert f"interrupted; finish it with: bdl train resume={run.path}\n" in said.out
    assert bdl("train", f"resume={run.path}").status == 0
    assert run.status() == "complete"


SECRETIVE = """
from my_things import Waves as Base


class Waves(Base):
    def __init__(self, rows, service):
        super().__init__(rows)
        assert service["api_key"] != "***"
"""


def test_no_secret_of_the_config_is_stored(train, bdl, user_package, tmp_path):
    (tmp_path / "own" / "secretive.py").write_text(SECRETIVE)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    service = "{api_key: abc123, token: t0psecret, num_tokens: 4}"
    node = f"_target_: secretive.Waves\nbatch_size: 16\nrows: 60\nservice: {service}\n"
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(node)
    words = ("data=mine", "likelihood=gaussian", f"allow=[secretive,{user_package}]", "--config-dir", "conf")
    run = train(*words).run
    stored = yaml.safe_load(run.config.read_text())
    assert stored["data"]["service"] == {"api_key": "***", "token": "***", "num_tokens": 4}
    assert stored["optimizer"]["_target_"] == "torch.optim.Adam"
    for path in run.path.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"abc123" not in content
        assert b"t0psecret" not in content
    # What needs the secret again says so instead of running without it.
    said = bdl("evaluate", f"run={run.path}", f"allow=[secretive,{user_package}]")
    assert said.status == 2
    assert "data.service.api_key was masked" in said.err


def test_output_dir_and_name_decide_the_place(train, tmp_path):
    run = train("output_dir=there/deep", "name=first try").run
    assert run.path.parent == run.path.__class__("there/deep/first try")
    assert (tmp_path / "there" / "deep" / "first try" / run.path.name / "manifest.json").is_file()


def test_two_runs_of_one_second_are_two_runs(train, monkeypatch):
    frozen = bdl_train.runs.datetime.now()

    class Stopped(bdl_train.runs.datetime):
        @classmethod
        def now(cls, tz=None):
            return frozen

    monkeypatch.setattr(bdl_train.runs, "datetime", Stopped)
    one, other = (train("plan_only=true", "seed=1") and find_runs("runs") for _ in range(2))
    assert (len(one), len(other)) == (1, 2)
    names = [run.path.name for run in other]
    assert names[0][:15] == names[1][:15]


def test_plan_only_writes_the_plan_and_trains_nothing(bdl, train):
    said = train("plan_only=true", "num_members=5", "cluster.members_per_stack=2")
    (run,) = find_runs("runs")
    assert [stack["members"] for stack in read_json(run.plan)["stacks"]] == [[0], [1, 2], [3, 4]]
    assert files(run) == {"config.yaml", "plan.json"}
    assert str(run.path) in said.out
    assert "3 stacks, 1 at a time" in said.out
    # What it prints is a way to train that plan.
    assert bdl("train", f"resume={run.path}").status == 0
    assert run.status() == "complete"


def test_the_same_config_and_seed_give_the_same_bits_and_another_seed_others(train):
    hashes = [
        [member["sha256"] for member in read_json(train(f"seed={seed}").run.manifest)["members"]]
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_stored_paths_do_not_depend_on_the_folder_of_the_call(train, bdl, mixed_csv, tmp_path, monkeypatch):
    table = tmp_path / "here.csv"
    table.write_bytes(mixed_csv.read_bytes())
    words = (
        "data=csv",
        "data.path=here.csv",
        "data.target=y",
        "data.features=[width]",
        "likelihood=gaussian",
    )
    run = train(*words, "inference=deep_ensemble").run.path.absolute()
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["data"]["path"] == str(table)
    assert os.path.isabs(stored["data"]["root"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert bdl("evaluate", f"run={run}", "part=val").status == 0


def test_yesterdays_posterior_is_todays_prior(train, tmp_path, monkeypatch):
    (tmp_path / "yesterday").mkdir()
    earlier = train("trainer.max_epochs=30", "output_dir=yesterday").run
    # A step of size zero: members stay where they started.
    words = (
        "prior=from_posterior",
        f"prior.run={earlier.path}",
        "optimizer.lr=1e-30",
        "inference=deep_ensemble",
    )
    later = train(*words, "num_members=40", "trainer.max_epochs=1").run
    stored = yaml.safe_load(later.config.read_text())
    assert stored["prior"]["run"] == str(earlier.path.absolute())
    manifest = read_json(later.manifest)
    assert manifest["prior_run"] == {
        "path": str(earlier.path.absolute()),
        "posterior_sha256": sha256(earlier.posterior / "posterior.json"),
    }
    artefact = read_artefact(later.posterior)
    starts = np.stack([next(member.draw(1, 0))[0].numpy() for member in artefact.posterior.members])
    prior = FromPosterior(run=str(earlier.path), moments="pooled", tempering=1.0, min_std=1e-3)
    bound = prior.bind(artefact.layout, [0])
    z = (starts - bound.mean.numpy()) / bound.std.numpy()
    # 40 draws of about 1600 standard normals; the mean square of 64,000 has standard deviation 0.006.
    assert np.mean(np.square(z)) == pytest.approx(1, abs=0.03)
    assert np.abs(z.mean(0)).mean() == pytest.approx(np.sqrt(2 / np.pi / 40), rel=0.1)
