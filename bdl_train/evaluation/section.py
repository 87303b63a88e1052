"""A chapter of an evaluation: what was found in words, its numbers as tables, or the reason why there are none."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.files import write_bytes, write_json
from bdl_train.runs import read_json

Level = Literal["good", "note", "warn", "empty"]
"""How a reader should take it: as it should be, plain information, look here, or there is nothing (see the reason)."""


@dataclass(frozen=True)
class Section:
    """One chapter.

    Attributes:
        key: Its file name, e.g. `slices`.
        title: For people.
        verdict: One or two sentences in words, with the numbers that carry them; the reason if it is empty.
        level: Of the verdict.
        tables: By name, each a plain table of numbers and texts; figures are drawn from them alone.
        warnings: What a reader must know beside the verdict (small slices, fallbacks and their reasons).
    """

    key: str
    title: str
    verdict: str
    level: Level = "note"
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def empty(cls, key: str, title: str, reason: str) -> "Section":
        """A chapter that could not be written, and why."""
        return cls(key, title, reason, "empty")


def section_or_reason(key: str, title: str, make: Callable[[], Section]) -> Section:
    """The section, or an empty one with the message if its input does not allow it: the others do not depend on it."""
    try:
        return make()
    except UsageError as error:
        return Section.empty(key, title, str(error))


def write_section(folder: Path, section: Section) -> list[str]:
    """Write `<key>.json` and `<key>.<table>.parquet` below `folder`; returns the file names, the json last."""
    files = []
    for name, table in section.tables.items():
        files.append(f"{section.key}.{name}.parquet")
        write_bytes(folder / files[-1], table.to_parquet(index=False))
    head = {
        "title": section.title,
        "verdict": section.verdict,
        "level": section.level,
        "warnings": list(section.warnings),
        "tables": list(section.tables),
    }
    files.append(f"{section.key}.json")
    write_json(folder / files[-1], head)
    return files


def read_section(folder: Path, key: str) -> Section:
    """The inverse of `write_section`.

    Raises:
        UsageError: missing or damaged.
    """
    head: dict[str, Any] = read_json(folder / f"{key}.json")
    try:
        texts = [head["title"], head["verdict"], *head["warnings"], *head["tables"]]
        if head["level"] not in get_args(Level) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"level {head['level']!r}, or a word that is no text")
        if not all(re.fullmatch(r"\w+", name) for name in head["tables"]):
            raise ValueError(f"tables {head['tables']!r}")
        tables = {name: pd.read_parquet(folder / f"{key}.{name}.parquet") for name in head["tables"]}
        return Section(key, head["title"], head["verdict"], head["level"], tables, tuple(head["warnings"]))
    except (KeyError, TypeError, OSError, ValueError) as error:
        raise UsageError(f"{folder / key}.json is damaged: {type(error).__name__} {error}.") from error
