"""Runs side by side: runs that differ only in their split are one row, mean ± standard error over splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.evaluation.table import HEADLINE

REPEATS = ("data.split", "seed")
VARIES = (*REPEATS, "data.root", "name", "output_dir", "plan_only", "check_prior")
"""Keys that runs of one row may differ in. Runs of other clusters or trackers are the same experiment too."""
IGNORED_GROUPS = ("cluster", "tracking")

TARGET = "._target_"
EMPTY = "–"


@dataclass(frozen=True)
class FinishedRun:
    """A run's name, its resolved config and its flat metrics."""

    name: str
    config: Mapping[str, Any]
    metrics: Mapping[str, float | None]


@dataclass(frozen=True)
class Experiment:
    """Runs that differ only in split or seed; the name holds the settings in which it differs from the others."""

    name: str
    runs: list[FinishedRun]


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a config; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compare(runs: Sequence[FinishedRun], metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """One row an experiment: the settings in which experiments differ, the number of runs, mean and SE of metrics.

    Args:
        runs: Finished runs.
        metrics: Keys to show; None = the headline ones that every run has.

    Returns:
        Columns: differing settings (dotted keys; a group whose class differs is one column of its name, and its
        settings are there if they differ among runs of one class), `runs`, and for each metric `<key>` (mean) and
        `<key> se` (sample standard deviation / √runs; NaN for one run).
    """
    groups, columns = _grouped(runs)
    if metrics is None:
        common = [key for key in runs[0].metrics if all(key in run.metrics for run in runs)]
        shared = [key for key in common if key.rpartition("/")[2] in HEADLINE] or common
    else:
        shared = list(metrics)
    rows = []
    for i, members in enumerate(groups):
        row: dict[str, Any] = {name: texts[i] for name, texts in columns.items()}
        row["runs"] = len(members)
        for key in shared:
            values = np.array(
                [np.nan if run.metrics.get(key) is None else run.metrics[key] for run in members], float
            )
            row[key] = values.mean()
            row[f"{key} se"] = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        rows.append(row)
    return pd.DataFrame(rows)


def experiments(runs: Sequence[FinishedRun]) -> list[Experiment]:
    """The experiments among runs, one a row of `compare`; the names are different."""
    groups, columns = _grouped(runs)
    if len(columns) == 1:
        names = list(next(iter(columns.values())))
    else:
        names = [
            ", ".join(f"{key}={texts[i]}" for key, texts in columns.items() if texts[i] != EMPTY)
            or members[0].name
            for i, members in enumerate(groups)
        ]
    if len(set(names)) < len(names):
        names = [f"{name} ({members[0].name})" for name, members in zip(names, groups, strict=True)]
    return [Experiment(name, members) for name, members in zip(names, groups, strict=True)]


def repeated(runs: Sequence[FinishedRun]) -> list[list[str]]:
    """Names of runs that are the same down to split and seed, so that the mean would count one result twice."""
    groups: dict[str, list[str]] = {}
    for run in runs:
        flat = flatten(run.config)
        label = repr((sorted(_identity(run).items()), [flat.get(key) for key in REPEATS]))
        groups.setdefault(label, []).append(run.name)
    return [names for names in groups.values() if len(names) > 1]


def _grouped(runs: Sequence[FinishedRun]) -> tuple[list[list[FinishedRun]], dict[str, list[str]]]:
    """Runs of each experiment, and the columns of the settings in which experiments differ."""
    groups: dict[str, list[FinishedRun]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        flat = _identity(run)
        label = repr(sorted(flat.items()))
        groups.setdefault(label, []).append(run)
        settings[label] = flat
    return list(groups.values()), _differing(list(settings.values()))


def _identity(run: FinishedRun) -> dict[str, Any]:
    ignored = tuple(f"{group}." for group in IGNORED_GROUPS)
    flat = flatten(run.config).items()
    return {key: value for key, value in flat if key not in VARIES and not key.startswith(ignored)}


def _differing(flats: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Column name to one text an experiment, for the settings in which experiments differ."""
    columns: dict[str, list[str]] = {}
    for key in sorted({key for flat in flats for key in flat}):
        if not _differs(key, flats):
            continue
        name = key.removesuffix(TARGET)
        if name != key:
            targets = [str(flat[key]) if key in flat else EMPTY for flat in flats]
            texts = _short(targets)
        else:
            texts = [_plain(flat[key]) if key in flat else EMPTY for flat in flats]
        # A part that is null in some experiments has its class in others: two keys, one column.
        before = columns.get(name, [EMPTY] * len(flats))
        columns[name] = [old if new == EMPTY else new for old, new in zip(before, texts, strict=True)]
    return columns


def _differs(key: str, flats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a setting differs among experiments whose groups around it have the same class."""
    *around, _ = key.removesuffix(TARGET).split(".")
    owners = [f"{path}{TARGET}" for path in accumulate(around, "{}.{}".format)]
    values: dict[str, set[str]] = {}
    for flat in flats:
        same = repr([flat.get(owner) for owner in owners])
        values.setdefault(same, set()).add(repr(flat[key]) if key in flat else EMPTY)
    return any(len(found) > 1 for found in values.values())


def _short(targets: Sequence[str]) -> list[str]:
    """Our modules by name, other classes by name; longer where two would read the same."""
    ways = (
        [
            target.split(".")[-2] if target.startswith("bdl_train.") else target.split(".")[-1]
            for target in targets
        ],
        [target.split(".")[-1] for target in targets],
    )
    return next((way for way in ways if len(set(way)) == len(set(targets))), list(targets))


def _plain(value: Any) -> str:
    return "null" if value is None else str(value)


def to_text(table: pd.DataFrame) -> pd.DataFrame:
    """The same with `mean ± se` cells, for people; columns without any value are left out."""
    shown = pd.DataFrame(index=table.index)
    for column in table.columns:
        if column.endswith(" se") or not table[column].notna().to_numpy().any():
            continue
        if f"{column} se" in table.columns:
            pairs = zip(table[column], table[f"{column} se"], strict=True)
            shown[column] = [
                EMPTY if np.isnan(mean) else f"{mean:.3f}" if np.isnan(se) else f"{mean:.3f} ± {se:.3f}"
                for mean, se in pairs
            ]
        else:
            shown[column] = table[column].astype(str)
    return shown


def to_markdown(table: pd.DataFrame) -> str:
    """`to_text` as a markdown table."""
    shown = to_text(table)
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + " --- |" * len(shown.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in shown.itertuples(index=False)]
    return "\n".join(lines) + "\n"


def show(table: pd.DataFrame, title: str) -> None:
    """Print the table; experiments are the columns when that is narrower."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = to_text(table).T
    grid = Table(
        title=escape(title), title_justify="left", show_edge=False, pad_edge=False, show_header=False
    )
    grid.add_column(style="bold", no_wrap=True)
    for _ in shown.columns:
        grid.add_column(justify="right", overflow="fold")
    for name, row in shown.iterrows():
        grid.add_row(escape(str(name)), *(escape(str(cell)) for cell in row))
    Console(highlight=False).print(grid)
