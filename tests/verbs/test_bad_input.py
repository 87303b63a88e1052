"""Wrong usage: exit status 2, one message that names the key and what came, nothing started, nothing left behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.datasets import load_breast_cancer

from bdl_train.cli import main
from bdl_train.distributed import ray_local, work
from bdl_train.errors import UsageError
from bdl_train.files import sha256, write_json
from bdl_train.runs import RunDir, find_runs, read_json


def refused(said, *parts: str) -> None:
    assert said.status == 2, said.out + said.err
    assert "Traceback" not in said.err
    # Before it there may be what was decided about the data.
    assert any(line.startswith("bdl ") for line in said.err.splitlines()), said.err
    for part in parts:
        assert part in said.err


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Every use of Ray begins with this call; the default cluster is Ray."""

    def start(resources):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_local, "start", start)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "a": random.normal(size=40),
            "y": random.normal(size=40),
            "label": random.integers(0, 2, 40),
            "hole": [np.nan, *random.normal(size=39)],
            "endless": [np.inf, *random.normal(size=39)],
            "negative": random.integers(-3, 3, 40),
            "part": ["train"] * 30 + ["test"] * 10,
            "odd_part": ["train"] * 30 + ["exam"] * 10,
            "who": [*range(35), 0, 1, 2, 3, 4],
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


CSV = ("data=csv", "data.path=t.csv", "data.features=[a]", "inference=deep_ensemble")

TRAIN = {
    # keys and choices
    "unknown key": (["sede=1"], ["Unknown key 'sede'", "Did you mean 'seed'?"]),
    "unknown key of a group": (["inference.max_rnk=3"], ["'inference.max_rnk'", "Did you mean 'inference.max_rank'?"]),
    "key of another choice": (["inference=deep_ensemble", "inference.max_rank=3"], ["inference=swag has it"]),
    "unknown choice": (["model=mpl"], ["Unknown model 'mpl'", "Did you mean 'mlp'?", "lenet", "ft_transformer"]),
    "no override": (["seed"], ["'seed' is not an override"]),
    # types and ranges
    "wrong type": (["num_members=many"], ["num_members", "'many'"]),
    "wrong type in a group": (["trainer.max_epochs=long"], ["trainer.max_epochs", "'long'"]),
    "a text for a list": (["model.hidden=50"], ["model.hidden", "50"]),
    "a text for a truth value": (["plan_only=maybe"], ["plan_only", "'maybe'"]),
    "no members": (["num_members=0"], ["num_members", "0"]),
    "negative seed": (["seed=-1"], ["seed", "-1"]),
    "no epochs": (["trainer.max_epochs=0"], ["trainer.max_epochs", "0"]),
    "no batch": (["data.batch_size=0"], ["data.batch_size", "0"]),
    "negative prior scale": (["prior.scale=-1"], ["prior.scale", "-1"]),
    "negative prior scale below a pattern": (
        ["prior=layerwise", "prior.patterns={bias: {_target_: bdl_train.priors.gaussian.Gaussian, scale: -2, "
         "fan_in: false}}"],
        ["scale", "-2"],
    ),
    "negative learning rate": (["optimizer.lr=-0.1"], ["optimizer", "-0.1"]),
    "learning rate of text": (["optimizer.lr=fast"], ["optimizer", "'fast'"]),
    "negative noise": (
        ["data.name=diabetes", "likelihood=gaussian", "likelihood.noise_std=-1"],
        ["likelihood.noise_std", "-1"],
    ),
    "dropout above 1": (["model.dropout=1.5"], ["model.dropout", "1.5"]),
    "NaN": (["prior.scale=nan"], ["prior.scale", "nan"]),
    "unknown precision": (["trainer.precision=16-mixed"], ["trainer.precision", "16-mixed", "bf16-mixed"]),
    "wandb without a project": (["tracking=wandb", "tracking.project=''"], ["tracking.project"]),
    "wandb mode": (["tracking=wandb", "tracking.mode=of"], ["tracking.mode", "'of'", "offline"]),
    "wandb patience": (["tracking=wandb", "tracking.init_timeout_s=0"], ["tracking.init_timeout_s", "0"]),
    "no workers": (["cluster=ray_local", "cluster.num_workers=0"], ["cluster.num_workers", "0"]),
    "two GPUs a stack": (["cluster.gpus_per_stack=2"], ["cluster.gpus_per_stack", "2"]),
    "experiment folder above": (["name=../up"], ["name='../up'"]),
    # what does not fit together
    "SWAG after the last epoch": (
        ["inference.start_epoch=4"], ["inference.start_epoch=4", "trainer.max_epochs=4"],
    ),
    "SWAG too late for two snapshots": (["inference.start_epoch=3"], ["2 snapshots", "take 1"]),
    "SWAG of rank 1": (["inference.max_rank=1"], ["inference", "max_rank", "1"]),
    "likelihood for classes on numbers": (["data.name=diabetes"], ["categorical", "continuous"]),
    "likelihood for numbers on classes": (["likelihood=gaussian"], ["gaussian", "class"]),
    "bernoulli on three classes": (["likelihood=bernoulli", "data.name=iris"], ["bernoulli", "two classes", "3"]),
    "poisson on numbers": (["likelihood=poisson", "data.name=diabetes"], ["poisson", "continuous"]),
    "image network on a table": (["model=lenet"], ["model=lenet", "image", "table"]),
    "anchored without a Gaussian prior": (["inference=anchored", "prior=laplace"], ["anchored", "Gaussian prior"]),
    "perturbed targets without noise": (
        ["inference=anchored", "inference.perturb_targets=true"], ["inference.perturb_targets"],
    ),
    "early stopping without validation": (
        ["inference=deep_ensemble", "data.val_fraction=0"], ["data.val_fraction", "inference.patience=null"],
    ),
    "pattern of no parameter": (
        ["prior=layerwise", "prior.patterns={nothing: {_target_: bdl_train.priors.gaussian.Gaussian, scale: 1.0, "
         "fan_in: false}}"],
        ["'nothing' matches no parameter"],
    ),
    "refused optimiser": (
        ["optimizer={_target_: torch.optim.LBFGS}"], ["optimizer=LBFGS", "cannot train a stack"],
    ),
    "factored optimiser": (
        ["optimizer={_target_: torch.optim.Adafactor}"], ["optimizer=Adafactor", "cannot train a stack"],
    ),
    "GPU that is not there": (["cluster.gpus_per_stack=1"], ["cluster.gpus_per_stack=1", "0 GPUs"]),
    "GPU that no stack gets": (["trainer.accelerator=gpu"], ["trainer.accelerator=gpu", "cluster.gpus_per_stack=0"]),
    "more CPUs than there are": (["cluster.cpus_per_stack=100000"], ["cluster.cpus_per_stack=100000", "CPUs"]),
    # targets of _target_
    "network outside the allow-list": (["model={_target_: os.system}"], ["model._target_ is 'os.system'", "allow="]),
    "class of another kind": (["model={_target_: torch.optim.Adam}"], ["model._target_", "torch.optim.Adam"]),
    "nested target outside the allow-list": (
        ["model={_target_: torch.nn.Sequential, _args_: [{_target_: builtins.print}]}"], ["builtins.print", "allow="],
    ),
    "network that does not exist": (["model={_target_: torch.nn.Linaer}"], ["torch.nn.Linaer", "cannot be imported"]),
    "network of the wrong width": (
        ["model={_target_: torch.nn.Linear, in_features: 30, out_features: 7}"], ["[2, 2]", "[2, 7]"],
    ),
    "package name": (["allow=['no/package']"], ["allow", "no/package"]),
    # data
    "unknown bundled set": (["data.name=irsi"], ["data.name", "'irsi'"]),
    "missing file": (["data=csv", "data.path=absent.csv", "data.target=y"], ["data.path=absent.csv"]),
    "mandatory keys": (["data=csv"], ["data.path and data.target must be given"]),
    "missing UCI folder": (["data=uci", "data.root=nowhere", "likelihood=gaussian"], ["nowhere/uci/energy.npz"]),
    "missing images": (["data=images", "data.root=nowhere", "model=lenet"], ["nowhere"]),
    "missing target column": ([*CSV, "data.target=why"], ["data.target", "'why'"]),
    "NaN target": ([*CSV, "data.target=hole", "likelihood=gaussian"], ["'hole'", "1 rows", "row 0"]),
    "infinite target": ([*CSV, "data.target=endless", "likelihood=gaussian"], ["'endless'", "infinite"]),
    "negative counts": ([*CSV, "data.target=negative", "data.kind=count", "likelihood=poisson"], ["counts", "-3"]),
    "fractional classes": ([*CSV, "data.target=y", "data.kind=class"], ["'y'", "data.kind"]),
    "missing input column": ([*CSV, "data.target=y", "data.features=[b]", "likelihood=gaussian"], ["'b'"]),
    "unknown part in a declared split": ([*CSV, "data.target=label", "data.split_column=odd_part"], ["exam"]),
    "declared parts that share rows": (
        [*CSV, "data.target=label", "data.split_column=part", "data.id_column=who"], ["who"],
    ),
    "no training row left": ([*CSV, "data.target=label", "data.val_fraction=0.99"], ["data.val_fraction=0.99"]),
    "unknown file type": (["data=csv", "data.path=t.xlsx", "data.target=y"], ["t.xlsx"]),
    # earlier runs
    "prior of no run": (["prior=from_posterior"], ["prior.run"]),
    "prior of a missing run": (["prior=from_posterior", "prior.run=nowhere"], ["prior.run", "nowhere"]),
    "resume of a missing run": (["resume=nowhere"], ["resume"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAIN)
def test_training_is_refused(name, bdl, table, tmp_path):
    words, parts = TRAIN[name]
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    resumes = any(word.startswith("resume=") for word in words)
    tiny = () if resumes else ("num_members=2", "trainer.max_epochs=4")
    refused(bdl("train", *tiny, *words), *parts)
    assert not (tmp_path / "runs").exists()


def test_ray_is_not_even_imported_for_a_refused_run(tmp_path):
    code = "import sys; from bdl_train.cli import main; status = main(sys.argv[1:]); assert 'ray' not in sys.modules; "
    command = [sys.executable, "-c", code + "sys.exit(status)", "train", "prior.scale=-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "prior.scale" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_made(bdl, tmp_path):
    (tmp_path / "file").write_text("")
    refused(bdl("train", "output_dir=file"), "file", "output_dir")


@pytest.mark.parametrize("kind", ["labels", "pixels", "offsets", "no npz"])
def test_images_that_do_not_fit(kind, bdl, data_folder):
    path = data_folder / "images" / "grey.npz"
    arrays = dict(np.load(path))
    if kind == "labels":
        arrays["y_train"] = arrays["y_train"] - 1
    elif kind == "pixels":
        arrays["x_train"] = arrays["x_train"].astype(np.float64) * 1000
    elif kind == "offsets":
        arrays["y_train"] = arrays["y_train"][:-1]
    np.savez(path, **arrays)
    if kind == "no npz":
        path.write_text("nothing")
    words = (
        "data=images",
        f"data.root={data_folder}",
        "data.name=grey",
        "model=lenet",
        "inference=deep_ensemble",
    )
    refused(bdl("train", *words), "grey" if kind != "labels" else "class")


# --- run directories ------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(class_run, tmp_path) -> RunDir:
    """A copy of a run, to be spoiled."""
    shutil.copytree(class_run.path, tmp_path / "copy")
    return RunDir(tmp_path / "copy")


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    source: Any = load_breast_cancer()
    frame = pd.DataFrame(source["data"][:20], columns=source["feature_names"])
    frame.to_csv(tmp_path / "patients.csv", index=False)
    return tmp_path / "patients.csv"


def spoil_member(run: RunDir) -> str:
    path = run.posterior / "member-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return "does not match its recorded SHA-256"


def spoil_json(run: RunDir) -> str:
    (run.posterior / "posterior.json").write_text("{")
    return "posterior.json"


def spoil_version(run: RunDir) -> str:
    change(run, lambda meta: meta.update(schema_version=99))
    return "schema version 99"


def spoil_keys(run: RunDir) -> str:
    change(run, lambda meta: meta.pop("layout"))
    return "posterior.json"


def spoil_target(run: RunDir) -> str:
    change(run, lambda meta: meta["architecture"].update(_target_="os.system"))
    return "outside the allowed packages"


def spoil_shape(run: RunDir) -> str:
    change(run, lambda meta: meta["architecture"].update(hidden=[7]))
    return "another architecture"


def spoil_path(run: RunDir) -> str:
    change(run, lambda meta: meta["members"][0].update(file="../config.yaml"))
    return "config.yaml"


def remove_member(run: RunDir) -> str:
    (run.posterior / "member-00000.safetensors").unlink()
    return "member-00000.safetensors is missing"


def remove_posterior(run: RunDir) -> str:
    shutil.rmtree(run.posterior)
    return "posterior.json is missing"


def change(run: RunDir, edit) -> None:
    meta = read_json(run.posterior / "posterior.json")
    edit(meta)
    write_json(run.posterior / "posterior.json", meta)


POSTERIOR = [
    spoil_member, spoil_json, spoil_version, spoil_keys, spoil_target, spoil_shape, spoil_path, remove_member,
    remove_posterior,
]  # fmt: skip


@pytest.mark.parametrize("spoil", POSTERIOR)
@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_damaged_posterior_is_not_used(verb, spoil, bdl, damaged, patients):
    expected = spoil(damaged)
    # Whoever changes the posterior may change the manifest's hash of it too: the checks behind it must hold alone.
    header = damaged.posterior / "posterior.json"
    if header.is_file():
        manifest = read_json(damaged.manifest)
        manifest["hashes"]["posterior/posterior.json"] = sha256(header)
        write_json(damaged.manifest, manifest)
    more = {"evaluate": ["part=val"], "predict": [f"input={patients}", "output=p.csv"]}[verb]
    refused(bdl(verb, f"run={damaged.path}", *more), expected)
    assert not Path("p.csv").exists()
    assert not damaged.evaluation("val").exists()


@pytest.mark.parametrize("content", ["{", "[1, 2]", "data: 3", "\x00"])
@pytest.mark.parametrize("verb", ["evaluate", "resume", "compare"])
def test_an_unreadable_config_is_named(verb, content, bdl, damaged):
    damaged.config.write_text(content)
    damaged.manifest.unlink() if verb == "resume" else None
    words = {
        "evaluate": ["evaluate", f"run={damaged.path}"],
        "resume": ["train", f"resume={damaged.path}"],
        "compare": ["compare", f"runs={damaged.path}"],
    }[verb]
    refused(bdl(*words), "config.yaml")


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_a_config_changed_after_the_run_is_noticed(verb, bdl, damaged):
    stored = yaml.safe_load(damaged.config.read_text())
    stored["seed"] = 5
    damaged.config.write_text(yaml.safe_dump(stored))
    words = {"evaluate": f"run={damaged.path}", "compare": f"runs={damaged.path}"}[verb]
    refused(bdl(verb, words), "config.yaml does not match the hash")


def test_a_damaged_manifest_is_named(bdl, damaged):
    for content in ("{", "{}", "[]", '{"data": {}}'):
        damaged.manifest.write_text(content)
        refused(bdl("evaluate", f"run={damaged.path}"), "manifest.json")
        assert bdl("runs", "root=.").status == 0


def test_a_damaged_plan_is_named(bdl, damaged):
    damaged.manifest.unlink()
    for content in ("{", "{}", '{"inputs": 3}', "[]"):
        damaged.plan.write_text(content)
        refused(bdl("train", f"resume={damaged.path}"), "plan.json")


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_a_run_that_is_none(verb, bdl, tmp_path, patients):
    more = {"evaluate": [], "predict": [f"input={patients}", "output=p.csv"]}[verb]
    refused(bdl(verb, *more), "run must be given")
    refused(bdl(verb, "run=nowhere", *more), "run=nowhere", "bdl runs")
    refused(bdl(verb, f"run={patients}", *more), "is not a directory")
    (tmp_path / "empty").mkdir()
    refused(bdl(verb, "run=empty", *more), "config.yaml is missing")


# --- evaluate, predict, runs, compare -------------------------------------------------------------------------


def test_evaluate_refuses(bdl, class_run):
    def evaluated(*words):
        return bdl("evaluate", f"run={class_run.path}", *words)

    refused(evaluated("part=tset"), "part", "'tset'", "Did you mean 'test'?")
    refused(evaluated("part=val", "name=../../out"), "name", "../../out")
    refused(evaluated("part=val", "name=test"), "name=test")
    refused(evaluated("part=val", "num_draws=0"), "num_draws", "0")
    refused(evaluated("part=val", "num_draws=many"), "num_draws", "'many'")
    refused(evaluated("part=val", "accelerator=tpu"), "accelerator", "'tpu'")
    if not torch.cuda.is_available():
        refused(evaluated("part=val", "accelerator=gpu"), "accelerator=gpu", "no GPU")
    refused(evaluated("part=val", "data.split=2"), "data.split")


def test_evaluate_refuses_data_that_changed(bdl, train, table):
    run = train(*CSV, "data.target=label").run
    frame = pd.read_csv(table)
    frame.loc[3, "a"] += 1
    frame.to_csv(table, index=False)
    refused(bdl("evaluate", f"run={run.path}"), "differ from those the run was trained on", "fingerprint")
    table.unlink()
    refused(bdl("evaluate", f"run={run.path}"), "t.csv")


def test_evaluate_refuses_a_part_without_rows(bdl, train):
    run = train("data.val_fraction=0").run
    refused(bdl("evaluate", f"run={run.path}", "part=val"), "no rows", "part")


def test_more_draws_than_atoms_are_refused(bdl, number_run):
    refused(bdl("evaluate", f"run={number_run.path}", "part=val", "num_draws=2"), "num_draws=2", "at most 1")


def test_predict_refuses(bdl, class_run, patients, tmp_path):
    def predicted(*words, source=patients, output="p.csv"):
        return bdl("predict", f"run={class_run.path}", f"input={source}", f"output={output}", *words)

    frame = pd.read_csv(patients)
    frame.drop(columns="mean radius").to_csv("less.csv", index=False)
    refused(predicted(source="less.csv"), "less.csv", "mean radius", "1 of 30 columns")
    frame.assign(**{"mean radius": "wide"}).to_csv("text.csv", index=False)
    refused(predicted(source="text.csv"), "mean radius", "wide")
    frame.head(0).to_csv("none.csv", index=False)
    refused(predicted(source="none.csv"), "none.csv", "no rows")
    frame.head(0).to_parquet("none.parquet", index=False)
    refused(predicted(source="none.parquet", output="p.parquet"), "none.parquet", "no rows")
    (tmp_path / "void.csv").write_text("")
    refused(predicted(source="void.csv"), "void.csv", "empty")
    (tmp_path / "wrong.parquet").write_text("a,b")
    refused(predicted(source="wrong.parquet"), "wrong.parquet")
    refused(predicted(source="absent.csv"), "absent.csv")
    refused(predicted(output="nowhere/p.csv"), "output=nowhere/p.csv", "does not exist")
    refused(predicted(output="p.xlsx"), "output=p.xlsx", ".parquet")
    refused(predicted(output=patients), "the input itself")
    (tmp_path / "folder.csv").mkdir()
    refused(predicted(output="folder.csv"), "is a folder")
    refused(predicted("keep=[name]"), "lacks 1 of 31 columns: name")
    refused(predicted("keep=mean radius"), "keep")
    frame.assign(epistemic=1).to_csv("clash.csv", index=False)
    refused(predicted("keep=[epistemic]", source="clash.csv"), "'epistemic'")
    refused(predicted("intervals=[0.5,2]"), "intervals", "2")
    refused(predicted("intervals=0.9"), "intervals", "0.9")
    refused(predicted("chunk_rows=0"), "chunk_rows", "0")
    refused(predicted("num_draws=-1"), "num_draws", "-1")
    left = {path.name for path in tmp_path.iterdir()}
    assert not {name for name in left if name.startswith((".p", "p."))}


def test_predict_refuses_a_run_on_images(bdl, train, data_folder, patients):
    words = (
        "data=images",
        f"data.root={data_folder}",
        "data.name=grey",
        "model=lenet",
        "inference=deep_ensemble",
    )
    run = train(*words, "trainer.max_epochs=1", "num_members=1").run
    said = bdl("predict", f"run={run.path}", f"input={patients}", "output=p.csv")
    refused(said, "[1, 28, 28]", "not on a table")


def test_runs_and_compare_refuse(bdl, class_run):
    refused(bdl("runs", "status=finished"), "status", "'finished'", "complete")
    refused(bdl("runs", "limit=0"), "limit", "0")
    refused(bdl("compare"), "runs must be given")
    refused(bdl("compare", "runs=nothing/*"), "runs=nothing/*", "matches no run")
    refused(
        bdl("compare", f"runs={class_run.path}", "metrics=[test/nlll]"),
        "'test/nlll'",
        "Did you mean 'test/nll'?",
    )
    refused(bdl("compare", f"runs={class_run.path}", "metrics=test/nll"), "metrics", "test/nll")
    refused(bdl("compare", f"runs={class_run.path}", "output=table.xlsx"), "output=table.xlsx", ".md")


# --- resume ---------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(train) -> RunDir:
    """A run that was planned and not trained."""
    train("plan_only=true", "inference=deep_ensemble")
    return find_runs("runs")[-1]


@pytest.mark.parametrize(
    "word",
    ["seed=1", "inference=swag", "num_members=3", "trainer.precision=64-true", "data.root=.", "name=x"],
)
def test_a_resumed_run_takes_no_other_settings(word, bdl, planned):
    refused(bdl("train", f"resume={planned.path}", word), "cannot change when a run is resumed")
    assert planned.status() == "planned"


def test_a_resumed_run_takes_no_fewer_epochs(bdl, planned):
    refused(bdl("train", f"resume={planned.path}", "trainer.max_epochs=3"), "trainer.max_epochs=3", "4")
    refused(bdl("train", f"resume={planned.path}", "trainer.max_epochs=x"), "trainer.max_epochs", "'x'")


def test_a_run_in_use_is_left_alone(bdl, planned):
    # This very process is alive, and the heartbeat is of now.
    lock = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeat": time.time()}
    planned.lock.write_text(json.dumps(lock))
    refused(bdl("train", f"resume={planned.path}"), "in use by process", str(os.getpid()))
    assert planned.lock.is_file()
    # A heartbeat of another host that has stopped long ago holds nothing.
    planned.lock.write_text(json.dumps({**lock, "host": "elsewhere", "heartbeat": time.time() - 3600}))
    assert bdl("train", f"resume={planned.path}").status == 0


def test_a_run_is_not_resumed_on_other_data(bdl, train, table):
    train(*CSV, "data.target=label", "plan_only=true")
    (run,) = find_runs("runs")
    frame = pd.read_csv(table)
    frame.loc[3, "a"] += 1
    frame.to_csv(table, index=False)
    refused(bdl("train", f"resume={run.path}"), "the data (by fingerprint) changed since the run began")


def test_a_run_is_not_resumed_on_another_prior(bdl, train, tmp_path):
    earlier = train("output_dir=earlier").run
    train("prior=from_posterior", f"prior.run={earlier.path}", "plan_only=true")
    (run,) = find_runs("runs")
    change(earlier, lambda meta: meta.update(temperature=2.0))
    refused(bdl("train", f"resume={run.path}"), "the posterior behind prior.run changed since the run began")


def test_a_refusal_deep_in_a_worker_leaves_nothing(bdl, train, monkeypatch, tmp_path):
    def refuse(*args):
        raise UsageError("known too late")

    monkeypatch.setattr(work, "train_stack", refuse)
    refused(bdl("train", "cluster=inline", "num_members=2"), "known too late")
    assert find_runs("runs") == []


def test_of_several_jobs_each_is_composed_before_the_first_starts(bdl, tmp_path):
    refused(bdl("train", "-m", "inference=swag,swga"), "Unknown inference 'swga'")
    assert not (tmp_path / "runs").exists()


def test_the_message_is_one_line_on_stderr(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "num_members=0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
