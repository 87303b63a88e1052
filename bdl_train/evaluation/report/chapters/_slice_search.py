"""The search for slices: differences on the half of the rows that was not searched."""

from collections.abc import Iterator

import numpy as np

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, texts
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import number
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section


def draw(section: Section) -> Iterator[Block]:
    """A row a slice that was found."""
    found = section.tables["found"]
    if not len(found):
        return
    adjusted = numbers(found, "p_adjusted")
    value, low, high = (numbers(found, name) for name in ("difference", "low", "high"))
    panel = rows_panel(
        texts(found, "slice"), Scale.over(value, low, high, [0.0]),
        xlabel="difference of the mean loss to the rest",
        right=[f"n {n:,}" for n in found["n_confirm"]], width=380,
    )  # fmt: skip
    panel.upright(0.0)
    places = -np.arange(len(found), dtype=float)
    panel.ranges(low, high, places)
    for i, sure in enumerate(numbers(found, "significant") > 0):
        panel.points(
            [value[i]],
            [places[i]],
            0,
            tips=[f"{number(value[i])}, adjusted p {number(adjusted[i], 2)}"],
            filled=sure,
        )
    caption = (
        "Slices were found on one half of the rows; what is shown is the other half, with 95 % intervals. Filled dots: "
        "worse beyond chance after adjusting. n: rows of the confirming half."
    )
    yield Figure("Slices that were found", [panel], found, caption)
