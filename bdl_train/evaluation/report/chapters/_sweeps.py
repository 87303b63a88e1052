"""Curves over the severity of something, as small panels: shared by robustness and attacks."""

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.columns import numbers, ordered, parts, texts, where
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale

WORDS = {
    "nll": "NLL, nats", "accuracy": "accuracy", "ece": "calibration error (ECE)", "entropy": "total uncertainty, nats",
    "mutual_information": "epistemic uncertainty, nats", "rmse": "RMSE, in the target's unit",
    "coverage_95": "coverage of 95 % intervals", "total_std": "predictive standard deviation",
    "epistemic_std": "epistemic standard deviation", "total": "total uncertainty", "epistemic": "epistemic uncertainty",
    "auroc": "AUROC",
}  # fmt: skip


def panel_a_kind(curves: pd.DataFrame, metric: str) -> Figure:
    """One metric, a small panel for each kind, all with the same scale upwards."""
    own = where(curves, curves["metric"] == metric)
    y = _scale(own)
    panels = []
    for kind, group in parts(own, "kind"):
        group = ordered(group, "severity")
        x = Scale.over(group["severity"], pad=0.04, most_ticks=4)
        panel = Panel(x, y, title=kind.replace("_", " "), width=190, height=140)
        panel.across(float(numbers(group, "value")[0]))
        panel.band(group["severity"], group["low"], group["high"])
        panel.line(group["severity"], group["value"], 0)
        panel.points(group["severity"], group["value"], 0, size=2.6)
        panels.append(panel)
    caption = "Severity across, with 95 % intervals; the dashed line is the clean value."
    return Figure(WORDS.get(metric, metric), panels, own, caption, small=True)


def panel_a_metric(
    curves: pd.DataFrame, title: str, column: str = "metric", even: float | None = None
) -> Figure:
    """A small panel for each metric, a line for each kind."""
    panels, kinds = [], list(dict.fromkeys(texts(curves, "kind")))
    for metric, own in parts(curves, column):
        panel = Panel(
            Scale.over(own["severity"], pad=0.04, most_ticks=4), _scale(own), title=WORDS.get(metric, metric),
            xlabel="strength", width=190, height=160,
        )  # fmt: skip
        if even is not None:
            panel.across(even)
        for i, kind in enumerate(kinds):
            group = ordered(where(own, own["kind"] == kind), "severity")
            value = group["value"] if "value" in group else group["auroc"]
            panel.band(group["severity"], group["low"], group["high"], i)
            panel.line(group["severity"], value, i)
            panel.points(group["severity"], value, i, size=2.6)
        panels.append(panel)
    legend = [(kind.replace("_", " "), i, "both") for i, kind in enumerate(kinds)]
    return Figure(title, panels, curves, "With 95 % intervals.", legend, small=True)


def _scale(own: pd.DataFrame) -> Scale:
    """Over the values, and the intervals as far as they do not dwarf them."""
    value = numbers(own, "value" if "value" in own else "auroc")
    spread = np.nanmax(value) - np.nanmin(value) if np.isfinite(value).any() else 0.0
    room = max(spread, 0.02 * abs(np.nanmean(value))) if len(value) else 0.0
    low = np.maximum(numbers(own, "low"), np.nanmin(value) - room)
    high = np.minimum(numbers(own, "high"), np.nanmax(value) + room)
    return Scale.over(value, low, high, most_ticks=4)
