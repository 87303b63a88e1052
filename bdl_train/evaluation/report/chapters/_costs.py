"""Costs: what policies cost on these rows, and which actions are taken."""

from collections.abc import Iterator

import numpy as np

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, texts
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import number, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section


def draw(section: Section) -> Iterator[Block]:
    """Mean cost of each policy with its interval, then the actions."""
    summary = section.tables["summary"]
    value, low, high = (numbers(summary, name) for name in ("mean_cost", "low", "high"))
    labels = [one.replace("_", " ") for one in texts(summary, "policy")]
    panel = rows_panel(labels, Scale.over(value, high, zero=True), xlabel="mean cost of a row", width=380)
    places = -np.arange(len(summary), dtype=float)
    panel.ranges(low, high, places)
    panel.points(value, places, 0, tips=[number(one) for one in value])
    caption = "With 95 % intervals. The oracle knows the true class; the best constant action is known only afterwards."
    yield Figure("What decisions cost", [panel], summary, caption)
    yield tag("h4", "Actions of least expected cost")
    yield table_of(section.tables["actions"])
