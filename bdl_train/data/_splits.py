"""Which rows train, validate and test: random splits by number, and splits that the data declares."""

import logging
from typing import Any

import numpy as np
import pandas as pd
from pandas.util import hash_pandas_object

from bdl_train.data._levels import level_text
from bdl_train.errors import UsageError, nearest

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")


def random_split(num_rows: int, split: int, test_fraction: float) -> dict[str, np.ndarray]:
    """Train and test rows in source order; the same number gives the same rows, whatever the run's seed."""
    order = np.random.default_rng(split).permutation(num_rows)
    num_test = max(1, round(test_fraction * num_rows))
    return {"train": np.sort(order[num_test:]), "test": np.sort(order[:num_test])}


def declared_split(values: pd.Series) -> dict[str, np.ndarray]:
    """The rows that a column assigns to `train`, `test` and, if it names them, `val`.

    Raises:
        UsageError: a value other than these three, or none at all.
    """
    texts = [level_text(value) if pd.notna(value) else "" for value in values]
    for row, text in enumerate(texts):
        if text not in PARTS:
            raise UsageError(
                f"data.split_column={values.name} has '{text}' in row {row}.{nearest(text, PARTS)} "
                f"Each row needs one of: {', '.join(PARTS)}."
            )
    column = np.array(texts)
    parts = {part: np.flatnonzero(column == part) for part in PARTS}
    return {part: rows for part, rows in parts.items() if part != "val" or len(rows)}


def check_ids(ids: pd.Series, parts: dict[str, np.ndarray], *, declared: bool) -> None:
    """Refuse parts that share an id.

    Args:
        ids: `[N]`, the column `data.id_column`.
        parts: Rows of each part.
        declared: Whether the data declares the parts; names the right way out in the message.
    """
    known = ids.map(level_text, na_action="ignore")
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = set(known.iloc[parts.get(one, [])].dropna()) & set(known.iloc[parts.get(other, [])].dropna())
        if shared:
            remedy = (
                "remove the shared rows from one of them"
                if declared
                else "a random split tears rows of one id apart, so declare the parts with data.split_column"
            )
            raise UsageError(
                f"The {one} and {other} parts share {len(shared)} ids of data.id_column={ids.name}, such as "
                f"'{min(shared)}': a model must not be scored on what it was fitted to; {remedy}."
            )


def count_duplicates(table: pd.DataFrame, parts: dict[str, np.ndarray], *, declared: bool) -> dict[str, Any]:
    """Notes on equal rows, inputs and target together; warns when declared parts share rows.

    Without ids, equal rows may be two examples that agree by chance, so they are counted and not refused.
    """
    hashes = hash_pandas_object(table, index=False).to_numpy()  # pyright: ignore[reportCallIssue]
    fitted = np.concatenate([parts["train"], parts.get("val", parts["train"][:0])])
    num_shared = int(np.isin(hashes[parts["test"]], hashes[fitted]).sum())
    if num_shared and declared:
        log.warning(
            "%d of %d test rows equal a training row in every column: scores may be too good. "
            "Declare data.id_column if rows have ids.",
            num_shared, len(parts["test"]),
        )  # fmt: skip
    return {"duplicated_rows": len(hashes) - len(np.unique(hashes)), "test_rows_seen_in_train": num_shared}
