"""Diagnostics: R-hat of predictions within and across members, the chains' traces, and pairs of members.

Shape letters: M members, V values.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, parts, records
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import folded, number, table_of
from bdl_train.evaluation.report.panel import Panel, rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.report.strokes import NUM_STYLES
from bdl_train.evaluation.section import Section

MOST_MEMBERS = 40
NUM_BINS = 24
WEIGHTS = (
    "R-hat of single weights would say nothing: networks with permuted or sign-flipped units are one function. "
    "Predictions and the potential mean the same in every chain."
)


def draw(section: Section) -> Iterator[Block]:
    """Of chains their R-hat and traces; of all methods the pairs of members."""
    if "chains" in section.tables:
        chains, values = section.tables["chains"], section.tables["values"]
        yield _histogram(values)
        yield _members(chains)
        yield from _traces(section.tables["traces"])
        yield folded("R-hat and effective sample size of every chain", table_of(chains))
    if "pairs" in section.tables:
        yield folded("Disagreement and correlation of pairs of members", table_of(section.tables["pairs"]))


def _histogram(values: pd.DataFrame) -> Figure:
    """How R-hat is spread over predictions; what is infinite stands at the right edge."""
    within, across = (numbers(values, name) for name in ("rhat_within_median", "rhat_across"))
    finite = np.r_[within, across][np.isfinite(np.r_[within, across])]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (1.0, 1.0)
    edges = np.linspace(low, max(high, low + 0.05), NUM_BINS + 1)
    shares = [
        np.histogram(np.clip(one[~np.isnan(one)], edges[0], edges[-1]), edges)[0] / len(values)
        for one in (within, across)
    ]
    panel = Panel(Scale.over(edges, [1.0]), Scale.over(*shares, zero=True), "R-hat", "share of predictions")
    panel.upright(1.0)
    panel.bars(edges[:-1], edges[1:], shares[0], 0)
    panel.steps(edges[:-1], edges[1:], shares[1], 1)
    caption = f"{WEIGHTS} Within: the median over members of each value."
    legend = [("within members", 0, "bar"), ("across members", 1, "line")]
    return Figure("R-hat of predictions", [panel], values, caption, legend)


def _members(chains: pd.DataFrame) -> Figure:
    """R-hat and effective sizes, a row a member."""
    shown = chains.head(MOST_MEMBERS)
    labels = [f"member {row['member']}" for row in records(shown)]
    places = -np.arange(len(shown), dtype=float)
    panels = []
    for title, middle, edge, base in (
        ("R-hat", "rhat_median", "rhat_max", 1.0),
        ("effective sample size", "ess_bulk_median", "ess_bulk_min", 0.0),
    ):
        typical, extreme = numbers(shown, middle), numbers(shown, edge)
        panel = rows_panel(labels, Scale.over(typical, extreme, [base]), xlabel=title)
        panel.upright(base)
        panel.ranges(np.fmin(typical, extreme), np.fmax(typical, extreme), places, 3)
        tips = [
            f"{label}: {number(a)}, {number(b)}" for label, a, b in zip(labels, typical, extreme, strict=True)
        ]
        panel.points(typical, places, 0, tips=tips)
        panels.append(panel)
    caption = "A dot is the median over predictions, its line reaches to the worst prediction."
    if len(shown) < len(chains):
        caption += f" The first {MOST_MEMBERS} of {len(chains)} members."
    return Figure("Each chain", panels, chains, caption)


def _traces(traces: pd.DataFrame) -> Iterator[Figure]:
    """A panel a trace, a line a member."""
    names = [str(name) for name in traces.columns if name not in ("member", "draw")]
    members = parts(traces, "member")
    panels = []
    for name in names:
        panel = Panel(
            Scale.over(numbers(traces, "draw")), Scale.over(numbers(traces, name)), "kept draw", _unit(name)
        )
        for i, (_, own) in enumerate(members[:NUM_STYLES]):
            panel.line(numbers(own, "draw"), numbers(own, name), i)
        panels.append(panel)
    if not panels:
        return
    caption = (
        "A mixed chain looks like noise around a level; a slope or a plateau that it leaves once says that the start "
        "was not discarded or that draws stand too close. Methods on minibatches report the potential of one batch."
    )
    if len(members) > NUM_STYLES:
        caption += f" The first {NUM_STYLES} of {len(members)} members."
    legend = [(f"member {member}", i, "line") for i, (member, _) in enumerate(members[:NUM_STYLES])]
    yield Figure("What the samplers reported at the kept draws", panels, traces, caption, legend)


def _unit(name: str) -> str:
    return "potential, nats per example" if name == "potential" else name.replace("_", " ")
