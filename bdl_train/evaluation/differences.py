"""Two groups of independent rows: the difference of their means, with an interval and a test that fits the values.

Shape letters: N rows, n rows of a group, R regroupings.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE, REGROUPINGS = 0.95, 9999
LEAST_EXPECTED, LEAST_ROWS = 5, 30
"""Expected rows in each cell of a 2×2 table, and rows in each group, before the normal approximation is trusted."""


@dataclass(frozen=True)
class Difference:
    """The mean of a group against that of the rest, whose difference has an interval; NaN with a reason if unknown."""

    mean: float
    rest: float
    difference: float
    low: float
    high: float
    test: str
    p: float
    reason: str | None = None


def adjust(p: np.ndarray) -> np.ndarray:
    """p-values by Benjamini & Hochberg (1995) over those that are known; NaN stays."""
    found, known = np.full(len(p), np.nan), np.isfinite(p)
    if known.any():
        found[known] = stats.false_discovery_control(p[known])
    return found


def difference(inside: np.ndarray, outside: np.ndarray, regroup: "Regroupings") -> Difference:
    """Compare two groups of independent rows.

    Values of two kinds, as the zeros and ones of a share, have Newcombe's interval, and Fisher's exact test if a cell
    is expected to hold fewer than 5 rows, else Welch's t-test. Others have Welch's interval and t-test, or a
    permutation test if a group has fewer than 30 rows.

    Args:
        inside, outside: `[n]` and `[N − n]` values of rows.
        regroup: Draws of the permutation test.
    """
    a, b = (float(np.mean(group)) if len(group) else math.nan for group in (inside, outside))
    sizes = (len(inside), len(outside))
    if min(sizes) < 2:
        where = "" if sizes[0] < 2 else "in the rest "
        return _unknown(a, b, f"{where}{('no rows', 'one row only')[min(sizes)]}")
    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        return _unknown(a, b, "a prediction is not finite")
    low, high, p = welch(inside, outside)
    kinds = _two_kinds(inside, outside)
    if kinds is not None:
        hits = (int(np.sum(inside == kinds[1])), int(np.sum(outside == kinds[1])))
        low, high = (edge * (kinds[1] - kinds[0]) for edge in newcombe(hits, sizes))
        share = sum(hits) / sum(sizes)
        if not math.isfinite(p) or min(sizes) * min(share, 1 - share) < LEAST_EXPECTED:
            cells = [[hits[0], sizes[0] - hits[0]], [hits[1], sizes[1] - hits[1]]]
            _, p = stats.fisher_exact(cells)
            return Difference(a, b, a - b, low, high, "Fisher", float(p))  # pyright: ignore[reportArgumentType]
    elif min(sizes) < LEAST_ROWS:
        return Difference(a, b, a - b, low, high, "permutation", regroup.p_value(inside, outside))
    return Difference(a, b, a - b, low, high, "Welch", p)


def _unknown(mean: float, rest: float, reason: str) -> Difference:
    return Difference(mean, rest, math.nan, math.nan, math.nan, "", math.nan, reason)


def _two_kinds(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float] | None:
    """The lower and the upper value if there are no others; those of a share are 0 and 1 whichever occur."""
    every = np.concatenate([inside, outside])
    for low, high in ((0.0, 1.0), (float(every.min()), float(every.max()))):
        if ((every == low) | (every == high)).all():
            return low, high
    return None


def welch(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float]:
    """Low and high of the interval of the difference in means, and the two-sided p-value; NaN without any spread.

    Source:
        Welch (1947), degrees of freedom by Satterthwaite.
    """
    a, b = (float(np.var(group, ddof=1)) / len(group) for group in (inside, outside))
    if a + b == 0:
        return math.nan, math.nan, math.nan
    df = (a + b) ** 2 / (a**2 / (len(inside) - 1) + b**2 / (len(outside) - 1))
    gap, error = float(np.mean(inside) - np.mean(outside)), math.sqrt(a + b)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * error
    return gap - reach, gap + reach, float(2 * stats.t.sf(abs(gap) / error, df))


def newcombe(hits: tuple[int, int], sizes: tuple[int, int]) -> tuple[float, float]:
    """Interval of a difference of two shares, from Wilson's interval of each.

    Source:
        Newcombe (1998), Statistics in Medicine 17, 873-890, method 10.
    """
    z2 = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) ** 2
    shares, below, above = [], [], []
    for k, n in zip(hits, sizes, strict=True):
        middle = (k + z2 / 2) / (n + z2)
        reach = math.sqrt(z2 * k * (n - k) / n + z2**2 / 4) / (n + z2)
        shares.append(k / n)
        below.append(k / n - (middle - reach))
        above.append(middle + reach - k / n)
    gap = shares[0] - shares[1]
    return gap - math.hypot(below[0], above[1]), gap + math.hypot(above[0], below[1])


class Regroupings:
    """Random groups of rows; those of one size are drawn once, by a seed of their own."""

    def __init__(self, seed: int):
        """A p-value does not depend on which slices were tested before."""
        self._seed = seed
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def p_value(self, inside: np.ndarray, outside: np.ndarray) -> float:
        """Two-sided permutation p-value of the difference in means.

        The group itself counts as one of the regroupings, so it is never zero (Phipson & Smyth 2010,
        arXiv:1603.05766).
        """
        few, many = sorted((inside, outside), key=len)
        every = np.concatenate([few, many])
        every = every - every.mean()
        # The total is fixed, so the difference of the means moves with the sum of one group.
        drawn = np.abs(every[self._positions(len(every), len(few))].sum(1))
        seen = abs(float(every[: len(few)].sum())) - 1e-12 * float(
            np.abs(every).sum()
        )  # rounding breaks no tie
        return (1 + int(np.sum(drawn >= seen))) / (1 + REGROUPINGS)

    def _positions(self, total: int, size: int) -> np.ndarray:
        """`[R, size]` distinct positions below `total`, every set equally likely (Floyd's algorithm, Bentley 1987)."""
        if (total, size) not in self._drawn:
            random = np.random.default_rng((self._seed, total, size))
            picked = np.empty((REGROUPINGS, size), np.int64)
            for k, last in enumerate(range(total - size, total)):
                new = random.integers(last + 1, size=REGROUPINGS)
                picked[:, k] = np.where((picked[:, :k] == new[:, None]).any(1), last, new)
            self._drawn[total, size] = picked
        return self._drawn[total, size]
