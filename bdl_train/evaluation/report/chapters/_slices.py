"""Slices: metrics of each with intervals, the worst of them, and gaps beyond chance."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, texts, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import folded, number, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

HEADLINES = ("nll", "accuracy", "ece", "rmse", "coverage_95")
MOST_SLICES = 24


SHOWN = ("slice", "loss", "difference", "low", "high", "p_adjusted", "n")
"""Columns of the gaps that stand on the page; the others are in the fold."""


def draw(section: Section) -> Iterator[Block]:
    """A forest plot a headline metric, then gaps and the worst slices."""
    metrics = section.tables["metrics"]
    kept = [key for key in HEADLINES if key in set(metrics["key"])]
    for key in kept:
        yield _forest(where(metrics, metrics["key"] == key), key)
    gaps = section.tables["gaps"]
    if len(gaps):
        yield tag("h4", "Gaps to the rest of the rows")
        sure = where(gaps, gaps["significant"]) if "significant" in gaps else gaps
        if len(sure):
            yield table_of(sure.loc[:, [name for name in SHOWN if name in sure]], 30)
        else:
            yield tag(
                "p", "None is beyond chance after adjusting for the number of comparisons.", class_="dim"
            )
        yield folded(f"All {len(gaps)} gaps", table_of(gaps))
    worst = section.tables.get("worst")
    if worst is not None and len(worst):
        yield folded("Where each metric is worst", table_of(worst))


def _forest(rows: pd.DataFrame, key: str) -> Figure:
    is_whole = (rows["slice"] == "all") & (rows["column"] == "")
    whole, slices = where(rows, is_whole), where(rows, ~is_whole)
    defined = where(slices, np.isfinite(numbers(slices, "value")))
    # Of many slices those with the most rows, in their order.
    largest = np.argsort(-numbers(defined, "n"), kind="stable")[:MOST_SLICES]
    shown = where(defined, np.isin(np.arange(len(defined)), largest))
    first = pd.concat([whole, shown])
    labels = ["all rows"] * len(whole) + texts(shown, "slice")
    value, low, high, n = (numbers(first, name) for name in ("value", "low", "high", "n"))
    # A slice of few rows may have an interval that dwarfs the others.
    solid = n >= 0.02 * n.max(initial=1)
    x = Scale.over(value, low[solid], high[solid])
    unit = texts(rows, "unit")[0]
    support = [f"n {one:,.0f}" for one in n]
    panel = rows_panel(labels, x, xlabel=f"{key}, {unit}" if unit else key, right=support, width=380)
    if len(whole):
        panel.upright(float(value[0]))
    places = -np.arange(len(first), dtype=float)
    panel.ranges(low, high, places)
    for i, small in enumerate(numbers(first, "small") > 0):
        tip = f"{labels[i]}: {number(value[i])} ({number(low[i])} to {number(high[i])})"
        panel.points([value[i]], [places[i]], 0, tips=[tip], filled=not small)
    caption = "Dots with 95 % intervals; the dashed line is all rows. Hollow dots: few rows."
    if len(shown) < len(slices):
        caption += f" {len(shown)} of {len(slices)} slices: those with the most rows in which it is defined."
    return Figure(f"{key} within slices", [panel], rows, caption)
