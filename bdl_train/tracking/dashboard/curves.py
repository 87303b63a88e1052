"""Learning curves of an ensemble from its event files, read as they grow and kept as sums, not as events.

A run of 1,000 members writes a million numbers. Lines with one number are parsed by pyarrow's CSV reader, which is
written in C++ and knows nothing of JSON: such a line has five fields between commas, whatever else has more.
"""

import json
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

CURVES = ("train/nll", "val/nll", "val/stack_nll", "val/disagreement")
_NAMES = ("time", "member", "step", "key", "value")
# What stands in front of each value in a line of `EventWriter`.
_BEFORE = {"member": ' "member": ', "step": ' "step": ', "key": ' "key": "', "value": ' "value": '}


class Curve:
    """One quantity by step: how many members reported it, their mean, spread and range (Welford, merged by Chan)."""

    def __init__(self) -> None:
        self._rows: dict[
            int, list[float]
        ] = {}  # step: count, mean, sum of squared deviations, least, largest

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Add numbers `[n]` reported at steps `[n]`; NaN says nothing."""
        known = np.isfinite(values)
        unique, at = np.unique(steps[known], return_inverse=True)
        values = values[known]
        count = np.bincount(at, minlength=len(unique))
        mean = np.bincount(at, values, len(unique)) / np.maximum(count, 1)
        squares = np.bincount(at, (values - mean[at]) ** 2, len(unique))
        low, high = np.full(len(unique), np.inf), np.full(len(unique), -np.inf)
        np.minimum.at(low, at, values)
        np.maximum.at(high, at, values)
        for row in zip(unique, count, mean, squares, low, high, strict=True):
            step, *new = (float(one) for one in row)
            self._rows[int(step)] = merged(self._rows.get(int(step)), new)

    def points(self, most: int) -> dict[str, list[float]]:
        """At most so many points, evenly over the steps: step, count, mean, std, low, high."""
        steps = sorted(self._rows)
        if len(steps) > most:
            steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))]
        rows = [self._rows[step] for step in steps]
        return {
            "step": [float(step) for step in steps],
            "count": [row[0] for row in rows],
            "mean": [row[1] for row in rows],
            "std": [(row[2] / row[0]) ** 0.5 for row in rows],
            "low": [row[3] for row in rows],
            "high": [row[4] for row in rows],
        }


def merged(one: list[float] | None, other: list[float]) -> list[float]:
    """(count, mean, M2, least, largest) of both sets of numbers (Chan et al. 1979, eq. 2.1)."""
    if one is None:
        return other
    n = one[0] + other[0]
    delta = other[1] - one[1]
    return [
        n,
        one[1] + delta * other[0] / n,
        one[2] + other[2] + delta * delta * one[0] * other[0] / n,
        min(one[3], other[3]),
        max(one[4], other[4]),
    ]


def parse(
    block: bytes, take: Callable[[dict[str, Any]], None]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Whole lines of an event file.

    Args:
        block: Ends with a newline.
        take: Called with every event that is no number of a curve, in the order of time.

    Returns:
        By key: members `[n]` (-1 = the whole stack), steps `[n]`, values `[n]`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    rest: list[str] = []

    def keep(row: Any) -> str:
        rest.append(row.text)
        return "skip"

    try:
        table = csv.read_csv(
            BytesIO(block),
            csv.ReadOptions(column_names=list(_NAMES), block_size=1 << 22),
            csv.ParseOptions(delimiter=",", quote_char=False, invalid_row_handler=keep),
            csv.ConvertOptions(column_types=dict.fromkeys(_NAMES, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid:  # bytes that are no text
        for line in block.splitlines():
            _take(line, take)
        return {}
    text = {name: table[name].combine_chunks() for name in _NAMES}
    key = pc.utf8_slice_codeunits(text["key"], len(_BEFORE["key"]), -1)  # pyright: ignore
    is_curve = pc.is_in(key, value_set=pa.array(CURVES))  # pyright: ignore
    whole = pc.and_(is_curve, pc.ends_with(text["value"], "}"))  # pyright: ignore
    for name, before in _BEFORE.items():
        whole = pc.and_(whole, pc.starts_with(text[name], before))  # pyright: ignore
    others: list[tuple[str, dict[str, Any]]] = []
    plain = [",".join(line[name] for name in _NAMES) for line in table.filter(pc.invert(whole)).to_pylist()]  # pyright: ignore
    for line in [*plain, *rest]:
        _take(line, lambda event, line=line: others.append((line, event)))
    # Lines of five fields and lines of more come apart; of one millisecond their place in the file tells the order.
    when = Counter(event["time"] for _, event in others)
    for _, event in sorted(
        others,
        key=lambda one: (one[1]["time"], block.find(one[0].encode()) if when[one[1]["time"]] > 1 else 0),
    ):
        take(event)
    found = {}
    key, text = pc.filter(key, whole), {name: pc.filter(one, whole) for name, one in text.items()}  # pyright: ignore
    member = _number(pc.utf8_slice_codeunits(text["member"], len(_BEFORE["member"])), -1)  # pyright: ignore
    step = _number(pc.utf8_slice_codeunits(text["step"], len(_BEFORE["step"])), -1)  # pyright: ignore
    value = _number(pc.utf8_slice_codeunits(text["value"], len(_BEFORE["value"]), -1), np.nan)  # pyright: ignore
    for name in pc.unique(key).to_pylist():  # pyright: ignore
        rows = pc.equal(key, name).to_numpy(zero_copy_only=False)  # pyright: ignore
        found[name] = member[rows].astype(int), step[rows].astype(int), value[rows]
    return found


def _number(text: Any, otherwise: float) -> np.ndarray:
    """Numbers of an array of text; what is none becomes another one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_number = pc.match_substring_regex(text, r"^-?\d+(\.\d+)?([eE][-+]?\d+)?$")  # pyright: ignore
    clean = pc.if_else(is_number, text, pa.scalar("nan"))  # pyright: ignore
    numbers = pc.cast(clean, pa.float64()).to_numpy(zero_copy_only=False)
    return np.where(np.isnan(numbers), otherwise, numbers)


def _take(line: str | bytes, take: Callable[[dict[str, Any]], None]) -> None:
    try:
        event = json.loads(line)
    except ValueError:
        return  # half a line of a process that was killed
    known = isinstance(event, dict) and set(event).issuperset(_NAMES)
    if known and isinstance(event["time"], int | float):
        take(event)


def curve_of_member(path: Path, member: int, most: int) -> dict[str, list[list[float]]]:
    """Steps and values of one member's own curves, from its stack's file: `{key: [[step, value], ...]}`."""
    needle = f'"member": {member},'.encode()
    with path.open("rb") as file:
        lines = b"".join(line for line in file if needle in line and line.endswith(b"\n"))
    curves = {}
    for key, (members, steps, values) in parse(lines, lambda event: None).items():
        own = (members == member) & np.isfinite(values)
        rows = sorted(dict(zip(steps[own].tolist(), values[own].tolist(), strict=True)).items())
        at = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int)) if rows else []
        curves[key] = [[float(rows[i][0]), float(rows[i][1])] for i in at]
    return curves
