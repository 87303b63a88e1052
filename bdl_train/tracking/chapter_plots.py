"""Pictures of an evaluation for a tracker, drawn from the tables of its chapters alone.

Shape letters: R rows of a table.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.tracking.chapters import chapter_rows
from bdl_train.tracking.outcome import png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Columns = Mapping[str, np.ndarray]
"""By name `[R]`."""
MOST_ROWS = 20_000
MOST_SLICES, MOST_LOSSES = 30, 6
MOST_PANELS = 12
MOST_EXAMPLES = 16


@dataclass(frozen=True)
class Plot:
    """How a picture is made.

    Attributes:
        chapter: Whose tables it needs.
        tables: Their names.
        draw: Gets a figure, and the tables in this order.
    """

    chapter: str
    tables: tuple[str, ...]
    draw: Callable[..., None]


def plots_of(there: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the pictures that these tables by chapter allow."""
    return [key for key, plot in PLOTS.items() if set(plot.tables) <= set(there.get(plot.chapter, ()))]


def draw_plot(run: RunDir, name: str, plot: str) -> bytes:
    """A picture as PNG.

    Raises:
        UsageError: a table is missing or damaged, or lacks a column.
    """
    one = PLOTS[plot]
    tables = [
        _columns(chapter_rows(run, one.chapter, table, name=name, most=MOST_ROWS)) for table in one.tables
    ]
    try:
        return png_of(lambda figure: one.draw(figure, *tables))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"'{plot}' cannot be drawn from the tables of '{one.chapter}': {type(error).__name__} {error}."
        ) from error


def _columns(rows: list[dict[str, Any]]) -> Columns:
    """Numbers as floats, with NaN for None; everything else as it is."""
    found: dict[str, np.ndarray] = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        numeric = all(value is None or isinstance(value, int | float) for value in values)
        found[name] = np.array(values, float) if numeric else np.array(values, object)
    return found


def _text(value: Any, most: int = 40) -> str:
    """A name from data as matplotlib shows it: `$` would start a formula."""
    text = str(value)
    return (text if len(text) <= most else f"{text[: most - 1]}…").replace("$", r"\$")


def _bars(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths `[2, R]` of error bars; none where an edge is unknown."""
    return np.nan_to_num(np.maximum([value - low, high - value], 0))


# --- calibration --------------------------------------------------------------------------------------------------


def _reliability(figure: "Figure", bins: Columns) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.errorbar(
        bins["probability"],
        bins["frequency"],
        _bars(bins["frequency"], bins["low"], bins["high"]),
        fmt="o",
        markersize=5,
        elinewidth=1,
        capsize=2,
    )
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(f"reliability, {int(bins['n'].sum()):,} rows, 95 % intervals", fontsize=9)


def _pit(figure: "Figure", bins: Columns) -> None:
    axes, middle = figure.subplots(), (bins["left"] + bins["right"]) / 2
    errors = _bars(bins["density"], bins["low"], bins["high"])
    axes.bar(
        bins["left"],
        bins["density"],
        bins["right"] - bins["left"],
        align="edge",
        alpha=0.6,
        edgecolor="white",
    )
    axes.errorbar(middle, bins["density"], errors, fmt="none", ecolor="0.3", elinewidth=1)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(xlabel="PIT: P(Y ≤ y)", ylabel="density", xlim=(0, 1))
    axes.set_title(
        f"probability integral transform, {int(bins['n'].sum()):,} rows, 95 % intervals", fontsize=9
    )


def _coverage(figure: "Figure", levels: Columns) -> None:
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot(levels["level"], levels["coverage"])
    axes.fill_between(levels["level"], levels["low"], levels["high"], alpha=0.2, linewidth=0)
    axes.set(xlabel="level of the central interval", ylabel="rows inside", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"coverage, {int(levels['n'].max()):,} rows, 95 % intervals", fontsize=9)


# --- what it is worth ---------------------------------------------------------------------------------------------


def _risk_coverage(figure: "Figure", curve: Columns) -> None:
    axes = figure.subplots()
    axes.plot(curve["coverage"], curve["risk"], label="most uncertain rows deferred first")
    axes.fill_between(curve["coverage"], curve["low"], curve["high"], alpha=0.2, linewidth=0)
    axes.plot(curve["coverage"], curve["ideal"], color="0.4", linestyle="--", label="perfect order")
    axes.set(xlabel="coverage: share of rows that are kept", ylabel="risk of the kept rows", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    axes.set_title("risk and coverage, 95 % intervals", fontsize=9)


def _slices(figure: "Figure", gaps: Columns) -> None:
    """A forest plot: a panel a loss, slices with the largest gaps first."""
    losses = list(dict.fromkeys(gaps["loss"]))[:MOST_LOSSES]
    first = gaps["loss"] == losses[0]
    size = np.nan_to_num(np.abs(gaps["difference"][first]))
    names = gaps["slice"][first][np.argsort(-size, kind="stable")][:MOST_SLICES]
    places = {name: -i for i, name in enumerate(names)}
    figure.set_size_inches(2.5 + 2.2 * len(losses), 1.3 + 0.23 * len(names))
    for i, (axes, loss) in enumerate(_panels(figure, losses, len(losses), sharey=True)):
        rows = (gaps["loss"] == loss) & np.isin(gaps["slice"], names) & np.isfinite(gaps["difference"])
        axes.axvline(0, color="0.6", linewidth=1)
        for strong, colour in ((False, "0.45"), (True, "C3")):
            own = rows & (gaps["significant"].astype(bool) == strong)
            value, at = gaps["difference"][own], [places[name] for name in gaps["slice"][own]]
            axes.errorbar(
                value,
                at,
                xerr=_bars(value, gaps["low"][own], gaps["high"][own]),
                fmt="D" if strong else "o",
                color=colour,
                markersize=4,
                elinewidth=1,
            )
        axes.set_title(_text(loss), fontsize=9)
        axes.tick_params(labelsize=8)
        if i == 0:
            axes.set_yticks(list(places.values()), [_text(name) for name in places])
    what = "all" if first.sum() <= len(names) else f"{len(names)} of {int(first.sum())}"
    figure.supxlabel(f"slice − rest, 95 % intervals; {what} slices; red diamonds: beyond chance", fontsize=8)


def _ood(figure: "Figure", bins: Columns) -> None:
    pairs = list(dict.fromkeys(zip(bins["out_set"], bins["score"], strict=True)))
    shown = pairs[:MOST_PANELS]
    for axes, (out_set, score) in _panels(figure, shown, min(3, len(shown))):
        for kind in dict.fromkeys(bins["set"]):
            own = (bins["out_set"] == out_set) & (bins["score"] == score) & (bins["set"] == kind)
            edges = np.append(bins["left"][own], bins["right"][own][-1:])
            axes.stairs(bins["density"][own], edges, fill=True, alpha=0.45, label=_text(kind))
        axes.set_title(f"{_text(out_set)}\n{_text(score)}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
        axes.legend(fontsize=7, frameon=False)
    if len(pairs) > len(shown):
        figure.supxlabel(f"the first {len(shown)} of {len(pairs)}", fontsize=8)


def _robustness(figure: "Figure", curves: Columns) -> None:
    """A panel a metric, a line a kind of shift; severities have units of their own, so that places stand for them."""
    metrics, kinds = (list(dict.fromkeys(curves[name])) for name in ("metric", "kind"))
    shown = metrics[:MOST_PANELS]
    for axes, metric in _panels(figure, shown, min(3, len(shown)), room=0.9):
        for i, kind in enumerate(kinds):
            rows = np.flatnonzero((curves["metric"] == metric) & (curves["kind"] == kind))
            rows = rows[np.argsort(curves["severity"][rows], kind="stable")]
            color, dashes = f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]
            axes.plot(range(len(rows)), curves["value"][rows], dashes, color=color, label=_text(kind))
            if len(kinds) <= 5:
                low, high = curves["low"][rows], curves["high"][rows]
                axes.fill_between(range(len(rows)), low, high, alpha=0.15, color=color, linewidth=0)
        axes.set_title(_text(metric), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel("severity, from 0 = clean to the strongest that was tried", fontsize=8)


def _members(figure: "Figure", members: Columns, compared: Columns) -> None:
    ensemble = dict(zip(compared["metric"], compared["ensemble"], strict=True))
    metrics = [name for name in members if name != "member"][:MOST_PANELS]
    for axes, metric in _panels(figure, metrics, min(3, len(metrics))):
        axes.plot(members["member"], members[metric], "o", markersize=4, label="members")
        if metric in ensemble:
            axes.axhline(ensemble[metric], color="C1", label="ensemble")
        axes.set_title(_text(metric), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", integer=True)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel("member", fontsize=8)


def _panels(
    figure: "Figure", shown: Sequence[Any], num_columns: int, *, sharey: bool = False, room: float = 0.0
) -> Iterator[tuple["Axes", Any]]:
    """Axes with what each shows; the figure grows with them unless it has a size already."""
    num_rows = math.ceil(len(shown) / num_columns)
    if not sharey:
        figure.set_size_inches(max(4.5, 2.7 * num_columns), max(3.0, 2.4 * num_rows + 0.4) + room)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey).ravel()
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    yield from zip(grid, shown, strict=False)


PLOTS = {
    "reliability": Plot("calibration", ("reliability",), _reliability),
    "pit": Plot("calibration", ("pit",), _pit),
    "coverage": Plot("calibration", ("coverage",), _coverage),
    "risk_coverage": Plot("deferral", ("curve",), _risk_coverage),
    "slices": Plot("slices", ("gaps",), _slices),
    "ood": Plot("ood", ("histogram",), _ood),
    "robustness": Plot("robustness", ("curves",), _robustness),
    "members": Plot("members", ("members", "compared"), _members),
}


# --- images of rows -----------------------------------------------------------------------------------------------


def example_images(run: RunDir, name: str, table: str) -> list[tuple[np.ndarray, str]]:
    """Pixels `[H, W]` or `[H, W, 3]` uint8 and a caption of the first rows of a table of examples; [] without pixels.

    Raises:
        UsageError: the table is missing or damaged.
    """
    rows = chapter_rows(run, "examples", table, name=name, most=MOST_EXAMPLES)
    return [(_pixels(row), _caption(row)) for row in rows if {"pixels", "shape"} <= set(row)]


def _pixels(row: Mapping[str, Any]) -> np.ndarray:
    try:
        channels, height, width = (int(one) for one in str(row["shape"]).split(","))
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(channels, height, width)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"The pixels of row {row.get('row')} are damaged ({error}): evaluate the run again."
        ) from error
    if channels not in (1, 3):
        raise UsageError(f"Row {row.get('row')} has {channels} channels, 1 or 3 can be shown.")
    return pixels[0] if channels == 1 else np.moveaxis(pixels, 0, -1)


def _caption(row: Mapping[str, Any]) -> str:
    if "predicted" in row:
        return f"true {row.get('true')}, predicted {row['predicted']}, confidence {_number(row.get('confidence'))}"
    edges = f"{_number(row.get('lower_95'))} to {_number(row.get('upper_95'))}"
    return f"true {_number(row.get('y'))}, predicted {_number(row.get('mean'))}, 95 % {edges}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "unknown"
