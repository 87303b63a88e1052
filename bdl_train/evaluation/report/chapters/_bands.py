"""Predictive bands of a number: observed against predicted, and along the inputs that go with it.

Shape letters: N rows.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, only, ordered, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import number
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_DRAWN, MOST_FEATURES = 300, 4
"""Rows of the scatter plots, and inputs that have one."""


def draw(section: Section) -> Iterator[Block]:
    """Observed against predicted, then up to four inputs."""
    points = section.tables["points"]
    yield _observed(points)
    ranked = _ranked(points)
    if ranked:
        yield _along(points, ranked)


def _thinned(points: pd.DataFrame, by: str) -> pd.DataFrame:
    """Rows spread evenly over the order of a column."""
    rising = ordered(points, by)
    picked = np.unique(np.linspace(0, len(rising) - 1, min(MOST_DRAWN, len(rising))).round().astype(int))
    return where(rising, np.isin(np.arange(len(rising)), picked))


def _window(points: pd.DataFrame) -> Scale:
    """All targets and means, and the bars as far as they do not dwarf them."""
    edges = np.concatenate([numbers(points, "lower_95"), numbers(points, "upper_95")])
    edges = edges[np.isfinite(edges)]
    bars = np.quantile(edges, [0.02, 0.98]) if len(edges) else []
    return Scale.over(numbers(points, "y"), numbers(points, "mean"), bars)


def _bars(panel: Panel, x: np.ndarray, rows: pd.DataFrame, level: int, class_: str) -> None:
    panel.error_bars(x, numbers(rows, f"lower_{level}"), numbers(rows, f"upper_{level}"), 4, class_=class_)


def _observed(points: pd.DataFrame) -> Figure:
    shown = _thinned(points, "mean")
    scale, x = _window(points), numbers(shown, "mean")
    panel = Panel(scale, scale, "predicted mean", "observed, and central 95 % interval", height=320)
    _bars(panel, x, shown, 95, "thin")
    panel.line([scale.low, scale.high], [scale.low, scale.high], class_="even", dashed=False)
    panel.cloud(x, numbers(shown, "y"), 0)
    y, low, high = (numbers(points, name) for name in ("y", "lower_95", "upper_95"))
    outside = float(np.mean((y < low) | (y > high)))
    caption = (
        f"{len(shown)} of {len(points)} rows, spread over the predictions. Of all rows {100 * outside:.1f} % lie "
        "outside their bar; 5 % should."
    )
    plain = only(points, [str(name) for name in points.columns if not str(name).startswith("input ")])
    legend = [("observed", 0, "dot"), ("95 % interval", 4, "error"), ("equal", 0, "even")]
    return Figure("Observed against predicted", [panel], plain, caption, legend)


def _ranked(points: pd.DataFrame) -> list[tuple[str, float]]:
    """The inputs that go with the prediction most, and their rank correlations."""
    found, mean = [], numbers(points, "mean")
    for name in [str(name) for name in points.columns if str(name).startswith("input ")]:
        values = numbers(points, name)
        known = np.isfinite(values) & np.isfinite(mean)
        if known.sum() < 10 or np.ptp(values[known]) == 0 or np.ptp(mean[known]) == 0:
            continue
        ranks = np.stack([stats.rankdata(one[known]) for one in (values, mean)])
        found.append((name, float(np.corrcoef(ranks)[0, 1])))
    return sorted(found, key=lambda one: -abs(one[1]))[:MOST_FEATURES]


def _along(points: pd.DataFrame, ranked: list[tuple[str, float]]) -> Figure:
    panels, y = [], _window(points)
    for name, rank in ranked:
        shown = _thinned(points, name)
        values = numbers(shown, name)
        levels = np.unique(values)
        if 1 < len(levels) <= 30:  # rows of one value would hide each other
            values = values + 0.5 * np.diff(levels).min() * (((np.arange(len(values)) * 0.618034) % 1) - 0.5)
        words = f"rank correlation {number(rank, 2)}"
        panel = Panel(Scale.over(values), y, words, title=name.removeprefix("input "))
        _bars(panel, values, shown, 95, "thin")
        _bars(panel, values, shown, 50, "error")
        panel.cloud(values, numbers(shown, "y"), 0)
        panels.append(panel)
    caption = (
        f"The inputs whose rank correlation with the prediction is largest, at most {MOST_DRAWN} rows each. Rows of "
        "equal values are moved apart a little."
    )
    table = only(points, ["y", "mean", "lower_95", "upper_95", *(name for name, _ in ranked)])
    legend = [("observed", 0, "dot"), ("50 % and 95 % interval", 4, "error")]
    return Figure("Bands along inputs", panels, table, caption, legend)
