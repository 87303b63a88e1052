"""Logs of human decisions: read with the line of each mistake, and put on the rows that they are about.

Shape letters: N rows, D decisions.
"""

import csv
import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.data._levels import MISSING, level_text
from bdl_train.data._stream import is_csv, read_table
from bdl_train.errors import UsageError, nearest, unknown_choice
from bdl_train.evaluation.rows import RowScores
from bdl_train.specs import TargetKind, TargetSpec

ACCEPTED, OVERRIDDEN, DEFERRED = "accepted", "overridden", "deferred"
WORDS = {"accept": ACCEPTED, "override": OVERRIDDEN, "defer": DEFERRED}


def read_decisions(path: str | Path) -> pd.DataFrame:
    """Read a log of decisions.

    Args:
        path: CSV or parquet with the columns `row` (row id, a whole number) and `action` (`accept`, `defer`, `override`
            or what was decided instead, e.g. the name of a class); `label` (the outcome that was seen later, may be
            missing), `by` and `time` may be there, and others are kept.

    Returns:
        Indexed by `line` of the file (of a parquet file: the number of the record, from 1): `row` int64, `action` text,
        `label` text or None, and the other columns as they are.

    Raises:
        UsageError: unreadable, no decision, a column is missing, or a cell is wrong; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"decisions={path} is not a file.")
    table = _csv_table(path) if is_csv(path) else read_table(path)
    if table.index.name is None:
        table.index = pd.RangeIndex(1, len(table) + 1, name="line")
    if table.empty:
        raise UsageError(f"{path} has no decisions: give each a line with row and action.")
    for name in ("row", "action"):
        if name not in table:
            raise UsageError(
                f"{path} lacks the column '{name}'.{nearest(name, map(str, table))} It has: "
                f"{', '.join(map(str, table.columns[:20]))}."
            )
    if "label" not in table:
        table["label"] = None
    lines = table.index.tolist()
    table["row"] = [_row_id(cell, path, line) for cell, line in zip(table["row"], lines, strict=True)]
    table["action"] = [_action(cell, path, line) for cell, line in zip(table["action"], lines, strict=True)]
    table["label"] = pd.Series([_text(cell) for cell in table["label"]], table.index, dtype=object)
    return table


def _csv_table(path: Path) -> pd.DataFrame:
    """All cells as text. Not by pandas, which cannot tell the line of a row."""
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    rows, lines = [], []
    try:
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t|", key=first.count), skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if not any(cells):
                    continue
                if len(cells) > len(header):
                    raise UsageError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} columns."
                    )
                rows.append(cells + [""] * (len(header) - len(cells)))
                lines.append(reader.line_num)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise UsageError(f"{path} has two columns named '{twice[0]}': rename one.")
    return pd.DataFrame(rows, pd.Index(lines, name="line"), header, dtype=object)


def _text(cell: Any) -> str | None:
    if cell is None or cell is pd.NA or cell != cell:
        return None
    text = level_text(cell)
    return None if text == MISSING else text


def _row_id(cell: Any, path: Path, line: int) -> int:
    try:
        return int(_text(cell) or "")
    except ValueError as error:
        raise UsageError(
            f"{path}, line {line}: row must be a row id, a whole number, got '{cell}'."
        ) from error


def _action(cell: Any, path: Path, line: int) -> str:
    text = _text(cell)
    if text is None:
        raise UsageError(
            f"{path}, line {line}: action is missing; write accept, defer, override or what was decided."
        )
    return text


@dataclass(frozen=True)
class Log:
    """Decisions `[D]` on known rows, one a row.

    Attributes:
        place: Positions of their rows.
        kind: ACCEPTED, OVERRIDDEN or DEFERRED.
        model, decided, label: Class indices or numbers; NaN where a decision or an outcome is not known.
    """

    place: np.ndarray
    kind: np.ndarray
    model: np.ndarray
    decided: np.ndarray
    label: np.ndarray


def _value(text: str, what: str, line: Any, target: TargetSpec) -> float:
    if target.kind is TargetKind.CLASS:
        if text in target.classes:
            return float(target.classes.index(text))
        known = target.classes if what == "label" else (*WORDS, *target.classes)
        raise UsageError(f"Decisions, line {line}: {unknown_choice(what, text, known)}")
    try:
        return float(text)
    except ValueError as error:
        others = "" if what == "label" else f"{', '.join(WORDS)} or "
        raise UsageError(f"Decisions, line {line}: {what} must be {others}a number, got '{text}'.") from error


def log_of(
    rows: RowScores, row_ids: np.ndarray, decisions: pd.DataFrame, target: TargetSpec, warnings: list[str]
) -> Log:
    place_of = {int(row): i for i, row in enumerate(row_ids)}
    places = np.array([place_of.get(int(row), -1) for row in decisions["row"]])
    unknown = places < 0
    if unknown.any():
        some = ", ".join(str(row) for row in decisions["row"][unknown][:5])
        warnings.append(
            f"{int(unknown.sum())} decisions are on rows that this part has not (row ids {some}): left out."
        )
    repeated = decisions["row"].duplicated(keep="last").to_numpy() & ~unknown
    if repeated.any():
        warnings.append(
            f"{int(repeated.sum())} decisions were followed by another on the same row: the last counts."
        )
    column = "prediction" if target.kind is TargetKind.CLASS else "mean"
    model, uncertainty = rows.columns[column].astype(np.float64), uncertainty_of(rows)
    broken = ~unknown & ~repeated & ~np.isfinite(uncertainty[places])
    if broken.any():
        warnings.append(f"{int(broken.sum())} decisions are on rows without a finite prediction: left out.")
    clash = [name for name in target.classes if name.lower() in WORDS]
    if clash:
        warnings.append(
            f"The action '{clash[0]}' is read as the word of the log, not as the class of that name."
        )
    kept = ~unknown & ~repeated & ~broken
    place, table = places[kept], decisions[kept]
    predicted = model[place]
    decided, kinds = np.full(len(place), np.nan), []
    for i, (line, action) in enumerate(zip(table.index, table["action"], strict=True)):
        word = WORDS.get(str(action).lower())
        if word is None:
            decided[i] = _value(str(action), "action", line, target)
            word = ACCEPTED if decided[i] == predicted[i] else OVERRIDDEN
        elif word == ACCEPTED:
            decided[i] = predicted[i]
        elif word == OVERRIDDEN and target.num_classes == 2:
            decided[i] = 1 - predicted[i]
        kinds.append(word)
    label = [
        math.nan if text is None else _value(text, "label", line, target)
        for line, text in zip(table.index, map(_text, table["label"]), strict=True)
    ]
    return Log(place, np.array(kinds, dtype=object), predicted, decided, np.array(label, np.float64))


def uncertainty_of(rows: RowScores) -> np.ndarray:
    return rows.columns["total_std" if rows.probs is None else "total"]
