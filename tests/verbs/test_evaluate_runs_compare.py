"""`bdl evaluate`, `bdl runs`, `bdl compare`, and many runs of one command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from bdl_train.distributed.inline import Inline
from bdl_train.errors import Exit
from bdl_train.files import sha256, write_json
from bdl_train.runs import RunDir, find_runs, read_json
from bdl_train.verbs import train as train_verb

# --- evaluate -------------------------------------------------------------------------------------------------


@pytest.fixture
def own_run(class_run, tmp_path) -> RunDir:
    """A copy of the run, to be written to."""
    shutil.copytree(class_run.path, tmp_path / "runs" / "breast_cancer" / class_run.path.name)
    return RunDir(tmp_path / "runs" / "breast_cancer" / class_run.path.name)


def test_evaluation_of_the_test_part_gives_the_trainings_numbers_again(bdl, own_run):
    files = ("metrics.json", "metrics_detail.parquet", "predictions.parquet")
    before = {name: sha256(own_run.evaluation("test") / name) for name in files}
    shutil.rmtree(own_run.evaluation("test"))
    said = bdl("evaluate", f"run={own_run.path}")
    assert said.status == 0
    assert "114 rows" in said.out
    assert read_json(own_run.evaluation("test") / "metrics.json") == read_json(own_run.metrics)
    assert {name: sha256(own_run.evaluation("test") / name) for name in files} == before


def test_other_parts_and_names_go_to_folders_of_their_own(bdl, own_run):
    assert bdl("evaluate", f"run={own_run.path}", "part=val").status == 0
    assert bdl("evaluate", f"run={own_run.path}", "part=train", "name=fit", "num_draws=1").status == 0
    folders = {path.name for path in (own_run.path / "evaluation").iterdir()}
    assert folders == {"test", "val", "fit"}
    val = pd.read_parquet(own_run.evaluation("val") / "predictions.parquet")
    fit = pd.read_parquet(own_run.evaluation("fit") / "predictions.parquet")
    test = pd.read_parquet(own_run.evaluation("test") / "predictions.parquet")
    # Rows of the source: the parts are disjoint and together everything.
    assert sorted([*val["row"], *fit["row"], *test["row"]]) == list(range(569))
    assert set(read_json(own_run.evaluation("fit") / "metrics.json")) >= {"train/nll", "train/accuracy"}
    hashes = read_json(own_run.evaluation("val") / "hashes.json")
    assert hashes == {name: sha256(own_run.evaluation("val") / name) for name in hashes}
    # The run's own metrics stay those of its test part.
    assert "test/nll" in read_json(own_run.metrics)


def test_evaluate_finds_the_data_at_another_place(bdl, train, data_folder, tmp_path):
    words = ("data=uci", "data.name=toy", "likelihood=gaussian", "inference=deep_ensemble")
    run = train(*words, f"data.root={data_folder}").run
    (tmp_path / "moved").mkdir()
    data_folder.rename(tmp_path / "moved" / "sets")
    assert bdl("evaluate", f"run={run.path}", "part=val").status == 2
    said = bdl("evaluate", f"run={run.path}", "part=val", "data.root=moved/sets")
    assert said.status == 0, said.err


def test_evaluate_of_several_parts_is_a_multirun(bdl, own_run):
    said = bdl("evaluate", "-m", f"run={own_run.path}", "part=val,tset,train")
    assert said.status == 2  # the worst of the three, and the others are done
    assert {path.name for path in (own_run.path / "evaluation").iterdir()} == {"test", "val", "train"}


# --- runs -----------------------------------------------------------------------------------------------------


def test_runs_lists_the_newest_first_with_members_and_headlines(bdl, train):
    train("name=b", "num_members=1")
    train("name=a", "num_members=3", "inference=deep_ensemble", "data.split=2", "seed=7")
    train("name=c", "plan_only=true")
    said = bdl("runs")
    assert said.status == 0
    lines = said.out.splitlines()
    assert [Path(line.split()[0]).parent.name for line in lines] == ["c", "a", "b"]
    assert re.search(
        r"complete +3/3 members +deep_ensemble +split 2 +seed 7 +test/nll 0\.\d+ +test/accuracy 0\.\d+$",
        lines[1],
    )
    assert re.search(r"planned +2 members +swag +split 0 +seed 0$", lines[0])
    assert len({line.index("split") for line in lines}) == 1
    assert len(bdl("runs", "limit=1").out.splitlines()) == 2
    assert "2 more" in bdl("runs", "limit=1").out
    assert len(bdl("runs", "status=complete").out.splitlines()) == 2
    assert len(bdl("runs", "root=runs/c").out.splitlines()) == 1
    assert "no failed runs below runs" in bdl("runs", "status=failed").out
    assert bdl("runs", "root=nowhere").status == 0


def test_runs_shows_a_damaged_run_and_goes_on(bdl, own_run):
    for content in ("{", "[]", "{}"):
        own_run.manifest.write_text(content)
        said = bdl("runs")
        assert said.status == 0
        assert re.search(r"damaged +", said.out)


@pytest.mark.parametrize("content", ["{", "[]", "", "inference: 3\ndata: []\nseed: [1]", "a: b: c", "\x00"])
def test_runs_leaves_blank_what_a_damaged_config_lacks(content, bdl, own_run):
    own_run.config.write_text(content)
    said = bdl("runs")
    assert said.status == 0
    assert re.search(r"complete +2/2 members +test/nll", said.out)


# --- compare --------------------------------------------------------------------------------------------------


def make_run(folder, nll, **settings) -> RunDir:
    """A run directory with a config and metrics, without a training."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    config = yaml.safe_load(json.dumps(BASE))
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group] = {**config[group], name: value} if name else value
    run.config.write_text(yaml.safe_dump(config))
    write_json(run.plan, {"stacks": []})
    write_json(run.metrics, {"test/nll": nll, "test/rmse": 2 * nll, "test/mae": None})
    hashes = {"config.yaml": sha256(run.config)}
    write_json(
        run.manifest, {"status": "complete", "hashes": hashes, "data": {"fingerprint": ""}, "members": []}
    )
    return run


GROUPS = ("model", "likelihood", "optimizer", "scheduler", "trainer", "cluster", "tracking")
BASE = {
    **{group: {"_target_": f"bdl_train.{group}"} for group in GROUPS},
    "data": {"_target_": "bdl_train.data.uci.Uci", "name": "energy", "split": 0, "root": "/data"},
    "prior": {"_target_": "bdl_train.priors.gaussian.Gaussian", "scale": 1.0},
    "inference": {"_target_": "bdl_train.inference.swag.Swag"},
    "num_members": 5,
    "seed": 0,
    "output_dir": "runs",
    "name": None,
    "plan_only": False,
    "check_prior": False,
}


def test_compare_groups_by_config_and_averages_over_splits_and_seeds(bdl, tmp_path):
    for split, nll in enumerate((1.0, 2.0, 4.0)):
        make_run(
            tmp_path / f"a{split}", nll, data__split=split, cluster__num_workers=split, output_dir=f"{split}"
        )
    for seed, nll in enumerate((3.0, 5.0)):
        make_run(tmp_path / f"b{seed}", nll, prior__scale=0.1, seed=seed, data__root=f"/other{seed}")
    make_run(tmp_path / "c", 7.0, num_members=1)
    said = bdl("compare", "runs=*", "output=t.csv")
    assert said.status == 0
    table = pd.read_csv("t.csv")
    assert list(table["runs"]) == [3, 2, 1]
    assert set(table.columns) == {
        "num_members", "prior.scale", "runs", "test/nll", "test/nll se", "test/rmse", "test/rmse se", "test/mae",
        "test/mae se",
    }  # fmt: skip
    # By hand: mean 7/3, sample variance ((4/3)² + (1/3)² + (5/3)²) / 2 = 7/3.
    np.testing.assert_allclose(table["test/nll"], [7 / 3, 4, 7])
    np.testing.assert_allclose(table["test/nll se"], [np.sqrt(7 / 3 / 3), 1, np.nan])
    assert list(table["test/mae"].isna()) == [True] * 3
    assert "warning" not in said.out
    assert "2.333 ± 0.882" in said.out


def test_compare_writes_markdown_for_a_readme(bdl, tmp_path):
    for split, nll in enumerate((1.0, 2.0)):
        make_run(tmp_path / f"a{split}", nll, data__split=split)
    make_run(tmp_path / "b", 3.0, data__name="concrete")
    assert bdl("compare", "runs=*", "metrics=[test/nll]", "output=out/t.md").status == 0
    assert (tmp_path / "out" / "t.md").read_text().splitlines() == [
        "| data.name | runs | test/nll |",
        "| --- | --- | --- |",
        "| energy | 2 | 1.500 ± 0.500 |",
        "| concrete | 1 | 3.000 |",
    ]
    assert bdl("compare", "runs=*", "output=t.parquet").status == 0
    assert list(pd.read_parquet("t.parquet")["runs"]) == [2, 1]


SWAG = {"_target_": "bdl_train.inference.swag.Swag", "start_epoch": None, "max_rank": 20}
ENSEMBLE = {"_target_": "bdl_train.inference.deep_ensemble.DeepEnsemble", "patience": 5}


def test_a_group_of_another_class_is_one_column_by_its_module(bdl, tmp_path):
    make_run(
        tmp_path / "a", 1.0, inference=ENSEMBLE, optimizer={"_target_": "torch.optim.SGD", "momentum": 0.9}
    )
    make_run(tmp_path / "b", 2.0, inference=SWAG, optimizer={"_target_": "torch.optim.Adam", "amsgrad": True})
    make_run(
        tmp_path / "c", 3.0, inference={**SWAG, "start_epoch": 7}, optimizer={"_target_": "torch.optim.Adam"}
    )
    said = bdl("compare", "runs=*", "output=t.md", "metrics=[test/nll,test/mae]")
    assert said.status == 0
    # amsgrad differs among the runs with Adam; patience and momentum belong to one class alone.
    assert (tmp_path / "t.md").read_text().splitlines() == [
        "| inference | inference.start_epoch | optimizer | optimizer.amsgrad | runs | test/nll |",
        "| --- | --- | --- | --- | --- | --- |",
        "| deep_ensemble | – | SGD | – | 1 | 1.000 |",
        "| swag | null | Adam | True | 1 | 2.000 |",
        "| swag | 7 | Adam | – | 1 | 3.000 |",
    ]
    assert "test/mae" not in said.out
    assert "scheduler" not in said.out


def test_classes_of_one_name_and_a_part_that_is_null_stay_apart(bdl, tmp_path):
    parts = (None, {"_target_": "bdl_train.a.linear.Warm"}, {"_target_": "bdl_train.a.sine.Warm"})
    for name, package, part in zip("abc", ("torch.optim", "mine", "mine"), parts, strict=True):
        scheduler = {"_target_": "bdl_train.schedulers.cosine.Cosine", "warm": part}
        make_run(tmp_path / name, 1.0, optimizer={"_target_": f"{package}.Adam"}, scheduler=scheduler)
    assert bdl("compare", "runs=*", "output=t.csv").status == 0
    table = pd.read_csv("t.csv", keep_default_na=False)
    assert list(table["optimizer"]) == ["torch.optim.Adam", "mine.Adam", "mine.Adam"]
    assert list(table["scheduler.warm"]) == ["null", "linear", "sine"]


def test_names_of_rows_stay_whole_in_a_narrow_terminal(bdl, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    for i in range(6):
        make_run(tmp_path / f"{i}", 1.0 + i, inference={**SWAG, "a_setting_of_a_long_name": 10**12 + i})
    said = bdl("compare", "runs=*")
    assert "inference.a_setting_of_a_long_name " in said.out


def test_the_same_split_and_seed_twice_is_a_warning(bdl, tmp_path):
    make_run(tmp_path / "a", 1.0)
    make_run(tmp_path / "b", 1.0)
    make_run(tmp_path / "c", 2.0, data__split=1)
    said = bdl("compare", "runs=*")
    assert said.status == 0
    assert "warning: a and b have the same settings, split and seed" in said.out


def test_compare_names_what_it_leaves_out_and_what_is_partial(bdl, tmp_path):
    make_run(tmp_path / "a", 1.0)
    lost = make_run(tmp_path / "b", 1.0, seed=1)
    write_json(lost.manifest, {**read_json(lost.manifest), "status": "partial"})
    unfinished = make_run(tmp_path / "c", 1.0, seed=2)
    unfinished.metrics.unlink()
    unfinished.manifest.unlink()
    unfinished.driver_events.touch()
    said = bdl("compare", "runs=*")
    assert "c has no metrics (interrupted): left out" in said.out
    assert "b is partial" in said.out
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert bdl("compare", "runs=*").status == 2


def score_run(run: RunDir, fingerprint: str, *, gain: float = 0.0, name: str = "test") -> None:
    """Scored rows of a regression; `gain` is how much less surprise there is in every row."""
    manifest = read_json(run.manifest)
    write_json(run.manifest, {**manifest, "num_data": 400, "data": {"fingerprint": fingerprint}})
    random = np.random.default_rng(len(fingerprint))
    nll = random.exponential(1, 100)
    noise = np.random.default_rng(list(run.path.name.encode())).normal(0, 0.1, 100)
    rows = {"row": np.arange(100), "y": nll, "nll": nll + noise - gain, "crps": nll, "error": noise}
    run.evaluation(name).mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(run.evaluation(name) / "predictions.parquet")
    detail = pd.DataFrame({"key": [f"{name}/crps"], "unit": ["kWh"]})
    detail.to_parquet(run.evaluation(name) / "metrics_detail.parquet")
    write_json(run.evaluation(name) / "metrics.json", {f"{name}/nll": float(rows["nll"].mean())})


def test_runs_on_the_same_rows_are_compared_row_by_row(bdl, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    score_run(make_run(tmp_path / "a", 1.0), "same", gain=0.2)
    score_run(make_run(tmp_path / "b", 1.0, num_members=1), "same")
    score_run(make_run(tmp_path / "c", 1.0, num_members=2), "another")
    make_run(tmp_path / "d", 1.0, num_members=3)
    said = bdl("compare", "runs=*", "report=out/page.html")
    assert said.status == 0, said.err
    assert "1 against 5, 100 rows of one pair of runs: loses to it in NLL by 0." in said.out
    assert "exactly equal in CRPS" in said.out
    assert (
        "2 cannot be paired with 5: their data differ (at split 0, seed 0 the fingerprints are another"
        in said.out
    )
    assert "No scored rows in evaluation/test, so not paired: d." in said.out
    page = (tmp_path / "out" / "page.html").read_text()
    assert "1 against 5, 100 rows" in page
    assert "kWh" in page


def test_the_baseline_is_named_by_a_run_and_may_lie_elsewhere(bdl, tmp_path):
    (tmp_path / "old").mkdir()
    score_run(make_run(tmp_path / "old" / "x", 1.0, num_members=1), "same")
    for name, members in (("a", 5), ("b", 2)):
        score_run(make_run(tmp_path / "runs" / name, 1.0, num_members=members), "same", gain=0.2)
    said = bdl("compare", "runs=runs/*", "baseline=old/x")
    assert said.status == 0, said.err
    assert re.search(r"5 against 1, 100 rows of one pair of runs: beats it in NLL", said.out)
    assert re.search(r"2 against 1, 100 rows of one pair of runs: beats it in NLL", said.out)
    said = bdl("compare", "runs=runs/*", "baseline=*/*")
    assert said.status == 2
    assert "baseline holds two experiments on the same data" in said.err
    assert bdl("compare", "runs=runs/*", "baseline=nowhere").status == 2
    make_run(tmp_path / "old" / "y", 1.0, num_members=9)
    said = bdl("compare", "runs=runs/*", "baseline=old/y")
    assert "baseline=9 has no rows in evaluation/test" in said.err


def test_another_evaluation_is_compared_by_its_name(bdl, tmp_path):
    for name, members in (("a", 5), ("b", 2)):
        run = make_run(tmp_path / name, 1.0, num_members=members)
        score_run(run, "same", name="shifted")
    make_run(tmp_path / "c", 1.0, num_members=3)
    said = bdl("compare", "runs=*", "evaluation=shifted", "output=t.csv")
    assert said.status == 0, said.err
    assert "c has no evaluation shifted (complete): left out" in said.out
    assert "shifted/nll" in pd.read_csv("t.csv").columns
    assert "2 against 5, 100 rows" in said.out
    assert bdl("compare", "runs=*", "evaluation=nothing").status == 2
    assert bdl("compare", "runs=*", "report=page.pdf").status == 2


# --- multirun -------------------------------------------------------------------------------------------------


def test_a_multirun_writes_one_run_a_job_in_order_and_a_summary(bdl):
    said = bdl(
        "train", "-m", "cluster=inline", "cluster.cpus_per_stack=1", "num_members=1", "trainer.max_epochs=4",
        "data.split=0,1", "inference=deep_ensemble,swag",
    )  # fmt: skip
    assert said.status == 0
    heads = [line for line in said.out.splitlines() if re.match(r"\[\d/4\]", line)]
    assert [re.findall(r"split=(\d).*inference=(\w+)", head)[0] for head in heads] == [
        ("0", "deep_ensemble"), ("0", "swag"), ("1", "deep_ensemble"), ("1", "swag"),
    ]  # fmt: skip
    runs = find_runs("runs")
    assert len(runs) == 4
    _, _, summary = said.out.rpartition("4 of 4 runs")
    assert re.search(r"inference +│ +deep_ensemble │ +swag", summary)
    (nll,) = re.findall(r"test/nll +│ +([\d.]+) ± ([\d.]+) +│", summary)
    values = [
        read_json(one.metrics)["test/nll"]
        for one in runs
        if "DeepEnsemble" in yaml.safe_load(one.config.read_text())["inference"]["_target_"]
    ]
    assert float(nll[0]) == pytest.approx(np.mean(values), abs=6e-4)
    assert float(nll[1]) == pytest.approx(np.std(values, ddof=1) / np.sqrt(2), abs=6e-4)


def test_a_job_that_fails_does_not_stop_the_others(bdl):
    said = bdl(
        "train", "-m", "cluster=inline", "cluster.cpus_per_stack=1", "num_members=1", "trainer.max_epochs=4",
        "likelihood=gaussian,categorical",
    )  # fmt: skip
    assert said.status == Exit.USAGE
    assert "bdl train [1/2]" in said.err
    assert len(find_runs("runs")) == 1
    assert "1 of 2 runs" in said.out


def test_jobs_share_a_launcher_where_their_clusters_agree(bdl, monkeypatch):
    made, closed = [], []

    class Counted(Inline):
        def close(self) -> None:
            closed.append(self)

    true_build = train_verb.build

    def build(node, base, *, key):
        if key != "cluster":
            return true_build(node, base, key=key)
        made.append(node["cpus_per_stack"])
        return Counted(**{name: value for name, value in node.items() if name != "_target_"})

    monkeypatch.setattr(train_verb, "build", build)
    words = (
        "cluster=inline",
        "num_members=1",
        "trainer.max_epochs=2",
        "inference=deep_ensemble",
        "data.name=iris",
    )
    said = bdl("train", "-m", *words, "cluster.cpus_per_stack=1,null", "seed=0,1")
    assert said.status == 0
    assert made == [1, None]
    assert len(closed) == 2


def test_of_a_multirun_the_worst_status_counts(bdl, monkeypatch):
    statuses = iter([Exit.PARTIAL, Exit.DONE, Exit.STOPPED, Exit.DONE])
    monkeypatch.setattr(train_verb, "train", lambda config, launcher: (next(statuses), None))
    assert bdl("train", "-m", "cluster=inline", "seed=0,1").status == Exit.PARTIAL
    # A request to stop ends the others too.
    assert bdl("train", "-m", "cluster=inline", "seed=0,1").status == Exit.STOPPED
    assert next(statuses) is Exit.DONE
