"""Slices of an evaluation: every metric within each, and which differ from the rest of the rows beyond chance.

Shape letters: N rows, n rows of a group, R regroupings.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section
from bdl_train.evaluation.slicing import Slice

TITLE = "Slices: where is it better or worse?"
CONFIDENCE, REGROUPINGS = 0.95, 9999
LEAST_EXPECTED, LEAST_ROWS = 5, 30
"""Expected rows in each cell of a 2×2 table, and rows in each group, before the normal approximation is trusted."""


def slices_section(
    rows: RowScores,
    slices: Sequence[Slice],
    *,
    score: Callable[[RowScores], list[Metric]],
    unit: str,
    seed: int,
    small: int = 30,
    warnings: Sequence[str] = (),
) -> Section:
    """Metrics within slices, their gaps to the rest, and the worst of them.

    Args:
        rows: All N scored rows.
        slices: Of the same rows.
        score: Metrics with intervals of some rows.
        unit: Of a numeric target.
        seed: Of the permutation tests.
        small: Slices of fewer rows are flagged.
        warnings: To pass on, from `parse_slices`.

    Returns:
        Tables `metrics` (first those of all rows, `slice` "all"), `gaps` and `worst`.

    Raises:
        UsageError: a slice is of other rows, or there is none.
    """
    if not slices:
        raise UsageError("There are no slices to compare: list columns or comparisons in `slices`.")
    for one in slices:
        if one.mask.shape != (len(rows),):
            raise UsageError(
                f"Slice '{one.name}' is of {one.mask.size} rows, but {len(rows)} rows are scored."
            )
    metrics = list(_metric_rows(rows, slices, score, small))
    losses = losses_of(rows, unit)
    gaps = gaps_of(slices, losses, seed=seed, small=small)
    notes = list(warnings)
    few = [f"'{one.name}' ({len(one)})" for one in slices if 0 < len(one) < small]
    empty = [f"'{one.name}'" for one in slices if len(one) == 0]
    if few:
        notes.append(f"Slices of fewer than {small} rows, which can mislead: {', '.join(few)}.")
    if empty:
        notes.append(f"Slices without rows: {', '.join(empty)}.")
    verdict, level = _verdict(gaps, losses)
    tables = {
        "metrics": table_of(MetricRow, metrics),
        "gaps": table_of(Gap, gaps),
        "worst": table_of(WorstRow, list(_worst_rows(metrics, len(rows)))),
    }
    return Section("slices", TITLE, verdict, level, tables, tuple(notes))


def table_of(kind: type, found: Sequence) -> pd.DataFrame:
    """Instances of a dataclass as rows; its fields are the columns even if there is none."""
    names = [one.name for one in fields(kind)]
    return pd.DataFrame({name: [getattr(one, name) for one in found] for name in names})


# --- metrics within slices ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricRow:
    """A row of `metrics`: one metric of one slice."""

    slice: str
    column: str
    key: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    unit: str
    better: str
    small: bool
    reason: str | None


@dataclass(frozen=True)
class WorstRow:
    """A row of `worst`: the slice in which a metric is worst, `among` those "not small" or "all"."""

    key: str
    among: str
    slice: str
    value: float
    low: float | None
    high: float | None
    n: int
    overall: float | None
    unit: str
    better: str
    small: bool


def _metric_rows(
    rows: RowScores, slices: Sequence[Slice], score: Callable[[RowScores], list[Metric]], small: int
) -> Iterator[MetricRow]:
    overall = {metric.key: metric for metric in score(rows)}
    for one in (Slice("all", np.ones(len(rows), bool), ""), *slices):
        count, found, without = len(one), {}, "no rows"
        if one.mask.all():
            found = overall
        elif count:
            without = "not defined on these rows"
            try:
                found = {metric.key: metric for metric in score(rows.take(one.mask))}
            except UsageError as error:
                without = str(error)
        for key, known in (overall | found).items():
            metric = found.get(key, replace(known, value=None, reason=without))
            value = metric.value if metric.value is not None and math.isfinite(metric.value) else None
            # All resamples of one row are that row: an interval of no width would look certain.
            low, high = (metric.low, metric.high) if value is not None and count > 1 else (None, None)
            reason = None if value is not None else metric.reason or "not finite"
            yield MetricRow(
                one.name, one.column, key, value, low, high, count, known.unit, known.better, count < small, reason
            )  # fmt: skip


def _worst_rows(metrics: Sequence[MetricRow], num_rows: int) -> Iterator[WorstRow]:
    overall = {row.key: row.value for row in metrics if row.slice == "all" and row.column == ""}
    sign = {"lower": 1, "higher": -1}
    for key in overall:
        parts = [row for row in metrics if row.key == key and row.n < num_rows and row.better in sign]
        parts = [(sign[row.better] * row.value, row) for row in parts if row.value is not None]
        for among, kept in (("not small", [part for part in parts if not part[1].small]), ("all", parts)):
            if kept:
                row = max(kept, key=lambda part: part[0])[1]
                assert row.value is not None
                yield WorstRow(
                    key, among, row.slice, row.value, row.low, row.high, row.n, overall[key], row.unit, row.better,
                    row.small,
                )  # fmt: skip


# --- gaps to the rest ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Loss:
    """A number a row whose mean is compared.

    Attributes:
        key: Its name.
        values: `[N]`.
        among: `[N]` bool, the rows it is defined on.
        unit: Of the values.
        is_loss: Whether higher is worse; a rate of predictions is neither.
    """

    key: str
    values: np.ndarray
    among: np.ndarray
    unit: str
    is_loss: bool


def losses_of(rows: RowScores, unit: str) -> list[Loss]:
    """NLL and error of each row; for two classes also three rates whose gaps speak of fairness.

    Equal positive rates are demographic parity, equal true and false positive rates equalised odds; class 1 is the
    positive one.

    Source:
        Hardt et al. (2016), arXiv:1610.02413, definitions 2.1 and 2.2.
    """
    c, every = rows.columns, np.ones(len(rows), bool)
    nll = Loss("nll", c["nll"], every, "nats", True)
    if rows.probs is None:
        return [nll, Loss("absolute_error", np.abs(c["error"]), every, unit, True)]
    found = [nll, Loss("error_rate", 1.0 - c["correct"], every, "share", True)]
    if rows.probs.shape[1] != 2:
        return found
    # Where a prediction is not finite, neither is the rate.
    positive = np.where(np.isfinite(c["correct"]), c["prediction"] == 1, np.nan)
    return [
        *found,
        Loss("positive_rate", positive, every, "share", False),
        Loss("true_positive_rate", positive, c["y"] == 1, "share", False),
        Loss("false_positive_rate", positive, c["y"] == 0, "share", False),
    ]


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


@dataclass(frozen=True)
class Gap:
    """A row of `gaps`: one loss of one slice against the rest; `n` and `n_rest` are rows it is defined on."""

    slice: str
    column: str
    loss: str
    mean: float
    rest: float
    difference: float
    low: float
    high: float
    n: int
    n_rest: int
    unit: str
    test: str
    p: float
    p_adjusted: float
    significant: bool
    small: bool
    reason: str | None


def gaps_of(slices: Sequence[Slice], losses: Sequence[Loss], *, seed: int, small: int) -> list[Gap]:
    """Every loss of every slice against the rest; p-values are adjusted over all of them."""
    regroup, compared = Regroupings(seed), []
    for one in slices:
        for loss in losses:
            inside, outside = loss.values[loss.among & one.mask], loss.values[loss.among & ~one.mask]
            compared.append((one, loss, len(inside), len(outside), difference(inside, outside, regroup)))
    adjusted = adjust(np.array([gap.p for *_, gap in compared])).tolist()
    return [
        Gap(
            one.name, one.column, loss.key, gap.mean, gap.rest, gap.difference, gap.low, gap.high, n, n_rest,
            loss.unit, gap.test, gap.p, p, p <= 1 - CONFIDENCE, n < small, gap.reason,
        )
        for (one, loss, n, n_rest, gap), p in zip(compared, adjusted, strict=True)
    ]  # fmt: skip


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


# --- in words -----------------------------------------------------------------------------------------------------


def _verdict(gaps: Sequence[Gap], losses: Sequence[Loss]) -> tuple[str, Level]:
    tested = [gap for gap in gaps if math.isfinite(gap.p)]
    if not tested:
        return "No slice can be compared: none has two rows or more beside two other rows.", "note"
    found = [gap for gap in tested if gap.significant]
    num_slices = len({gap.slice for gap in tested})
    scope = f"{len(tested)} comparisons, 5 % by Benjamini and Hochberg"
    if not found:
        highest = _largest([gap for gap in tested if gap.loss == losses[0].key])
        words = "" if highest is None else f" The highest {losses[0].key}: {_words(highest, losses)}."
        return f"None of {num_slices} slices differs from the rest beyond chance ({scope}).{words}", "good"
    differ = f"{len({gap.slice for gap in found})} of {num_slices} slices differ from the rest beyond chance ({scope})"
    for loss in (one for one in losses if one.is_loss):
        worst = _largest([gap for gap in found if gap.loss == loss.key and gap.difference > 0])
        if worst is not None:
            return f"Worst slice: {_words(worst, losses)}. {differ}.", "warn"
    widest = max(found, key=lambda gap: abs(gap.difference))
    return f"Largest gap: {_words(widest, losses)}. {differ}.", "warn"


def _largest(gaps: Sequence[Gap]) -> Gap | None:
    """The largest difference, of slices that are not small if there are any."""
    large = [gap for gap in gaps if not gap.small]
    return max(large or gaps, key=lambda gap: gap.difference, default=None)


def _words(gap: Gap, losses: Sequence[Loss]) -> str:
    loss = next(one for one in losses if one.key == gap.loss)
    overall = float(np.mean(loss.values[loss.among]))
    few = ", few rows" if gap.small else ""
    unit = "" if loss.unit == "share" else f" {loss.unit}"
    return (
        f"{gap.slice} (n = {gap.n}{few}), {loss.key} {gap.mean:.3g}{unit} against {overall:.3g} over all rows, "
        f"adjusted {p_text(gap.p_adjusted)}"
    )


def p_text(p: float) -> str:
    """`p = 0.03`, and no more digits than a p-value has."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
