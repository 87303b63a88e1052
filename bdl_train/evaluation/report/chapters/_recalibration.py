"""Recalibration: the maps, and what they change."""

from collections.abc import Iterator

import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import only, ordered, parts, texts, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import folded, interval, table_of, tag
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_CURVES = 6


def draw(section: Section) -> Iterator[Block]:
    """The table of changes, then the maps."""
    metrics = section.tables["metrics"]
    names = ["method", "metric", "before", "after", "difference"]
    shown = only(metrics, names).assign(
        interval=[interval(a, b) for a, b in zip(metrics["low"], metrics["high"], strict=True)],
        verdict=metrics["verdict"],
    )
    yield tag("h4", "Before and after, on these rows")
    yield table_of(shown)
    maps = section.tables["maps"]
    if len(maps):
        yield _maps(maps)
    yield folded("What was fitted", table_of(section.tables["fitted"]))


def _maps(maps: pd.DataFrame) -> Figure:
    panels, names = [], list(dict.fromkeys(maps["curve"]))[:MOST_CURVES]
    for method, own in parts(maps, "method"):
        span = Scale.over(own["x"], own["value"], pad=0.02)
        panel = Panel(span, span, "before", "after", title=method.replace("_", " "), height=270)
        panel.line([span.low, span.high], [span.low, span.high], class_="even", dashed=False)
        for i, name in enumerate(names):
            group = ordered(where(own, own["curve"] == name), "x")
            panel.line(group["x"], group["value"], i)
        panels.append(panel)
    left = len(set(texts(maps, "curve"))) - len(names)
    caption = "The dashed line changes nothing." + (
        f" {left} more curves are in the numbers." if left else ""
    )
    legend = [(str(name), i, "line") for i, name in enumerate(names)] if len(names) > 1 else []
    return Figure("The maps", panels, maps, caption, legend)
