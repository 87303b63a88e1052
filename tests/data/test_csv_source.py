"""Tables of one's own: columns, targets, splits, and every way to get them wrong."""

import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bdl_train.data import Data
from bdl_train.data._datamodule import source_from
from bdl_train.data._target import read_target
from bdl_train.errors import UsageError
from bdl_train.specs import TargetKind

SETTINGS: dict[str, Any] = {
    "_target_": "bdl_train.data.csv.Csv", "name": None, "target": "y", "kind": "auto", "max_auto_classes": 20,
    "features": None, "drop": [], "categorical": [], "max_categories": 64, "split_column": None,
    "test_path": None, "id_column": None, "split": 0, "test_fraction": 0.25, "val_fraction": 0.1,
    "batch_size": 8,
}  # fmt: skip


def a_table(num_rows: int = 80) -> pd.DataFrame:
    random = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "id": [f"p{i:03d}" for i in range(num_rows)],
            "age": random.normal(40, 10, num_rows),
            "ward": random.integers(1, 4, num_rows),
            "blood": random.choice(["A", "B", "?"], num_rows),
            "part": np.array(["train"] * 40 + ["val"] * 15 + ["test"] * 25)[:num_rows],
            "y": random.normal(size=num_rows),
        }
    )


def load(folder: Path, table: Any, *, file: str = "table.csv", seed: int = 0, **changed: Any) -> Data:
    if file.endswith(".parquet"):
        table.to_parquet(folder / file)
    else:
        table.to_csv(folder / file, index=False)
    return source_from({**SETTINGS, "path": str(folder / file), **changed, "root": "unused"}).load("", seed)


@pytest.mark.parametrize("file", ["table.csv", "table.csv.gz", "table.parquet"])
def test_file_becomes_standardised_inputs_and_target(tmp_path: Path, file: str):
    table = a_table()
    data = load(tmp_path, table, file=file, id_column="id", split_column="part", categorical=["ward"])
    assert data.name == "table"
    assert data.inputs.names == ("age", "ward", "blood")
    assert data.inputs.groups == (1, 3, 3)
    assert [len(part) for part in (data.train, data.val, data.test)] == [40, 15, 25]
    assert data.target.kind is TargetKind.CONTINUOUS
    age = table["age"].to_numpy()
    expected = (age - age[:40].mean()) / age[:40].std()
    np.testing.assert_allclose(data.test.x[:, 0], expected[55:], rtol=1e-5)
    np.testing.assert_array_equal(data.test.x[:, 1:4].argmax(1) + 1, table["ward"][55:])
    y = table["y"].to_numpy()
    np.testing.assert_allclose(data.val.y, ((y - y[:40].mean()) / y[:40].std())[40:55], rtol=1e-5)
    assert data.notes["duplicated_rows"] == data.notes["test_rows_seen_in_train"] == 0


def test_csv_and_parquet_of_one_table_give_the_same_arrays(tmp_path: Path):
    table = a_table()
    table.loc[::9, "ward"] = np.nan  # 3 becomes 3.0
    by_file = [
        load(tmp_path, table, file=file, drop=["id", "part"], categorical=["ward"]).fingerprint()
        for file in ("table.csv", "table.parquet")
    ]
    assert by_file[0] == by_file[1]


def test_truth_values_with_gaps_stay_categories_and_decimals_become_numbers(tmp_path: Path):
    table = a_table().drop(columns=["id", "part", "blood", "ward"])
    table["smoker"] = pd.Series([True, None, False, True] * 20, dtype=object)
    table["price"] = [Decimal(i) / 4 for i in range(80)]
    data = load(tmp_path, table, file="table.parquet")
    assert data.inputs.names == ("age", "smoker", "price")
    assert data.inputs.groups == (1, 3, 1)
    assert load(tmp_path, table).fingerprint() == data.fingerprint()


def test_random_split_follows_its_number_and_not_the_seed(tmp_path: Path):
    table = a_table().drop(columns=["id", "part"])
    first, other_seed, other_split = (
        load(tmp_path, table, split=split, seed=seed) for split, seed in ((0, 0), (0, 1), (1, 0))
    )
    np.testing.assert_array_equal(first.test.rows, other_seed.test.rows)
    assert not np.array_equal(first.val.rows, other_seed.val.rows)
    assert not np.array_equal(first.test.rows, other_split.test.rows)
    assert [len(first.train), len(first.val), len(first.test)] == [54, 6, 20]


def test_test_file_is_the_test_part(tmp_path: Path):
    table = a_table().drop(columns=["id", "part"])
    table.loc[60:, ["y", "blood", "ward", "age"]].to_csv(tmp_path / "test.csv", index=False)
    data = load(tmp_path, table.iloc[:60], test_path="test.csv")
    one_file = load(tmp_path, table.assign(part=["train"] * 60 + ["test"] * 20), split_column="part")
    assert len(data.val) == 6
    assert data.fingerprint() == one_file.fingerprint()


@pytest.fixture(autouse=True)
def _in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_relative_paths_are_also_looked_for_in_the_data_root(tmp_path: Path):
    (tmp_path / "sets").mkdir()
    a_table().to_csv(tmp_path / "sets" / "mine.csv", index=False)
    source = source_from({**SETTINGS, "path": "mine.csv", "drop": ["id", "part"], "name": "my set"})
    assert source.load(str(tmp_path / "sets"), 0).name == "my set"
    with pytest.raises(UsageError, match=r"data\.path=mine\.csv: neither mine\.csv nor .* is a file"):
        source.load(str(tmp_path), 0)
    typo = source_from({**SETTINGS, "path": str(tmp_path / "sets" / "mime.csv")})
    with pytest.raises(UsageError, match=r"Did you mean 'mine\.csv'\?"):
        typo.load("", 0)


def test_features_drop_and_id_choose_the_inputs(tmp_path: Path):
    table = a_table()
    assert load(tmp_path, table, features=["ward", "age"]).inputs.names == ("ward", "age")
    assert load(tmp_path, table, drop=["id", "part"]).inputs.names == ("age", "ward", "blood")
    assert load(tmp_path, table, id_column="id", drop=["part"]).inputs.names == ("age", "ward", "blood")


def test_identifier_left_among_the_inputs_is_grouped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    data = load(tmp_path, a_table(), features=["id", "age"], max_categories=5)
    assert data.inputs.groups == (5, 1)
    assert "Column 'id' has another text in each of its 54 training rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "values", "warned"),
    [
        ("row", np.arange(80), True),
        ("row", 500.0 - 3 * np.arange(80), True),
        ("Patient_ID", np.arange(80) * 7 % 80, True),
        ("INDEX", np.arange(80) * 7 % 80, True),
        ("id", np.arange(80) * 7 % 80, True),
        ("row", np.arange(80) * 7 % 80, False),
        ("valid", np.arange(80) * 7 % 80, False),
        ("row", np.arange(80) + 0.5, False),
        ("row", np.arange(80) // 2, False),
        ("id", np.arange(80) % 3, False),
        ("id", np.where(np.arange(80) % 2, np.nan, np.arange(80)), False),
    ],
)
def test_a_number_like_an_identifier_is_a_warning_and_stays(tmp_path: Path, caplog, name, values, warned):
    table = a_table().drop(columns=["id", "part"]).assign(**{name: values})
    data = load(tmp_path, table)
    assert name in data.inputs.names
    said = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(said) == warned
    if warned:
        assert f"Column '{name}' has another whole number in each of its 60 training rows" in said[0]
        assert "looks like an identifier: name it in data.drop" in said[0]
        caplog.clear()
        load(tmp_path, table, drop=[name])
        load(tmp_path, table.assign(**{name: values // 10}), categorical=[name])
        assert not [one for one in caplog.records if one.levelno == logging.WARNING]


def target_of(cells: list, kind: Any = "auto", name: str = "y") -> tuple[TargetKind, list, tuple[str, ...]]:
    raw = read_target(pd.Series(cells, name=name), kind, 5)
    return raw.kind, raw.y.tolist(), raw.classes


@pytest.mark.parametrize(
    ("cells", "kind", "y", "classes"),
    [
        (["no", "yes", "no", "no"], TargetKind.CLASS, [0, 1, 0, 0], ("no", "yes")),
        ([True, False, True, True], TargetKind.CLASS, [1, 0, 1, 1], ("False", "True")),
        (["10", "9", "10", "9", "9"], TargetKind.CLASS, [1, 0, 1, 0, 0], ("9", "10")),
        ([2.0, 1.0, 2.0, 2.0, 2.0], TargetKind.CLASS, [1, 0, 1, 1, 1], ("1", "2")),
        ([-1, 1, 1, -1, 1], TargetKind.CLASS, [0, 1, 1, 0, 1], ("-1", "1")),
        (["0.5", "1", "1", "1", "1"], TargetKind.CONTINUOUS, [0.5, 1, 1, 1, 1], ()),
        ([1, 2, 3, 4], TargetKind.CONTINUOUS, [1, 2, 3, 4], ()),  # too few rows for so many classes
        ([1, 2, 3, 4, 5, 6] * 4, TargetKind.CONTINUOUS, [1, 2, 3, 4, 5, 6] * 4, ()),
    ],
)
def test_kind_of_a_target_is_found(cells: list, kind: TargetKind, y: list, classes: tuple[str, ...]):
    assert target_of(cells) == (kind, y, classes)


def test_numbered_categories_are_classes_in_the_order_of_their_numbers():
    cells = pd.Series(pd.Categorical(["2", "10", "2", "2"]), name="y")
    raw = read_target(cells, "auto", 5)
    assert raw.kind is TargetKind.CLASS
    assert [raw.classes[label] for label in raw.y] == ["2", "10", "2", "2"]


def test_kind_can_be_said():
    assert target_of([1, 2, 1, 2, 2], "continuous") == (TargetKind.CONTINUOUS, [1, 2, 1, 2, 2], ())
    assert target_of([0, 2, 0, 2, 7], "count") == (TargetKind.COUNT, [0, 2, 0, 2, 7], ())
    assert target_of([1, 2, 3, 4, 5, 6] * 4, "class")[2] == ("1", "2", "3", "4", "5", "6")


def test_kind_is_logged_and_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        data = load(tmp_path, a_table(), target="ward", drop=["id", "part"])
    assert data.target.classes == ("1", "2", "3")
    assert data.notes["target_kind"] == "class: it has 3 distinct whole values"
    assert "Target 'ward' is of kind class: it has 3 distinct whole values" in caplog.text


@pytest.mark.parametrize(
    ("cells", "kind", "message"),
    [
        (["1", "?", None], "auto", r"'y' is missing in 2 rows \(the first is row 1"),
        ([1.0, np.inf, 2.0], "auto", "'y' is infinite in 1 rows"),
        (["a", "b", "a"], "continuous", r"'y' holds text \('a'\), not numbers: set data.kind=class"),
        ([1.0, 1.5, 1.0], "class", r"fractional value 1\.5 in row 1"),
        (["a", "b", "c"], "auto", "3 classes in 3 rows"),
    ],
)
def test_targets_that_mean_nothing_are_refused(cells: list, kind: str, message: str):
    with pytest.raises(UsageError, match=message):
        target_of(cells, kind)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": "aeg"}, r"data\.target names the column 'aeg', .* Did you mean 'age'\?"),
        ({"features": ["age", "word"]}, r"data\.features names the column 'word'.* mean 'ward'\?"),
        ({"drop": ["blod"]}, r"data\.drop names the column 'blod'.* Did you mean 'blood'\?"),
        ({"categorical": ["x9"]}, r"data\.categorical names the column 'x9'"),
        ({"categorical": ["ward"], "drop": ["ward"]}, r"data\.categorical names 'ward', which is not among"),
        ({"features": ["age", "y"]}, r"data\.features names 'y', which is the target"),
        ({"features": ["id"], "id_column": "id"}, r"data\.features names 'id', which is the target or names"),
        ({"split_column": "parts"}, r"data\.split_column or data\.id_column names the column 'parts'"),
        ({"split_column": "blood"}, r"data\.split_column=blood has '"),
        ({"split_column": "part", "test_path": "t.csv"}, "both declare the test rows"),
        ({"target": "y", "kind": "class"}, "fractional value"),
        ({"kind": "count"}, "whole numbers for kind 'count'"),
        ({"kind": "clas"}, r"data\.kind: input should be 'auto', .* got 'clas'"),
        ({"test_fraction": 1.5}, r"data\.test_fraction: input should be less than 1, got 1\.5"),
        ({"max_categories": 1}, r"data\.max_categories: input should be greater than or equal to 2"),
        ({"targets": "y"}, r"Unknown key 'data\.targets'\. Did you mean 'target'\?"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        load(tmp_path, a_table(), **changed)


def test_unknown_split_value_names_its_row_and_the_nearest(tmp_path: Path):
    table = a_table()
    table.loc[7, "part"] = "tset"
    with pytest.raises(UsageError, match=r"data\.split_column=part has 'tset' in row 7\. .*'test'\?"):
        load(tmp_path, table, split_column="part")
    table.loc[7, "part"] = None
    with pytest.raises(UsageError, match="has '' in row 7"):
        load(tmp_path, table, split_column="part")
    with pytest.raises(UsageError, match="The test part has no rows"):
        load(tmp_path, table.assign(part="train"), split_column="part")


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("val", "test")])
def test_declared_parts_that_share_ids_are_refused(tmp_path: Path, parts: tuple[str, str]):
    table = a_table()
    one, other = (int(np.flatnonzero(table["part"] == part)[0]) for part in parts)
    table.loc[other, "id"] = table.loc[one, "id"]
    with pytest.raises(UsageError, match=rf"{parts[0]} and {parts[1]} parts share 1 ids of data"):
        load(tmp_path, table, split_column="part", id_column="id")


def test_random_split_does_not_tear_an_id_apart(tmp_path: Path):
    table = a_table().assign(id=lambda t: [f"p{i // 2}" for i in range(len(t))])
    with pytest.raises(UsageError, match=r"a random split tears .* data\.split_column"):
        load(tmp_path, table, id_column="id")


def test_equal_rows_without_ids_are_counted_and_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    table = a_table().drop(columns="id")
    test_rows = np.flatnonzero(table["part"] == "test")
    for i, row in enumerate(test_rows[:3]):
        table.loc[row, ["age", "ward", "blood", "y"]] = table.loc[i, ["age", "ward", "blood", "y"]]
    data = load(tmp_path, table, split_column="part")
    assert data.notes["test_rows_seen_in_train"] == 3
    assert data.notes["duplicated_rows"] == 3
    assert "3 of 25 test rows equal a training row in every column" in caplog.text


def test_test_file_equal_to_the_training_file_is_refused(tmp_path: Path):
    table = a_table().drop(columns=["id", "part"])
    table.to_csv(tmp_path / "copy.csv", index=False)
    with pytest.raises(UsageError, match=r"data\.test_path=copy\.csv holds the same rows as data\.path"):
        load(tmp_path, table, test_path="copy.csv")
    table.drop(columns="ward").to_csv(tmp_path / "copy.csv", index=False)
    with pytest.raises(UsageError, match=r"copy\.csv lacks the columns ward of data\.path"):
        load(tmp_path, table, test_path="copy.csv")


def test_test_rows_do_not_decide_whether_a_column_is_a_number(tmp_path: Path):
    table = a_table().astype({"age": object})
    table.loc[79, "age"] = "old"
    with pytest.raises(UsageError, match=r"'age' holds numbers in the training rows, but elsewhere: .*old"):
        load(tmp_path, table, split_column="part", drop=["id"])
    table.loc[0, "age"] = "old"
    data = load(tmp_path, table, split_column="part", drop=["id"])
    assert data.inputs.groups[0] == 40  # a level each


def test_missing_target_names_its_row_in_the_file(tmp_path: Path):
    table = a_table()
    table.loc[[5, 9], "y"] = np.nan
    with pytest.raises(UsageError, match=r"'y' is missing in 2 rows \(the first is row 5, counted from 0"):
        load(tmp_path, table)


@pytest.mark.shared_data
def test_adult_census(data_root: str):
    changed = {"path": "tabular/adult.csv.gz", "target": "income-per-year", "split_column": "split"}
    data = source_from({**SETTINGS, **changed}).load(data_root, 0)
    assert data.name == "adult"
    assert data.target.classes == ("<=50K", ">50K")
    assert [len(part) for part in (data.train, data.val, data.test)] == [19536, 6512, 6513]
    labels = np.concatenate([data.train.y, data.val.y, data.test.y])
    assert labels.mean() == pytest.approx(0.241, abs=5e-4)
    assert data.transform is not None
    levels = {one["name"]: one["levels"] for one in data.transform.to_json() if "levels" in one}
    assert len(levels) == 8
    assert len(levels["education"]) == 16
    missing = {name for name, texts in levels.items() if "<missing>" in texts}
    assert missing == {"workclass", "occupation", "native-country"}


@pytest.mark.shared_data
def test_german_credit_and_support2(data_root: str):
    changed = {"path": "tabular/german_credit.csv.gz", "target": "credit", "split_column": "split"}
    credit = source_from({**SETTINGS, **changed}).load(data_root, 0)
    assert credit.target.classes == ("1", "2")
    assert [len(part) for part in (credit.train, credit.val, credit.test)] == [600, 200, 200]
    assert sum(int((part.y == 1).sum()) for part in (credit.train, credit.val, credit.test)) == 300
    changed = {"path": "tabular/support2.csv.gz", "target": "hospdead", "split_column": "split"}
    support = source_from({**SETTINGS, **changed}).load(data_root, 0)
    assert len(support.train) + len(support.val) + len(support.test) == 9105
    glucose = support.inputs.names.index("glucose")
    assert support.inputs.groups[glucose] == 2
    at = sum(support.inputs.groups[:glucose])
    assert support.train.x[:, at + 1].mean() == pytest.approx(0.49, abs=0.02)
    assert np.isfinite(support.train.x).all()
