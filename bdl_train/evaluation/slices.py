"""Slices of an evaluation: every metric within each, and which differ from the rest of the rows beyond chance.

Shape letters: N rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.evaluation.differences import CONFIDENCE, Regroupings, adjust, difference
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section
from bdl_train.evaluation.slicing import Slice

TITLE = "Slices: where is it better or worse?"


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


# --- in words -----------------------------------------------------------------------------------------------------


def _verdict(gaps: Sequence[Gap], losses: Sequence[Loss]) -> tuple[str, Level]:
    tested = [gap for gap in gaps if math.isfinite(gap.p)]
    if not tested:
        reasons = dict.fromkeys(gap.reason for gap in gaps if gap.reason)
        return f"No slice can be compared: {'; '.join(list(reasons)[:3]) or 'there is none'}.", "note"
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
    rates = [gap for gap in found if not next(one for one in losses if one.key == gap.loss).is_loss]
    if not rates:
        best = min(found, key=lambda gap: (gap.small, gap.difference))
        return (
            f"No slice is worse than the rest beyond chance; the best one: {_words(best, losses)}. {differ}.",
            "note",
        )
    widest = max(rates, key=lambda gap: (not gap.small, abs(gap.difference)))
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
        f"{gap.slice} ({_support(gap, loss)}{few}), {loss.key} {gap.mean:.3g}{unit} against {overall:.3g} over all "
        f"rows, adjusted {p_text(gap.p_adjusted)}"
    )


def _support(gap: Gap, loss: Loss) -> str:
    """The rows that the loss is a mean of; not all rows of the slice, if it is defined on some only."""
    return f"n = {gap.n}" if loss.among.all() else f"n = {gap.n} rows that the rate is of"


def p_text(p: float) -> str:
    """`p = 0.03`, and no more digits than a p-value has."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
