"""Conformal prediction: coverage beside what exchangeable rows allow, and sizes."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.evaluation.conformal import EXPECTED
from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, only, records, texts, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import folded, number, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_GROUPS = 24
WORDS = {
    "lac": "lac: every class whose probability is above a threshold, the smallest sets on average.",
    "aps": "aps: the likeliest classes until their probabilities add up to a threshold, never none.",
    "aps_randomised": "aps_randomised: the same with the last class left out by chance, so that the coverage is exact.",
    "normalised": "normalised: the mean ± a multiple of the predictive standard deviation.",
    "cqr": "cqr: the predictive's own interval, moved outwards or inwards by the same amount everywhere.",
}
"""What the methods do, for who does not know their names."""


def draw(section: Section) -> Iterator[Block]:
    """All rows, then groups, then the sizes."""
    coverage = section.tables["coverage"]
    told = [WORDS[name] for name in dict.fromkeys(texts(coverage, "method")) if name in WORDS]
    yield tag("p", " ".join(told), class_="dim")
    is_whole, own = coverage["group"] == "all", coverage["threshold_from"] == "own group"
    whole, groups = where(coverage, is_whole), where(coverage, ~is_whole & own)
    if len(whole):
        labels = [
            f"{_name(row)}{', by group' if row['threshold_from'] == 'own group' else ''}"
            for row in records(whole)
        ]
        yield _figure(whole, "Coverage of all rows", labels)
    if len(groups):
        labels = [f"{row['group']}: {_name(row)}" for row in records(groups)]
        yield _figure(groups, "Coverage of groups, a threshold for each", labels)
    names = [
        "method",
        "level",
        "threshold_from",
        "threshold",
        "size",
        "size_p10",
        "size_p90",
        "empty",
        "n",
        "verdict",
    ]
    yield folded("Sizes of intervals or sets", table_of(only(whole, names)), open_=True)


def _name(row: dict[str, Any]) -> str:
    return f"{row['method'].replace('_', ' ')}, {row['level']:g}"


def _figure(rows: pd.DataFrame, title: str, labels: list[str]) -> Figure:
    shown = rows.head(MOST_GROUPS)
    names = ("coverage", "low", "high", "expected_low", "expected_high", "level")
    value, low, high, expected_low, expected_high, level = (numbers(shown, name) for name in names)
    x = Scale.over(value, low, high, expected_low, level, [1.0], pad=0.02)
    panel = rows_panel(labels[: len(shown)], x, xlabel="coverage", width=380)
    places = -np.arange(len(shown), dtype=float)
    panel.ranges(expected_low, expected_high, places, 5, class_="expected")
    panel.ranges(low, high, places)
    panel.points(level, places, 6, size=3.6)
    panel.points(value, places, 0, tips=[number(one) for one in value])
    caption = (
        "Lines: exact 95 % intervals. Wide bands: where the coverage of exchangeable rows falls "
        f"{100 * EXPECTED:.0f} % of the time."
    )
    if len(shown) < len(rows):
        caption += f" The first {len(shown)} of {len(rows)}."
    legend = [("coverage", 0, "dot"), ("promised", 6, "dot"), ("expected range", 5, "band")]
    return Figure(title, [panel], rows, caption, legend)
