"""One panel of axes and marks as SVG, readable at the width of a phone, coloured by the style sheet.

A panel is drawn in units of about one pixel of a phone. Series differ in colour (Okabe & Ito 2008), in dashes and in
the shape of their points, so that they stay apart in grey. Equal numbers give equal bytes.

Shape letters: N points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bdl_train.evaluation.report.html import Html, tag
from bdl_train.evaluation.report.scale import Scale
from bdl_train.evaluation.report.strokes import CHAR, DASHES, NUM_STYLES, SHAPES, path, rounded, shape, short


@dataclass
class Panel:
    """Axes, and marks on them in the order they were added.

    Attributes:
        x, y: Scales; `y` grows upwards.
        xlabel, ylabel: With units.
        title: Above the axes; may be empty.
        width, height: Of all of it.
        labels: Texts of rows in place of the ticks of y, first on top; their places are 0, 1, 2 ...
    """

    x: Scale
    y: Scale
    xlabel: str = ""
    ylabel: str = ""
    title: str = ""
    width: float = 360
    height: float = 250
    marks: list[Html] = field(default_factory=list)
    left: float = 0
    outside: list[Html] = field(default_factory=list)
    grid: bool = True

    def __post_init__(self) -> None:
        if not self.left:
            longest = max((len(text) for _, text in self.y.ticks), default=0)
            self.left = max(26.0, 12 + CHAR * longest)
        self.top = (20.0 if self.title else 6.0) + (18.0 if self.ylabel else 0.0)
        self.bottom = 22.0 + (17.0 if self.xlabel else 0.0)
        self.right = 12.0

    @property
    def inner(self) -> tuple[float, float]:
        return self.width - self.left - self.right, self.height - self.top - self.bottom

    def px(self, values: Any) -> np.ndarray:
        return np.atleast_1d(self.x.at(values)) * self.inner[0]

    def py(self, values: Any) -> np.ndarray:
        return (1 - np.atleast_1d(self.y.at(values))) * self.inner[1]

    # --- marks ---

    def line(self, x: Any, y: Any, style: int = 0, *, class_: str = "line", dashed: bool = True) -> None:
        """A line through N points, broken where one is not finite."""
        dash = DASHES[style % NUM_STYLES] if dashed else ""
        self.marks.append(
            tag(
                "path",
                d=path(self.px(x), self.py(y)),
                class_=f"{class_} c{style % NUM_STYLES}",
                stroke_dasharray=dash or None,
            )
        )

    def steps(self, left: Any, right: Any, heights: Any, style: int = 0) -> None:
        """The outline of a histogram."""
        x = np.column_stack([left, right]).ravel()
        self.line(x, np.repeat(np.asarray(heights, float), 2), style)

    def band(self, x: Any, low: Any, high: Any, style: int = 0, class_: str = "band") -> None:
        """The area between two curves of N points."""
        low, high = np.asarray(low, float), np.asarray(high, float)
        there = np.isfinite(low) & np.isfinite(high) & np.isfinite(np.asarray(x, float))
        if there.sum() < 2:
            return
        px, top, below = self.px(x)[there], self.py(high)[there], self.py(low)[there]
        d = path(np.r_[px, px[::-1]], np.r_[top, below[::-1]]) + "Z"
        self.marks.append(tag("path", d=d, class_=f"{class_} c{style % NUM_STYLES}"))

    def bars(
        self, left: Any, right: Any, heights: Any, style: int = 0, *, base: float = 0.0, class_: str = "bar"
    ) -> None:
        """Bars from `base` up, each between its edges."""
        x0, x1, y = self.px(left), self.px(right), self.py(heights)
        floor = float(self.py(base)[0])
        pieces = [
            f"M{rounded(a + 0.4)} {rounded(floor)}V{rounded(t)}H{rounded(b - 0.4)}V{rounded(floor)}Z"
            for a, b, t in zip(x0, x1, y, strict=True)
            if math.isfinite(t)
        ]
        self.marks.append(tag("path", d="".join(pieces), class_=f"{class_} c{style % NUM_STYLES}"))

    def flat_bars(
        self, row: float, value: float, style: int = 0, *, base: float = 0.0, thick: float = 11
    ) -> None:
        """One horizontal bar at the place of a row."""
        a, b = sorted((float(self.px(base)[0]), float(self.px(value)[0])))
        y = float(self.py(row)[0])
        self.marks.append(
            tag(
                "rect",
                x=rounded(a),
                y=rounded(y - thick / 2),
                width=rounded(max(b - a, 0.5)),
                height=rounded(thick),
                class_=f"bar c{style % NUM_STYLES}",
            )
        )

    def error_bars(self, x: Any, low: Any, high: Any, style: int = 0, *, class_: str = "error") -> None:
        """Vertical intervals."""
        px, a, b = self.px(x), self.py(low), self.py(high)
        d = "".join(
            f"M{rounded(p)} {rounded(u)}V{rounded(v)}"
            for p, u, v in zip(px, a, b, strict=True)
            if math.isfinite(p + u + v)
        )
        self.marks.append(tag("path", d=d, class_=f"{class_} c{style % NUM_STYLES}"))

    def ranges(self, low: Any, high: Any, y: Any, style: int = 0, *, class_: str = "error") -> None:
        """Horizontal intervals."""
        a, b, py = self.px(low), self.px(high), self.py(y)
        d = "".join(
            f"M{rounded(u)} {rounded(p)}H{rounded(v)}"
            for u, v, p in zip(a, b, py, strict=True)
            if math.isfinite(p + u + v)
        )
        self.marks.append(tag("path", d=d, class_=f"{class_} c{style % NUM_STYLES}"))

    def points(
        self,
        x: Any,
        y: Any,
        style: int = 0,
        *,
        size: float = 3.6,
        tips: Sequence[str] | None = None,
        filled: bool = True,
        mark: str | None = None,
    ) -> None:
        """One shape a point, of its style or `mark`, with a text that hovering shows."""
        for i, (px, py) in enumerate(zip(self.px(x), self.py(y), strict=True)):
            if math.isfinite(px + py):
                tip = None if tips is None else tag("title", tips[i])
                class_ = f"dot c{style % NUM_STYLES}" + ("" if filled else " open")
                self.marks.append(
                    tag(
                        "path",
                        tip,
                        d=shape(mark or SHAPES[style % NUM_STYLES], float(px), float(py), size),
                        class_=class_,
                    )
                )

    def cloud(self, x: Any, y: Any, style: int = 0) -> None:
        """Many small points as one path."""
        px, py = self.px(x), self.py(y)
        d = "".join(
            f"M{rounded(a)} {rounded(b)}h0" for a, b in zip(px, py, strict=True) if math.isfinite(a + b)
        )
        self.marks.append(tag("path", d=d, class_=f"cloud c{style % NUM_STYLES}"))

    def across(self, y: float, class_: str = "even") -> None:
        """A horizontal line over the whole width."""
        p = rounded(float(self.py(y)[0]))
        self.marks.append(tag("path", d=f"M0 {p}H{rounded(self.inner[0])}", class_=class_))

    def upright(self, x: float, class_: str = "even") -> None:
        """A vertical line over the whole height."""
        p = rounded(float(self.px(x)[0]))
        self.marks.append(tag("path", d=f"M{p} 0V{rounded(self.inner[1])}", class_=class_))

    def cell(
        self, left: float, right: float, low: float, high: float, share: float, tip: str, text: str = ""
    ) -> None:
        """A cell of a heat map; `share` in [0, 1] is how strong it is."""
        (a, b), (u, v) = self.px([left, right]), self.py([high, low])
        self.marks.append(
            tag(
                "rect",
                tag("title", tip),
                x=rounded(a),
                y=rounded(u),
                width=rounded(b - a),
                height=rounded(v - u),
                class_="heat c0",
                fill_opacity=rounded(0.04 + 0.96 * share),
            )
        )
        if text:
            self.marks.append(
                tag(
                    "text",
                    text,
                    x=rounded((a + b) / 2),
                    y=rounded((u + v) / 2 + 4),
                    text_anchor="middle",
                    class_="on" if share > 0.6 else "off",
                )
            )

    def note(self, x: float, y: float, text: str, *, anchor: str = "start", dy: float = 4) -> None:
        """A text at a place."""
        a, b = float(self.px(x)[0]), float(self.py(y)[0])
        self.marks.append(tag("text", text, x=rounded(a), y=rounded(b + dy), text_anchor=anchor))

    # --- the whole ---

    def svg(self, key: str, name: str, description: str) -> Html:
        """The panel as an element.

        Args:
            key: Unique in the page.
            name: Its title for screen readers.
            description: What can be seen.
        """
        wide, high = self.inner
        drawn: list[Any] = []
        if self.title:
            drawn.append(tag("text", short(self.title, int(self.width / 7)), x=0, y=14, class_="head"))
        if self.ylabel:
            drawn.append(
                tag(
                    "text",
                    short(self.ylabel, int(self.width / CHAR)),
                    x=0,
                    y=rounded(self.top - 11),
                    class_="label",
                )
            )
        if self.xlabel:
            drawn.append(
                tag(
                    "text",
                    short(self.xlabel, int(self.width / CHAR)),
                    x=rounded(self.width - self.right),
                    y=rounded(self.height - 4),
                    text_anchor="end",
                    class_="label",
                )
            )
        lines = []
        last = -math.inf
        for value, text in self.x.ticks:
            p = float(self.px(value)[0])
            if not -0.5 <= p <= wide + 0.5:
                continue
            if self.grid:
                lines.append(f"M{rounded(p)} 0V{rounded(high)}")
            half = CHAR * len(text) / 2
            if p - half > last + 4:
                place = min(max(self.left + p, half), self.width - half)
                drawn.append(
                    tag(
                        "text",
                        text,
                        x=rounded(place),
                        y=rounded(self.height - self.bottom + 15),
                        text_anchor="middle",
                    )
                )
                last = p + half
        for value, text in self.y.ticks:
            p = float(self.py(value)[0])
            if not -0.5 <= p <= high + 0.5:
                continue
            if self.grid:
                lines.append(f"M0 {rounded(p)}H{rounded(wide)}")
            drawn.append(
                tag("text", text, x=rounded(self.left - 6), y=rounded(self.top + p + 4), text_anchor="end")
            )
        # A nested element cuts off what lies outside the axes; 5 units of air keep points on the edge whole.
        plot = tag(
            "svg",
            tag("g", tag("path", d="".join(lines), class_="grid"), *self.marks, transform="translate(5 5)"),
            x=rounded(self.left - 5), y=rounded(self.top - 5), width=rounded(wide + 10), height=rounded(high + 10),
        )  # fmt: skip
        return tag(
            "svg",
            tag("title", name, id=f"{key}-t"), tag("desc", description, id=f"{key}-d"), *drawn, plot, *self.outside,
            viewBox=f"0 0 {rounded(self.width)} {rounded(self.height)}", role="img", aria_labelledby=f"{key}-t {key}-d",
            class_="panel", style=f"--w:{rounded(self.width)}",
        )  # fmt: skip


def rows_panel(
    labels: Sequence[str],
    x: Scale,
    *,
    xlabel: str = "",
    title: str = "",
    right: Sequence[str] | None = None,
    width: float = 360,
    height: float = 24,
) -> Panel:
    """A panel with a row for each label, the first on top at place 0; long labels stand above their row.

    Args:
        labels: Of the rows.
        x: Of the values.
        xlabel, title: As of a panel.
        right: A short text at the right end of each row, such as its support.
        width: Of all of it.
        height: Of a row.
    """
    count = len(labels)
    longest = max((len(one) for one in labels), default=0)
    above = longest > 20
    height = height + 12 if above else height
    panel = Panel(
        x, Scale(-(count - 0.45), 0.55, ()), xlabel=xlabel, title=title, width=width, height=0,
        left=8 if above else 10 + 6.6 * longest,
    )  # fmt: skip
    panel.right = 10 if right is None else 14 + CHAR * max((len(one) for one in right), default=0)
    panel.height = panel.top + panel.bottom + height * count
    for i, label in enumerate(labels):
        at = panel.top + float(panel.py(-i)[0])
        if above:
            text, place = short(label, int((width - panel.right) / 6.2)), at - height / 2 + 8
            panel.outside.append(tag("text", tag("title", label), text, x=8, y=rounded(place), class_="row"))
        else:
            panel.outside.append(
                tag(
                    "text",
                    label,
                    x=rounded(panel.left - 8),
                    y=rounded(at + 4),
                    text_anchor="end",
                    class_="row",
                )
            )
        if right is not None:
            panel.outside.append(
                tag("text", right[i], x=rounded(width - 2), y=rounded(at + 4), text_anchor="end")
            )
    return panel
