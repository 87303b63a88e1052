"""What is evaluated, and how more of it can be scored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.data import Data, Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import metrics_with_intervals
from bdl_train.evaluation.diagnostics_chapter import Diagnosis, diagnose
from bdl_train.evaluation.evaluate import Evaluation
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.shards import Scores
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.differentiable import MixtureModule
from bdl_train.predictive.predict import Predictor


@dataclass(frozen=True)
class Case:
    """What is evaluated, and how more of it can be scored.

    Attributes:
        artefact: The posterior.
        predictor: Of it, in this process.
        score: Scores a part, perhaps over a cluster.
        part: The rows that were scored.
        evaluation: Their scores.
        table: Their raw columns, in the same order; None = there are none.
        data: The run's own data; None = it could not be read, and `missing` says why.
        raw: Raw columns of all of the run's rows by position; None = there are none.
        stops_early: Whether the validation part chose the epochs of the members.
        train_rows: By member the source rows that it was trained on.
        own: Whether the rows are a part of the run's own data.
        notes: On the data, from the manifest.
        missing: Why there are no own data.
    """

    artefact: Artefact
    predictor: Predictor
    score: Callable[[Part], Scores]
    part: Part
    evaluation: Evaluation
    table: pd.DataFrame | None
    data: Data | None
    raw: pd.DataFrame | None
    stops_early: bool
    train_rows: Mapping[int, np.ndarray]
    own: bool
    notes: Mapping[str, Any]
    missing: str = ""

    @property
    def rows(self) -> RowScores:
        return self.evaluation.rows

    @cached_property
    def own_data(self) -> Data:
        if self.data is None:
            raise UsageError(f"This needs the run's own data, which cannot be read: {self.missing}")
        return self.data

    @cached_property
    def val(self) -> RowScores:
        """Scores of the validation part."""
        if self.part is self.own_data.val or self.part is self.own_data.train:
            raise UsageError(
                "What is fitted on the validation part is judged on rows that had no part in the run: evaluate "
                "part=test."
            )
        if len(self.own_data.val) == 0:
            raise UsageError("This needs a validation part: train with data.val_fraction above 0.")
        return self.score(self.own_data.val)[0]

    @cached_property
    def module(self) -> MixtureModule:
        return MixtureModule(self.artefact, device=self.predictor.device, num_draws=self.predictor.num_draws)

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """Of the chains, or why there are none, and of pairs of members."""
        return diagnose(self.artefact, self.predictor, self.part, self.evaluation.members)

    @property
    def inputs(self) -> pd.DataFrame | None:
        """The raw columns that the network was given, of the scored rows."""
        if self.table is None:
            return None
        names = set(self.artefact.inputs.names)
        return self.table.loc[:, [name for name in self.table.columns if name in names]]

    def table_of(self, part: Part) -> pd.DataFrame | None:
        return None if self.raw is None else self.raw.iloc[part.rows].reset_index(drop=True)

    def metrics(self, rows: RowScores) -> list[Metric]:
        target = self.artefact.target
        return metrics_with_intervals(rows, target.name, target.classes)
