"""Rows of a file that the run did not train on, encoded as its network expects them.

Shape letters: N rows, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from bdl_train.data import Part, encode_target
from bdl_train.data._files import find_file
from bdl_train.data._levels import MISSING, cells_of, to_levels, to_numbers
from bdl_train.data._stream import read_table
from bdl_train.data._table import TableTransform
from bdl_train.data.images import read_images
from bdl_train.errors import UsageError, nearest
from bdl_train.specs import InputSpec, TargetKind, TargetSpec


@dataclass(frozen=True)
class Foreign:
    """The rows of a file.

    Attributes:
        name: Of the file, without its ending.
        part: Encoded; targets are 0 where there are none.
        table: The raw columns; None for images.
        has_target: Whether the file told the targets.
        unseen: By column, rows with a category that training never saw.
    """

    name: str
    part: Part
    table: pd.DataFrame | None
    has_target: bool
    unseen: Mapping[str, int] = field(default_factory=dict)


def read_foreign(
    path: str,
    root: str,
    *,
    inputs: InputSpec,
    target: TargetSpec,
    transform: TableTransform | None,
    key: str,
    needs_target: bool,
) -> Foreign:
    """Read a table with the run's columns, in any order, or an npz of images of the run's size.

    Args:
        path: Relative to the working directory or to `root`.
        root: The folder of data sets.
        inputs, target, transform: Of the run.
        key: The config key to name in an error.
        needs_target: Whether rows without targets are of no use.

    Raises:
        UsageError: missing columns, images of another shape, classes that the run does not know.
    """
    file = find_file(path, root, key=key)
    name = file.name.split(".")[0]
    if inputs.is_image:
        x, labels, classes = read_images(file)
        if x.shape[1:] != inputs.shape:
            raise UsageError(
                f"{key}={path} has images of {list(x.shape[1:])}, the run was trained on {list(inputs.shape)}."
            )
        known = np.array([_place(one, target.classes) for one in classes])[labels]
        has_target = bool((known >= 0).all())
        if needs_target and not has_target:
            raise UsageError(
                f"{key}={path} has the class {classes[labels[known < 0][0]]!r}, the run knows "
                f"{', '.join(target.classes[:20])}: it can only serve as an out-of-distribution set."
            )
        return Foreign(name, Part(x, np.where(known < 0, 0, known), np.arange(len(x))), None, has_target)
    if transform is None:
        raise UsageError(
            f"{key}={path}: the run's inputs are {list(inputs.shape)} without a stored table transform, so that no "
            "file can be encoded for it."
        )
    table = read_table(file)
    x = transform.apply(table)
    has_target = target.name in table.columns
    if needs_target and not has_target:
        raise UsageError(
            f"{key}={path} lacks the target column '{target.name}'.{nearest(target.name, table.columns)} It has: "
            f"{', '.join(table.columns[:20])}."
        )
    y = np.zeros(len(table))
    if has_target:
        y, has_target = _targets(table, target, f"{key}={path}", needs_target)
    part = Part(x, encode_target(y, target), np.arange(len(table)))
    return Foreign(name, part, table, has_target, transform.unseen(table))


def _place(name: str, classes: tuple[str, ...]) -> int:
    return classes.index(name) if name in classes else -1


def _targets(table: pd.DataFrame, target: TargetSpec, where: str, needed: bool) -> tuple[np.ndarray, bool]:
    """Raw targets `[N]`, and whether all of them are known."""
    cells = cells_of(table, target.name)
    if target.kind is TargetKind.CLASS:
        codes, levels = to_levels(cells)
        known = np.array([_place(level, target.classes) for level in levels])[codes]
        if needed and (known < 0).any():
            wrong = levels[codes[known < 0][0]]
            what = "a missing target" if wrong == MISSING else f"the class {wrong!r}"
            raise UsageError(
                f"{where} has {what} in column '{target.name}', row {int(np.flatnonzero(known < 0)[0])}; the run knows "
                f"{', '.join(target.classes[:20])}."
            )
        return np.maximum(known, 0), bool((known >= 0).all())
    try:
        numbers = to_numbers(cells)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{where}: the target '{target.name}' held numbers in training, here: {error}."
        ) from error
    finite = np.isfinite(numbers)
    if needed and not finite.all():
        raise UsageError(
            f"{where}: the target '{target.name}' has {int((~finite).sum())} missing or infinite values (the first in "
            f"row {int(np.flatnonzero(~finite)[0])}): drop those rows."
        )
    return np.where(finite, numbers, target.loc), bool(finite.all())


def seen_before(part: Part, train: Part) -> int:
    """How many rows of a part have inputs that are equal, in every digit, to those of a training row."""
    known = {row.tobytes() for row in np.ascontiguousarray(train.x)}
    return sum(row.tobytes() in known for row in np.ascontiguousarray(part.x))
