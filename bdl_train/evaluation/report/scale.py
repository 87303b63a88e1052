"""From values to places on an axis, with ticks at round numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdl_train.evaluation.report.html import number


@dataclass(frozen=True)
class Scale:
    """From values to places between 0 and 1; `ticks` are values and their texts."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def at(self, values: Any) -> np.ndarray:
        values = np.asarray(values, float)
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(divide="ignore", invalid="ignore"):
            places = (np.log10(values) - math.log10(self.low)) / (
                math.log10(self.high) - math.log10(self.low)
            )
        return np.where(values > 0, places, -1.0)

    @classmethod
    def over(
        cls,
        *values: Any,
        zero: bool = False,
        pad: float = 0.05,
        most_ticks: int = 5,
        edges: tuple[float, float] | None = None,
    ) -> "Scale":
        """Linear, over all finite values (with 0 if `zero`), or between `edges`."""
        if edges is None:
            found = np.concatenate([np.ravel(np.asarray(one, float)) for one in values] or [np.zeros(1)])
            found = found[np.isfinite(found)]
            low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
            low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
            if not high - low > 1e-9 * max(abs(low), abs(high), 1e-300):
                spread = abs(high) * 0.1 or 1.0
                low, high = low - spread, high + spread
            margin = pad * (high - low)
            low = low if zero and low == 0 else low - margin
            high = high if zero and high == 0 else high + margin
        else:
            low, high = edges
        return cls(low, high, tuple(_nice(low, high, most_ticks)))

    @classmethod
    def logarithmic(cls, low: float, high: float) -> "Scale":
        """Powers of ten between two positive numbers."""
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        ticks = [(10.0**k, number(10.0**k, 3)) for k in range(first, last + 1)]
        return cls(low, high, tuple(ticks), log=True)


def _nice(low: float, high: float, most: int) -> Iterable[tuple[float, str]]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, -math.floor(math.log10(step)) + (1 if step / power == 2.5 else 0))
    for k in range(first, last + 1):
        value = k * step
        if max(abs(low), abs(high)) >= 1e5 or step < 1e-4:
            yield value, number(round(value, 12), 3)
        else:
            text = f"{value:,.{decimals}f}"
            yield value, ("0" if float(text.replace(",", "")) == 0 else text.replace("-", "−"))
