"""Out-of-distribution rows: scores of rows from here and from elsewhere, and how well they are told apart."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, only, records, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import interval, number, table_of
from bdl_train.evaluation.report.panel import Panel, rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_PANELS = 12


def draw(section: Section) -> Iterator[Block]:
    """AUROC of every score, then the histograms."""
    detection, histogram = section.tables["detection"], section.tables["histogram"]
    yield _auroc(detection)
    yield _histograms(histogram, detection)
    yield table_of(_words(detection))


def _auroc(detection: pd.DataFrame) -> Figure:
    labels = [f"{row['out_set']}: {row['score']}".replace("_", " ") for row in records(detection)]
    value, low, high = (numbers(detection, name) for name in ("auroc", "auroc_low", "auroc_high"))
    panel = rows_panel(
        labels, Scale.over(value, low, high, [0.5, 1.0], pad=0.02), xlabel="AUROC, 0.5 is chance", width=380
    )
    panel.upright(0.5)
    places = -np.arange(len(detection), dtype=float)
    panel.ranges(low, high, places)
    panel.points(value, places, 0, tips=[number(one) for one in value])
    return Figure("How well each score tells rows apart", [panel], detection, "With 95 % intervals.")


def _histograms(histogram: pd.DataFrame, detection: pd.DataFrame) -> Figure:
    ranked = detection.sort_values("auroc", ascending=False, kind="stable")
    pairs = [(row["out_set"], row["score"]) for row in records(ranked)][:MOST_PANELS]
    panels = []
    for out_set, score in pairs:
        own = where(histogram, (histogram["out_set"] == out_set) & (histogram["score"] == score))
        bins = where(own, own["set"] == "in")
        left, right = numbers(bins, "left"), numbers(bins, "right")
        # The last bin takes a long tail whole: its width would squeeze the others.
        end = float(right[-2] if len(bins) > 1 else right[-1])
        start = float(left[0])
        x = Scale.over(edges=(start, max(end, start + 1e-9)), most_ticks=4)
        panel = Panel(
            x,
            Scale.over(own["density"], zero=True, most_ticks=3),
            title=f"{out_set}: {score}".replace("_", " "),
            width=190,
            height=140,
        )
        for style, name in enumerate(("in", "out")):
            group = where(own, own["set"] == name)
            ends = np.column_stack([group["left"], group["right"]]).ravel()
            panel.band(ends, 0 * ends, np.repeat(numbers(group, "density"), 2), style)
            panel.steps(group["left"], group["right"], group["density"], style)
        panels.append(panel)
    caption = "Densities of each score. Rows beyond the right edge are cut off."
    if len(pairs) < len(detection):
        caption += f" The {len(pairs)} best scores of {len(detection)}."
    legend = [("rows of this data set", 0, "line"), ("rows from elsewhere", 1, "line")]
    return Figure("Scores here and elsewhere", panels, histogram, caption, legend, small=True)


def _words(detection: pd.DataFrame) -> pd.DataFrame:
    found = only(detection, ["out_set", "score"]).copy()
    for name in ("auroc", "aupr_out", "aupr_in", "fpr95"):
        if name in detection:
            found[name] = [
                f"{number(v, 3)} ({interval(a, b)})"
                for v, a, b in zip(
                    detection[name], detection[f"{name}_low"], detection[f"{name}_high"], strict=True
                )
            ]
    return found.assign(n_in=detection["n_in"], n_out=detection["n_out"])
