"""The toy data sets that ship inside scikit-learn: no network, no files."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from bdl_train.data import Data, DataSource
from bdl_train.data._splits import random_split
from bdl_train.data._table import table_data
from bdl_train.specs import TargetKind


@dataclass(frozen=True, kw_only=True)
class Sklearn(DataSource):
    """One of scikit-learn's bundled data sets, with a random split by number.

    Attributes:
        name: Which data set.
        split: Number of the random split; the same number gives the same test rows whatever the run's seed.
        test_fraction: Share of rows for testing.
        val_fraction: Share of the remaining rows for validation.
        batch_size: Examples per member and step.
    """

    name: Literal["breast_cancer", "diabetes", "digits", "iris", "wine"]
    split: Annotated[int, Field(ge=0)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    val_fraction: Annotated[float, Field(ge=0, lt=1)]
    batch_size: Annotated[int, Field(ge=1)]

    def load(self, root: str, seed: int) -> Data:
        bunch = self._bunch()
        y = np.asarray(bunch.target)
        is_regression = self.name == "diabetes"
        classes = () if is_regression else tuple(str(name) for name in bunch.target_names)
        parts = random_split(len(y), self.split, self.test_fraction)
        return table_data(
            name=self.name,
            table=_inputs(bunch),
            y=y,
            target_name={"diabetes": "progression", "breast_cancer": "diagnosis"}.get(self.name, "class"),
            kind=TargetKind.CONTINUOUS if is_regression else TargetKind.CLASS,
            classes=classes,
            train_rows=parts["train"],
            test_rows=parts["test"],
            val_fraction=self.val_fraction,
            seed=seed,
        )

    def table(self, root: str) -> pd.DataFrame:
        return _inputs(self._bunch())

    def _bunch(self) -> Any:
        from sklearn import datasets

        return getattr(datasets, f"load_{self.name}")()


def _inputs(bunch: Any) -> pd.DataFrame:
    return pd.DataFrame(bunch.data, columns=pd.Index([str(name) for name in bunch.feature_names]))
