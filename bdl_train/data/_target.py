"""What a raw target column means: continuous numbers, classes or counts."""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from bdl_train.data._levels import MISSING, to_levels, to_numbers
from bdl_train.errors import UsageError
from bdl_train.specs import TargetKind

log = logging.getLogger(__name__)

Kind = Literal["auto", "continuous", "class", "count"]


@dataclass(frozen=True)
class RawTarget:
    """A target column that was understood.

    Attributes:
        y: `[N]` float64 numbers or int64 labels.
        kind: What they are.
        classes: Names of the classes in label order: sorted as numbers if all are, else as text.
        reason: Why this kind.
    """

    y: np.ndarray
    kind: TargetKind
    classes: tuple[str, ...]
    reason: str


def read_target(values: pd.Series, kind: Kind, max_auto_classes: int) -> RawTarget:
    """Understand a target column.

    Rule for `auto`: text, categories and truth values are classes; whole numbers (also written 3.0) with at
    most `max_auto_classes` distinct values, and fewer than half as many as there are rows, are classes; all
    else is continuous. Counts are never guessed.

    Args:
        values: `[N]` cells; those of a CSV file as text.
        kind: `auto`, or what the user says.
        max_auto_classes: See the rule.

    Raises:
        UsageError: missing or infinite values, text where numbers are needed, fractional or far too many
            classes.
    """
    name = str(values.name)
    codes, levels = to_levels(values)
    if MISSING in levels and (codes == levels.index(MISSING)).any():
        rows = np.flatnonzero(codes == levels.index(MISSING))
        raise UsageError(
            f"The target '{name}' is missing in {len(rows)} rows (the first is row {rows[0]}, counted from 0 "
            "without the header): drop those rows or choose another data.target."
        )
    numbers = _numbers(values)
    if numbers is not None and not np.isfinite(numbers).all():
        rows = np.flatnonzero(~np.isfinite(numbers))
        raise UsageError(
            f"The target '{name}' is infinite in {len(rows)} rows (the first is row {rows[0]}): drop those "
            "rows or choose another data.target."
        )
    if kind == "auto":
        chosen, reason = _guess(numbers, len(levels) - 1, len(values), max_auto_classes)
    else:
        chosen, reason = TargetKind(kind), "data.kind says so"
    log.info("Target '%s' is of kind %s: %s", name, chosen, reason)
    if chosen is not TargetKind.CLASS:
        if numbers is None:
            raise UsageError(
                f"The target '{name}' holds text ('{levels[0]}'), not numbers: set data.kind=class."
            )
        return RawTarget(numbers, chosen, (), reason)
    return _classes(name, codes, levels, numbers, reason)


def _numbers(values: pd.Series) -> np.ndarray | None:
    if isinstance(values.dtype, pd.CategoricalDtype) or pd.api.types.is_bool_dtype(values):
        return None
    try:
        return to_numbers(values)
    except (ValueError, TypeError):
        return None


def _guess(
    numbers: np.ndarray | None, num_levels: int, num_rows: int, max_auto_classes: int
) -> tuple[TargetKind, str]:
    if numbers is None:
        return TargetKind.CLASS, "its values are not numbers"
    if not (numbers % 1 == 0).all():
        return TargetKind.CONTINUOUS, "it has fractional values"
    if num_levels <= max_auto_classes and 2 * num_levels < num_rows:
        return TargetKind.CLASS, f"it has {num_levels} distinct whole values"
    return TargetKind.CONTINUOUS, f"it has {num_levels} distinct whole values in {num_rows} rows"


def _classes(
    name: str, codes: np.ndarray, levels: list[str], numbers: np.ndarray | None, reason: str
) -> RawTarget:
    if numbers is not None and (numbers % 1 != 0).any():
        row = int(np.flatnonzero(numbers % 1 != 0)[0])
        raise UsageError(
            f"The target '{name}' has the fractional value {numbers[row]:g} in row {row}, classes must be "
            "whole numbers or text: set data.kind=continuous, or data.target to another column."
        )
    present = np.unique(codes)
    value = (
        {code: float(numbers[np.flatnonzero(codes == code)[0]]) for code in present}
        if numbers is not None
        else {}
    )
    ordered = sorted(present, key=value.__getitem__ if value else levels.__getitem__)
    if 2 * len(ordered) > len(codes):
        raise UsageError(
            f"The target '{name}' has {len(ordered)} classes in {len(codes)} rows, too few rows for each: "
            "set data.kind=continuous, or data.target to another column."
        )
    label = np.zeros(len(levels), dtype=np.int64)
    label[ordered] = np.arange(len(ordered))
    return RawTarget(label[codes], TargetKind.CLASS, tuple(levels[code] for code in ordered), reason)
