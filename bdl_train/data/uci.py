"""The UCI regression benchmark with its standard splits and gap splits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from bdl_train.data import Data, DataSource
from bdl_train.data._files import load_npz
from bdl_train.data._table import table_data
from bdl_train.errors import UsageError, unknown_choice
from bdl_train.specs import TargetKind


@dataclass(frozen=True, kw_only=True)
class Uci(DataSource):
    """A UCI set in npz form, from `<root>/uci/<name>.npz` (gap splits: `<root>/uci_gap/<name>.npz`).

    The file holds `X [N, D]`, `y [N]` and, when the splits are stored, `train_idx [S, n]` and `test_idx [S,
    m]`.
    Without stored splits they are built by the published recipe: legacy seed 1, one permutation a split, the
    first `round(0.9 N)` rows for training (Hernández-Lobato & Adams, 2015; Gal & Ghahramani, 2016).

    Attributes:
        name: File name without `.npz`.
        split: Split number; for gap splits, the number of the feature with the gap (Foong et al., 2019).
        protocol: `standard` or `gap`.
        val_fraction: Share of the split's training rows cut off for validation.
        batch_size: Examples per member and step.
    """

    name: str
    split: Annotated[int, Field(ge=0)]
    protocol: Literal["standard", "gap"]
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    batch_size: Annotated[int, Field(ge=1)]

    def load(self, root: str, seed: int) -> Data:
        stored, path = self._stored(root)
        X, y = _table(stored, path)
        target_name = str(stored.get("target_name", "target"))
        if self.protocol == "gap":
            train_rows, test_rows = self._gap_rows(root, X)
        else:
            train_rows, test_rows = self._standard_rows(stored, len(y))
        return table_data(
            name=self.name,
            table=_named(stored, X),
            y=y,
            target_name=target_name,
            kind=TargetKind.CONTINUOUS,
            train_rows=train_rows.astype(np.int64),
            test_rows=test_rows.astype(np.int64),
            val_fraction=self.val_fraction,
            seed=seed,
            notes={"duplicated_rows": len(y) - len(np.unique(np.column_stack([X, y]), axis=0))},
        )

    def table(self, root: str) -> pd.DataFrame:
        stored, path = self._stored(root)
        X, y = _table(stored, path)
        return _named(stored, X).assign(**{str(stored.get("target_name", "target")): y})

    def _stored(self, root: str) -> tuple[Mapping[str, np.ndarray], Path]:
        folder = Path(root) / "uci"
        path = folder / f"{self.name}.npz"
        if not path.is_file():
            found = [one.stem for one in folder.glob("*.npz")]
            if found:
                raise UsageError(unknown_choice("data.name", self.name, found))
            raise UsageError(
                f"{path} does not exist. Point data.root (or the environment variable BDL_DATA_ROOT) at the "
                "folder that holds uci/<name>.npz."
            )
        return load_npz(path), path

    def _standard_rows(
        self, stored: Mapping[str, np.ndarray], num_rows: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if "train_idx" not in stored or "test_idx" not in stored:
            return published_split(num_rows, self.split)
        self._check_number(len(stored["train_idx"]))
        return stored["train_idx"][self.split], stored["test_idx"][self.split]

    def _gap_rows(self, root: str, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        path = Path(root) / "uci_gap" / f"{self.name}.npz"
        self._check_number(X.shape[1])
        if not path.is_file():
            return gap_split(X, self.split)
        stored = load_npz(path)
        absent = [key for key in ("train_idx", "test_idx") if len(stored.get(key, ())) <= self.split]
        if absent:
            raise UsageError(f"{path} has no row {self.split} in {absent[0]}: it does not fit the table.")
        return stored["train_idx"][self.split], stored["test_idx"][self.split]

    def _check_number(self, count: int) -> None:
        if self.split >= count:
            raise UsageError(
                f"data.split={self.split} does not exist: data.name={self.name} has the {self.protocol} "
                f"splits 0 to {count - 1}."
            )


def _named(stored: Mapping[str, np.ndarray], X: np.ndarray) -> pd.DataFrame:
    names = [str(one) for one in stored.get("feature_names", [f"x{i}" for i in range(X.shape[1])])]
    return pd.DataFrame(X, columns=pd.Index(names))


def _table(stored: Mapping[str, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray]:
    absent = [key for key in ("X", "y") if key not in stored]
    if absent:
        raise UsageError(f"{path} lacks {' and '.join(absent)}; it has: {', '.join(stored) or 'nothing'}.")
    X, y = stored["X"], stored["y"]
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise UsageError(f"{path} must hold X [N, D] and y [N], got {list(X.shape)} and {list(y.shape)}.")
    return X, y


def published_split(num_rows: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows of one standard split, in the published order (legacy `RandomState`, seed 1)."""
    random = np.random.RandomState(1)
    for _ in range(split):
        random.choice(range(num_rows), num_rows, replace=False)
    order = random.choice(range(num_rows), num_rows, replace=False)
    num_train = round(0.9 * num_rows)
    return order[:num_train], order[num_train:]


def gap_split(X: np.ndarray, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """Train and test rows when the middle third of the rows, sorted by `feature`, is held out.

    Rows with equal values of the feature are taken in source order; published splits break such ties in other
    ways, so at the edges of the gap their rows may differ.
    """
    order = np.argsort(X[:, feature], kind="stable")
    outer = round(len(order) / 3)
    test = order[outer : len(order) - outer]
    return np.sort(np.concatenate([order[:outer], order[len(order) - outer :]])), np.sort(test)
