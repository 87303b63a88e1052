"""Members: each beside the ensemble, and how far they are apart.

Shape letters: M members.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, records
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import folded, number, table_of
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_CELLS = 40
"""Members that a heat map shows."""


def draw(section: Section) -> Iterator[Block]:
    """A strip of dots a metric, the heat map of distances, and what each member scores in a fold."""
    members, compared = section.tables["members"], section.tables["compared"]
    yield _strips(members, compared)
    if len(members) > 1:
        yield _heat(section.tables["diversity"], members)
    yield folded("Scores of every member", table_of(members))


def _strips(members: pd.DataFrame, compared: pd.DataFrame) -> Figure:
    panels = []
    for row in records(compared):
        values = numbers(members, row["metric"])
        ensemble = np.nan if row["ensemble"] is None else float(row["ensemble"])
        better = "higher is better →" if row["better"] == "higher" else "← lower is better"
        panel = Panel(
            Scale.over(values, [ensemble]), Scale(0, 1, ()), better, title=str(row["metric"]), height=96, left=12
        )  # fmt: skip
        # Fixed heights that keep dots apart: the golden ratio spreads any number of them.
        heights = 0.2 + 0.42 * ((np.arange(len(values)) * 0.618034) % 1)
        tips = [f"member {m}: {number(v)}" for m, v in zip(members["member"], values, strict=True)]
        panel.upright(float(values.mean()))
        panel.points(values, heights, 4, size=3.2, tips=tips, filled=False, mark="circle")
        panel.points([ensemble], [0.82], 3, size=4.5, tips=[f"ensemble: {number(ensemble)}"])
        panels.append(panel)
    caption = "The height of a member's dot means nothing; it keeps dots apart."
    legend = [("ensemble", 3, "dot"), ("a member", 4, "ring"), ("mean of the members", 0, "even")]
    return Figure("The ensemble beside its members", panels, compared, caption, legend)


def _heat(diversity: pd.DataFrame, members: pd.DataFrame) -> Figure:
    ids = [int(one) for one in numbers(members, "member")][:MOST_CELLS]
    count, place = len(ids), {one: i for i, one in enumerate(ids)}
    worst = float(numbers(diversity, "distance").max()) or 1.0
    every = max(1, -(-count // 12))
    ticks = tuple((place[one] + 0.5, str(one)) for one in ids[::every])
    flipped = tuple((count - at, text) for at, text in ticks)
    size = 300 if count > 4 else 230
    panel = Panel(
        Scale(0, count, ticks),
        Scale(0, count, flipped),
        "member",
        "member",
        width=size + 30,
        height=size,
        grid=False,
    )
    for row in records(diversity):
        i, j = place.get(int(row["one"])), place.get(int(row["other"]))
        if i is None or j is None:
            continue
        tip = f"{row['one']} and {row['other']}: {number(row['distance'])}"
        text = number(row["distance"], 2) if count <= 6 and i != j else ""
        panel.cell(j, j + 1, count - i - 1, count - i, float(row["distance"]) / worst, tip, text)
    what = (
        "share of rows with different predicted classes"
        if "accuracy" in members
        else "root mean square distance of the means"
    )
    caption = f"The stronger the colour, the further apart: {what}, up to {number(worst)}."
    if len(members) > MOST_CELLS:
        caption += f" The first {MOST_CELLS} of {len(members)} members."
    return Figure("How far members are apart", [panel], diversity, caption)
