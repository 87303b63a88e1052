"""Columns and rows of tables with plain types."""

from typing import Any, cast

import numpy as np
import pandas as pd


def numbers(table: pd.DataFrame, name: str) -> np.ndarray:
    """A column as floats `[N]`; what is missing is NaN."""
    return np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=float)


def texts(table: pd.DataFrame, name: str) -> list[str]:
    """A column as texts."""
    return [str(one) for one in table[name]]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows by column name."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def where(table: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """The rows at which the mask is true."""
    return table.loc[np.asarray(mask, dtype=bool)]


def only(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Those of the columns that the table has."""
    return table.loc[:, [name for name in names if name in table.columns]]


def parts(table: pd.DataFrame, name: str) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each value of a column, in the order in which values appear."""
    return [(str(value), where(table, table[name] == value)) for value in dict.fromkeys(table[name])]


def ordered(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows by rising values of a column, NaN left out."""
    values = numbers(table, name)
    order = np.argsort(values, kind="stable")
    return cast("pd.DataFrame", table.iloc[order[np.isfinite(values[order])]])
