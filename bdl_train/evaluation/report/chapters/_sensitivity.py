"""Sensitivity: what moves the prediction, as bars or as a picture."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, records
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import Html, folded, number, picture, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_FEATURES = 25


def draw(section: Section) -> Iterator[Block]:
    """Bars of a table's features, or maps of an image's pixels."""
    if "features" in section.tables:
        yield _bars(section.tables["features"])
    if "pixels" in section.tables:
        yield _maps(section.tables["pixels"])
        yield folded("Numbers behind these pictures", table_of(section.tables["pixels"]))


def _bars(features: pd.DataFrame) -> Figure:
    shown = features.head(MOST_FEATURES)
    effect, doubt, low, high = (
        numbers(shown, name) for name in ("effect", "epistemic_gradient", "low", "high")
    )
    labels = [f"{row['feature']}{' *' if row['kind'] == 'category' else ''}" for row in records(shown)]
    panel = rows_panel(
        labels,
        Scale.over(effect, high, doubt, zero=True),
        xlabel="mean absolute change",
        height=28,
        width=380,
    )
    for i in range(len(shown)):
        panel.flat_bars(-i, float(effect[i]), 0, thick=8)
        panel.flat_bars(-i - 0.26, float(np.nan_to_num(doubt[i])), 1, thick=5)
    panel.ranges(low, high, -np.arange(len(shown), dtype=float), 3)
    caption = (
        "Numbers: per training standard deviation, from gradients. Categories (*): per switch of the level."
    )
    if len(shown) < len(features):
        caption += f" The {len(shown)} largest of {len(features)}."
    legend = [("of the prediction, 95 % interval", 0, "bar"), ("of the epistemic uncertainty", 1, "bar")]
    return Figure("What the prediction depends on", [panel], features, caption, legend)


def _maps(pixels: pd.DataFrame) -> Html:
    cells = []
    for name, words in (("gradient", "the prediction"), ("epistemic_gradient", "the epistemic uncertainty")):
        image = pixels.pivot_table(index="row", columns="column", values=name, aggfunc="mean").to_numpy(float)
        worst = float(np.nanmax(image)) or 1.0
        shades = (255 * (1 - np.nan_to_num(image) / worst)).astype(np.uint8)
        cells.append(
            tag(
                "div", picture(shades, f"Mean absolute gradient of {words} for each pixel"), tag("span", words),
                tag("span", f"black: {number(worst, 3)}", class_="dim"), class_="thumb large",
            )
        )  # fmt: skip
    return join_titled("Where pixels move the result (mean over channels)", cells)


def join_titled(title: str, cells: list[Html]) -> Html:
    return tag("div", tag("h4", title), tag("div", *cells, class_="thumbs"))
