"""How many members, where the run chose: the curves of validation NLL and disagreement, and the decision in words."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.evaluation.report.figure import Figure
from bdl_train.evaluation.report.html import Html, tag
from bdl_train.evaluation.report.material import Material
from bdl_train.evaluation.report.panel import Panel
from bdl_train.evaluation.report.scale import Scale

COLUMNS = ("members", "nll", "gain", "gain_se", "disagreement", "growth", "growth_se")
ENDED = {
    "tolerance": "one more would have added too little",
    "max_members": "there were as many as it may have",
    "budget": "its budget had no room for more",
    "lost": "the last members were all lost",
}
NLL, DISAGREEMENT = 0, 1
"""Styles of the two quantities."""


def ensemble_size(material: Material) -> Iterator[Html | Figure]:
    """Words and figures; nothing where the number of members was given."""
    chosen = material.manifest.get("num_members")
    if not isinstance(chosen, dict):
        return
    waves = [one for one in _list(chosen.get("waves")) if isinstance(one, dict)]
    sizes = np.cumsum([len(_list(wave.get("members"))) for wave in waves])
    total = int(sizes[-1]) if len(sizes) else 0
    why = ENDED.get(str(chosen.get("decision")), "it ended for a reason that is not known here")
    yield tag(
        "p",
        f"The run chose its number of members: {total} in {len(waves)} {'wave' if len(waves) == 1 else 'waves'}, then "
        f"{why}. In the words of the decision: {chosen.get('reason')}.",
    )
    table = _table(chosen.get("curve"))
    if len(table) > 1:
        yield _figure(table, waves, sizes, _number(chosen.get("tolerance")))


def _figure(table: pd.DataFrame, waves: list[dict[str, Any]], sizes: np.ndarray, tolerance: float) -> Figure:
    most = int(table["members"].to_numpy().max())
    x = Scale.over(edges=(0.5, most + 1.5), most_ticks=min(8, most))
    panels = []
    for key, title, style in (
        ("nll", "validation NLL of the ensemble", NLL),
        ("disagreement", "disagreement of its members", DISAGREEMENT),
    ):
        panel = Panel(x, Scale.over(table[key]), "members", "nats a row", title=title)
        for size in sizes[:-1]:
            panel.upright(float(size) + 0.5)
        panel.line(table["members"], table[key], style)
        panel.points(table["members"], table[key], style)
        panels.append(panel)
    panels.append(_steps(table, waves[-1] if waves else {}, x, tolerance))
    caption = (
        "Averages over ensembles of so many of the members. The last panel is what the last of them added, with a "
        "standard error over rows; to the right, open, what one more would add, with a standard error over rows and "
        "members. The horizontal line is budget.tolerance. Upright lines part the waves."
    )
    legend = [
        ("fall of the validation NLL", NLL, "both"),
        ("growth of the disagreement", DISAGREEMENT, "both"),
        ("tolerance", NLL, "even"),
    ]
    return Figure("Number of members", panels, table, caption, legend)


def _steps(table: pd.DataFrame, last: dict[str, Any], x: Scale, tolerance: float) -> Panel:
    """What the last member added, and what one more would add."""
    series = []
    for key, ahead, style in (("gain", "gain", NLL), ("growth", "disagreement", DISAGREEMENT)):
        members = np.append(table["members"].to_numpy(float), table["members"].max() + 1)
        value = np.append(table[key].to_numpy(float), _number(last.get(ahead)))
        error = np.append(table[f"{key}_se"].to_numpy(float), _number(last.get(f"{ahead}_se")))
        there = np.isfinite(value)
        series.append((members[there], value[there], error[there], style))
    y = _scale_of_steps(np.concatenate([value for _, value, _, _ in series]), tolerance)
    panel = Panel(x, y, "members", "nats a row", title="what the last member added")
    if np.isfinite(tolerance):
        panel.across(tolerance)
    beyond = table["members"].max() + 1
    for members, value, error, style in series:
        low = value - error
        known = members < beyond
        if y.log:  # a bar may reach 0, which is nowhere
            low = np.where(np.isfinite(low), np.maximum(low, y.low), np.nan)
        panel.error_bars(members, low, value + error, style)
        panel.line(members[known], value[known], style)
        panel.points(members[known], value[known], style)
        panel.points(members[~known], value[~known], style, filled=False)
    return panel


def _scale_of_steps(values: np.ndarray, tolerance: float) -> Scale:
    """Logarithmic over whole powers of ten, unless something is not above 0."""
    shown = np.append(values, tolerance)
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0 or (shown <= 0).any():
        return Scale.over(shown, zero=True)
    low, high = np.floor(np.log10(shown.min())), np.ceil(np.log10(shown.max()))
    return Scale.logarithmic(10.0**low, 10.0 ** max(high, low + 1))


def _table(rows: Any) -> pd.DataFrame:
    """The stored curve; what is no number is missing, and a row without `members` is left out."""
    table = pd.DataFrame([row for row in _list(rows) if isinstance(row, dict)])
    numbers = {
        name: pd.to_numeric(table[name], errors="coerce") if name in table else np.nan for name in COLUMNS
    }
    table = pd.DataFrame(numbers, index=table.index, columns=list(COLUMNS), dtype=float)
    return table.replace([np.inf, -np.inf], np.nan).dropna(subset=["members"], ignore_index=True)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
