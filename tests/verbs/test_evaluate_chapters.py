"""`bdl evaluate` with everything it can be asked for: chapters beside the metrics, and what cannot be made says why."""

# pandas-stubs take a column for anything that a table can hold.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pandas as pd
import pytest
from command_line import Said

from bdl_train.cli import main
from bdl_train.evaluation.section import read_section
from bdl_train.files import sha256
from bdl_train.runs import RunDir, read_json


@pytest.fixture(scope="module")
def bdl_module() -> Callable[..., Said]:
    """`bdl <words>` in this process, for fixtures of the module."""

    def call(*words: str) -> Said:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = main([str(word) for word in words])
        return Said(status, out.getvalue(), err.getvalue())

    return call


def table_of(count: int, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    age, income = random.integers(18, 80, count), random.normal(size=count)
    sex, race = random.choice(["f", "m"], count), random.choice(["a", "b", "c"], count, p=[0.7, 0.27, 0.03])
    score = 0.05 * (age - 45) + income - 0.5 * (sex == "f")
    # For the oldest of group b the label is a coin: the model must be worse there.
    noise = np.where((race == "b") & (age > 60), 8.0, 0.5)
    label = np.where(score + noise * random.normal(size=count) > 0, "yes", "no")
    return pd.DataFrame({"age": age, "income": income.round(4), "sex": sex, "race": race, "paid": label})


SMALL = (
    "inference=deep_ensemble",
    "num_members=3",
    "trainer.max_epochs=8",
    "model.hidden=[16]",
    "cluster=inline",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, bdl_module):
    """A small run on a table whose column `race` is no input."""
    folder = tmp_path_factory.mktemp("chapters")
    table_of(1500).to_csv(folder / "people.csv", index=False)
    words = (
        f"data.path={folder / 'people.csv'}",
        "data.target=paid",
        "data.drop=[race]",
        f"output_dir={folder / 'runs'}",
    )
    said = bdl_module("train", "data=csv", *words, *SMALL, "trainer.member_fraction=0.5")
    assert said.status == 0, said.err
    (path,) = (folder / "runs" / "people").iterdir()
    return RunDir(path)


@pytest.fixture(scope="module")
def full(run, bdl_module):
    said = bdl_module(
        "evaluate", f"run={run.path}", "analysis=full", "name=full", "max_rows=200",
        "slices=[sex, race, age>60, race×age>60, planet, age>200]", "defer.target=0.1",
        "cost.matrix=[[0,1,0.2],[4,0,0.2]]", "cost.actions=[refuse,lend,ask]", "conformal_by=sex",
    )  # fmt: skip
    assert said.status == 0, said.err
    return said, run.evaluation("full")


KEYS = (
    "data", "calibration", "members", "diagnostics", "uncertainty", "examples", "slices", "deferral", "recalibration",
    "slice_search", "conformal", "costs", "robustness", "sensitivity", "privacy",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_every_chapter_is_written_with_numbers_and_said(full, key: str):
    said, folder = full
    section = read_section(folder / "sections", key)
    assert section.level != "empty", section.verdict
    assert section.tables
    assert section.verdict in said.out
    assert all(len(table.columns) for table in section.tables.values())


def test_every_file_is_in_the_hashes(full):
    _, folder = full
    hashes = read_json(folder / "hashes.json")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(hashes) == there - {"hashes.json", "report.html"}
    assert all(sha256(folder / name) == digest for name, digest in hashes.items())


def test_the_report_tells_how_it_was_made_and_shows_inputs_only(full, bdl_module, run):
    _, folder = full
    examples = read_section(folder / "sections", "examples").tables["wrong"]
    assert [name for name in examples if name.startswith("input ")] == [
        "input age",
        "input income",
        "input sex",
    ]
    assert bdl_module("report", f"run={run.path}", "name=full").status == 0
    page = (folder / "report.html").read_text()
    assert "analysis=full" in page
    assert "race×age&gt;60" in page


def test_slices_use_columns_that_are_no_inputs_and_wrong_ones_hinder_nothing(full):
    said, folder = full
    section = read_section(folder / "sections", "slices")
    metrics = section.tables["metrics"]
    names = set(metrics["slice"])
    assert {"race=a", "race=b", "race=c", "sex=f", "age>60"} <= names
    assert any("planet" in one for one in section.warnings)
    assert "planet" in said.out
    empty = metrics[metrics["slice"] == "age>200"]
    assert set(empty["n"]) == {0}
    assert empty["reason"].notna().all()
    assert any("race=c" in one for one in section.warnings)  # small
    detail = pd.read_parquet(folder / "metrics_detail.parquet")
    accuracy = detail[detail["key"] == "test/accuracy"].set_index("slice")["value"]
    test = pd.read_parquet(folder / "predictions.parquet").merge(
        table_of(1500), left_on="row", right_index=True
    )
    for race, expected in test.groupby("race")["correct"].mean().items():
        assert accuracy[f"race={race}"] == pytest.approx(expected)
    assert accuracy["all"] == pytest.approx(test["correct"].mean())


def test_the_planted_slice_is_the_worst(full):
    _, folder = full
    gaps = read_section(folder / "sections", "slices").tables["gaps"]
    nll = gaps[(gaps["loss"] == "nll") & (gaps["n"] >= 15)].sort_values("difference")
    assert nll["slice"].iloc[-1] == "race=b & age>60"
    assert nll["significant"].iloc[-1]


def test_members_of_half_the_rows_are_attacked_with_each_other(full, run):
    _, folder = full
    attacks = read_section(folder / "sections", "privacy").tables["attacks"]
    assert "likelihood ratio" in set(attacks["attack"])
    posterior = read_json(run.posterior / "posterior.json")
    assert posterior["members"][0]["train_rows"] == "member_rows"


def test_recalibration_is_recorded_with_the_posterior(full, run):
    recorded = read_json(run.posterior / "recalibration.json")
    assert set(recorded["maps"]) == {"temperature", "isotonic"}
    assert recorded["maps"]["temperature"]["num_rows"] == 1500 * 0.8 * 0.1
    assert recorded["posterior_sha256"] == sha256(run.posterior / "posterior.json")


def test_predictions_are_recalibrated_by_the_recorded_map(full, bdl_module, run, tmp_path):
    people = run.path.parents[2] / "people.csv"
    outputs = {}
    for name in ("none", "temperature", "isotonic"):
        words = [] if name == "none" else [f"recalibration={name}"]
        said = bdl_module(
            "predict", f"run={run.path}", f"input={people}", f"output={tmp_path / name}.csv", *words
        )
        assert said.status == 0, said.err
        outputs[name] = pd.read_csv(tmp_path / f"{name}.csv")
    temperature = read_json(run.posterior / "recalibration.json")["maps"]["temperature"]["temperature"]
    odds = outputs["none"]["p_yes"] / outputs["none"]["p_no"]
    expected = odds ** (1 / temperature)
    np.testing.assert_allclose(
        outputs["temperature"]["p_yes"] / outputs["temperature"]["p_no"], expected, rtol=1e-4
    )
    assert outputs["temperature"]["epistemic"].isna().all()
    np.testing.assert_allclose(outputs["isotonic"]["p_yes"] + outputs["isotonic"]["p_no"], 1, rtol=1e-6)
    said = bdl_module(
        "predict",
        f"run={run.path}",
        f"input={people}",
        f"output={tmp_path / 'x.csv'}",
        "recalibration=temprature",
    )
    assert said.status == 2
    assert "Did you mean 'temperature'" in said.err


def test_another_file_is_scored_by_its_columns_whatever_their_order(bdl_module, run, tmp_path):
    new = table_of(300, seed=5)
    new.to_csv(tmp_path / "new.csv", index=False)
    new[["paid", "sex", "income", "race", "age"]].to_csv(tmp_path / "turned.csv", index=False)
    for name in ("new", "turned"):
        said = bdl_module(
            "evaluate", f"run={run.path}", f"data.path={tmp_path / name}.csv", f"name={name}", "slices=[race]"
        )
        assert said.status == 0, said.err
    one, other = (read_json(run.evaluation(name) / "metrics.json") for name in ("new", "turned"))
    assert one == other
    assert set(read_section(run.evaluation("new") / "sections", "slices").tables["metrics"]["slice"]) >= {
        "race=a"
    }
    renamed = new.rename(columns={"income": "Income"})
    renamed.to_csv(tmp_path / "renamed.csv", index=False)
    said = bdl_module("evaluate", f"run={run.path}", f"data.path={tmp_path / 'renamed.csv'}", "name=renamed")
    assert said.status == 2
    assert "lacks 1 of 3 input columns: income. Did you mean 'Income'" in said.err
    new.assign(paid="perhaps").to_csv(tmp_path / "classes.csv", index=False)
    said = bdl_module("evaluate", f"run={run.path}", f"data.path={tmp_path / 'classes.csv'}", "name=classes")
    assert said.status == 2
    assert "the class 'perhaps'" in said.err
    assert "Traceback" not in said.err


def test_a_file_of_training_rows_with_strange_categories_is_remarked(bdl_module, run, tmp_path):
    people = pd.read_csv(run.path.parents[2] / "people.csv")
    people.loc[:99, "sex"] = "unknown"
    people.to_csv(tmp_path / "again.csv", index=False)
    said = bdl_module("evaluate", f"run={run.path}", f"data.path={tmp_path / 'again.csv'}", "name=again")
    assert said.status == 0, said.err
    warnings = read_section(run.evaluation("again") / "sections", "data").warnings
    assert "column sex: 100 of 1500 rows have a category that training never saw" in warnings
    assert any(one.startswith("training rows: ") for one in warnings)
    said = bdl_module(
        "predict", f"run={run.path}", f"input={tmp_path / 'again.csv'}", f"output={tmp_path / 'out.csv'}"
    )
    assert "column sex: 100 of 1500 rows have a category that training never saw" in said.out
    said = bdl_module(
        "evaluate", f"run={run.path}", f"data.path={tmp_path / 'again.csv'}", "part=val", "name=again"
    )
    assert said.status == 2
    assert "part=val would mean nothing" in said.err


def test_the_validation_part_is_not_judged_on_itself_and_old_chapters_are_missed(bdl_module, run):
    words = ("evaluate", f"run={run.path}", "part=val", "name=own")
    said = bdl_module(*words, "recalibrate=true", "conformal=[0.9]", "defer.target=0.2", "slices=[sex]")
    assert said.status == 0, said.err
    for key in ("recalibration", "conformal", "deferral"):
        section = read_section(run.evaluation("own") / "sections", key)
        assert (section.level, "part=test" in section.verdict) == ("empty", True), key
    assert bdl_module("report", f"run={run.path}", "name=own").status == 0
    said = bdl_module(*words)
    assert "had more chapters: conformal, recalibration, slices" in said.out
    assert not (run.evaluation("own") / "report.html").exists()


def test_maps_of_fewer_draws_are_not_recorded(bdl_module, run):
    path = run.posterior / "recalibration.json"
    before = path.read_bytes() if path.exists() else None
    said = bdl_module("evaluate", f"run={run.path}", "name=one", "num_draws=1", "recalibrate=true")
    assert said.status == 0, said.err
    assert "not recorded" in said.out
    assert (path.read_bytes() if path.exists() else None) == before


def test_rows_of_one_class_still_have_all_that_does_not_need_two(bdl_module, run, tmp_path):
    new = table_of(300, seed=6)
    new[new["paid"] == "yes"].to_csv(tmp_path / "yes.csv", index=False)
    said = bdl_module(
        "evaluate", f"run={run.path}", f"data.path={tmp_path / 'yes.csv'}", "name=yes", "slices=[sex]",
        "recalibrate=true", "robustness=true", "max_rows=100", "ood=[nowhere.csv]", "privacy=true",
        "cost.matrix=[[0,1]]",
    )  # fmt: skip
    assert said.status == 0, said.err
    metrics = json.loads((run.evaluation("yes") / "metrics.json").read_text())
    assert metrics["test/auroc"] is None
    assert metrics["test/accuracy"] is not None
    detail = pd.read_parquet(run.evaluation("yes") / "metrics_detail.parquet").set_index(["key", "slice"])
    assert detail.loc[("test/auroc", "all"), "reason"] == "the rows hold one class only"
    reasons = {
        key: read_section(run.evaluation("yes") / "sections", key)
        for key in ("ood", "privacy", "costs", "slices")
    }
    assert reasons["ood"].level == "empty"
    assert "nowhere.csv" in reasons["ood"].verdict
    assert reasons["privacy"].level == "empty"
    assert reasons["costs"].level == "empty"
    assert "cost" in reasons["costs"].verdict
    assert reasons["slices"].level != "empty"


def test_numbers_have_bands_maps_and_intervals(bdl_module, tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(900, 2))
    table = pd.DataFrame({"u": x[:, 0], "v": x[:, 1], "kind": random.choice(["p", "q"], 900)})
    table["price"] = 10 + 3 * x[:, 0] + random.normal(size=900) * (1 + (table["kind"] == "q"))
    table.to_csv(tmp_path / "prices.csv", index=False)
    words = (f"data.path={tmp_path / 'prices.csv'}", "data.target=price", f"output_dir={tmp_path / 'runs'}")
    said = bdl_module("train", "data=csv", *words, *SMALL, "likelihood=heteroscedastic_gaussian")
    assert said.status == 0, said.err
    (path,) = (tmp_path / "runs" / "prices").iterdir()
    said = bdl_module(
        "evaluate", f"run={path}", "slices=[kind]", "recalibrate=true", "conformal=[0.9]", "conformal_by=kind",
        "defer.target=1.2", "defer.metric=rmse", "robustness=true", "sensitivity=true", "find_slices=true",
        "max_rows=120", "cost.matrix=[[0,1],[1,0]]", "attacks=[0.5]",
    )  # fmt: skip
    assert said.status == 0, said.err
    folder = RunDir(path).evaluation("test") / "sections"
    for key in (
        "bands",
        "calibration",
        "recalibration",
        "conformal",
        "deferral",
        "robustness",
        "sensitivity",
        "attacks",
    ):
        assert read_section(folder, key).level != "empty", key
    assert read_section(folder, "costs").level == "empty"
    assert set(read_json(RunDir(path).posterior / "recalibration.json")["maps"]) == {"variance", "quantile"}
    predictions = {}
    for name in ("none", "variance", "quantile"):
        words = [] if name == "none" else [f"recalibration={name}"]
        said = bdl_module(
            "predict",
            f"run={path}",
            f"input={tmp_path / 'prices.csv'}",
            f"output={tmp_path / name}.csv",
            *words,
        )
        assert said.status == 0, said.err
        predictions[name] = pd.read_csv(tmp_path / f"{name}.csv")
    scale = read_json(RunDir(path).posterior / "recalibration.json")["maps"]["variance"]["scale"]
    ratio = predictions["variance"]["total_std"] / predictions["none"]["total_std"]
    np.testing.assert_allclose(ratio, scale, rtol=1e-5)
    assert predictions["quantile"]["mean"].isna().all()
    assert np.isfinite(predictions["quantile"]["lower_90"]).all()
    assert not np.allclose(predictions["quantile"]["lower_90"], predictions["none"]["lower_90"])
    groups = read_section(folder, "conformal").tables["coverage"]
    assert {"kind=p", "kind=q"} <= set(groups["group"])
