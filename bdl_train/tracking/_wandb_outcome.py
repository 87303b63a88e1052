"""What a run came to, as rows for wandb: plots and images first, which wait for no server, then tables."""

import logging
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.tracking._wandb_service import first_line, library
from bdl_train.tracking.chapter_plots import draw_plot, example_images, plots_of
from bdl_train.tracking.chapters import Chapter, chapter_table, chapters, evaluations
from bdl_train.tracking.outcome import Table, members_table, metrics_table, plots

log = logging.getLogger(__name__)

CALIBRATION = frozenset({"reliability", "pit", "coverage"})


def outcome_rows(run: RunDir) -> Iterator[dict[str, Any]]:
    """Rows to log, one by one: `plot/...`, `table/...` and `evaluation/...`.

    The run's own evaluation has these names; those of another one, such as `new`, end in its name: `plot_new/...`.
    What is damaged is left out, with one line in the log.
    """
    names = evaluations(run)
    found = {name: chapters(run, name) for name in names}
    for name in names:
        yield from _plots(run, name, found[name])
    for name in names:
        yield from _images(run, name, found[name])
    plain: dict[str, Table | None] = {}
    _or_say("test", lambda: plain.update({"table/members": members_table(run)}))
    for name in names:
        key = f"table{_end(name)}/metrics"
        _or_say(name, lambda key=key, name=name: plain.update({key: metrics_table(run, name)}))
    yield from ({key: _table(table)} for key, table in plain.items() if table is not None)
    for name in names:
        yield from _tables(run, name, found[name])


def _end(name: str) -> str:
    return "" if name == "test" else f"_{name}"


def _plots(run: RunDir, name: str, found: list[Chapter]) -> Iterator[dict[str, Any]]:
    from PIL import Image

    wandb = library()
    pictures: dict[str, bytes] = {}
    for plot in plots_of({one.key: one.tables for one in found}):
        _or_say(name, lambda plot=plot: pictures.update({plot: draw_plot(run, name, plot)}))
    if not pictures.keys() & CALIBRATION:  # no chapter on it
        _or_say(name, lambda: pictures.update(plots(run, name)))
    if pictures:
        yield {
            f"plot{_end(name)}/{plot}": wandb.Image(Image.open(BytesIO(png)))
            for plot, png in pictures.items()
        }


def _images(run: RunDir, name: str, found: list[Chapter]) -> Iterator[dict[str, Any]]:
    wandb = library()
    for table in [table for one in found if one.key == "examples" for table in one.tables]:
        shown: list[Any] = []
        _or_say(name, lambda table=table, shown=shown: shown.extend(example_images(run, name, table)))
        if shown:
            images = [wandb.Image(pixels, caption=caption) for pixels, caption in shown]
            yield {f"examples{_end(name)}/{table}": images}


def _tables(run: RunDir, name: str, found: list[Chapter]) -> Iterator[dict[str, Any]]:
    rows, tables = [], {}
    for one in found:
        said = []
        for table in one.tables:
            said.append(f"{table} (cannot be read)")

            def read(one: Chapter = one, table: str = table, said: list[str] = said) -> None:
                content = chapter_table(run, one.key, table, name=name)
                said[-1] = table
                if content.num_left_out:
                    shown = len(content.rows)
                    said[-1] += f" (the first {shown:,} of {shown + content.num_left_out:,} rows)"
                tables[f"evaluation{_end(name)}/{one.key}/{table}"] = content

            _or_say(name, read)
        warnings = "\n".join(one.warnings)
        rows.append((one.key, one.title, one.level, one.verdict, warnings, ", ".join(said)))
        if one.level == "damaged":
            _say(name, one.verdict)
    if rows:
        columns = ("chapter", "title", "level", "verdict", "warnings", "tables")
        yield {f"evaluation{_end(name)}/chapters": _table(Table(columns, rows))}
    for key, table in tables.items():
        yield {key: _table(table)}


def _table(table: Table) -> Any:
    return library().Table(
        columns=list(table.columns), data=[list(row) for row in table.rows], allow_mixed_types=True
    )


def _or_say(name: str, read: Callable[[], None]) -> None:
    """Read something; what is damaged is one line in the log, and stops nothing else."""
    try:
        read()
    except UsageError as error:
        _say(name, str(error))
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are of these
        _say(name, f"{type(error).__name__} {first_line(error)}")


def _say(name: str, what: str) -> None:
    log.warning("wandb is told less of the evaluation '%s': %s", name, what)
