"""Deferral: the risk of the rows that are kept, and what a chosen threshold does."""

from collections.abc import Iterator

import numpy as np

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import folded, table_of, tag
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section


def draw(section: Section) -> Iterator[Block]:
    """The curve, and the policy if there is one."""
    curve = section.tables["curve"]
    policy = section.tables.get("policy")
    y = Scale.over(
        curve["risk"], np.minimum(numbers(curve, "high"), 2 * numbers(curve, "risk").max()), zero=True
    )
    panel = Panel(
        Scale.over(edges=(0.0, 1.0)),
        y,
        "share of rows that are kept, the surest first",
        "risk of the kept rows",
    )
    panel.band(curve["coverage"], curve["low"], curve["high"])
    panel.line(curve["coverage"], curve["ideal"], 1)
    panel.line(curve["coverage"], curve["risk"], 0)
    legend = [("this uncertainty, 95 % interval", 0, "line"), ("perfect order of the same rows", 1, "line")]
    if policy is not None:
        panel.across(float(numbers(policy, "target")[0]), "even")
        legend.append(("target", 0, "even"))
    caption = (
        "From right to left ever more rows are left to people. The nearer to the perfect order, the better."
    )
    yield Figure("Risk and coverage", [panel], curve, caption, legend)
    if policy is not None:
        yield tag("h4", "The threshold that was chosen on validation rows, on these rows")
        yield table_of(policy.head(1))
        if len(policy) > 1:
            yield folded(f"The same within {len(policy) - 1} slices", table_of(policy.iloc[1:]))
