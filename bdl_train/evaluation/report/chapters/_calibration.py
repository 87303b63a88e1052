"""Calibration: the reliability diagram, or PIT values and coverage.

Shape letters: G bins.
"""

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, parts, records
from bdl_train.evaluation.report.figure import Figure, drawn
from bdl_train.evaluation.report.html import folded
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

UNIT = Scale.over(edges=(0.0, 1.0))
MOST_CLASSES = 12


def draw(section: Section) -> Iterator[Block]:
    """What the tables of the chapter allow."""
    if "reliability" in section.tables:
        yield _reliability(section.tables["reliability"])
    if "classes" in section.tables:
        figure = _classes(section.tables["classes"])
        yield folded("Each class alone", drawn([figure], "calibration-classes"))
    if "pit" in section.tables:
        yield _pit(section.tables["pit"])
    if "coverage" in section.tables:
        yield _coverage(section.tables["coverage"])


def _diagram(table: pd.DataFrame, panel: Panel, size: float) -> Panel:
    panel.line([0, 1], [0, 1], class_="even", dashed=False)
    x = numbers(table, "probability")
    panel.error_bars(x, numbers(table, "low"), numbers(table, "high"))
    tips = [
        f"said {row['probability']:.3f}, came true {row['frequency']:.3f}, {row['n']} rows"
        for row in records(table)
    ]
    panel.points(x, numbers(table, "frequency"), 0, size=size, tips=tips)
    return panel


def _reliability(table: pd.DataFrame) -> Figure:
    # Confidences crowd near 1: the axes begin where they do.
    least = float(numbers(table, "probability").min())
    start = 0.0 if least < 0.3 else math.floor(10 * least) / 10
    low = min(start, math.floor(10 * float(numbers(table, "low").min())) / 10)
    x, y = Scale.over(edges=(start, 1.0)), Scale.over(edges=(low, 1.0))
    panel = Panel(x, y, "stated confidence", "share that was right", height=290)
    caption = (
        f"{len(table)} bins of about {np.median(numbers(table, 'n')):,.0f} rows. Points on the dashed line are "
        "calibrated, below it the model is too sure. Bars are exact 95 % intervals of the share."
    )
    legend = [("bin of rows", 0, "dot"), ("calibrated", 0, "even")]
    return Figure("Reliability of the confidence", [_diagram(table, panel, 4)], table, caption, legend)


def _classes(table: pd.DataFrame) -> Figure:
    panels = [
        _diagram(group, Panel(UNIT, UNIT, title=f"class {k}", width=190, height=160), 2.6)
        for k, group in parts(table, "k")[:MOST_CLASSES]
    ]
    caption = "The probability of a class (across) against its frequency (up), with 95 % intervals."
    count = len(parts(table, "k"))
    if count > MOST_CLASSES:
        caption += f" The first {MOST_CLASSES} of {count} classes."
    return Figure("Reliability of each class", panels, table, caption, small=True)


def _pit(table: pd.DataFrame) -> Figure:
    total, bins = int(numbers(table, "n").sum()), len(table)
    low, high = (stats.binom.ppf(edge, total, 1 / bins) * bins / max(total, 1) for edge in (0.025, 0.975))
    y = Scale.over(table["density"], [high, 1.0], zero=True)
    panel = Panel(UNIT, y, "PIT value: P(Y ≤ y)", "density")
    panel.bars(table["left"], table["right"], table["density"])
    panel.band([0, 1], [low, low], [high, high], 5)
    panel.across(1.0)
    caption = (
        "Flat is calibrated. Humps at both ends: too narrow; a hump in the middle: too wide; a slope: shifted. The "
        f"band holds 95 % of the bars if the predictive is right ({total:,} rows)."
    )
    legend = [("observed", 0, "bar"), ("expected if right", 5, "band")]
    behind = table.assign(expected_low=low, expected_high=high)
    return Figure("Where targets fall in their predictive", [panel], behind, caption, legend)


def _coverage(table: pd.DataFrame) -> Figure:
    panel = Panel(UNIT, UNIT, "level of the central interval", "share of targets inside")
    panel.line([0, 1], [0, 1], class_="even", dashed=False)
    panel.error_bars(numbers(table, "level"), numbers(table, "low"), numbers(table, "high"))
    tips = [f"{row['level']:.2f}: {row['coverage']:.3f}" for row in records(table)]
    panel.points(table["level"], table["coverage"], 0, tips=tips)
    caption = (
        "Below the dashed line intervals are too narrow, above it too wide. Bars are exact 95 % intervals."
    )
    return Figure(
        "Coverage of central intervals",
        [panel],
        table,
        caption,
        [("observed", 0, "dot"), ("right", 0, "even")],
    )
