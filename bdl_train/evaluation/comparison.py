"""Experiments against a baseline: paired differences of their metrics, adjusted p-values, and a verdict in words."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from bdl_train.evaluation.bootstrap import LEVEL
from bdl_train.evaluation.paired import (
    CLASS_METRICS,
    NLL,
    NUMBER_METRICS,
    ROWS,
    Interval,
    RowMetric,
    SplitDifference,
    difference,
    holm,
)
from bdl_train.evaluation.pairing import ScoredExperiment, matched, splits_of
from bdl_train.evaluation.section import Section

KEY, TITLE = "paired", "Paired differences to the baseline"
METRICS = {metric.key: metric for metric in (*CLASS_METRICS, *NUMBER_METRICS)}


@dataclass(frozen=True)
class Comparison:
    """A row of `differences`: one metric of one experiment minus that of its baseline.

    Attributes:
        mean, baseline_mean: Over the paired rows, and then over splits.
        result: "better", "worse", "no clear difference", "equal" or "not judged".
        splits, pairs, n: Splits, pairs of runs, and rows of all splits.
    """

    experiment: str
    baseline: str
    metric: str
    unit: str
    better: str
    mean: float
    baseline_mean: float
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    result: str
    method: str
    splits: int
    pairs: int
    n: int
    reason: str


def paired_section(
    experiments: Sequence[ScoredExperiment], baselines: Sequence[str], *, seed: int
) -> Section:
    """Every experiment against the baseline on its data.

    p-values are adjusted by Holm over all metrics and experiments that share a baseline.

    Args:
        experiments: With different names.
        baselines: Names of those that others are compared with, at most one for each data set. Experiments that can be
            paired with none of them are told; without any name, the first experiment on each data set is its baseline,
            which is a choice that no result had a part in.
        seed: Of the resamples of rows.

    Returns:
        Tables `differences` (the fields of `Comparison`) and `splits` (experiment, baseline, metric, and the fields of
        `SplitDifference`). The verdict has a line for each experiment.

    Raises:
        UsageError: two baselines on the same data.
    """
    warnings: list[str] = []
    chosen, partners = matched(experiments, baselines, warnings)
    rows: list[Comparison] = []
    each: list[dict[str, object]] = []
    for base in chosen:
        family: list[tuple[ScoredExperiment, RowMetric, Interval, list[SplitDifference]]] = []
        for other, pairs in partners[base.name]:
            splits = splits_of(base, other, pairs, warnings)
            metrics = splits[0].model if splits else ()
            family += [(other, metric, *difference(splits, metric, seed=seed)) for metric in metrics]
        adjusted = holm([found.p for _, _, found, _ in family])
        for (other, metric, found, parts), p in zip(family, adjusted.tolist(), strict=True):
            rows.append(_comparison(base, other, metric, found, parts, p))
            head = {"experiment": other.name, "baseline": base.name, "metric": metric.key}
            each += [{**head, **asdict(part)} for part in parts]
    if not rows:
        reason = "There are no two experiments on the same rows."
        return Section(KEY, TITLE, reason, "empty", {}, tuple(warnings))
    tables = {"differences": pd.DataFrame([asdict(row) for row in rows]), "splits": pd.DataFrame(each)}
    return Section(KEY, TITLE, "\n".join(sentences(rows)), "note", tables, tuple(warnings))


# --- in words -----------------------------------------------------------------------------------------------------


def _comparison(
    base: ScoredExperiment,
    other: ScoredExperiment,
    metric: RowMetric,
    found: Interval,
    parts: Sequence[SplitDifference],
    p_adjusted: float,
) -> Comparison:
    return Comparison(
        experiment=other.name,
        baseline=base.name,
        metric=metric.key,
        unit=metric.unit_of(other.runs[0].unit),
        better=metric.better,
        mean=float(np.mean([part.mean for part in parts])),
        baseline_mean=float(np.mean([part.baseline_mean for part in parts])),
        difference=found.difference,
        low=found.low,
        high=found.high,
        p=found.p,
        p_adjusted=p_adjusted,
        result=_result(metric, found, p_adjusted),
        method=found.method,
        splits=len(parts),
        pairs=sum(part.pairs for part in parts),
        n=sum(part.n for part in parts),
        reason=found.reason,
    )


def _result(metric: RowMetric, found: Interval, p_adjusted: float) -> str:
    if found.reason:
        return "not judged"
    if found.difference == found.low == found.high == 0:
        return "equal"
    if p_adjusted > 1 - LEVEL or found.low <= 0 <= found.high:
        return "no clear difference"
    return "better" if (found.difference < 0) == (metric.better == "lower") else "worse"


def sentences(rows: Sequence[Comparison]) -> list[str]:
    """One for each experiment: where it beats its baseline, where it loses, and where nothing can be said."""
    found: dict[tuple[str, str], list[Comparison]] = {}
    for row in rows:
        found.setdefault((row.experiment, row.baseline), []).append(row)
    return [_sentence(own) for own in found.values()]


def _sentence(rows: Sequence[Comparison]) -> str:
    first = rows[0]
    clauses = []
    for result, words in (("better", "beats it"), ("worse", "loses to it")):
        won = [f"in {METRICS[row.metric].words} by {_amount(row)}" for row in rows if row.result == result]
        if won:
            clauses.append(f"{words} {' and '.join(won)}")
    unclear = [
        f"{METRICS[row.metric].words} ({_edges(row.low, row.high)})"
        for row in rows
        if row.result == "no clear difference"
    ]
    if unclear:
        clauses.append(f"no clear difference in {', '.join(unclear)}")
    equal = [METRICS[row.metric].words for row in rows if row.result == "equal"]
    if equal:
        clauses.append(f"exactly equal in {', '.join(equal)}")
    clauses += [
        f"not judged in {METRICS[row.metric].words}, because {row.reason}"
        for row in rows
        if row.result == "not judged"
    ]
    return f"{first.experiment} against {first.baseline}, {basis(first)}: {'; '.join(clauses)}."


def _amount(row: Comparison) -> str:
    low, high = sorted((abs(row.low), abs(row.high)))
    return f"{abs(row.difference):.3g}{f' {row.unit}' if row.unit else ''} ({_edges(low, high)})"


def _edges(low: float, high: float) -> str:
    return f"{low:.3g} .. {high:.3g}"


def basis(row: Comparison) -> str:
    """What a comparison rests on."""
    if row.method != ROWS:
        seeds = "" if row.pairs == row.splits else f" ({row.pairs} pairs of runs)"
        return f"{row.splits} splits{seeds}"
    seeds = "one pair of runs" if row.pairs == 1 else f"{row.pairs} seeds of one split, averaged"
    return f"{row.n} rows of {seeds}"


# --- in the terminal ----------------------------------------------------------------------------------------------

MOST_SHOWN = 6
"""Experiments of which the terminal shows every metric and the verdict; of more it shows the NLL only."""


def show_paired(section: Section) -> None:
    """Print the differences, the verdict in words, and what was not paired."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = section.tables.get("differences")
    console.print()
    if table is None:
        console.print(f"{section.title}: none. {section.verdict}", markup=False)
    else:
        rows = [Comparison(**{str(key): one for key, one in row.items()}) for row in table.to_dict("records")]
        many = len({row.experiment for row in rows}) > MOST_SHOWN
        grid = Table(
            title=section.title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold"
        )
        for header in ("experiment", "metric", "difference", "95 % interval", "p (Holm)", "result", "from"):
            grid.add_column(header, overflow="fold")
        for row in rows:
            if many and row.metric != NLL.key:
                continue
            known = not row.reason
            grid.add_row(
                escape(row.experiment),
                row.metric,
                f"{row.difference:+.4g}",
                _edges(row.low, row.high) if known else "",
                f"{row.p_adjusted:.2g}" if known else "",
                row.result,
                escape(f"{basis(row)}, {row.method}"),
            )
        console.print(grid)
        if many:
            console.print("other metrics: report=compare.html")
        else:
            console.print(section.verdict, markup=False)
    for one in section.warnings:
        console.print(one, markup=False)
