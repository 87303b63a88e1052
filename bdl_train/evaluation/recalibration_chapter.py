"""The chapter of an evaluation on recalibration: what fitted maps change on test rows.

Shape letters: N rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.evaluation import functionals as f
from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.metrics import NUM_BINS, inside, pinball, pit_p_value
from bdl_train.evaluation.recalibration import Recalibration
from bdl_train.evaluation.rows import INTERVALS, RowScores
from bdl_train.evaluation.section import Level, Section
from bdl_train.specs import TargetSpec

TITLE = "Recalibration"
FEWEST_ROWS = 100
"""Validation rows below which a fitted map is more noise than knowledge; a section then warns."""


@dataclass(frozen=True)
class _Watched:
    """A metric before and after. `better` is "lower", "higher", the number that it should be, or "" for none."""

    key: str
    unit: str
    better: str
    before: f.Statistic
    after: f.Statistic

    def change(self, counts: np.ndarray) -> np.ndarray:
        return self.after(counts) - self.before(counts)


def recalibration_section(
    before: RowScores,
    after: Sequence[tuple[Recalibration, RowScores]],
    *,
    target: TargetSpec,
    seed: int,
) -> Section:
    """What each map changes on test rows, with intervals of the paired difference over resampled rows.

    Tables: `metrics` (method, metric, unit, better, before, after, difference, low, high, verdict, n), `maps` (method,
    curve, x, value: the maps to draw) and `fitted` (method, text, num_val).

    Args:
        before: Test scores of the pooled predictive, `[N]` rows.
        after: Each map, fitted on validation rows, with the same test rows after it.
        target: For the unit of a number, and the names of classes.
        seed: Of the resamples.
    """
    if not after:
        raise UsageError("There is no recalibration to show: no map was fitted.")
    changes = [_changes(before, rows, map_, target, seed) for map_, rows in after]
    maps = [
        pd.DataFrame({"method": map_.method, "curve": name, "x": x, "value": value})
        for map_, _ in after
        for name, (x, value) in map_.curves(target.classes).items()
    ]
    empty = pd.DataFrame({"method": [], "curve": [], "x": [], "value": []})
    fitted = [{"method": one.method, "text": one.describe(), "num_val": one.num_rows} for one, _ in after]
    warnings = [
        f"{one.describe()}: fitted on {one.num_rows} validation rows only, fewer than {FEWEST_ROWS}; raise "
        "data.val_fraction."
        for one, _ in after
        if one.num_rows < FEWEST_ROWS
    ]
    missing = {
        map_.method: [
            row["metric"] for row in rows if math.isnan(row["after"]) and not math.isnan(row["before"])
        ]
        for (map_, _), rows in zip(after, changes, strict=True)
    }
    warnings += [
        f"{method}: scores alone do not give {', '.join(keys)} after the map."
        for method, keys in missing.items()
        if keys
    ]
    nll = [next(row for row in rows if row["metric"] == "nll") for rows in changes]
    verdict = " ".join(_sentence(map_, row) for (map_, _), row in zip(after, nll, strict=True))
    judged = {row["verdict"] for row in nll}
    level: Level = "good" if "better" in judged else "warn" if "worse" in judged else "note"
    metrics, fitted = pd.DataFrame([row for rows in changes for row in rows]), pd.DataFrame(fitted)
    tables = {
        "metrics": metrics,
        "maps": pd.concat(maps, ignore_index=True) if maps else empty,
        "fitted": fitted,
    }
    return Section("recalibration", TITLE, verdict, level, tables, tuple(warnings))


def _sentence(map_: Recalibration, nll: Mapping[str, Any]) -> str:
    if nll["verdict"] == "not available":
        return f"{map_.describe()[0].upper()}{map_.describe()[1:]}: its NLL is not finite on these rows."
    word = {"better": "helped", "worse": "hurt"}.get(nll["verdict"], "made no clear difference")
    text = map_.describe()
    return (
        f"{text[0].upper()}{text[1:]}, from {map_.num_rows} validation rows, {word} on the {nll['n']} test rows: NLL "
        f"{nll['before']:.4g} to {nll['after']:.4g} nats (change {nll['difference']:+.3g}, 95 % interval "
        f"{nll['low']:+.3g} to {nll['high']:+.3g})."
    )


def _changes(
    before: RowScores, after: RowScores, map_: Recalibration, target: TargetSpec, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table."""
    if len(before) != len(after) or not np.array_equal(before.columns["y"], after.columns["y"]):
        raise ValueError(f"{map_.method}: the test rows after the map are not those before it.")
    old, new = _statistics(before, target), _statistics(after, target)
    watched = [_Watched(*head, one, new[head]) for head, one in old.items()]
    intervals = bootstrap_intervals({one.key: one.change for one in watched}, len(before), seed=seed)
    once = np.ones((1, len(before)))
    found = []
    for one in watched:
        values = float(one.before(once)[0]), float(one.after(once)[0])
        found.append((one.key, one.unit, one.better, *values, *map(float, intervals[one.key])))
    if before.probs is None:
        # A test has no interval: it passes or not.
        p_values = pit_p_value(before), pit_p_value(after)
        found.append(("pit_p_value", "probability", "", *p_values, np.nan, np.nan))
    return [
        {
            "method": map_.method,
            "metric": key,
            "unit": unit,
            "better": better,
            "before": one,
            "after": other,
            "difference": other - one,
            "low": low,
            "high": high,
            "verdict": _judged(better, one, other, low, high),
            "n": len(before),
        }
        for key, unit, better, one, other, low, high in found
    ]


def _statistics(rows: RowScores, target: TargetSpec) -> dict[tuple[str, str, str], f.Statistic]:
    """By (metric, unit, better)."""
    c = rows.columns
    if rows.probs is not None:
        wide, even = (bins(c["confidence"], NUM_BINS) for bins in (f.equal_width_bins, f.equal_mass_bins))
        return {
            ("nll", "nats", "lower"): f.mean_of(c["nll"]),
            ("ece", "share", "lower"): _gap(c, wide),
            ("ace", "share", "lower"): _gap(c, even),
            ("brier", "0..2", "lower"): f.mean_of(c["brier"]),
            ("accuracy", "share", "higher"): f.mean_of(c["correct"]),
        }
    coverages = {
        (f"coverage_{round(100 * level)}", "share", str(level)): f.mean_of(inside(rows, level))
        for level in INTERVALS
    }
    return {
        ("nll", "nats", "lower"): f.mean_of(c["nll"]),
        ("crps", target.name, "lower"): f.mean_of(c["crps"]),
        ("pinball", target.name, "lower"): f.mean_of(pinball(rows)),
        **coverages,
        ("interval_width_95", target.name, ""): f.mean_of(c["upper_95"] - c["lower_95"]),
    }


def _gap(columns: Mapping[str, np.ndarray], bins: np.ndarray) -> f.Statistic:
    gaps = f.binned_gap(columns["confidence"], columns["correct"], bins, NUM_BINS)
    return lambda counts: gaps(counts)[:, 0]


def _judged(better: str, before: float, after: float, low: float, high: float) -> str:
    if not math.isfinite(after - before):
        return "not available"
    if not better:
        return "-"
    if not low * high > 0:
        return "no clear change"
    gain = {"lower": before - after, "higher": after - before}
    closer = gain[better] if better in gain else abs(before - float(better)) - abs(after - float(better))
    return "better" if closer > 0 else "worse"
