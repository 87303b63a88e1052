"""How training went: the curves of every member, who was lost, and whether the loss had stopped falling.

Shape letters: M members, E points of a curve.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.events import EventReader
from bdl_train.runs import RunDir

LAST = 0.2
"""Share of a curve's points that are its end."""
STILL = 0.02
"""The end still falls if it does so by more than this share of the whole fall."""


@dataclass(frozen=True)
class History:
    """Curves by key: `train/nll` and `val/nll` a member, `val/stack_nll` and `val/disagreement` a stack.

    Attributes:
        curves: By key, then member number (or stack), a curve as `{step: value}`.
        decisions: What the driver and the stacks reported beside curves: retries, splits, stops.
        executors: Devices and how members ran, by stack.
        progress: The last word of each stack on its steps.
    """

    curves: Mapping[str, Mapping[Any, Mapping[int, float]]] = field(default_factory=dict)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    executors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    progress: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def frame(self, key: str) -> pd.DataFrame:
        """One column a member, one row a step, both ascending."""
        curves = self.curves.get(key, {})
        found = pd.DataFrame({member: pd.Series(curve, dtype=float) for member, curve in curves.items()})
        return found.sort_index().reindex(columns=sorted(found.columns))


def read_history(run: RunDir) -> History:
    """Read the event files; of a point that was reported twice, after a restart, the last counts."""
    curves: dict[str, dict[Any, dict[int, float]]] = {}
    decisions, executors, progress = [], {}, {}
    reader = EventReader(run)
    try:
        for stack, event in reader.read():
            key, member, value = event.get("key"), event.get("member"), event.get("value")
            step = event.get("step")
            if not isinstance(key, str) or not isinstance(step, int):
                continue
            if "/" in key and (value is None or isinstance(value, int | float)):
                who = stack if member is None else member
                curves.setdefault(key, {}).setdefault(who, {})[step] = math.nan if value is None else value
            elif key == "started" and isinstance(value, dict):
                executors[stack] = value
            elif key == "progress" and isinstance(value, dict):
                progress[stack] = value
            elif key in ("split", "stopped", "again"):
                decisions.append(
                    {"where": f"stack {stack}", "what": key, "value": _words(value), "step": step}
                )
        for event in reader.read_decisions():
            value = event.get("value")
            decisions.append(
                {"where": "driver", "what": str(event.get("key")), "value": _words(value), "step": 0}
            )
    except OSError:
        pass
    return History(curves, decisions, executors, progress)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


@dataclass(frozen=True)
class End:
    """How the curves of one key end: the mean over members at the start, and over the last points its first and last.

    Attributes:
        fall: From the first to the lowest mean.
        last_fall: Of a line through the end of the mean curve, from its first point to its last; negative if it rises.
        over: Points of the end.
    """

    fall: float
    last_fall: float
    over: int

    @property
    def still_falls(self) -> bool:
        return self.last_fall > STILL * self.fall > 0


def end_of(frame: pd.DataFrame) -> End | None:
    """Judge the end of the mean curve; None if it has fewer than five points.

    The mean is over the members that are there at the last step: members that stopped before would move it.

    Args:
        frame: `[E, M]`, a row a step.
    """
    frame = frame.dropna(axis=1, how="all")
    if frame.empty:
        return None
    last = frame.iloc[-1].notna()
    mean = frame.loc[:, last].mean(axis=1).dropna().to_numpy()
    if len(mean) < 5 or not np.isfinite(mean).all():
        return None
    over = max(3, math.ceil(LAST * len(mean)))
    tail = mean[-over:]
    slope = np.polyfit(np.arange(over), tail, 1)[0]
    return End(float(mean[0] - mean.min()), float(-slope * (over - 1)), over)
