"""What can be asked of an evaluation beside what every one has: keys of `conf/evaluate.yaml`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Deferral:
    """Which predictions are handed to a person.

    Attributes:
        metric: risk (error rate), mae or rmse of the rows that are kept.
        target: What it may be at most; null = only the curve is drawn.
        by: What sorts the rows.
        confidence: Chance with which the target holds for new rows, for `risk`; null = as it is on the validation rows.
    """

    metric: Literal["risk", "mae", "rmse"] | None
    target: Annotated[float, Field(ge=0)] | None
    by: Literal["total", "epistemic", "confidence"] | None
    confidence: Share | None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a decision costs: `matrix[true class][action]`, with names of the actions; null = the classes, in order."""

    matrix: list[list[float]] | None
    actions: list[str] | None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be analysed beside what every evaluation has; keys of `conf/evaluate.yaml`."""

    slices: list[str]
    find_slices: bool
    ood: list[str]
    recalibrate: bool
    conformal: list[Share]
    conformal_by: str | None
    defer: Deferral
    cost: Costs
    robustness: bool
    sensitivity: bool
    attacks: list[Annotated[float, Field(gt=0)]]
    privacy: bool
    decisions: str | None
    max_rows: Annotated[int, Field(ge=10)]
    seed: Annotated[int, Field(ge=0)]
