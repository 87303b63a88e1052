"""Reading tables whole and in chunks."""

import gc
import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pytest

from bdl_train.data._stream import read_table, read_table_in_chunks
from bdl_train.data._table import TableTransform
from bdl_train.errors import UsageError


def a_table(num_rows: int = 95) -> pd.DataFrame:
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "x": random.normal(size=num_rows),
            "code": random.integers(1, 4, num_rows).astype(float),
            "mixed": np.where(np.arange(num_rows) < 50, "7", "seven"),
        }
    )
    table.loc[[3, 60], "code"] = np.nan
    return table


def written(table: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        table.to_parquet(path, row_group_size=17)
    else:
        table.to_csv(path, index=False)
    return path


def transform_of(table: pd.DataFrame) -> TableTransform:
    return TableTransform.fit(table, categorical=["code"])


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
@pytest.mark.parametrize("chunk_rows", [1, 20, 95, 1000])
def test_chunks_give_the_same_inputs_as_the_table_in_memory(tmp_path: Path, suffix: str, chunk_rows: int):
    table = a_table()
    transform = transform_of(table)
    path = written(table, tmp_path / f"t{suffix}")
    chunks = list(read_table_in_chunks(path, ["mixed", "code", "x"], chunk_rows))
    assert max(len(chunk) for chunk in chunks) <= chunk_rows
    np.testing.assert_array_equal(np.concatenate([chunk.index for chunk in chunks]), np.arange(95))
    inputs = np.concatenate([transform.apply(chunk) for chunk in chunks])
    np.testing.assert_array_equal(inputs, transform.apply(table))


def test_column_that_is_whole_in_one_chunk_and_text_in_the_next_keeps_its_levels(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("code\n" + "\n".join(["1", "2", "3.0", "", "A1", "2.0", "?", "1"]))
    transform = TableTransform.fit(read_table(path), categorical=["code"])
    assert transform.to_json()[0]["levels"] == ["1", "2", "3", "<missing>", "A1"]
    for chunk_rows in (1, 2, 3, 8):
        chunks = read_table_in_chunks(path, None, chunk_rows)
        inputs = np.concatenate([transform.apply(chunk) for chunk in chunks])
        assert inputs.argmax(1).tolist() == [0, 1, 2, 3, 4, 1, 3, 0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_only_the_wanted_columns_in_the_wanted_order(tmp_path: Path, suffix: str):
    path = written(a_table(), tmp_path / f"t{suffix}")
    assert [list(chunk) for chunk in read_table_in_chunks(path, ["mixed", "x"], 50)] == [["mixed", "x"]] * 2
    assert [list(chunk) for chunk in read_table_in_chunks(path, None, 95)] == [["x", "code", "mixed"]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_missing_columns_are_named_before_the_first_chunk(tmp_path: Path, suffix: str):
    path = written(a_table(), tmp_path / f"t{suffix}")
    with pytest.raises(UsageError, match=r"lacks 1 of 2 columns: cod\. Did you mean 'code'\? It has: x"):
        read_table_in_chunks(path, ["x", "cod"], 10)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separator_blanks_and_a_byte_order_mark_are_understood(tmp_path: Path, separator: str):
    path = tmp_path / "t.csv"
    rows = [["a", " b"], ["1", ' "x, y; z"'], ["2", " ?"]]
    path.write_text("\ufeff" + "\n".join(separator.join(row) for row in rows) + "\n\n", encoding="utf-8")
    table = read_table(path)
    assert list(table) == ["a", "b"]
    assert table["a"].tolist() == ["1", "2"]
    assert table["b"].isna().tolist() == [False, True]
    assert table["b"].tolist()[0] == "x, y; z"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_row_index_that_pandas_writes_is_no_column(tmp_path: Path, suffix: str):
    path = tmp_path / f"t{suffix}"
    table = a_table().iloc[::2]
    if suffix == ".csv":
        table.to_csv(path)
    else:
        table.to_parquet(path)
    assert list(read_table(path)) == ["x", "code", "mixed"]
    assert [list(chunk) for chunk in read_table_in_chunks(path, None, 1000)] == [["x", "code", "mixed"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"a,b\n", "has no rows"),
        ("t.csv", b"a,b\n1,2,3\n4,5,6\n", "its rows have more fields than its header"),
        ("t.csv", b"a,b\n1,2\n4,5,6\n", "Expected 2 fields in line 3, saw 3"),
        ("t.csv", b"a,b,a\n1,2,3\n", "two columns named 'a'"),
        ("t.csv", "a,b\n1,\xe9\n".encode("latin-1"), "is not UTF-8 text"),
        ("t.csv.gz", b"a,b\n1,2\n", "cannot be read: Not a gzipped file"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 100, mtime=0)[:-20], "cannot be read: "),
        ("t.parquet", b"not a parquet file", "cannot be read: "),
        ("t.xlsx", b"", r"is of unknown type: its name must end in one of \.csv, "),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


def test_malformed_rows_of_a_later_chunk_are_an_error(tmp_path: Path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,2\n" * 10 + "1,2,3\n")
    chunks = read_table_in_chunks(path, ["a"], 5)
    assert len(next(chunks)) == 5
    with pytest.raises(UsageError, match="line 12, saw 3"):
        list(chunks)
    with pytest.raises(UsageError, match=r"no\.csv is not a file"):
        read_table_in_chunks(tmp_path / "no.csv", None, 5)


def test_one_large_row_group_is_not_held_in_memory(tmp_path: Path):
    path = tmp_path / "t.parquet"
    num_rows = 1_000_000
    values = np.random.default_rng(0).normal(size=num_rows)
    pd.DataFrame({"a": values, "b": values[::-1]}).to_parquet(path, row_group_size=num_rows)
    before = pyarrow.total_allocated_bytes()
    most = max(pyarrow.total_allocated_bytes() for _ in read_table_in_chunks(path, None, 10_000)) - before
    # Read at once, the compressed row group alone would take the size of the file.
    assert most < path.stat().st_size / 2


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    def peak(num_rows: int) -> int:
        path = tmp_path / f"{num_rows}.csv"
        path.write_text("a,b,c\n" + "0.123456,some text,17\n" * num_rows)
        gc.collect()
        tracemalloc.start()
        for _ in read_table_in_chunks(path, None, 500):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(500)  # imports
    # Eight times the rows: what grew with the file would be seven times over; the collector's timing is not.
    assert peak(160_000) < 1.5 * peak(20_000)
