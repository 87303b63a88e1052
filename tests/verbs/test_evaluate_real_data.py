"""The documented commands on real data, with fewer members and epochs: every chapter of each analysis is there."""

# pandas-stubs take a column for anything that a table can hold.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import pandas as pd
import pytest

from bdl_train.evaluation.section import read_section
from bdl_train.runs import find_runs

pytestmark = [pytest.mark.shared_data, pytest.mark.ci]
SMALL = ("num_members=3", "trainer.max_epochs=4", "cluster=inline", "cluster.cpus_per_stack=2")
ALWAYS = (
    "data",
    "calibration",
    "members",
    "diagnostics",
    "uncertainty",
    "examples",
    "deferral",
    "recalibration",
    "conformal",
)
ON_TABLES = ("slices", "slice_search", "robustness", "sensitivity")


def evaluated(bdl, tmp_path, *words: str, analysis: str, max_rows: int = 200):
    said = bdl("train", *words, *SMALL)
    assert said.status == 0, said.err
    run = find_runs(tmp_path / "runs")[-1]
    said = bdl("evaluate", f"run={run.path}", f"analysis={analysis}", f"max_rows={max_rows}")
    assert said.status == 0, said.err
    return run.evaluation("test") / "sections"


@pytest.mark.parametrize(
    ("name", "slices", "more"),
    [
        ("adult", ("sex=Female", "race=Black", "race=White & sex=Male", "age>65"), ()),
        ("support2", ("sex=female", "race=black", "dzgroup=Coma"), ("costs",)),
        ("german_credit", ("personal_status=A92", "foreign_worker=A201", "age>25"), ("costs", "privacy")),
    ],
)
def test_tables_with_slices_by_sex_race_and_age(bdl, tmp_path, name: str, slices, more):
    folder = evaluated(bdl, tmp_path, f"experiment={name}", analysis=name)
    for key in (*ALWAYS, *ON_TABLES, *more):
        assert read_section(folder, key).level != "empty", (key, read_section(folder, key).verdict)
    metrics = read_section(folder, "slices").tables["metrics"]
    names = set(metrics["slice"])
    assert set(slices) <= names
    assert any(str(one).startswith("age ") for one in names)  # quartiles of the age
    accuracy = metrics[metrics["key"] == "accuracy"]
    assert accuracy["low"].notna().to_numpy()[(accuracy["n"] > 30).to_numpy()].all()


def test_fashion_mnist_with_mnist_outside(bdl, tmp_path):
    folder = evaluated(
        bdl,
        tmp_path,
        "experiment=fashion_mnist",
        "data.max_train=3000",
        analysis="fashion_mnist",
        max_rows=60,
    )
    for key in (*ALWAYS, "ood", "robustness", "sensitivity"):
        assert read_section(folder, key).level != "empty", key
    detection = read_section(folder, "ood").tables["detection"].set_index("score")
    assert {"mutual_information", "predictive_entropy", "max_probability", "energy"} <= set(detection.index)
    assert pd.to_numeric(detection["auroc"]).max() > 0.7
    curves = read_section(folder, "robustness").tables["curves"]
    assert curves["kind"].nunique() == 15 + 1  # and wrong labels
    corrupted = curves[curves["kind"] != "label_noise"]
    assert sorted(corrupted["severity"].unique()) == [0, 1, 2, 3, 4, 5]


def test_uci_with_conformal_intervals(bdl, tmp_path):
    words = ("experiment=uci_deep_ensemble", "data.name=power-plant")
    folder = evaluated(bdl, tmp_path, *words, analysis="uci")
    for key in (*ALWAYS, "bands", "robustness", "sensitivity"):
        assert read_section(folder, key).level != "empty", key
    coverage = read_section(folder, "conformal").tables["coverage"]
    assert set(coverage["level"]) == {0.5, 0.8, 0.9, 0.95}
    assert set(coverage["method"]) == {"normalised", "cqr"}
    gap = (coverage["coverage"] - coverage["level"]).abs()
    assert gap.to_numpy().max() < 0.06
