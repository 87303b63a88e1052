"""Single rows: images as images, rows of a table as cards."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.chapters import Block
from bdl_train.evaluation.report.columns import records
from bdl_train.evaluation.report.html import Html, facts, folded, is_number, number, picture, table_of, tag
from bdl_train.evaluation.section import Section

TITLES = {"uncertain": "The most uncertain rows", "wrong": "The rows that were predicted worst"}
MOST_CARDS, MOST_IMAGES, MOST_INPUTS = 6, 16, 12


def draw(section: Section) -> Iterator[Block]:
    """Each table as a grid."""
    for name, table in section.tables.items():
        yield tag("h4", TITLES.get(name, name.replace("_", " ")))
        yield _images(table) if "pixels" in table else _cards(table)
        yield folded(f"Numbers of these {len(table)} rows", table_of(table))


def image_of(pixels: bytes, shape: str) -> np.ndarray:
    """Stored pixels `C,H,W` as `[H, W]` or `[H, W, 3]` uint8."""
    dims = [int(one) for one in str(shape).split(",")]
    image = np.frombuffer(pixels, np.uint8).reshape(dims)
    return image[0] if len(image) != 3 else image.transpose(1, 2, 0)


def _images(table: pd.DataFrame) -> Html:
    cells = []
    for row in records(table.head(MOST_IMAGES)):
        wrong = row["true"] != row["predicted"] if "true" in row else False
        words = _headline(row)
        alt = f"row {row['row']}, {words}"
        cells.append(
            tag(
                "div", picture(image_of(row["pixels"], row["shape"]), alt), tag("span", words),
                tag("span", f"row {number(row['row'])} · NLL {number(row.get('nll'), 3)}", class_="dim"),
                class_="thumb wrong" if wrong else "thumb",
            )
        )  # fmt: skip
    return tag("div", *cells, class_="thumbs")


def _headline(row: dict[Any, Any]) -> str:
    if "true" in row:
        sure = f" ({100 * row['confidence']:.0f} %)"
        if row["true"] == row["predicted"]:
            return f"{row['true']}, rightly{sure}"
        return f"{row['true']}, taken for {row['predicted']}{sure}"
    return f"{number(row['y'])}, predicted {number(row['mean'])}"


def _cards(table: pd.DataFrame) -> Html:
    cards = []
    for row in records(table.head(MOST_CARDS)):
        inputs = {str(name)[6:]: value for name, value in row.items() if str(name).startswith("input ")}
        listed = [(name, _value(value)) for name, value in inputs.items()]
        more = len(listed) - MOST_INPUTS
        cards.append(
            tag(
                "article", tag("h5", _headline(row)),
                tag("p", _scores(row), class_="dim"), facts(listed[:MOST_INPUTS]),
                tag("p", f"and {more} more inputs, see the numbers", class_="dim") if more > 0 else None,
                class_="example",
            )
        )  # fmt: skip
    return tag("div", *cards, class_="cards")


def _value(text: Any) -> str:
    """Cells are texts; long decimals are cut."""
    try:
        return number(float(text)) if "." in str(text) and len(str(text)) > 8 else str(text)
    except ValueError:
        return str(text)


def _scores(row: dict[Any, Any]) -> str:
    names = {"epistemic": "epistemic", "nll": "NLL", "error": "error", "total_std": "standard deviation"}
    told = [f"{name} {number(row[key], 3)}" for key, name in names.items() if is_number(row.get(key))]
    if "lower_95" in row:
        told.append(f"95 % interval {number(row['lower_95'], 3)} to {number(row['upper_95'], 3)}")
    return f"row {number(row['row'])} · " + " · ".join(told)
