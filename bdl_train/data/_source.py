"""What CSV files and OpenML sets share: the settings of a table, and the way from its columns to `Data`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field

from bdl_train.data import Data, DataSource
from bdl_train.data._levels import cells_of, is_text, to_numbers
from bdl_train.data._splits import count_duplicates
from bdl_train.data._table import check_unique, table_data
from bdl_train.data._target import Kind, read_target
from bdl_train.errors import UsageError, nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TableSource(DataSource):
    """Settings of a table with a target column.

    Attributes:
        kind: Of the target; `auto` follows the rule of `_target.read_target` and logs what it chose.
        max_auto_classes: Under `auto`, most distinct values of a whole-number target that is taken for
            classes.
        features: Input columns; null = all but the target, the split, the id and `drop`.
        drop: Columns to leave out.
        categorical: Columns of numbers to treat as categories.
        max_categories: Most levels of a category; beyond it the rarest ones share one level.
        split: Number of the random split, when the data declares none.
        test_fraction: Share of rows for testing, in a random split.
        val_fraction: Share of the training rows for validation, unless the data declares them.
        batch_size: Examples per member and step.
    """

    kind: Kind
    max_auto_classes: Annotated[int, Field(ge=2)]
    features: list[str] | None
    drop: list[str]
    categorical: list[str]
    max_categories: Annotated[int, Field(ge=2)]
    split: Annotated[int, Field(ge=0)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    batch_size: Annotated[int, Field(ge=1)]

    def from_table(
        self,
        *,
        name: str,
        table: pd.DataFrame,
        target: str,
        parts: dict[str, np.ndarray],
        declared: bool,
        untyped: bool,
        seed: int,
        reserved: Sequence[str] = (),
    ) -> Data:
        """`Data` from a raw table and the rows of its parts.

        Args:
            name: Of the data set.
            table: All rows, target included.
            target: The target column.
            parts: Rows of `train`, `test` and perhaps `val`.
            declared: Whether the data declares the parts.
            untyped: Whether cells are text that may be numbers, as in a CSV file.
            seed: Of the validation cut.
            reserved: Columns that are neither inputs nor target (split, id).
        """
        check_unique(table)
        check_columns([target], table, "data.target")
        inputs = table.loc[:, self._inputs(table, target, reserved)]
        inputs = _parse_numbers(inputs, parts["train"], self.categorical, untyped)
        _warn_of_identifiers(inputs, parts["train"], self.categorical)
        raw = read_target(cells_of(table, target), self.kind, self.max_auto_classes)
        notes: dict[str, Any] = {"target_kind": f"{raw.kind}: {raw.reason}"}
        notes |= count_duplicates(inputs.assign(**{target: raw.y}), parts, declared=declared)
        return table_data(
            name=name,
            table=inputs,
            y=raw.y,
            target_name=target,
            kind=raw.kind,
            classes=raw.classes,
            train_rows=parts["train"],
            val_rows=parts.get("val"),
            test_rows=parts["test"],
            val_fraction=self.val_fraction,
            seed=seed,
            categorical=self.categorical,
            max_categories=self.max_categories,
            notes=notes,
        )

    def _inputs(self, table: pd.DataFrame, target: str, reserved: Sequence[str]) -> list[str]:
        for key, names in (
            ("features", self.features),
            ("drop", self.drop),
            ("categorical", self.categorical),
        ):
            check_columns(names or [], table, f"data.{key}")
        taken = [target, *reserved]
        if self.features is None:
            inputs = [name for name in table.columns if name not in (*taken, *self.drop)]
        else:
            wrong = [name for name in self.features if name in taken]
            if wrong:
                raise UsageError(
                    f"data.features names '{wrong[0]}', which is the target or names the split or the id: a "
                    "model must not see it."
                )
            inputs = [name for name in dict.fromkeys(self.features) if name not in self.drop]
        unused = [name for name in self.categorical if name not in inputs]
        if unused:
            raise UsageError(f"data.categorical names '{unused[0]}', which is not among the input columns.")
        return inputs


def check_columns(names: Sequence[str], table: pd.DataFrame, key: str) -> None:
    """Refuse names that are no columns of `table`.

    Args:
        names: As the user wrote them.
        table: The data.
        key: The config key to name.
    """
    for name in names:
        if name not in table.columns:
            raise UsageError(
                f"{key} names the column '{name}', which the table has not.{nearest(name, table.columns)} "
                f"It has: {', '.join(table.columns[:40])}."
            )


def _parse_numbers(
    inputs: pd.DataFrame, train_rows: np.ndarray, categorical: Sequence[str], untyped: bool
) -> pd.DataFrame:
    """Turn text into numbers in columns whose training rows are all numbers: test rows decide nothing."""
    parsed = {}
    for name, values in inputs.items():
        # Truth values with gaps are Python objects too, and stay categories as they are without gaps.
        is_open = values.dtype == object and pd.api.types.infer_dtype(values, skipna=True) != "boolean"
        if name in categorical or not (is_open or (untyped and is_text(values))):
            continue
        try:
            parsed[name] = to_numbers(values)
        except (ValueError, TypeError) as error:
            try:
                to_numbers(values.iloc[train_rows])
            except (ValueError, TypeError):
                continue
            raise UsageError(
                f"Column '{name}' holds numbers in the training rows, but elsewhere: {error}. Correct it, or "
                "name it in data.categorical or data.drop."
            ) from error
    return inputs.assign(**parsed)


def _warn_of_identifiers(inputs: pd.DataFrame, train_rows: np.ndarray, categorical: Sequence[str]) -> None:
    """Name columns that count the rows: a network learns from them what no new row can repeat."""
    train = inputs.iloc[np.sort(train_rows)]
    for name, values in train.items():
        is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        if name in categorical or not is_number or len(values) < 2:
            continue
        numbers = to_numbers(values)
        if not (np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all()):
            continue
        steps = np.diff(numbers)
        is_sorted = (steps > 0).all() or (steps < 0).all()
        lower = str(name).lower()
        is_named = lower in ("id", "index") or lower.endswith("_id")
        if is_sorted or (is_named and len(np.unique(numbers)) == len(numbers)):
            log.warning(
                "Column '%s' has another whole number in each of its %d training rows%s. It looks like an "
                "identifier: name it in data.drop to leave it out.",
                name, len(numbers), ", in the order of the file" if is_sorted else "",
            )  # fmt: skip
