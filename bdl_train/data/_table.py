"""How table columns become network inputs: stored as plain numbers, applied again by `bdl predict`."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.data import Data, Part, check_split, cut_validation, encode_target, fit_target, is_constant
from bdl_train.data._levels import MISSING, OTHER, cells_of, to_levels, to_numbers
from bdl_train.errors import UsageError, nearest
from bdl_train.specs import InputSpec, TargetKind

log = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class NumericColumn:
    """A number: (value - mean) / std. A missing or infinite value becomes the mean, flagged in a column of
    its own if the training part had such values. A column that was constant in training has std 0 and gives
    zeros: it told the network nothing, so another value must not move the prediction.
    """

    name: str
    mean: float
    std: float
    flag_missing: bool

    @property
    def width(self) -> int:
        return 2 if self.flag_missing else 1

    @classmethod
    def fit(cls, name: str, values: pd.Series) -> "NumericColumn":
        numbers = to_numbers(values)
        present = numbers[np.isfinite(numbers)]
        flag_missing = len(present) < len(numbers)
        if len(present) == 0:
            return cls(name, 0.0, 0.0, flag_missing)
        with np.errstate(over="ignore"):
            mean, std = float(present.mean()), float(present.std())
        if not (math.isfinite(mean) and math.isfinite(std)):
            raise UsageError(
                f"Column '{name}' has values up to {np.abs(present).max():.3g}, too large to standardise: "
                "rescale it or name it in data.drop."
            )
        return cls(name, mean, 0.0 if is_constant(present) else std, flag_missing)

    def fill(self, values: pd.Series, out: np.ndarray) -> None:
        """Write `[N, width]` into `out`."""
        try:
            numbers = to_numbers(values)
        except (ValueError, TypeError) as error:
            raise UsageError(f"Column '{self.name}' held numbers in training, here: {error}.") from error
        missing = ~np.isfinite(numbers)
        if self.std > 0:
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = (numbers - self.mean) / self.std
            out[:, 0] = np.where(missing, 0.0, np.clip(scaled, -_LARGEST, _LARGEST))
        if self.flag_missing:
            out[:, 1] = missing

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "mean": self.mean, "std": self.std, "flag_missing": self.flag_missing}


@dataclass(frozen=True)
class CategoryColumn:
    """A category: one column per level seen in training. A level never seen goes to the level of rare ones if
    there is one, otherwise it becomes all zeros."""

    name: str
    levels: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.levels)

    @classmethod
    def fit(cls, name: str, values: pd.Series, max_categories: int | None = None) -> "CategoryColumn":
        """Levels in alphabetical order; beyond `max_categories`, the rarest ones share the last level."""
        codes, texts = to_levels(values)
        counts = np.bincount(codes, minlength=len(texts))
        levels = sorted(text for text, count in zip(texts, counts, strict=True) if count)
        if max_categories is None or len(levels) <= max_categories:
            return cls(name, tuple(levels))
        num_present = int(counts[[text != MISSING for text in texts]].sum())
        if len(levels) - (MISSING in levels) == num_present:
            log.warning(
                "Column '%s' has another text in each of its %d training rows, like an identifier: its "
                "levels are grouped into %d (data.max_categories). Name it in data.drop to leave it out.",
                name, num_present, max_categories,
            )  # fmt: skip
        else:
            log.info("Column '%s': %d levels are grouped into %d", name, len(levels), max_categories)
        count_of = dict(zip(texts, counts.tolist(), strict=True))
        frequent = sorted(levels, key=lambda text: (-count_of[text], text))[: max_categories - 1]
        return cls(name, (*sorted(frequent), OTHER))

    def fill(self, values: pd.Series, out: np.ndarray) -> None:
        """Write `[N, width]` into `out`."""
        codes, texts = to_levels(values)
        number = {text: i for i, text in enumerate(self.levels)}
        unseen = number.get(OTHER, -1)
        level = np.array([number.get(text, unseen) for text in texts], dtype=np.int64)[codes]
        known = np.flatnonzero(level >= 0)
        out[known, level[known]] = 1.0

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "levels": list(self.levels)}


@dataclass(frozen=True)
class TableTransform:
    """The columns of a table, in order, each with its fitted numbers."""

    columns: tuple[NumericColumn | CategoryColumn, ...]

    @classmethod
    def fit(
        cls, train: pd.DataFrame, categorical: Sequence[str] = (), max_categories: int | None = None
    ) -> "TableTransform":
        """Fit on the training rows.

        Args:
            train: Input columns. Columns that are not numbers (text, categories, truth values) become
                categories.
            categorical: Columns of numbers to treat as categories.
            max_categories: Most levels of one column; None for no limit.

        Raises:
            UsageError: two columns of one name, or numbers too large to standardise.
        """
        check_unique(train)
        columns: list[NumericColumn | CategoryColumn] = []
        for name, values in train.items():
            is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
            if str(name) in categorical or not is_number:
                columns.append(CategoryColumn.fit(str(name), values, max_categories))
            else:
                columns.append(NumericColumn.fit(str(name), values))
        return cls(tuple(columns))

    def apply(self, table: pd.DataFrame) -> np.ndarray:
        """`[N, D]` float32 from the columns of `table` by name, whatever their order; others are ignored.

        Raises:
            UsageError: a column is missing or there twice, or holds text where training saw numbers.
        """
        table = table.set_axis([str(name) for name in table.columns], axis=1)
        names = self.names
        absent = [name for name in names if name not in table.columns]
        if absent:
            raise UsageError(
                f"The table lacks {len(absent)} of {len(names)} input columns: {', '.join(absent[:8])}."
                f"{nearest(absent[0], table.columns)} It has: {', '.join(table.columns[:20])}."
            )
        check_unique(table.loc[:, table.columns.isin(names)])
        out = np.zeros((len(table), sum(column.width for column in self.columns)), dtype=np.float32)
        at = 0
        for column in self.columns:
            column.fill(cells_of(table, column.name), out[:, at : at + column.width])
            at += column.width
        return out

    def unseen(self, table: pd.DataFrame) -> dict[str, int]:
        """By column, how many rows have a category that training never saw; columns without such rows are left out.

        Args:
            table: As for `apply`.
        """
        found = {}
        for column in self.columns:
            if isinstance(column, CategoryColumn):
                codes, texts = to_levels(cells_of(table, column.name))
                known = set(column.levels)
                strange = np.array([text not in known for text in texts])[codes]
                if strange.any():
                    found[column.name] = int(strange.sum())
        return found

    @property
    def names(self) -> list[str]:
        """The columns that `apply` needs."""
        return [column.name for column in self.columns]

    @property
    def constant(self) -> list[str]:
        """The columns that had one value in all training rows."""
        return [
            column.name
            for column in self.columns
            if (len(column.levels) == 1 if isinstance(column, CategoryColumn) else column.std == 0)
        ]

    @property
    def input_spec(self) -> InputSpec:
        widths = tuple(column.width for column in self.columns)
        return InputSpec((sum(widths),), widths, tuple(self.names))

    def to_json(self) -> list[dict[str, Any]]:
        return [column.to_json() for column in self.columns]

    @classmethod
    def from_json(cls, stored: Sequence[Mapping[str, Any]]) -> "TableTransform":
        return cls(
            tuple(
                CategoryColumn(one["name"], tuple(one["levels"])) if "levels" in one else NumericColumn(**one)
                for one in stored
            )
        )


def check_unique(table: pd.DataFrame) -> None:
    """Refuse two columns of one name."""
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise UsageError(f"The table has two columns named '{twice[0]}': rename one.")


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
    max_categories: int | None = None,
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
        max_categories: Most levels of one category; None for no limit.
        notes: To go into the manifest.

    Raises:
        UsageError: no input columns, overlapping or empty parts, targets that do not fit `kind`.
    """
    if table.shape[1] == 0:
        raise UsageError(
            "The table has no input column beside the target: check data.features and data.drop."
        )
    check_split({"train": train_rows, "test": test_rows}, len(y))
    if val_rows is None:
        train_rows, val_rows = cut_validation(train_rows, val_fraction, seed)
    rows_of = {"train": train_rows, "val": val_rows, "test": test_rows}
    check_split(rows_of, len(y))
    target = fit_target(y, train_rows, kind, target_name, classes)
    transform = TableTransform.fit(table.iloc[train_rows], categorical, max_categories)
    notes = dict(notes or {})
    if transform.constant:
        log.info("Constant in the training part: %s", ", ".join(transform.constant))
        notes["constant_columns"] = transform.constant
    parts = {
        part: Part(transform.apply(table.iloc[rows]), encode_target(y[rows], target), rows.astype(np.int64))
        for part, rows in rows_of.items()
    }
    return Data(
        name=name,
        inputs=transform.input_spec,
        target=target,
        transform=transform,
        notes=notes,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
    )
