"""A table of one's own: CSV, gzipped CSV or parquet, with a target column."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bdl_train.data import Data
from bdl_train.data._files import find_file
from bdl_train.data._levels import cells_of
from bdl_train.data._source import TableSource, check_columns
from bdl_train.data._splits import check_ids, declared_split, random_split
from bdl_train.data._stream import is_csv, read_table
from bdl_train.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Csv(TableSource):
    """A table in a file. Empty cells, `?`, `NA`, `NaN`, `null` and `None` are missing values.

    A column of a CSV file is a number if all its training rows are; in parquet, text and truth values are
    categories. Splits come from `split_column`, from `test_path`, or are random by number.

    Attributes:
        name: Of the data set, for tables and folders; null = the file's name.
        path: The file; relative to the working directory or to `data.root`.
        target: The target column.
        split_column: Column with `train`, `val` and `test`; null = none.
        test_path: File with the test rows; null = none.
        id_column: Column that names each row; parts that share an id are refused. It is no input.
    """

    name: str | None
    path: str
    target: str
    split_column: str | None
    test_path: str | None
    id_column: str | None

    def load(self, root: str, seed: int) -> Data:
        if self.split_column is not None and self.test_path is not None:
            raise UsageError(
                "data.split_column and data.test_path both declare the test rows: set one to null."
            )
        path = find_file(self.path, root, key="data.path")
        table, joined, untyped = self._read(root)
        check_columns([self.target], table, "data.target")
        reserved = [name for name in (self.split_column, self.id_column) if name is not None]
        check_columns(reserved, table, "data.split_column or data.id_column")
        if joined is not None:
            parts = joined
        elif self.split_column is not None:
            parts = declared_split(cells_of(table, self.split_column))
        else:
            parts = random_split(len(table), self.split, self.test_fraction)
        declared = self.split_column is not None or self.test_path is not None
        if self.id_column is not None:
            check_ids(cells_of(table, self.id_column), parts, declared=declared)
        return self.from_table(
            name=self.name or path.name.split(".")[0],
            table=table,
            target=self.target,
            parts=parts,
            declared=declared,
            untyped=untyped,
            seed=seed,
            reserved=reserved,
        )

    def table(self, root: str) -> pd.DataFrame:
        return self._read(root)[0]

    def _read(self, root: str) -> tuple[pd.DataFrame, dict[str, np.ndarray] | None, bool]:
        """All rows; the parts, if two files declare them; and whether cells are untyped text."""
        path = find_file(self.path, root, key="data.path")
        table, untyped = read_table(path), is_csv(path)
        if self.test_path is None:
            return table, None, untyped
        test_path = find_file(self.test_path, root, key="data.test_path")
        table, parts = _join(table, read_table(test_path), test_path)
        return table, parts, untyped or is_csv(test_path)


def _join(
    train: pd.DataFrame, test: pd.DataFrame, test_path: Path
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Training rows first, then test rows."""
    absent = [name for name in train.columns if name not in test.columns]
    if absent:
        raise UsageError(
            f"data.test_path={test_path} lacks the columns {', '.join(absent[:8])} of data.path."
        )
    test = test.loc[:, list(train.columns)]
    if test.equals(train):
        raise UsageError(
            f"data.test_path={test_path} holds the same rows as data.path: a model must not be scored on "
            "rows it was fitted to."
        )
    rows = np.arange(len(train) + len(test))
    table = pd.concat([train, test], ignore_index=True)
    return table, {"train": rows[: len(train)], "test": rows[len(train) :]}
