"""Columns to inputs: fitted on training rows, applied the same way ever after."""

import json
import logging

import numpy as np
import pandas as pd
import pytest

from bdl_train.data import Data
from bdl_train.data._levels import level_text, to_levels, to_numbers
from bdl_train.data._table import CategoryColumn, NumericColumn, TableTransform, table_data
from bdl_train.errors import UsageError
from bdl_train.specs import TargetKind


def a_table(num_rows: int = 60) -> pd.DataFrame:
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "age": random.normal(40, 12, num_rows),
            "ward": random.integers(1, 4, num_rows),
            "blood": random.choice(["A", "B", "0"], num_rows),
            "sodium": random.normal(140, 4, num_rows),
            "always": np.full(num_rows, 0.1),
        }
    )
    table.loc[::7, "sodium"] = np.nan
    table.loc[::11, "blood"] = None
    return table


def as_data(table: pd.DataFrame, num_train: int = 40) -> Data:
    y = np.arange(len(table), dtype=float)
    rows = np.arange(len(table))
    return table_data(
        name="t", table=table, y=y, target_name="y", kind=TargetKind.CONTINUOUS, val_fraction=0.1, seed=0,
        train_rows=rows[:num_train], test_rows=rows[num_train:], categorical=["ward"],
    )  # fmt: skip


def test_inputs_equal_a_computation_by_hand():
    train = pd.DataFrame({"a": [1.0, 2.0, np.nan, 5.0], "c": ["x", "y", "x", None]})
    x = TableTransform.fit(train).apply(pd.DataFrame({"a": [2.0, np.nan], "c": ["y", "new"]}))
    mean, std = 8 / 3, np.sqrt((25 / 9 + 4 / 9 + 49 / 9) / 3)
    # a, a is missing, then c = <missing>, x, y; a level never seen is all zeros.
    np.testing.assert_allclose(x, [[(2 - mean) / std, 0, 0, 0, 1], [0, 1, 0, 0, 0]], rtol=1e-6)


def test_training_part_is_standardised():
    data = as_data(a_table())
    age = data.train.x[:, 0].astype(np.float64)
    assert age.mean() == pytest.approx(0, abs=1e-6)
    assert age.std() == pytest.approx(1, abs=1e-6)


def test_test_rows_change_nothing_in_the_training_inputs():
    table = a_table()
    changed = table.copy()
    changed.loc[40:, "age"] = 1e9
    changed.loc[40:, "sodium"] = np.nan
    changed.loc[40:, "blood"] = "never seen"
    one, other = as_data(table), as_data(changed)
    assert one.transform == other.transform
    np.testing.assert_array_equal(one.train.x, other.train.x)
    np.testing.assert_array_equal(one.val.x, other.val.x)
    assert not np.array_equal(one.test.x, other.test.x)


def test_parts_are_disjoint_and_validation_is_cut_from_train():
    data = as_data(a_table())
    assert len(data.val) == 4
    assert set(data.val.rows) < set(range(40))
    assert set(data.train.rows) | set(data.val.rows) == set(range(40))
    np.testing.assert_array_equal(data.test.rows, np.arange(40, 60))


def test_declared_validation_rows_are_used():
    table, rows = a_table(), np.arange(60)
    data = table_data(
        name="t", table=table, y=np.arange(60.0), target_name="y", kind=TargetKind.CONTINUOUS, seed=0,
        val_fraction=0.5, train_rows=rows[:30], val_rows=rows[30:40], test_rows=rows[40:],
    )  # fmt: skip
    np.testing.assert_array_equal(data.val.rows, rows[30:40])
    assert len(data.train) == 30


def test_prediction_repeats_training_bit_for_bit():
    table = a_table()
    data = as_data(table)
    assert data.transform is not None
    again = TableTransform.from_json(json.loads(json.dumps(data.transform.to_json())))
    assert again == data.transform
    shuffled = table[["sodium", "always", "blood", "age", "ward"]].assign(other=1)
    for part in (data.train, data.val, data.test):
        np.testing.assert_array_equal(again.apply(shuffled.iloc[part.rows]), part.x)
        one_by_one = [again.apply(shuffled.iloc[[row]]) for row in part.rows]
        np.testing.assert_array_equal(np.concatenate(one_by_one), part.x)
        as_text = shuffled.iloc[part.rows].map(lambda cell: "?" if pd.isna(cell) else str(cell))
        np.testing.assert_array_equal(again.apply(as_text), part.x)


def test_input_spec_counts_the_columns_of_each_feature():
    data = as_data(a_table())
    assert data.inputs.names == ("age", "ward", "blood", "sodium", "always")
    assert data.inputs.groups == (1, 3, 4, 2, 1)
    assert data.inputs.shape == (11,)
    assert data.train.x.shape == (36, 11)
    assert data.train.x.dtype == np.float32


@pytest.mark.parametrize("value", [0.0, 0.1, -7e12])
def test_constant_columns_survive_and_stay_silent(value: float):
    train = pd.DataFrame({"a": np.full(30, value), "b": np.arange(30.0)})
    transform = TableTransform.fit(train)
    assert transform.constant == ["a"]
    assert (transform.apply(train)[:, 0] == 0).all()
    assert transform.apply(pd.DataFrame({"a": [value + 1e6], "b": [0.0]}))[0, 0] == 0


def test_constant_columns_are_noted():
    assert as_data(a_table()).notes == {"constant_columns": ["always"]}


def test_column_in_tiny_units_is_not_constant():
    values = pd.Series(1e-15 * np.random.default_rng(0).standard_normal(100))
    out = np.zeros((100, 1), np.float32)
    NumericColumn.fit("a", values).fill(values, out)
    assert out.std() == pytest.approx(1, rel=1e-5)


def test_infinite_inputs_count_as_missing_and_huge_ones_stay_finite():
    transform = TableTransform.fit(pd.DataFrame({"a": [1.0, 2.0, 3.0, np.inf]}))
    x = transform.apply(pd.DataFrame({"a": [np.inf, -np.inf, np.nan, 1e300]}))
    assert x[:3].tolist() == [[0, 1]] * 3
    assert np.isfinite(x).all()
    with pytest.raises(UsageError, match=r"Column 'a' has values up to 1e\+200"):
        TableTransform.fit(pd.DataFrame({"a": [1e200, -1e200]}))


def test_column_without_any_value_in_training_survives():
    transform = TableTransform.fit(pd.DataFrame({"a": [np.nan, np.nan]}))
    assert transform.apply(pd.DataFrame({"a": [np.nan, 3.0]})).tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("cells", [[3, 1], [3.0, 1.0], ["3", "1"], ["3.0", " 1 "], ["3.", "1.00"]])
def test_whole_numbers_name_the_same_category_however_they_are_written(cells: list):
    column = CategoryColumn.fit("c", pd.Series([1.0, np.nan, 3.0, 10.0]))
    assert column.levels == ("1", "10", "3", "<missing>")
    out = np.zeros((2, 4), np.float32)
    column.fill(pd.Series(cells), out)
    assert out.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_texts_that_only_look_like_numbers_stay_apart():
    cells = ["007", "7", "1.50", "1e5", "-0.0", 2.5, True, np.int64(4), np.float32(6), "n/a", "  x  "]
    expected = ["007", "7", "1.50", "1e5", "-0", "2.5", "True", "4", "6", "<missing>", "x"]
    assert [level_text(cell) for cell in cells] == expected


def test_equal_texts_of_different_cells_share_a_code():
    codes, levels = to_levels(pd.Series([1, "1", 1.0, "1.0", None, "?"], dtype=object))
    assert [levels[code] for code in codes] == ["1", "1", "1", "1", "<missing>", "<missing>"]
    assert len(set(codes.tolist())) == 2


def test_decimal_text_is_read_without_rounding_error():
    values = np.random.default_rng(0).standard_normal(5_000) * 10.0 ** np.arange(-25, 25).repeat(100)
    text = pd.Series([repr(float(value)) for value in values])
    np.testing.assert_array_equal(to_numbers(text), values)
    with_gaps = pd.concat([text, pd.Series(["?", "", None, " NA "])], ignore_index=True)
    np.testing.assert_array_equal(to_numbers(with_gaps), [*values, *[np.nan] * 4])


@pytest.mark.parametrize("bad", [pd.Series(["1", "x"]), pd.Series(pd.to_datetime(["2024-01-01"]))])
def test_text_and_dates_are_no_numbers(bad: pd.Series):
    transform = TableTransform((NumericColumn("a", 0.0, 1.0, False),))
    with pytest.raises(UsageError, match="Column 'a' held numbers in training, here: "):
        transform.apply(pd.DataFrame({"a": bad}))


def test_rare_levels_share_one_and_unseen_ones_join_them(caplog: pytest.LogCaptureFixture):
    counts = {"d": 5, "b": 4, "a": 4, "c": 2, "e": 1}
    column = CategoryColumn.fit("c", pd.Series([level for level, n in counts.items() for _ in range(n)]), 3)
    assert column.levels == ("a", "d", "<other>")  # of the equally frequent a and b, the first by name
    out = np.zeros((5, 3), np.float32)
    column.fill(pd.Series(["a", "b", "e", "new", None]), out)
    assert out.argmax(1).tolist() == [0, 2, 2, 2, 2]
    assert (out.sum(1) == 1).all()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_as_many_levels_as_allowed_are_kept():
    assert CategoryColumn.fit("c", pd.Series(["a", "b", None]), 3).levels == ("<missing>", "a", "b")


def test_column_like_an_identifier_is_grouped_with_a_warning(caplog: pytest.LogCaptureFixture):
    column = CategoryColumn.fit("name", pd.Series([f"patient {i}" for i in range(30)] + [None]), 4)
    assert column.width == 4
    assert column.levels[-1] == "<other>"
    assert "Column 'name' has another text in each of its 30 training rows" in caplog.text
    assert "data.drop" in caplog.text


def test_truth_values_and_text_are_categories():
    table = pd.DataFrame({"smoker": [True, False], "n": pd.Series([1, None], dtype="Int64")})
    assert TableTransform.fit(table).to_json() == [
        {"name": "smoker", "levels": ["False", "True"]},
        {"name": "n", "mean": 1.0, "std": 0.0, "flag_missing": True},
    ]


def test_bad_tables_are_refused():
    transform = TableTransform.fit(a_table())
    with pytest.raises(UsageError, match=r"lacks 1 of 5 input columns: sodium\. Did you mean 'sodum'\?"):
        transform.apply(a_table().rename(columns={"sodium": "sodum"}))
    twice = pd.concat([a_table(), a_table()[["age"]]], axis=1)
    with pytest.raises(UsageError, match="two columns named 'age'"):
        transform.apply(twice)
    with pytest.raises(UsageError, match="two columns named 'age'"):
        TableTransform.fit(twice)
    with pytest.raises(UsageError, match="Column 'a' holds lists"):
        TableTransform.fit(pd.DataFrame({"a": [[1], [2]]}))
    with pytest.raises(UsageError, match="no input column"):
        as_data(a_table().iloc[:, :0])


def test_columns_may_be_numbered():
    table = pd.DataFrame(np.arange(8.0).reshape(4, 2))
    transform = TableTransform.fit(table)
    assert transform.names == ["0", "1"]
    assert transform.apply(table).shape == (4, 2)
