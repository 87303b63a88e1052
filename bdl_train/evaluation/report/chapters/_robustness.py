"""Robustness: scores and uncertainty over the severity of shifts."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.chapters._sweeps import WORDS, panel_a_kind
from bdl_train.evaluation.report.columns import numbers, only, texts
from bdl_train.evaluation.report.figure import Figure, drawn
from bdl_train.evaluation.report.html import folded, number, table_of, tag
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

OPEN = ("accuracy", "rmse", "entropy", "total_std")
MOST_FEATURES = 25


def draw(section: Section) -> Iterator[Block]:
    """Quality and uncertainty, other metrics in folds, whether uncertainty grows, and missing features."""
    curves, growth = section.tables["curves"], section.tables["growth"]
    metrics = list(dict.fromkeys(texts(curves, "metric")))
    for metric in metrics:
        if metric in OPEN:
            yield panel_a_kind(curves, metric)
    for metric in metrics:
        if metric not in OPEN:
            yield folded(
                WORDS.get(metric, metric), drawn([panel_a_kind(curves, metric)], f"robustness-{metric}")
            )
    if len(growth):
        yield tag("h4", "Does uncertainty grow where the error does?")
        names = ["kind", "breaks_at", "error_change", "uncertainty_change", "agreement", "as_it_should"]
        yield table_of(only(growth, names))
        yield folded("All columns of this table", table_of(growth))
    missing = section.tables.get("missing")
    if missing is not None and len(missing):
        yield _missing(missing)


def _missing(missing: pd.DataFrame) -> Figure:
    shown = missing.head(MOST_FEATURES)
    value, low, high = (numbers(shown, name) for name in ("damage", "damage_low", "damage_high"))
    panel = rows_panel(
        texts(shown, "feature"),
        Scale.over(value, low, high, [0.0]),
        xlabel="rise of the NLL, nats",
        width=380,
    )
    panel.upright(0.0)
    for i in range(len(shown)):
        panel.flat_bars(-i, float(value[i]), thick=9)
    panel.ranges(low, high, -np.arange(len(shown), dtype=float))
    caption = "Each feature left out alone, with paired 95 % intervals."
    if len(shown) < len(missing):
        caption += f" The {len(shown)} most harmful of {len(missing)}."
    return Figure(
        f"What is missed most: {texts(shown, 'feature')[0]} ({number(value[0], 3)})",
        [panel],
        missing,
        caption,
    )
