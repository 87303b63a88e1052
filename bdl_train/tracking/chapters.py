"""The chapters of an evaluation as their files have them: words, and plain tables. What is damaged says so, alone."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdl_train.errors import UsageError
from bdl_train.runs import RunDir, read_json
from bdl_train.tracking.outcome import Table

SECTIONS = "sections"
MOST_ROWS = 1000
"""Of a table that a tracker is handed."""
MOST_BYTES = 1 << 20
"""Of the words of a chapter; a larger file is no chapter."""
LEVELS = ("good", "note", "warn", "empty")
NAME = re.compile(r"\w[\w.+-]*")
"""What evaluations, chapters and tables may be called: no name leads out of its folder."""


@dataclass(frozen=True)
class Chapter:
    """What one analysis found, in words.

    Attributes:
        key: Of its files.
        title: For people.
        verdict: Of the analysis; why there is none if the level is `empty`, what is wrong if it is `damaged`.
        level: `good`, `note`, `warn` (look here), `empty` or `damaged`.
        warnings: What else a reader must know.
        tables: Names of its tables.
    """

    key: str
    title: str
    verdict: str
    level: str
    warnings: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


def evaluations(run: RunDir) -> list[str]:
    """The evaluations of a run, its own one first, then those that were asked for, by name."""
    try:
        found = [one.name for one in (run.path / "evaluation").iterdir() if one.is_dir()]
    except OSError:
        return []
    return sorted((name for name in found if NAME.fullmatch(name)), key=lambda name: (name != "test", name))


def chapters(run: RunDir, name: str = "test") -> list[Chapter]:
    """All chapters of an evaluation in the order in which they were written; [] if it has none.

    A chapter that cannot be read is there, with the level `damaged` and the reason in one line.
    """
    return [_chapter(path) for path in chapter_files(run, name)]


def chapter_files(run: RunDir, name: str) -> list[Path]:
    """The files with the words of each chapter, in the order in which they were written."""
    folder = run.evaluation(name)
    try:
        found = [path for path in (folder / SECTIONS).glob("*.json") if NAME.fullmatch(path.stem)]
        written = list(read_json(folder / "hashes.json")) if found else []
    except (OSError, UsageError, TypeError):
        written = []
    place = {file: i for i, file in enumerate(written)}
    return sorted(found, key=lambda path: (place.get(f"{SECTIONS}/{path.name}", len(place)), path.name))


def chapter_table(
    run: RunDir, chapter: str, table: str, *, name: str = "test", most: int = MOST_ROWS
) -> Table:
    """The first rows of a chapter's table as plain values; columns of bytes are left out.

    Raises:
        UsageError: it is missing or damaged.
    """
    columns, rows, total = _stored(run, chapter, table, name, most)
    plain = [name for name in columns if not any(isinstance(row[name], bytes) for row in rows)]
    return Table(
        tuple(plain),
        [tuple(_plain(row[name]) for name in plain) for row in rows],
        num_left_out=total - len(rows),
    )


def chapter_rows(
    run: RunDir, chapter: str, table: str, *, name: str = "test", most: int = MOST_ROWS
) -> list[dict[str, Any]]:
    """The first rows as they are stored, bytes too.

    Raises:
        UsageError: it is missing or damaged.
    """
    return _stored(run, chapter, table, name, most)[1]


def _chapter(path: Path) -> Chapter:
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, {MOST_BYTES:,} at most were expected")
        head = json.loads(path.read_text(encoding="utf-8"))
        title, verdict, level = (_text(head[name]) for name in ("title", "verdict", "level"))
        if level not in LEVELS:
            raise ValueError(f"its level is '{level}', expected one of {', '.join(LEVELS)}")
        tables = _texts(head["tables"])
        if wrong := [one for one in tables if not NAME.fullmatch(one)]:
            raise ValueError(f"'{wrong[0]}' is no name of a table")
        return Chapter(path.stem, title, verdict, level, _texts(head["warnings"]), tables)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return Chapter(path.stem, path.stem, f"{path.name} cannot be read: {why}.", "damaged")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {type(value).__name__}")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list of texts, got {type(value).__name__}")
    return tuple(_text(one) for one in value)


def _stored(
    run: RunDir, chapter: str, table: str, name: str, most: int
) -> tuple[Sequence[str], list[dict[str, Any]], int]:
    """Names of columns, the first rows, and how many there are in all."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = run.evaluation(name) / SECTIONS / f"{chapter}.{table}.parquet"
    try:
        with parquet.ParquetFile(path) as file:
            batch = next(file.iter_batches(batch_size=most), None)
            rows = [] if batch is None else batch.to_pylist()
            return file.schema_arrow.names, rows, file.metadata.num_rows
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing: evaluate the run again.") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is damaged ({why}): evaluate the run again.") from error


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
