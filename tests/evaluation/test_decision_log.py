"""Logs of human decisions are read with the line of each mistake."""

import gzip
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bdl_train.errors import UsageError
from bdl_train.evaluation.decision_log import read_decisions


def write(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_log_is_read_with_the_lines_of_its_rows(tmp_path: Path, separator: str):
    text = "row,action,label,by,ward\n7,accept,1.0,ann,x\n\n8, override ,NA,bo\n9,2.0,,,\n".replace(
        ",", separator
    )
    table = read_decisions(write(tmp_path, text))
    assert table.index.name == "line"
    assert table.index.tolist() == [2, 4, 5]
    assert table["row"].tolist() == [7, 8, 9]
    assert table["row"].dtype == np.int64
    assert table["action"].tolist() == ["accept", "override", "2"]
    assert table["label"].tolist() == ["1", None, None]
    assert table["ward"].tolist() == ["x", "", ""]


def test_parquet_and_gzip_say_the_same_as_csv(tmp_path: Path):
    text = "row,action,label\n3,accept,1\n5,defer,\n"
    plain = read_decisions(write(tmp_path, text))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    typed = pd.DataFrame({"row": [3.0, 5.0], "action": ["accept", "defer"], "label": [1.0, math.nan]})
    typed.to_parquet(tmp_path / "log.parquet")
    for name in ("log.csv.gz", "log.parquet"):
        table = read_decisions(tmp_path / name)
        for column in ("row", "action", "label"):
            assert table[column].tolist() == plain[column].tolist()
    assert read_decisions(tmp_path / "log.parquet").index.tolist() == [1, 2]


def test_a_label_column_may_be_absent(tmp_path: Path):
    assert read_decisions(write(tmp_path, "action,row\naccept,1\n"))["label"].tolist() == [None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,action\n1,accept\n\nx7,accept\n", "line 4: row must be a row id, a whole number, got 'x7'"),
        ("row,action\n1.5,accept\n", "line 2: row must be a row id, a whole number, got '1.5'"),
        ("row,action\n,accept\n", "line 2: row must be a row id"),
        ('row,action,note\n1,accept,"two\nlines"\n2,,\n', "line 4: action is missing"),
        ("row,action\n1,accept,3\n", "line 2: 3 cells under 2 columns"),
        ("row,acton\n1,accept\n", "lacks the column 'action'. Did you mean 'acton'"),
        ("row,row,action\n1,1,accept\n", "two columns named 'row'"),
        ("row,action\n", "no decisions"),
        ("", "no decisions"),
    ],
)
def test_a_wrong_log_is_one_message_with_its_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(UsageError, match=message):
        read_decisions(write(tmp_path, text))


def test_a_file_that_is_not_there_or_not_text_is_one_message(tmp_path: Path):
    with pytest.raises(UsageError, match=r"none\.csv is not a file"):
        read_decisions(tmp_path / "none.csv")
    (tmp_path / "log.csv").write_bytes(b"row,action\n\xff\xfe,a\n")
    with pytest.raises(UsageError, match="cannot be read"):
        read_decisions(tmp_path / "log.csv")
    with pytest.raises(UsageError, match="unknown type"):
        read_decisions(write(tmp_path, "", "log.xlsx"))
