"""R-hat and effective sample sizes of many values of chains, what they come to, and whether the chains have mixed.

Within a member a chain is compared with itself, and there R-hat near 1 is what a sampler promises. Across members R-hat
says whether they found the same predictions; members of an ensemble of networks seldom do, and need not.

Shape letters: M members, K draws of each, V values.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdl_train.evaluation.diagnostics import ess_bulk, ess_tail, rhat_by_chance, split_rhat
from bdl_train.evaluation.metrics import Metric

MIXED = 1.1
"""R-hat up to which a chain counts as mixed (Gelman & Rubin 1992); of few draws also by chance larger ones occur."""
FALSE_ALARM = 0.05
AT_A_TIME = 2_000_000
"""Draws of values that are ranked and transformed at a time."""


@dataclass(frozen=True)
class Mixing:
    """Of V values; NaN where a value is the same in every draw.

    Attributes:
        num_draws: K.
        rhat, bulk, tail: R-hat and effective sizes of each chain alone, `[V, M]`.
        rhat_across, bulk_total: R-hat and effective size of all chains together, `[V]`.
        is_still: Whether a chain does not move at all, `[M]`.
    """

    num_draws: int
    rhat: np.ndarray
    bulk: np.ndarray
    tail: np.ndarray
    rhat_across: np.ndarray
    bulk_total: np.ndarray
    is_still: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Mixing":
        """Of values `[V, M, K]`."""
        parts = np.array_split(values, min(len(values), max(1, math.ceil(values.size / AT_A_TIME))))

        def over(statistic: Callable[[np.ndarray], np.ndarray], *, alone: bool) -> np.ndarray:
            return np.concatenate([statistic(part[:, :, None] if alone else part) for part in parts])

        return cls(
            values.shape[2],
            over(split_rhat, alone=True),
            over(ess_bulk, alone=True),
            over(ess_tail, alone=True),
            over(split_rhat, alone=False),
            over(ess_bulk, alone=False),
            (values == values[:, :, :1]).all((0, 2)),
        )

    @property
    def num_members(self) -> int:
        return self.rhat.shape[1]

    @property
    def by_member(self) -> np.ndarray:
        """Median R-hat of each chain, `[M]`: single values exceed any limit by chance, since there are many."""
        return over_known(np.nanmedian, self.rhat, axis=0)

    @property
    def limit(self) -> float:
        """What the R-hat of a mixed chain may be."""
        return max(MIXED, rhat_by_chance(self.num_draws, FALSE_ALARM))

    @property
    def unmixed(self) -> np.ndarray:
        """Whether each chain has not mixed, `[M]`.

        Those that stand still, and by R-hat: all beyond the limit if the typical chain is; else only those so far
        beyond it that in 19 of 20 cases not one of M mixed chains would be (Bonferroni).
        """
        each = self.by_member
        if over_known(np.nanmedian, each) > self.limit:
            return self.is_still | (each > self.limit)
        return self.is_still | (
            each > max(MIXED, rhat_by_chance(self.num_draws, FALSE_ALARM / self.num_members))
        )


def over_known(statistic: Callable[..., Any], values: np.ndarray, axis: int | None = None) -> Any:
    """A statistic like `nanmedian`; NaN, and no warning, where no value is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return statistic(values, axis=axis)


def mixing_metrics(predictions: Mixing, potential: Mixing | None) -> list[Metric]:
    """What both come to, each with its meaning.

    Args:
        predictions: Of values of the predictive.
        potential: Of the potential along the chains, one value; None = the sampler kept none.
    """
    of, median, largest, least = predictions, np.nanmedian, np.nanmax, np.nanmin
    both, total = "over predictions and members", "of all members as chains of one distribution"
    found = [
        _low("rhat_within_median", median, of.rhat, f"split R-hat of a member's chain, median {both}"),
        _low("rhat_within_max", largest, of.rhat, f"split R-hat of a member's chain, largest {both}"),
        _low(
            "rhat_within_worst_member",
            largest,
            of.by_member,
            "largest over members of the median over predictions",
        ),
        Metric("rhat_limit", of.limit, "R-hat", "up to which a chain of so many draws counts as mixed", ""),
        _across("rhat_across_median", median, of, "R-hat of all members together, median over predictions"),
        _across("rhat_across_max", largest, of, "R-hat of all members together, largest over predictions"),
        Metric("num_draws", float(of.num_draws), "draws", "that a member keeps", ""),
        _size("ess_bulk_median", median, of.bulk, f"of a member's chain, for the middle, median {both}"),
        _size("ess_bulk_min", least, of.bulk, f"of a member's chain, for the middle, smallest {both}"),
        _size("ess_tail_median", median, of.tail, f"of a member's chain, for the tails, median {both}"),
        _size("ess_tail_min", least, of.tail, f"of a member's chain, for the tails, smallest {both}"),
        _size("ess_bulk_total_median", median, of.bulk_total, f"{total}, median over predictions"),
        _size("ess_bulk_total_min", least, of.bulk_total, f"{total}, smallest over predictions"),
    ]
    if potential is None:
        return found
    along = "of the potential along a member's chain"
    return [
        *found,
        _low(
            "potential_rhat_within_max", largest, potential.rhat, f"split R-hat {along}, largest over members"
        ),
        _across("potential_rhat_across", largest, potential, "R-hat of the potential, all members together"),
        _size("potential_ess_bulk_min", least, potential.bulk, f"{along}, smallest over members"),
    ]


def _low(key: str, statistic: Callable[..., Any], values: np.ndarray, meaning: str) -> Metric:
    return _metric(key, float(over_known(statistic, values)), "R-hat", meaning, "lower")


def _across(key: str, statistic: Callable[..., Any], of: Mixing, meaning: str) -> Metric:
    if of.num_members == 1:
        return Metric(key, None, "R-hat", meaning, "", reason="there is one member")
    return _metric(key, float(over_known(statistic, of.rhat_across)), "R-hat", meaning, "")


def _size(key: str, statistic: Callable[..., Any], values: np.ndarray, meaning: str) -> Metric:
    value = float(over_known(statistic, values))
    return _metric(key, value, "draws", f"effective sample size {meaning}", "higher")


def _metric(key: str, value: float, unit: str, meaning: str, better: str) -> Metric:
    if math.isfinite(value):
        return Metric(key, value, unit, meaning, better)
    reason = (
        "the chains stand still"
        if math.isinf(value)
        else "it is the same in every draw, or not finite in some"
    )
    return Metric(key, None, unit, meaning, better, reason=reason)
