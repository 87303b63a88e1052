"""A figure: panels, how to read them, and the numbers behind them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bdl_train.evaluation.report.html import Html, folded, join, table_of, tag
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.strokes import DASHES, NUM_STYLES, SHAPES, shape


@dataclass(frozen=True)
class Figure:
    """Panels with a caption, what their marks mean, and the numbers behind them.

    Attributes:
        title: What it shows.
        panels: One or more.
        numbers: Everything that is drawn.
        caption: How to read it.
        legend: Name, style and mark (`line`, `dot`, `both`, `ring`, `bar`, `band`, `even`, `error`) of each series.
        small: Many panels beside each other, also on a phone.
        wide: Over the whole width, though it has one panel.
    """

    title: str
    panels: Sequence[Panel]
    numbers: pd.DataFrame
    caption: str = ""
    legend: Sequence[tuple[str, int, str]] = ()
    small: bool = False
    wide: bool = False

    @property
    def is_wide(self) -> bool:
        return self.wide or self.small or len(self.panels) > 1

    def html(self, key: str) -> Html:
        drawn = [
            panel.svg(
                f"{key}-{i}",
                f"{self.title}{f': {panel.title}' if panel.title else ''}",
                self.caption or self.title,
            )
            for i, panel in enumerate(self.panels)
        ]
        return tag(
            "figure",
            tag("h4", self.title),
            tag("div", *drawn, class_="panels small" if self.small else "panels"),
            legend(self.legend) if self.legend else None,
            tag("figcaption", self.caption) if self.caption else None,
            folded("Numbers behind this figure", table_of(self.numbers)),
            class_="wide" if self.is_wide else None,
        )


def legend(entries: Sequence[tuple[str, int, str]]) -> Html:
    """What colours, dashes and shapes mean."""
    items = []
    for name, style, mark in entries:
        drawn: list[Html] = []
        colour = f"c{style % NUM_STYLES}"
        if mark in ("line", "both"):
            drawn.append(
                tag(
                    "path",
                    d="M1 6H27",
                    class_=f"line {colour}",
                    stroke_dasharray=DASHES[style % NUM_STYLES] or None,
                )
            )
        if mark in ("dot", "both"):
            drawn.append(tag("path", d=shape(SHAPES[style % NUM_STYLES], 14, 6, 3.8), class_=f"dot {colour}"))
        if mark == "ring":
            drawn.append(tag("path", d=shape("circle", 14, 6, 3.8), class_=f"dot {colour} open"))
        if mark in ("bar", "band"):
            drawn.append(tag("path", d="M2 1H26V11H2Z", class_=f"{mark} {colour}"))
        if mark in ("even", "thin", "error"):
            drawn.append(tag("path", d="M1 6H27", class_=f"{mark} {colour}"))
        items.append(
            tag("span", tag("svg", *drawn, viewBox="0 0 28 12", class_="swatch", aria_hidden="true"), name)
        )
    return tag("p", *items, class_="legend")


def drawn(blocks: Iterable[Any], key: str) -> Html:
    """Figures and other markup, with ids that begin with `key`; figures of one panel in a row share the width."""
    found: list[Html] = []
    narrow: list[Html] = []
    for i, block in enumerate(blocks):
        if isinstance(block, Figure) and not block.is_wide:
            narrow.append(block.html(f"{key}-{i}"))
            continue
        found += _paired(narrow)
        narrow = []
        found.append(block.html(f"{key}-{i}") if isinstance(block, Figure) else block)
    return join([*found, *_paired(narrow)])


def _paired(figures: list[Html]) -> list[Html]:
    return [tag("div", *figures, class_="pair")] if len(figures) > 1 else figures
