"""What a finished run came to, as tables and plots for a tracker; read from the files of its run directory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from bdl_train.errors import UsageError
from bdl_train.runs import RunDir, read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_BINS = 15


@dataclass(frozen=True)
class Table:
    """Named columns and rows of plain values.

    Attributes:
        columns: Names.
        rows: Each with a value a column.
        num_left_out: Rows that the file has beyond these.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    num_left_out: int = 0


def metrics_table(run: RunDir, name: str = "test") -> Table | None:
    """Every metric over all rows of an evaluation, with its interval, unit and meaning; None if there is none."""
    path = run.evaluation(name) / "metrics_detail.parquet"
    if not path.is_file():
        return None
    import pyarrow.parquet as parquet

    columns = ("key", "value", "low", "high", "unit", "meaning", "better", "n")
    stored = parquet.read_table(path)
    if "slice" in stored.column_names:  # those of slices are a table of the chapter on slices
        of_all = np.array(stored["slice"].to_pylist(), object) == "all"
        stored = stored.filter(of_all)
    kept = tuple(
        name for name in columns if name in stored.column_names
    )  # a run of an earlier version has fewer
    rows = stored.select(kept).to_pylist()
    return Table(kept, [tuple(row[name] for name in kept) for row in rows])


def members_table(run: RunDir) -> Table | None:
    """How every member ended; None if the run has no manifest yet."""
    if not run.manifest.is_file():
        return None
    columns = ("member", "status", "stack", "seed", "best_epoch", "reason")
    rows = [
        (one["id"], *(one.get(name) for name in columns[1:])) for one in read_json(run.manifest)["members"]
    ]
    return Table(columns, rows)


def plots(run: RunDir, name: str = "test") -> dict[str, bytes]:
    """Pictures by name, as PNG: how far the probabilities of an evaluation's rows can be trusted.

    Classes: a reliability diagram. Numbers: the histogram of the PIT, and what the central intervals cover.
    """
    path = run.evaluation(name) / "predictions.parquet"
    if not path.is_file():
        return {}
    import pyarrow.parquet as parquet

    stored = parquet.read_table(path)
    columns = {name: stored[name].to_numpy() for name in stored.column_names}
    if {"confidence", "correct"} <= set(columns):
        return {"reliability": _picture(lambda axes: _reliability(axes, columns))}
    if {"pit", "pit_below"} <= set(columns):
        return {
            "pit": _picture(lambda axes: _pit(axes, columns)),
            "coverage": _picture(lambda axes: _coverage(axes, columns)),
        }
    return {}


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and rows of every bin that holds any; bins as in `test/ece`: (k/15, (k+1)/15]."""
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    held = [bins == k for k in range(NUM_BINS)]
    return [
        (float(confidence[rows].mean()), float(correct[rows].mean()), int(rows.sum()))
        for rows in held
        if rows.any()
    ]


def coverage(pit_below: np.ndarray, pit: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Share of rows inside their central interval of each level, as in `test/coverage_95`."""
    inside = [(pit >= (1 - level) / 2) & (pit_below < (1 + level) / 2) for level in levels]
    return np.array([one.mean() for one in inside])


def _reliability(axes: "Axes", columns: Mapping[str, np.ndarray]) -> None:
    known = ~np.isnan(columns["confidence"].astype(float))
    confidence = columns["confidence"].astype(float)[known]
    bins = reliability(confidence, columns["correct"].astype(float)[known])
    sizes = [10 + 200 * count / max(1, len(confidence)) for _, _, count in bins]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.scatter([one[0] for one in bins], [one[1] for one in bins], s=sizes, zorder=2)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(f"reliability, {len(confidence):,} rows (area: rows in the bin)", fontsize=9)


def _pit(axes: "Axes", columns: Mapping[str, np.ndarray]) -> None:
    pit = columns["pit"][~np.isnan(columns["pit"])]
    axes.hist(pit, bins=NUM_BINS, range=(0, 1), density=True)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(xlabel="PIT: P(Y ≤ y)", ylabel="density", xlim=(0, 1))
    axes.set_title(f"probability integral transform, {len(pit):,} rows", fontsize=9)


def _coverage(axes: "Axes", columns: Mapping[str, np.ndarray]) -> None:
    known = ~np.isnan(columns["pit"])
    levels = np.linspace(0.02, 0.98, 49)
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot(levels, coverage(columns["pit_below"][known], columns["pit"][known], levels))
    axes.set(xlabel="level of the central interval", ylabel="rows inside", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"coverage, {int(known.sum()):,} rows", fontsize=9)


def _picture(draw: Callable[["Axes"], None]) -> bytes:
    return png_of(lambda figure: draw(figure.subplots()))


def png_of(draw: Callable[["Figure"], None]) -> bytes:
    """What is drawn into an empty figure of 4.5 by 4 inches, which may be given another size."""
    from matplotlib.figure import Figure  # without pyplot: no backend, no global state

    figure = Figure(figsize=(4.5, 4), dpi=120, layout="constrained")
    draw(figure)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def planned_stacks(run: RunDir) -> dict[str, list[int]]:
    """Member numbers by stack id, of the run's plan; empty where it cannot be read."""
    try:
        return {str(one["id"]): [int(m) for m in one["members"]] for one in read_json(run.plan)["stacks"]}
    except (UsageError, KeyError, TypeError, ValueError):
        return {}
