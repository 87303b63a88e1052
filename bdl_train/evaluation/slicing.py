"""From words to slices, the subgroups of a table's rows.

    sex                     one slice a level; a number of many values is cut into quartiles, `age 29..37`
    age>65, sex==Female     comparisons (= == != > >= < <=), ranges `age in 18..25` with both ends
    sex==Female & age>65    rows that fulfil both
    race×sex, sex*age>65    every combination that has rows

A name of a column or of a level may hold blanks, hyphens, dots and signs: the longest known name wins, and quotes
around a value keep it whole. The name of a slice is itself an expression for it (but for pooled levels).

Shape letters: N rows.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from bdl_train.data._levels import MISSING, cells_of, level_text, to_levels, to_numbers
from bdl_train.errors import UsageError, nearest

MOST_LEVELS, MOST_DISTINCT, MOST_COMBINATIONS = 50, 8, 500
"""Levels of a column before the rare ones are pooled; values of a number before it is cut; slices of a crossing."""

Piece = tuple[str, np.ndarray]
"""A condition in words and its rows `[N]`."""

_CONNECTOR = re.compile(r"\s*[&×*]\s*")
_OPERATOR = re.compile(r"\s*(==|!=|>=|<=|≠|≥|≤|=|>|<)\s*|\s+(in)\s+|\s+(?=[-+.\d]\S*\.\.)")
_QUOTED = re.compile(r"\"([^\"]*)\"|'([^']*)'")
_PLAIN = {"==": "=", "≠": "!=", "≥": ">=", "≤": "<=", None: "in"}


@dataclass(frozen=True, eq=False)
class Slice:
    """Some of the rows.

    Attributes:
        name: In words, `sex=Female & age>65`.
        mask: `[N]` bool.
        column: The columns it is made of, joined by ×.
    """

    name: str
    mask: np.ndarray
    column: str

    def __len__(self) -> int:
        return int(self.mask.sum())


def parse_slices(expressions: Sequence[str], table: pd.DataFrame) -> tuple[list[Slice], list[str]]:
    """The slices of all expressions, and what a reader must know about them.

    Args:
        expressions: See the module's grammar; a wrong one becomes a warning and does not hinder the others.
        table: Raw cells, N rows.

    Returns:
        Slices in the order of the expressions, those without rows among them, and warnings.

    Raises:
        UsageError: no expression is right.
    """
    listed = [expressions] if isinstance(expressions, str) else list(expressions)
    if not listed:
        raise UsageError("slices is empty: list a column or a comparison such as age>65.")
    columns = Columns(table)
    found: dict[str, Slice] = {}
    warnings = []
    for expression in listed:
        try:
            slices, notes = _parse(str(expression).strip(), columns)
        except UsageError as error:
            warnings.append(f"slices: '{expression}': {error}")
            continue
        for one in slices:
            if one.name in found:
                notes.append(f"'{one.name}' is listed twice and counted once.")
            elif one.mask.all():
                notes.append(
                    f"'{one.name}' selects all {len(table)} rows, so there is nothing to compare with."
                )
            found.setdefault(one.name, one)
        warnings += [f"slices: {note}" for note in notes]
    if not found:
        raise UsageError(" ".join(warnings))
    return list(found.values()), warnings


@dataclass(frozen=True, eq=False)
class Column:
    """A column's cells, as levels and, if every cell is a number or missing, as numbers.

    Attributes:
        name: Without surrounding blanks.
        levels: Texts of the levels.
        codes: `[N]` the level of each cell.
        missing: `[N]` bool.
        numbers: `[N]` float64 with NaN where missing, or None.
    """

    name: str
    levels: list[str]
    codes: np.ndarray
    missing: np.ndarray
    numbers: np.ndarray | None

    @classmethod
    def read(cls, name: str, cells: pd.Series) -> "Column":
        codes, levels = to_levels(cells)
        missing = codes == levels.index(MISSING)
        try:
            numbers = None if missing.all() else to_numbers(cells)
        except (ValueError, TypeError):
            numbers = None
        return cls(name, levels, codes, missing, numbers)

    def pieces(self) -> tuple[list[Piece], list[str]]:
        """One a level or quartile, which hold every row once; and notes."""
        values = np.empty(0) if self.numbers is None else np.unique(self.numbers[~self.missing])
        if len(values) > MOST_DISTINCT:
            pieces, notes = self.quartiles(), []
        else:
            pieces, notes = self.level_pieces()
        if self.missing.any():
            pieces.append((f"{self.name}=missing", self.missing))
        return pieces, notes

    def level_pieces(self) -> tuple[list[Piece], list[str]]:
        """One a level that is not missing, rare ones pooled, by number or else by alphabet; and notes."""
        counts = Counter(self.codes[~self.missing].tolist())
        if len(counts) > MOST_LEVELS and 2 * len(counts) > int((~self.missing).sum()):
            raise UsageError(
                f"the column '{self.name}' has {len(counts)} different texts in {len(self.codes)} rows, like an "
                "identifier: no slice of it would hold rows enough. Leave it out of `slices`."
            )
        kept = [code for code, _ in counts.most_common(MOST_LEVELS)]
        kept.sort(key=self._place)
        pieces = [(f"{self.name}={self._word(self.levels[code])}", self.codes == code) for code in kept]
        if len(kept) == len(counts):
            return pieces, []
        pooled = ~np.isin(self.codes, kept) & ~self.missing
        pieces.append((f"{self.name}=other", pooled))
        return pieces, [
            f"{self.name} has {len(counts)} levels: the {MOST_LEVELS} most frequent are slices, the others "
            f"({int(pooled.sum())} rows) are pooled as '{self.name}=other'."
        ]

    def quartiles(self) -> list[Piece]:
        """Up to four ranges of equal mass, named by numbers that hold exactly their rows."""
        assert self.numbers is not None
        present = self.numbers[~self.missing]
        values = np.unique(present)
        # Edges are values of the data, so none is split, and a value that fills a quartile has one of its own.
        edges = np.unique(np.quantile(present, (0.25, 0.5, 0.75), method="inverted_cdf"))
        starts = np.unique(np.concatenate([[0], np.searchsorted(values, edges, side="right"), [len(values)]]))
        margin = 1e-3 * float(values[-1] - values[0]) if np.isfinite(values[[0, -1]]).all() else 0.0
        pieces = []
        for start, stop in pairwise(starts.tolist()):
            low, high = float(values[start]), float(values[stop - 1])
            below = float(np.nextafter(values[start - 1], np.inf)) if start else low - margin
            above = float(np.nextafter(values[stop], -np.inf)) if stop < len(values) else high + margin
            edges_text = f"{short_number(low, below, low)}..{short_number(high, high, above)}"
            name = f"{self.name}={level_text(low)}" if low == high else f"{self.name} {edges_text}"
            pieces.append((name, (self.numbers >= low) & (self.numbers <= high)))
        return pieces

    def condition(self, operator: str, value: str, quoted: bool) -> tuple[Piece, str]:
        """The rows that fulfil a comparison, and why there may be none; missing cells fulfil none but `=missing`.

        Raises:
            UsageError: the order of texts is asked for, or the value is no number.
        """
        if operator in ("=", "!="):
            return self._equals(operator, value, quoted)
        if self.numbers is None:
            raise UsageError(
                f"column '{self.name}' holds text, which only = and != compare; change `slices`."
            )
        if operator == "in":
            left, _, right = value.partition("..")
            low, high = _number(left, "a range such as 18..25"), _number(right, "a range such as 18..25")
            if low > high:
                raise UsageError(f"the range {value} ends before it begins; change `slices`.")
            return (
                f"{self.name} {value.replace(' ', '')}",
                (self.numbers >= low) & (self.numbers <= high),
            ), ""
        compare = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}[operator]
        mask = compare(self.numbers, _number(value, f"a number after {operator}"))
        return (f"{self.name}{operator}{value}", mask), ""

    def _equals(self, operator: str, value: str, quoted: bool) -> tuple[Piece, str]:
        missing = self.means_missing(value, quoted)
        level = MISSING if missing else level_text(value)
        word = "missing" if missing else self._word(level)
        try:
            wanted = self.codes == self.levels.index(level)
        except ValueError:
            wanted = np.zeros(len(self.codes), bool)
        if self.numbers is not None:
            wanted = wanted | (self.numbers == _number_or_nan(value))
        hint = (
            f" {self.name} has no value '{value}'.{nearest(value, self.levels)}" if not wanted.any() else ""
        )
        if operator == "=":
            return (f"{self.name}={word}", wanted), hint
        known = ~self.missing  # whether a missing cell differs is not known
        return (f"{self.name}!={word}", ~wanted & known), hint

    def means_missing(self, value: str, quoted: bool) -> bool:
        """Whether a value stands for missing cells: `missing`, or a marker such as ?, NA or empty quotes."""
        if not quoted and value == "missing":
            return bool(self.missing.any()) or value not in self.levels
        return level_text(value) == MISSING

    def _place(self, code: int) -> tuple[float, str]:
        return float(np.nan_to_num(_number_or_nan(self.levels[code]))), self.levels[code]

    def _word(self, level: str) -> str:
        """A level's text, in quotes where it would be taken for missing or pooled cells."""
        return f"'{level}'" if level in ("missing", "other") else level


class Columns:
    """The columns of a table by name, each read when it is first asked for."""

    def __init__(self, table: pd.DataFrame):
        """Refuse a table without rows or with two columns of one name."""
        if len(table) == 0:
            raise UsageError("slices need rows, and this table has none: choose another `part`.")
        if not table.columns.is_unique:
            raise UsageError("slices need columns of different names: rename those that share one.")
        self._table = table
        self._labels = {str(label).strip(): label for label in table.columns}
        self._read: dict[str, Column] = {}
        self.names = sorted(self._labels, key=len, reverse=True)
        """The longest first."""

    def __getitem__(self, name: str) -> Column:
        if name not in self._read:
            self._read[name] = Column.read(name, cells_of(self._table, self._labels[name]))
        return self._read[name]


def _parse(text: str, columns: Columns) -> tuple[list[Slice], list[str]]:
    """The slices of one expression: the product of its terms."""
    terms: list[list[Piece]] = []
    names, notes, hints = [], [], ""
    place = 0
    while True:
        column, place = _column_at(text, place, columns)
        names.append(column.name)
        operator = _OPERATOR.match(text, place)
        if operator is None:
            pieces, found = column.pieces()
            notes += found
        else:
            value, quoted, place = _value_at(text, operator.end(), column)
            sign = operator[1] or operator[2]
            piece, hint = column.condition(_PLAIN.get(sign, sign), value, quoted)
            pieces, hints = [piece], hints + hint
            if sign not in ("=", "==") and column.missing.any() and not column.means_missing(value, quoted):
                notes.append(
                    f"'{piece[0]}' leaves out {int(column.missing.sum())} rows without {column.name}."
                )
        terms.append(pieces)
        connector = _CONNECTOR.match(text, place)
        if connector is None:
            break
        place = connector.end()
    column_text = "×".join(dict.fromkeys(names))
    product, num_empty = _product(terms)
    if not product:
        notes.append(f"'{text}' selects no row.{hints}")
        name = " & ".join(pieces[0][0] for pieces in terms) if max(map(len, terms)) == 1 else text
        return [Slice(name, np.zeros(len(terms[0][0][1]), bool), column_text)], notes
    if num_empty:
        notes.append(f"'{text}' has {num_empty} combinations without rows, which are left out.")
    if len(product) > MOST_COMBINATIONS:
        notes.append(
            f"'{text}' has {len(product)} slices: the {MOST_COMBINATIONS} with the most rows are kept."
        )
        product = sorted(product, key=lambda piece: -int(piece[1].sum()))[:MOST_COMBINATIONS]
    return [Slice(name, mask, column_text) for name, mask in product], notes


def _product(terms: list[list[Piece]]) -> tuple[list[Piece], int]:
    """Every combination that has rows, and how many have none."""
    product, total = [piece for piece in terms[0] if piece[1].any()], len(terms[0])
    for pieces in terms[1:]:
        joined = [(f"{a} & {b}", mask & other) for a, mask in product for b, other in pieces]
        product, total = [piece for piece in joined if piece[1].any()], total * len(pieces)
    return product, total - len(product)


def _column_at(text: str, place: int, columns: Columns) -> tuple[Column, int]:
    for name in columns.names:
        end = place + len(name)
        if text.startswith(name, place) and (_ends(text, end) or _OPERATOR.match(text, end)):
            return columns[name], end
    word = re.split(r"[&×*<>=!≠≥≤]|\sin\s", text[place:])[0].strip()
    if not word:
        raise UsageError("a column's name was expected at its end or between two signs; change `slices`.")
    raise UsageError(f"the table has no column '{word}'.{nearest(word, columns.names)} Change `slices`.")


def _value_at(text: str, place: int, column: Column) -> tuple[str, bool, int]:
    """A value, whether it stood in quotes, and where it ends."""
    quoted = _QUOTED.match(text, place)
    if quoted and _ends(text, quoted.end()):
        return quoted[1] if quoted[1] is not None else quoted[2], True, quoted.end()
    known = [level for level in column.levels if level and text.startswith(level, place)]
    known = [level for level in known if _ends(text, place + len(level))]
    value = max(known, key=len) if known else re.split(r"\s*[&×*]", text[place:])[0]
    if not value.strip():
        raise UsageError(f"a value was expected after '{text[:place].strip()}'; change `slices`.")
    return value.strip(), False, place + len(value)


def _ends(text: str, place: int) -> bool:
    """Whether a term ends here."""
    return not text[place:].strip() or _CONNECTOR.match(text, place) is not None


def short_number(near: float, low: float, high: float) -> str:
    """The shortest decimal text of a number close to `near` from `low` to `high`, both included."""
    for digits in range(1, 17):
        number = float(f"{near:.{digits}g}")
        if low <= number <= high:
            return level_text(number)
    return level_text(float(near))


def _number(text: str, expected: str) -> float:
    number = _number_or_nan(text)
    if np.isnan(number):
        raise UsageError(f"{expected} was expected, '{text.strip()}' came; change `slices`.")
    return number


def _number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
