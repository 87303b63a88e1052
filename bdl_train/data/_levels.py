"""Raw cells to numbers and to the text of a category: one rule for training, prediction and serving.

CSV cells arrive as text, parquet cells are typed, and an integer column with gaps arrives as floats: 3, 3.0
and "3.0" are the same category "3".
"""

import re
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError

MISSING = "<missing>"
OTHER = "<other>"
MARKERS = frozenset({"", "?", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None", "<NA>"})
"""Cells that mean "no value", in files and in single records."""

_WHOLE = re.compile(r"([+-]?(?:0|[1-9]\d*))\.0*")


def is_text(values: pd.Series) -> bool:
    """Whether a column is declared as text or as a category (a Python-object column is neither)."""
    return isinstance(values.dtype, pd.StringDtype | pd.CategoricalDtype)


def cells_of(table: pd.DataFrame, name: str) -> pd.Series:
    """One column; names are unique here."""
    values = table[name]
    assert isinstance(values, pd.Series)
    return values


def to_numbers(values: pd.Series) -> np.ndarray:
    """`[N]` float64, NaN where there is no value; decimal text is rounded correctly.

    Raises:
        ValueError, TypeError: a cell is neither a number nor missing.
    """
    if not pd.api.types.is_numeric_dtype(values):
        if pd.api.types.is_datetime64_any_dtype(values):
            raise TypeError("it holds dates")
        cells = values.astype(object) if isinstance(values.dtype, pd.CategoricalDtype) else values
        try:
            values = pd.Series(pd.to_numeric(cells))
        except (ValueError, TypeError):  # markers of a missing value, or text, which mostly repeats itself
            codes, distinct = pd.factorize(cells)
            plain = [None if _is_missing(cell) else cell for cell in distinct.tolist()]
            return _parse([*plain, None])[codes]  # code -1, a missing cell, picks the last number
    return values.to_numpy(dtype=np.float64, na_value=np.nan)


def _parse(cells: list[Any]) -> np.ndarray:
    try:
        numbers = pd.Series(pd.to_numeric(pd.Series(cells, dtype=object)))
    except (ValueError, TypeError) as error:
        # pandas counts positions in this list, which are not those of the column.
        raise type(error)(str(error).partition(" at position")[0]) from error
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _is_missing(cell: Any) -> bool:
    return (
        cell is None or cell is pd.NA or cell != cell or (isinstance(cell, str) and cell.strip() in MARKERS)
    )


def level_text(cell: Any) -> str:
    """The name of a category: whole numbers without decimals, text without surrounding blanks."""
    if isinstance(cell, float | np.floating):
        return str(int(cell)) if float(cell).is_integer() else repr(float(cell))
    if not isinstance(cell, str):
        return str(cell)
    text = cell.strip()
    if text in MARKERS:
        return MISSING
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def to_levels(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Integer codes `[N]` of each cell's level, and the levels' texts; a missing value is a level of its own.

    Raises:
        UsageError: cells that are lists or mappings.
    """
    try:
        codes, cells = pd.factorize(values)
    except TypeError as error:
        raise UsageError(
            f"Column '{values.name}' holds lists or other nested values: leave it out."
        ) from error
    texts = [*(level_text(cell) for cell in cells), MISSING]
    levels = list(dict.fromkeys(texts))
    number = {text: i for i, text in enumerate(levels)}
    # Code -1, a missing cell, picks the last text.
    return np.array([number[text] for text in texts], dtype=np.int64)[codes], levels
