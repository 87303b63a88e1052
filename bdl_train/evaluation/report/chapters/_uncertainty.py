"""Uncertainty: its parts over the rows, and the error of surer and less sure rows."""

from collections.abc import Iterator

import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import parts, texts
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MEANINGS = {
    "total": "total", "aleatoric": "aleatoric: noise in the data", "epistemic": "epistemic: members disagree",
}  # fmt: skip


def draw(section: Section) -> Iterator[Block]:
    """Both figures."""
    yield _histogram(section.tables["histogram"])
    yield _by_group(section.tables["error_by_uncertainty"])


def _histogram(table: pd.DataFrame) -> Figure:
    is_std = any(one.endswith("_std") for one in texts(table, "part"))
    x = Scale.over(table["left"], table["right"], zero=True, pad=0.0)
    panels, xlabel = [], "in the target's unit" if is_std else "nats"
    for i, (part, group) in enumerate(parts(table, "part")):
        title = MEANINGS.get(part.removesuffix("_std"), part)
        panel = Panel(
            x,
            Scale.over(group["n"], zero=True, most_ticks=3),
            title=title,
            xlabel=xlabel,
            width=240,
            height=150,
        )
        panel.bars(group["left"], group["right"], group["n"], (0, 5, 1)[i % 3])
        panels.append(panel)
    caption = "Number of rows. The last bar takes all rows beyond it."
    return Figure("How uncertain the rows are", panels, table, caption, wide=True)


def _by_group(table: pd.DataFrame) -> Figure:
    y = Scale.over(table["error"], zero=True)
    panel = Panel(
        Scale.over(table["group"], pad=0.08, most_ticks=10),
        y,
        "tenth of the rows, surest to least sure",
        "mean error",
    )
    panel.bars(table["group"] - 0.36, table["group"] + 0.36, table["error"])
    caption = (
        "If uncertainty is useful, bars rise from left to right. "
        "Classes: error rate; numbers: mean absolute error."
    )
    return Figure("Error of surer and less sure rows", [panel], table, caption)
