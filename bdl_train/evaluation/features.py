"""Original features of a table in the inputs of a network, and random rows to move them in.

Shape letters: N rows, D columns.
"""

from dataclasses import dataclass

import numpy as np

from bdl_train.data import Part
from bdl_train.data._table import CategoryColumn, TableTransform
from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec


@dataclass(frozen=True)
class Number:
    """A numeric feature in the inputs of the network.

    Attributes:
        column: Its column among D.
        std: Raw units of one training standard deviation; 0 if it was constant in training, NaN if unknown.
        flag: The column that says where it was missing, or None.
    """

    name: str
    column: int
    std: float
    flag: int | None

    def known(self, x: np.ndarray) -> np.ndarray:
        """Whether each row `[N]` has a value that may be moved: it is not missing, and the column tells something."""
        missing = np.zeros(len(x), bool) if self.flag is None else x[:, self.flag] > 0
        return ~missing & (self.std != 0)


@dataclass(frozen=True)
class Category:
    """A category; `columns` are its one-hot levels among D."""

    name: str
    columns: slice


Feature = Number | Category


def features_of(inputs: InputSpec, transform: TableTransform | None) -> list[Feature]:
    """The original features of a table, in order.

    Raises:
        UsageError: without a transform, a feature of several columns may be a category or a number with a flag.
    """
    features: list[Feature] = []
    if transform is None:
        groups = inputs.groups or (1,) * inputs.shape[0]
        names = inputs.names or tuple(f"column {d}" for d in range(inputs.shape[0]))
        wide = [name for name, width in zip(names, groups, strict=True) if width > 1]
        if wide:
            raise UsageError(
                f"Feature '{wide[0]}' fills several columns, and this posterior has no transform that says whether it "
                "is a category: train with one of the shipped `data` choices."
            )
        return [Number(name, d, float("nan"), None) for d, name in enumerate(names)]
    at = 0
    for column in transform.columns:
        if isinstance(column, CategoryColumn):
            features.append(Category(column.name, slice(at, at + column.width)))
        else:
            features.append(Number(column.name, at, column.std, at + 1 if column.flag_missing else None))
        at += column.width
    return features


def sample_rows(part: Part, max_rows: int, seed: int) -> Part:
    """The part, or `max_rows` of it at random without replacement, in their order.

    Raises:
        UsageError: no rows, or `max_rows` below 1.
    """
    if len(part) == 0 or max_rows < 1:
        raise UsageError(
            f"One row or more is needed, this part has {len(part)} and max_rows={max_rows}: "
            "choose another `part`, or raise max_rows."
        )
    if len(part) <= max_rows:
        return part
    return take(part, np.sort(np.random.default_rng(seed).choice(len(part), max_rows, replace=False)))


def take(part: Part, index: np.ndarray) -> Part:
    """Some rows of a part, by position or truth value."""
    return Part(part.x[index], part.y[index], part.rows[index])
