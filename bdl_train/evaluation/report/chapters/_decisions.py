"""Decisions of people: overrides, who was right, and whose outcomes were seen."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, only, texts
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import number, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section


def draw(section: Section) -> Iterator[Block]:
    """Two rates with intervals, then the tables."""
    summary, labels = section.tables["summary"], section.tables["labels"]
    yield _rates(
        summary,
        "override_rate",
        "How often people decided otherwise",
        "Thirds of the rows by total uncertainty.",
    )
    yield _rates(labels, "label_rate", "For which decisions an outcome is known", "They should be alike.")
    names = [
        "group",
        "n_scored",
        "model",
        "human",
        "difference",
        "difference_low",
        "difference_high",
        "score",
    ]
    yield tag("h4", "Who was right, where the outcome is known")
    yield table_of(only(summary, names))
    if "predicted" in section.tables:
        yield tag("h4", "Rows with and without an outcome")
        yield table_of(section.tables["predicted"])


def _rates(table: pd.DataFrame, name: str, title: str, caption: str) -> Figure:
    value, low, high = (numbers(table, column) for column in (name, "low", "high"))
    labels = texts(table, "group")
    panel = rows_panel(
        labels,
        Scale.over(value, low, high, zero=True),
        xlabel="share of the rows",
        right=[f"n {n:,}" for n in table["n"]],
        width=380,
    )
    places = -np.arange(len(table), dtype=float)
    panel.ranges(low, high, places)
    panel.points(value, places, 0, tips=[number(one) for one in value])
    return Figure(title, [panel], table, f"With exact 95 % intervals. {caption}")
