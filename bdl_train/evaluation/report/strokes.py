"""Paths of lines and points, and the styles that tell series apart."""

import math

import numpy as np

CHAR = 6.3
"""Mean width of a letter of the axes' font."""
DASHES = ("", "6 3", "2 2.5", "8 3 2 3", "1 3", "10 4", "4 2 1 2")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus", "down")
NUM_STYLES = 7


def shape(name: str, x: float, y: float, r: float) -> str:
    """The path of a point's shape around a place."""
    if name == "circle":
        half = f"a{rounded(r)} {rounded(r)} 0 1 0"
        return f"M{rounded(x - r)} {rounded(y)}{half} {rounded(2 * r)} 0{half} {rounded(-2 * r)} 0Z"
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)],
        "down": [(0, 1.2), (1.1, -0.9), (-1.1, -0.9)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
        "cross": [
            (-1.1, -0.7), (-0.7, -1.1), (0, -0.4), (0.7, -1.1), (1.1, -0.7), (0.4, 0),
            (1.1, 0.7), (0.7, 1.1), (0, 0.4), (-0.7, 1.1), (-1.1, 0.7), (-0.4, 0),
        ],
        "plus": [
            (-0.35, -1.3), (0.35, -1.3), (0.35, -0.35), (1.3, -0.35), (1.3, 0.35), (0.35, 0.35),
            (0.35, 1.3), (-0.35, 1.3), (-0.35, 0.35), (-1.3, 0.35), (-1.3, -0.35), (-0.35, -0.35),
        ],
    }[name]  # fmt: skip
    return "M" + "L".join(f"{rounded(x + a * r)} {rounded(y + b * r)}" for a, b in corners) + "Z"


def short(text: str, most: int) -> str:
    """A text of so many letters at most."""
    return text if len(text) <= most else text[: max(most - 1, 1)].rstrip() + "…"


def path(x: np.ndarray, y: np.ndarray) -> str:
    pieces, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(a + b):
            pen = "M"
            continue
        pieces.append(f"{pen}{rounded(a)} {rounded(b)}")
        pen = "L"
    return "".join(pieces)


def rounded(value: float) -> str:
    """One decimal, none if it is 0; far outside the page nothing can be seen."""
    return f"{min(max(round(float(value), 1), -9999), 99999):g}"
