"""What the scored rows are: how many, the target's values, each column beside its training rows.

Shape letters: N rows.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from bdl_train.data import Part
from bdl_train.data._levels import MISSING, cells_of, to_levels, to_numbers
from bdl_train.evaluation.section import Section
from bdl_train.specs import TargetKind, TargetSpec

MOST_COLUMNS = 200


def data_section(
    parts: Mapping[str, Part],
    target: TargetSpec,
    tables: Mapping[str, pd.DataFrame] | None,
    notes: Mapping[str, object],
) -> Section:
    """The chapter `data`: tables `parts` (rows of each), `target` (classes or moments) and `columns`.

    Args:
        parts: By name, the scored one last.
        target: Names and units.
        tables: Raw columns of the parts by the same names; None = there are none.
        notes: Of the manifest.
    """
    scored = list(parts)[-1]
    sizes = pd.DataFrame({"part": list(parts), "rows": [len(part) for part in parts.values()]})
    found = {"parts": sizes, "target": _target(parts, target)}
    if tables is not None:
        found["columns"] = pd.DataFrame(
            [_column(str(name), tables, scored) for name in list(tables[scored].columns)[:MOST_COLUMNS]]
        )
    warnings = []
    if target.kind is TargetKind.CLASS:
        seen = np.unique(parts[scored].y)
        absent = [name for k, name in enumerate(target.classes) if k not in seen]
        if absent:
            warnings.append(f"no scored row is of class {', '.join(absent[:10])}")
    warnings += [
        f"{key.replace('_', ' ')}: {value}" for key, value in notes.items() if value and key != "target_kind"
    ]
    kind = str(notes.get("target_kind", target.kind))
    verdict = f"{len(parts[scored])} rows are scored; the target '{target.name}' is of kind {kind}."
    return Section("data", "Data", verdict, "note", found, tuple(warnings))


def _target(parts: Mapping[str, Part], target: TargetSpec) -> pd.DataFrame:
    if target.kind is TargetKind.CLASS:
        rows = {
            name: np.bincount(part.y.astype(int), minlength=target.num_classes) / max(len(part), 1)
            for name, part in parts.items()
        }
        return pd.DataFrame({"class": list(target.classes), **rows})
    raw = {
        name: part.y.astype(float) * target.scale + target.loc for name, part in parts.items() if len(part)
    }
    quantiles = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}
    table = {"statistic": ["mean", "standard deviation", *quantiles]}
    for name, values in raw.items():
        table[name] = [values.mean(), values.std(), *np.quantile(values, list(quantiles.values()))]
    return pd.DataFrame(table)


def _column(name: str, tables: Mapping[str, pd.DataFrame], scored: str) -> dict[str, object]:
    """One row of `columns`: numbers by mean and spread, categories by their most frequent level."""
    row: dict[str, object] = {"column": name}
    for part, table in tables.items():
        if part not in ("train", scored) or name not in table.columns or len(table) == 0:
            continue
        cells = cells_of(table, name)
        codes, levels = to_levels(cells)
        missing = float(np.mean(codes == levels.index(MISSING))) if MISSING in levels else 0.0
        row[f"{part} missing"] = missing
        try:
            numbers = to_numbers(cells)
        except (ValueError, TypeError):
            counts = np.bincount(codes, minlength=len(levels)) * np.array(
                [level != MISSING for level in levels]
            )
            top = int(counts.argmax())
            row[f"{part}"] = (
                f"{levels[top]} ({100 * counts[top] / len(codes):.0f} %), {int((counts > 0).sum())} levels"
            )
            continue
        finite = numbers[np.isfinite(numbers)]
        row[f"{part}"] = f"{finite.mean():.4g} ± {finite.std():.3g}" if len(finite) else "no number"
    return row
