"""Data sets. One module and one YAML a choice; each yields the same `Data`."""

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec, TargetKind, TargetSpec

if TYPE_CHECKING:
    import pandas as pd

    from bdl_train.data._table import TableTransform


@dataclass(frozen=True)
class Part:
    """The rows of one split.

    Attributes:
        x: `[N, *shape]`: float32 as the network sees it, or uint8 images.
        y: `[N]`: float32 standardised with the train part's statistics, or int64 labels and counts.
        rows: `[N]` int64, positions in the source, so that splits and members can be compared.
    """

    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """A data set, split and transformed with train-part statistics only.

    Attributes:
        name: For tables and reports.
        train, val, test: Disjoint rows; `val` is cut from train, never from test.
        inputs, target: What models and likelihoods need to know.
        transform: For tables, how raw columns become `x`; stored in the artefact and applied by `bdl
            predict`.
        augment: `none`, or the augmentation that the training loop applies to each batch (`_augment.py`).
        notes: What a reader of the manifest must know (constant columns, duplicated rows, augmentation).
    """

    name: str
    train: Part
    val: Part
    test: Part
    inputs: InputSpec
    target: TargetSpec
    transform: "TableTransform | None" = None
    augment: str = "none"
    notes: dict[str, Any] = field(default_factory=dict)

    def require_train(self) -> None:
        """Refuse a set that has a test part only; it serves as out-of-distribution data of another run.

        Raises:
            UsageError: no training rows.
        """
        if len(self.train) == 0:
            raise UsageError(
                f"data.name={self.name} has a test part only ({len(self.test)} rows), so nothing can be "
                "trained on it: train on another data set and evaluate on this one."
            )

    def fingerprint(self) -> str:
        """SHA-256 over the arrays of all three parts: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for part in (self.train, self.val, self.test):
            for array in (part.x, part.y, part.rows):
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class DataSource(ABC):
    """Where a data set comes from; `load` reads, splits and transforms it.

    Attributes:
        batch_size: Examples per member and step.
    """

    batch_size: int

    @abstractmethod
    def load(self, root: str, seed: int) -> Data:
        """Read the data.

        Args:
            root: The folder of data sets (`data.root`); sources that need none ignore it.
            seed: Of the random splits (stream `SPLIT` of the run).

        Raises:
            UsageError: a missing file or column, targets that are not finite, overlapping splits.
        """

    def table(self, root: str) -> "pd.DataFrame | None":
        """The raw columns, inputs or not, by the positions that `Part.rows` name; None if the source has none.

        For what is said about rows beside the model's inputs: slices, examples.

        Args:
            root: As for `load`.
        """
        return None


def cut_validation(train_rows: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a random validation part from the training rows.

    Args:
        train_rows: `[N]` row numbers.
        fraction: Share of rows for validation; at least one row when above 0.
        seed: Of the permutation.

    Returns:
        Remaining training rows and validation rows, each in source order.
    """
    if fraction == 0:
        return train_rows, train_rows[:0]
    count = max(1, round(fraction * len(train_rows)))
    if count >= len(train_rows):
        raise UsageError(
            f"data.val_fraction={fraction} leaves no training row out of {len(train_rows)}: lower it."
        )
    order = np.random.default_rng(seed).permutation(len(train_rows))
    is_val = np.zeros(len(train_rows), dtype=bool)
    is_val[order[:count]] = True
    return train_rows[~is_val], train_rows[is_val]


def check_split(parts: dict[str, np.ndarray], num_rows: int) -> None:
    """Refuse declared splits that overlap, leave the table, or are empty.

    Args:
        parts: Row numbers of `train`, `val` and `test`; `val` may be empty.
        num_rows: Of the whole table.
    """
    for name, rows in parts.items():
        if len(rows) == 0 and name != "val":
            raise UsageError(f"The {name} part has no rows: change data.split or the declared split.")
        outside = rows[(rows < 0) | (rows >= num_rows)]
        if len(outside):
            raise UsageError(
                f"The {name} part names row {outside[0]}, the table has rows 0 to {num_rows - 1}."
            )
    names = list(parts)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = np.intersect1d(parts[one], parts[other])
            if len(shared):
                raise UsageError(
                    f"The {one} and {other} parts share {len(shared)} rows (the first is row {shared[0]}): "
                    "a model must not be scored on rows it was fitted to. Change data.split."
                )


def is_constant(values: np.ndarray) -> bool:
    """Whether finite values are all equal, up to the rounding of the arithmetic that made them.

    The threshold is relative to the values themselves, so a column in units of 1e-15 is not taken for
    constant.
    """
    return len(values) == 0 or bool(np.ptp(values) <= 1e-12 * np.abs(values).max())


def fit_target(
    y: np.ndarray, train_rows: np.ndarray, kind: TargetKind, name: str, classes: tuple[str, ...]
) -> TargetSpec:
    """Check a whole target column and describe it, with statistics of the training rows only.

    Args:
        y: `[N]` raw targets: numbers, labels 0..K-1, or counts.
        train_rows: The rows whose statistics are used; may be empty unless `kind` is continuous.
        kind: What the target is.
        name: For messages.
        classes: Names of the classes, in label order; empty unless `kind` is class.

    Raises:
        UsageError: NaN or infinite values, labels out of range, negative or fractional counts.
    """
    finite = np.isfinite(y.astype(np.float64))
    if not finite.all():
        raise UsageError(
            f"The target '{name}' has {int((~finite).sum())} NaN or infinite values (the first in row "
            f"{int(np.flatnonzero(~finite)[0])}): drop those rows or choose another data.target."
        )
    if kind is TargetKind.CONTINUOUS:
        train = y[train_rows].astype(np.float64)
        with np.errstate(over="ignore"):
            loc, scale = float(train.mean()), float(train.std())
        if not math.isfinite(scale):
            raise UsageError(
                f"The target '{name}' has values up to {np.abs(train).max():.3g}, too large to standardise: "
                "rescale it or take its logarithm."
            )
        return TargetSpec(kind, name, (), loc, 1.0 if is_constant(train) else scale)
    whole = y % 1 == 0
    if not whole.all():
        raise UsageError(
            f"The target '{name}' must hold whole numbers for kind '{kind}', got {y[~whole][0]} in row "
            f"{int(np.flatnonzero(~whole)[0])}."
        )
    if kind is TargetKind.CLASS and len(classes) < 2:
        raise UsageError(f"The target '{name}' has {len(classes)} class: classification needs two or more.")
    if kind is TargetKind.CLASS and (y.min() < 0 or y.max() >= len(classes)):
        raise UsageError(
            f"The target '{name}' has labels {int(y.min())}..{int(y.max())}, expected 0..{len(classes) - 1}."
        )
    if kind is TargetKind.COUNT and y.min() < 0:
        raise UsageError(f"The target '{name}' must hold counts of 0 or more, got {int(y.min())}.")
    return TargetSpec(kind, name, classes)


def encode_target(y: np.ndarray, target: TargetSpec) -> np.ndarray:
    """Raw targets to what networks are trained on: standardised float32, or int64."""
    if target.kind is TargetKind.CONTINUOUS:
        return ((y.astype(np.float64) - target.loc) / target.scale).astype(np.float32)
    return y.astype(np.int64)
