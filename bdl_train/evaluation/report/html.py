"""HTML whose texts are escaped by construction: only `tag` and `join` make markup, everything else is text."""

import base64
import html
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

MOST_ROWS = 200
"""Rows of a table that are written into the page."""
LONG = 36
"""Letters of a cell from which its text may wrap."""
VOID = frozenset({"meta", "img", "br", "col"})


class Html(str):
    """Markup that needs no more escaping."""

    __slots__ = ()


def tag(element: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Texts and attribute values are escaped; a child of None is left out.

    Args:
        element: Its name.
        children: Markup (`Html`), or anything else as text.
        attributes: `class_` is `class`, other underscores are hyphens; None or False leaves one out, True gives its
            name alone.
    """
    words = [element]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Html(start if element in VOID else f"{start}{join(children)}</{element}>")


def join(children: Iterable[Any]) -> Html:
    """Markup and texts, one after another."""
    return Html("".join(_escaped(child) for child in children))


def _escaped(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, list | tuple):
        return join(child)
    return html.escape(str(child))


# --- numbers ------------------------------------------------------------------------------------------------------


def number(value: Any, digits: int = 4) -> str:
    """A number of so many significant digits, whole ones with separators; a dash if there is none."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    value = float(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 10 ** max(digits, 3) and size < 1e9:
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}"
    text = "0" if float(text) == 0 else text
    return text.replace("-", "−")


def interval(low: Any, high: Any) -> str:
    """Both edges, or nothing if one is missing."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{number(low, 3)} to {number(high, 3)}"


def seconds(value: float) -> str:
    """A duration in two units at most."""
    if value < 60:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


# --- tables -------------------------------------------------------------------------------------------------------


def table_of(frame: pd.DataFrame, most: int = MOST_ROWS) -> Html:
    """A frame as a table, its first rows if they are many; columns of bytes are left out.

    Args:
        frame: Of numbers and texts.
        most: Rows that are shown.
    """
    columns = [
        name for name in frame.columns if not any(isinstance(one, bytes) for one in frame[name].head(1))
    ]
    numeric = {name for name in columns if pd.api.types.is_numeric_dtype(frame[name])}
    head = [
        tag("th", str(name).replace("_", " "), class_="n" if name in numeric else None) for name in columns
    ]
    body = []
    for values in frame[columns].head(most).itertuples(index=False, name=None):
        cells = [
            tag(
                "td",
                number(value) if is_number(value) or value is None else _text(value),
                class_=_kind(value),
            )
            for value in values
        ]
        body.append(tag("tr", *cells))
    found = [tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body))]
    if len(frame) > most:
        found.append(
            tag(
                "p",
                f"The first {most} of {len(frame):,} rows; all of them are in the parquet file.",
                class_="dim",
            )
        )
    return tag("div", *found, class_="scroll", tabindex="0")


def _kind(value: Any) -> str | None:
    if is_number(value):
        return "n"
    return "long" if isinstance(value, str) and len(value) > LONG else None


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return number(value)
    return "–" if value is pd.NA or value is pd.NaT else str(value)


def folded(summary: str, *children: Any, open_: bool = False) -> Html:
    """Children that a click shows."""
    return tag("details", tag("summary", summary), *children, open=open_)


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and values, a small table of two columns."""
    return tag(
        "dl", *[tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs], class_="facts"
    )


def picture(pixels: np.ndarray, alt: str) -> Html:
    """An image inside the page.

    Args:
        pixels: `[H, W]` or `[H, W, 3]` uint8.
        alt: What it shows, for people who do not see it.
    """
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return tag("img", src=f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}", alt=alt)
