"""`bdl predict`: columns by name, streaming, the same numbers as the evaluation."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer

from bdl_train.posteriors.artefact import read_artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir


@pytest.fixture
def predict(bdl):
    """The predicted table, and the command's words checked."""

    def call(run: RunDir, source, *words: str, output: str = "p.parquet") -> pd.DataFrame:
        said = bdl("predict", f"run={run.path}", f"input={source}", f"output={output}", *words)
        assert said.status == 0, said.err
        table = pd.read_parquet(output) if output.endswith(".parquet") else pd.read_csv(output)
        assert f"{len(table)} rows written to {output}" in said.out
        return table

    return call


@pytest.fixture
def test_rows(number_run, mixed_csv) -> pd.DataFrame:
    """The rows of the test part, in the order of the evaluation's table, as the source has them."""
    scored = pd.read_parquet(number_run.evaluation("test") / "predictions.parquet")
    return pd.read_csv(mixed_csv).iloc[scored["row"]]


def test_predictions_are_those_of_the_evaluation(predict, number_run, test_rows, tmp_path):
    test_rows.to_csv(tmp_path / "rows.csv", index=False)
    scored = pd.read_parquet(number_run.evaluation("test") / "predictions.parquet")
    predicted = predict(number_run, "rows.csv", "intervals=[0.95]")
    for name in ("mean", "total_std", "aleatoric_std", "epistemic_std", "lower_95", "upper_95"):
        np.testing.assert_allclose(predicted[name], scored[name], rtol=1e-6, err_msg=name)


def test_class_predictions_are_those_of_the_evaluation(predict, class_run, tmp_path):
    source: Any = load_breast_cancer()
    scored = pd.read_parquet(class_run.evaluation("test") / "predictions.parquet")
    frame = pd.DataFrame(source["data"], columns=list(source["feature_names"])).iloc[scored["row"]]
    frame.to_csv(tmp_path / "rows.csv", index=False)
    predicted = predict(class_run, "rows.csv")
    for name in ("p_malignant", "p_benign", "total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(predicted[name], scored[name], rtol=1e-5, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(predicted["total"], predicted["aleatoric"] + predicted["epistemic"], rtol=1e-9)
    names = np.array(["malignant", "benign"])
    assert list(predicted["prediction"]) == list(names[scored["prediction"]])
    assert not [name for name in predicted if name.startswith("lower")]


def test_columns_are_found_by_name_in_any_order_and_format(predict, number_run, test_rows, tmp_path):
    test_rows.to_csv(tmp_path / "rows.csv", index=False)
    expected = predict(number_run, "rows.csv")
    shuffled = test_rows[["y", "age", "colour", "part", "width"]].assign(more=1)
    shuffled.to_csv(tmp_path / "other.csv", index=False, sep=";")
    shuffled.to_csv(tmp_path / "other.csv.gz", index=False)
    shuffled.to_parquet(tmp_path / "other.parquet")
    for source in ("other.csv", "other.csv.gz", "other.parquet"):
        pd.testing.assert_frame_equal(predict(number_run, source), expected)
    as_csv = predict(number_run, "rows.csv", output="p.csv")
    pd.testing.assert_frame_equal(as_csv, expected, rtol=1e-8)


def test_csv_has_nine_digits_of_predictions_and_all_of_kept_numbers(predict, number_run, test_rows, tmp_path):
    exact = test_rows.assign(weight=1e9 + np.arange(len(test_rows)) / 7)
    exact.loc[exact.index[3], "weight"] = np.nan
    exact.to_parquet(tmp_path / "rows.parquet", index=False)
    predict(number_run, "rows.parquet", "keep=[weight]", output="p.csv")
    as_text = pd.read_csv("p.csv", dtype=str)
    np.testing.assert_array_equal(as_text["weight"].astype(float), exact["weight"])
    lengths = (
        as_text["mean"]
        .str.replace(r"e.*", "", regex=True)
        .str.replace(r"[-.]|^-?0\.0*", "", regex=True)
        .str.len()
    )
    assert 7 <= lengths.max() <= 9


@pytest.mark.parametrize("chunk_rows", [1, 7, 25, 1000])
def test_chunks_change_nothing(chunk_rows, predict, number_run, test_rows, tmp_path):
    test_rows.to_parquet(tmp_path / "rows.parquet", index=False)
    expected = predict(number_run, "rows.parquet", "keep=[colour]")
    chunked = predict(number_run, "rows.parquet", "keep=[colour]", f"chunk_rows={chunk_rows}")
    # Members that nearly agree lose digits of their small difference.
    pd.testing.assert_frame_equal(chunked, expected, rtol=1e-4)


def test_intervals_are_named_by_percent_and_hold_their_mass(predict, number_run, test_rows, tmp_path):
    test_rows.to_csv(tmp_path / "rows.csv", index=False)
    predicted = predict(number_run, "rows.csv", "intervals=[0.5,0.9,0.999]")
    assert [name for name in predicted if "er_" in name] == [
        "lower_50", "upper_50", "lower_90", "upper_90", "lower_99.9", "upper_99.9",
    ]  # fmt: skip
    # By another route: the components' own distribution functions at the written edges.
    artefact = read_artefact(number_run.posterior)
    assert artefact.transform is not None
    x = torch.from_numpy(artefact.transform.apply(test_rows.reset_index(drop=True)))
    (tile,) = Predictor(artefact)(x)
    assert tile.mixture is not None
    for percent, mass in (("50", 0.5), ("90", 0.9), ("99.9", 0.999)):
        edges = predicted[[f"lower_{percent}", f"upper_{percent}"]].to_numpy().T
        standard = torch.from_numpy((edges - artefact.target.loc) / artefact.target.scale)
        below = tile.mixture.components.cdf(standard[:, None]).mean(1)  # [2, B]: equal weights
        torch.testing.assert_close(below[1] - below[0], torch.full_like(below[0], mass), rtol=0, atol=1e-5)


def test_kept_columns_stand_first_and_unchanged(predict, number_run, test_rows, tmp_path):
    frame = test_rows.assign(id=[f"p{i:03d}" for i in range(len(test_rows))], note="007")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    predicted = predict(number_run, "rows.csv", "keep=[id,note,width]")
    assert list(predicted.columns[:4]) == ["id", "note", "width", "mean"]
    assert list(predicted["id"]) == list(frame["id"])
    assert set(predicted["note"]) == {"007"}  # text stays text
    assert list(predicted["width"].astype(float)) == list(frame["width"])


def test_kept_columns_may_be_empty_at_first(predict, number_run, test_rows, tmp_path):
    late = [None] * (len(test_rows) - 1) + [3.5]
    whole = [1, *[None] * (len(test_rows) - 2), 2]
    frame = test_rows.assign(late=late, whole=pd.array(whole, dtype="Int64"))
    frame.to_parquet(tmp_path / "rows.parquet", index=False)
    predicted = predict(number_run, "rows.parquet", "keep=[late,whole]", "chunk_rows=10")
    assert list(predicted["late"].dropna().astype(float)) == [3.5]
    assert list(predicted["whole"].dropna().astype(int)) == [1, 2]


def test_missing_values_and_levels_never_seen_are_predicted(predict, number_run, test_rows, tmp_path):
    frame = test_rows.head(4).copy().assign(part="test")
    frame["colour"] = ["purple", None, "red", "blue"]
    frame["age"] = [np.nan, 3.0, np.nan, 5.0]
    frame.to_csv(tmp_path / "rows.csv", index=False)
    predicted = predict(number_run, "rows.csv")
    assert np.isfinite(predicted.to_numpy()).all()
    # A missing age is the mean age, flagged; it is not the same as any age.
    filled = frame.assign(age=frame["age"].fillna(46.0))
    filled.to_csv(tmp_path / "filled.csv", index=False)
    other = predict(number_run, "filled.csv")
    assert list(other["mean"] == predicted["mean"]) == [False, True, False, True]


def test_a_single_draw_of_a_member_is_less_than_all(predict, class_run, tmp_path):
    source: Any = load_breast_cancer()
    frame = pd.DataFrame(source["data"][:30], columns=list(source["feature_names"]))
    frame.to_csv(tmp_path / "rows.csv", index=False)
    every, one = predict(class_run, "rows.csv"), predict(class_run, "rows.csv", "num_draws=1")
    assert not np.allclose(every["p_benign"], one["p_benign"])
    pd.testing.assert_frame_equal(every, predict(class_run, "rows.csv", "num_draws=3"))


def test_a_failure_half_way_leaves_no_output_and_the_old_one_as_it_was(bdl, number_run, test_rows, tmp_path):
    frame = pd.concat([test_rows] * 4).astype({"width": object})
    frame.iloc[-1, frame.columns.get_loc("width")] = "wide"
    frame.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "p.csv").write_text("the predictions of yesterday")
    said = bdl("predict", f"run={number_run.path}", "input=rows.csv", "output=p.csv", "chunk_rows=10")
    assert said.status == 2
    assert "'width'" in said.err
    assert "wide" in said.err
    assert (tmp_path / "p.csv").read_text() == "the predictions of yesterday"
    assert [path.name for path in tmp_path.iterdir() if ".p" in path.name] == []


MEMORY = """
import json, sys
from bdl_train.cli import main
peaks = []
for name in ("small.csv", "large.csv"):
    assert main([*sys.argv[1:], f"input={name}"]) == 0
    # Not getrusage: its peak also counts the process that started this one.
    peaks.append(int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))))
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_file(number_run, tmp_path):
    for name, num_rows in (("small.csv", 20_000), ("large.csv", 300_000)):
        random = np.random.default_rng(0)
        table = {"width": random.normal(5, 2, num_rows).round(4), "age": random.integers(1, 90, num_rows)}
        table["colour"] = np.array(["red", "green", "blue"])[random.integers(0, 3, num_rows)]
        # Text in memory takes about ten times its bytes: the large file would need 200 MiB.
        table |= {f"more_{i}": np.full(num_rows, f"{i} and so on") for i in range(4)}
        pd.DataFrame(table).to_csv(tmp_path / name, index=False)
    words = (f"run={number_run.path}", "output=p.parquet", "intervals=[0.9]", "keep=[more_1]")
    command = [sys.executable, "-c", MEMORY, "predict", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert large - small < 30 * 1024
    assert len(pd.read_parquet(tmp_path / "p.parquet")) == 300_000
