"""How the columns of a table become network inputs: stored as plain numbers, applied again by `bdl predict`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.data import Data, Part, check_split, cut_validation, encode_target, fit_target
from bdl_train.errors import UsageError, nearest
from bdl_train.specs import InputSpec, TargetKind


@dataclass(frozen=True)
class NumericColumn:
    """A number: (value - mean) / std; a missing value becomes the mean, flagged in a column of its own
    if the training part had missing values."""

    name: str
    mean: float
    std: float
    flag_missing: bool

    @property
    def width(self) -> int:
        return 2 if self.flag_missing else 1

    @classmethod
    def fit(cls, name: str, values: pd.Series) -> "NumericColumn":
        numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
        present = numbers[np.isfinite(numbers)]
        mean = float(present.mean()) if len(present) else 0.0
        std = float(present.std()) if len(present) else 1.0
        # A constant column carries nothing: it becomes zeros, and survives another value at prediction time.
        constant = std <= 1e-12 * max(1.0, abs(mean))
        return cls(name, mean, 1.0 if constant else std, bool(len(present) < len(numbers)))

    def apply(self, values: pd.Series) -> np.ndarray:
        try:
            numbers = pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
        except (ValueError, TypeError) as error:
            raise UsageError(f"Column '{self.name}' was numeric in training: {error}.") from error
        missing = ~np.isfinite(numbers)
        scaled = np.where(missing, 0.0, (numbers - self.mean) / self.std)
        return np.stack([scaled, missing], axis=1) if self.flag_missing else scaled[:, None]


@dataclass(frozen=True)
class CategoryColumn:
    """A category: one column per level seen in training; a level never seen becomes all zeros."""

    name: str
    levels: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.levels)

    @classmethod
    def fit(cls, name: str, values: pd.Series) -> "CategoryColumn":
        return cls(name, tuple(sorted(_as_text(values).unique())))

    def apply(self, values: pd.Series) -> np.ndarray:
        codes = pd.Categorical(_as_text(values), categories=list(self.levels)).codes
        return (codes[:, None] == np.arange(len(self.levels))).astype(np.float64)


def _as_text(values: pd.Series) -> pd.Series:
    """Levels as text; a missing value is a level of its own."""
    return values.astype(object).where(values.notna(), "<missing>").astype(str)


@dataclass(frozen=True)
class TableTransform:
    """The columns of a table, in order, each with its fitted numbers."""

    columns: tuple[NumericColumn | CategoryColumn, ...]

    @classmethod
    def fit(cls, train: pd.DataFrame, categorical: Sequence[str] = ()) -> "TableTransform":
        """Fit on the training rows. Columns that are not numbers, and those named, are categories."""
        columns: list[NumericColumn | CategoryColumn] = []
        for name in train.columns:
            values = train[name]
            if name in categorical or not pd.api.types.is_numeric_dtype(values):
                columns.append(CategoryColumn.fit(str(name), values))
            else:
                columns.append(NumericColumn.fit(str(name), values))
        return cls(tuple(columns))

    def apply(self, table: pd.DataFrame) -> np.ndarray:
        """`[N, D]` float32 from the columns of `table` by name, whatever their order; others are ignored.

        Raises:
            UsageError: a column is missing, or holds text where training saw numbers.
        """
        missing = [column.name for column in self.columns if column.name not in table.columns]
        if missing:
            hint = nearest(missing[0], [str(name) for name in table.columns])
            raise UsageError(
                f"The table lacks {len(missing)} of {len(self.columns)} input columns: "
                f"{', '.join(missing[:8])}.{hint} It has: {', '.join(map(str, table.columns[:20]))}."
            )
        pieces = [column.apply(table[column.name]) for column in self.columns]
        return np.concatenate(pieces, axis=1).astype(np.float32)

    @property
    def input_spec(self) -> InputSpec:
        widths = tuple(column.width for column in self.columns)
        return InputSpec((sum(widths),), widths, tuple(column.name for column in self.columns))

    def to_json(self) -> list[dict[str, Any]]:
        stored = []
        for column in self.columns:
            if isinstance(column, NumericColumn):
                stored.append(
                    {"name": column.name, "mean": column.mean, "std": column.std, "flag_missing": column.flag_missing}
                )
            else:
                stored.append({"name": column.name, "levels": list(column.levels)})
        return stored

    @classmethod
    def from_json(cls, stored: list[dict[str, Any]]) -> "TableTransform":
        return cls(
            tuple(
                CategoryColumn(one["name"], tuple(one["levels"])) if "levels" in one else NumericColumn(**one)
                for one in stored
            )
        )


def table_data(
    *,
    name: str,
    table: pd.DataFrame,
    y: np.ndarray,
    target_name: str,
    kind: TargetKind,
    classes: tuple[str, ...] = (),
    train_rows: np.ndarray,
    test_rows: np.ndarray,
    val_rows: np.ndarray | None = None,
    val_fraction: float,
    seed: int,
    categorical: Sequence[str] = (),
    notes: dict[str, Any] | None = None,
) -> Data:
    """`Data` from a table of inputs, a target column and row numbers.

    Args:
        table: `[N]` rows of input columns.
        y: `[N]` raw targets.
        train_rows, test_rows, val_rows: Row numbers; `val_rows=None` cuts them from train.
        val_fraction: Share of train to cut, when `val_rows` is None.
        seed: Of that cut.
        categorical: Numeric columns to treat as categories.
    """
    check_split({"train": train_rows, "test": test_rows}, len(y))
    if val_rows is None:
        train_rows, val_rows = cut_validation(train_rows, val_fraction, seed)
    check_split({"train": train_rows, "val": val_rows, "test": test_rows}, len(y))
    transform = TableTransform.fit(table.iloc[train_rows], categorical)
    target = fit_target(y, train_rows, kind, target_name, classes)
    parts = {}
    for part, rows in (("train", train_rows), ("val", val_rows), ("test", test_rows)):
        x = transform.apply(table.iloc[rows])
        parts[part] = Part(x, encode_target(y[rows], target), rows.astype(np.int64))
    return Data(name=name, inputs=transform.input_spec, target=target, transform=transform, notes=notes or {}, **parts)


