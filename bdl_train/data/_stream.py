"""Reading tables, whole or in chunks of bounded memory.

Every cell of a CSV file is read as text and becomes a number or a category by the transform, never by a guess
per chunk: a column that is whole in one chunk and text in another means the same in both.
"""

import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from bdl_train.data._levels import MARKERS
from bdl_train.errors import UsageError, nearest

CSV_SUFFIXES = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".txt", ".txt.gz")
PARQUET_SUFFIXES = (".parquet", ".pq")
_BUFFER_BYTES = 2**18  # per column


def is_csv(path: Path) -> bool:
    """Whether a file name says CSV; otherwise it says parquet.

    Raises:
        UsageError: another ending.
    """
    name = path.name.lower()
    if name.endswith(CSV_SUFFIXES):
        return True
    if name.endswith(PARQUET_SUFFIXES):
        return False
    known = ", ".join((*CSV_SUFFIXES, *PARQUET_SUFFIXES))
    raise UsageError(f"{path} is of unknown type: its name must end in one of {known}.")


def read_table(path: Path) -> pd.DataFrame:
    """A whole table; the cells of a CSV file stay text.

    Raises:
        UsageError: unreadable, or without rows.
    """
    with _readable(path):
        if is_csv(path):
            positions, options = _csv_options(path)
            table = _select(pd.read_csv(path, **options), positions)
        else:
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                table = file.read(columns=_parquet_columns(file)).to_pandas(ignore_metadata=True)
    if len(table) == 0:
        raise UsageError(f"{path} has no rows.")
    return table


def read_table_in_chunks(
    path: str | Path, columns: Sequence[str] | None, chunk_rows: int
) -> Iterator[pd.DataFrame]:
    """The rows of a table in order, `chunk_rows` at a time, in memory that does not grow with the file.

    Args:
        path: CSV (also compressed with gzip) or parquet.
        columns: The columns to read, by name; others are skipped. None reads all of them.
        chunk_rows: Rows of one chunk; the last one may be shorter.

    Returns:
        Tables indexed by row number in the file. Cells of a CSV file are text (`TableTransform.apply` takes
        them).

    Raises:
        UsageError: missing or unreadable file, or a missing column, before the first chunk; malformed rows
            when they are reached.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is not a file.")
    with _readable(path):
        if is_csv(path):
            positions, options = _csv_options(path)
            names = list(positions)
        else:
            import pyarrow.parquet as pq

            with pq.ParquetFile(path) as file:
                names, positions, options = _parquet_columns(file), {}, None
    wanted = list(names if columns is None else columns)
    absent = [name for name in wanted if name not in names]
    if absent:
        raise UsageError(
            f"{path} lacks {len(absent)} of {len(wanted)} columns: {', '.join(absent[:8])}."
            f"{nearest(absent[0], names)} It has: {', '.join(names[:20])}."
        )
    if options is None:
        return _parquet_chunks(path, wanted, chunk_rows)
    return _csv_chunks(path, {name: positions[name] for name in wanted}, chunk_rows, options)


def _csv_chunks(
    path: Path, wanted: dict[str, int], chunk_rows: int, options: dict[str, Any]
) -> Iterator[pd.DataFrame]:
    with _readable(path):
        reader: Any = pd.read_csv(path, chunksize=chunk_rows, **options)
        with reader:
            for chunk in reader:
                yield _select(chunk, wanted)


def _select(table: pd.DataFrame, positions: dict[str, int]) -> pd.DataFrame:
    # Not `usecols`: with it pandas no longer sees that a stray comma has shifted the cells of a row.
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes surplus fields for a row index
        raise pd.errors.ParserError("its rows have more fields than its header")
    return table.iloc[:, list(positions.values())].set_axis(list(positions), axis=1)


def _parquet_chunks(path: Path, wanted: list[str], chunk_rows: int) -> Iterator[pd.DataFrame]:
    import pyarrow.parquet as pq

    start = 0
    # Some writers make one row group of the whole file: without a buffer size, arrow reads all of it at once.
    with _readable(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        for batch in file.iter_batches(batch_size=chunk_rows, columns=wanted):
            chunk = batch.to_pandas(ignore_metadata=True)[wanted]
            yield chunk.set_axis(pd.RangeIndex(start, start + len(chunk)), axis=0)
            start += len(chunk)


def _csv_options(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Positions of the columns by name, and the arguments of `pandas.read_csv`.

    The separator is the one that splits the header most. A column without a name is the row index that pandas
    writes, and is no column.
    """
    header, separator = [], ","
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    for candidate in (",", ";", "\t", "|"):
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            row = next((row for row in csv.reader(file, delimiter=candidate) if row), [])
        if len(row) > len(header):
            header, separator = row, candidate
    names = [name.strip() for name in header]
    if not any(names):
        raise UsageError(f"{path} is empty.")
    twice = [name for i, name in enumerate(names) if name and name in names[:i]]
    if twice:
        raise UsageError(f"{path} has two columns named '{twice[0]}': rename one.")
    return {name: i for i, name in enumerate(names) if name}, {
        "sep": separator,
        "dtype": str,
        "keep_default_na": False,
        "na_values": sorted(MARKERS),
        "skipinitialspace": True,
        "skip_blank_lines": len(names) > 1,  # in a single column a blank line is a missing value
        "encoding": "utf-8-sig",
    }


def _parquet_columns(file: Any) -> list[str]:
    """Column names without the row index that pandas stores beside them."""
    return [name for name in file.schema_arrow.names if not name.startswith("__index_level_")]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the parsers' errors into one message that names the file."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except (pd.errors.ParserError, csv.Error, pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        words = str(error).strip(" .\n")
        raise UsageError(f"{path} cannot be read: {words}.") from error
