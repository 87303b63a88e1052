"""The data: rows of each part, the target, the columns."""

from collections.abc import Iterator

import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import numbers, records, texts
from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import facts, folded, number, table_of
from bdl_train.evaluation.report.panel import rows_panel
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.section import Section

MOST_CLASSES = 30


def draw(section: Section) -> Iterator[Block]:
    """Sizes of the parts, shares of the classes or moments of the target, and the columns in a fold."""
    parts, target = section.tables["parts"], section.tables["target"]
    yield facts((f"{row['part']} rows", number(int(row["rows"]))) for row in records(parts))
    if "class" in target:
        yield _shares(target)
    else:
        yield table_of(target)
    if "columns" in section.tables:
        columns = section.tables["columns"]
        yield folded(f"The {len(columns)} input columns", table_of(columns), open_=len(columns) <= 12)


def _shares(target: pd.DataFrame) -> Figure:
    names = [name for name in target.columns if name != "class"]
    shown = target.head(MOST_CLASSES)
    x = Scale.over(shown[names].to_numpy(), zero=True)
    panel = rows_panel(texts(shown, "class"), x, xlabel="share of the rows", height=12 + 9 * len(names))
    for i in range(len(shown)):
        for j, name in enumerate(names):
            place = -i + (0.5 - (j + 0.5) / len(names)) * 0.62
            panel.flat_bars(place, float(numbers(shown, str(name))[i]), j, thick=7)
    caption = "" if len(target) <= MOST_CLASSES else f"The first {MOST_CLASSES} of {len(target)} classes."
    return Figure(
        "Classes of the target", [panel], target, caption, [(name, j, "bar") for j, name in enumerate(names)]
    )
