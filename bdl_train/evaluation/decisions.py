"""What people decided on the model's rows: how often they differed, who was right, and whose outcomes were ever seen.

Shape letters: N rows, D decisions, K classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.decision_log import ACCEPTED, DEFERRED, OVERRIDDEN, Log, log_of, uncertainty_of
from bdl_train.evaluation.functionals import mean_of, ratio
from bdl_train.evaluation.metrics import MOST_CLASSES
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section
from bdl_train.evaluation.selection import binomial_interval
from bdl_train.specs import TargetKind, TargetSpec

KEY, TITLE = "decisions", "Human decisions"
THIRDS = ("surest third", "middle third", "most unsure third")
HARDLY, MOSTLY, LEAST_ROWS = 0.05, 0.5, 5
"""Outcomes are called missing for a kind of decision of 5 rows or more if 5 % of it have one, and half of the rest."""
STRONG_GAP, STRONG_P = 0.2, 0.01
"""Label rates differ strongly from this gap on, if Fisher's test, times the number of tests, is below the second."""
STRONG_SHIFT = 0.05
"""Of a mean predicted probability between rows with and without an outcome, to be told; of a number, in its std."""


def decisions_section(
    rows: RowScores, row_ids: np.ndarray, decisions: pd.DataFrame, *, target: TargetSpec, seed: int
) -> Section:
    """Compare people's decisions with the model, and look for outcomes that the decisions themselves hid.

    A class that was decided is an acceptance if the model predicts it, else an override; an override without a class
    means the other class where there are two. Model and people are scored on the same rows: those with an outcome in
    the log and a known decision (share of right ones for classes, mean absolute error for numbers).

    Source:
        Lakkaraju et al. (2017), The selective labels problem, KDD: outcomes that only some decisions reveal.

    Args:
        rows: Scored rows of the part.
        row_ids: `[N]` their ids.
        decisions: Of `read_decisions`.
        target: Its class names are those of actions and labels.
        seed: Of the intervals.

    Returns:
        Tables `summary` (group: all and thirds by total uncertainty; n, share_decided, override_rate, low, high,
        defer_rate, agreement, score, n_scored, model, human, difference, difference_low, difference_high: human −
        model), `labels` (group, n, labelled, label_rate, low, high, rest_rate, p: Fisher's exact test against the rest)
        and `predicted` (quantity, labelled, unlabelled, difference, low, high: means over rows with and without an
        outcome, where there are both).

    Raises:
        UsageError: an action or a label is unknown; the message names the line.
    """
    warnings: list[str] = []
    log = log_of(rows, row_ids, decisions, target, warnings)
    if len(log.place) == 0:
        reason = (
            f"None of {len(decisions)} decisions is on a row of this part: are `row` the row ids of the data?"
        )
        return Section(KEY, TITLE, reason, "empty", {}, tuple(warnings))
    known = np.isfinite(log.label)
    summary = _summary(rows, log, target, seed)
    labels = _labels(log, known, target)
    tables = {"summary": pd.DataFrame(summary), "labels": pd.DataFrame(labels)}
    verdict = _verdict(summary, len(rows), target.kind is TargetKind.CLASS)
    unnamed = (log.kind == OVERRIDDEN) & np.isnan(log.decided)
    if unnamed.any():
        warnings.append(
            f"{int(unnamed.sum())} overrides do not say what was decided instead: people are scored without them."
        )
    if not known.any():
        warnings.append("The log holds no outcome (column `label`), so nobody can say who was right.")
    contradicted = known & ~np.isclose(log.label, rows.columns["y"][log.place], rtol=1e-4)
    if contradicted.any():
        warnings.append(
            f"{int(contradicted.sum())} of {int(known.sum())} outcomes in the log differ from the target in the data."
        )
    if 0 < known.sum() < len(known):
        predicted = _predicted(rows, log, known, target, seed)
        tables["predicted"] = predicted
        scale = 1.0 if target.kind is TargetKind.CLASS else float(log.model.std())
        warnings += [
            f"Rows with an outcome have a mean {one['quantity']} of {one['labelled']:.3g}, those without of "
            f"{one['unlabelled']:.3g}: outcomes are seen for rows of another kind."
            for one in predicted.to_dict("records")
            if (one["low"] > 0 or one["high"] < 0) and abs(one["difference"]) >= STRONG_SHIFT * scale
        ]
    feedback = _feedback(labels)
    if feedback:
        return Section(KEY, TITLE, f"{verdict} {feedback}", "warn", tables, tuple(warnings))
    return Section(KEY, TITLE, verdict, "note", tables, tuple(warnings))


def _summary(rows: RowScores, log: Log, target: TargetSpec, seed: int) -> list[dict[str, Any]]:
    is_class = target.kind is TargetKind.CLASS
    uncertainty = uncertainty_of(rows)
    edges = np.quantile(uncertainty[np.isfinite(uncertainty)], [1 / 3, 2 / 3])
    third = np.where(np.isfinite(uncertainty), np.searchsorted(edges, uncertainty), -1)
    masks = {"all": np.ones(len(rows), bool)} | {name: third == i for i, name in enumerate(THIRDS)}
    found = []
    for name, mask in masks.items():
        own = mask[log.place]
        count, kind = int(own.sum()), log.kind[own]
        if count == 0:
            continue
        overridden, accepted = int((kind == OVERRIDDEN).sum()), int((kind == ACCEPTED).sum())
        low, high = binomial_interval(overridden, count)
        row = {
            "group": name, "n": count, "share_decided": count / int(mask.sum()), "override_rate": overridden / count,
            "low": low, "high": high, "defer_rate": float((kind == DEFERRED).mean()),
            "agreement": accepted / (accepted + overridden) if accepted + overridden else math.nan,
            "score": "accuracy" if is_class else "mean absolute error",
        }  # fmt: skip
        scored = own & np.isfinite(log.decided) & np.isfinite(log.label)
        found.append(row | _scores(log.model[scored], log.decided[scored], log.label[scored], is_class, seed))
    return found


def _scores(
    model: np.ndarray, decided: np.ndarray, label: np.ndarray, is_class: bool, seed: int
) -> dict[str, Any]:
    if len(label) == 0:
        names = ("model", "human", "difference", "difference_low", "difference_high")
        return {"n_scored": 0} | dict.fromkeys(names, math.nan)
    scores = [(one == label).astype(float) if is_class else np.abs(one - label) for one in (model, decided)]
    difference = scores[1] - scores[0]
    low, high = bootstrap_intervals({"it": mean_of(difference)}, len(label), seed=seed)["it"]
    return {
        "n_scored": len(label), "model": float(scores[0].mean()), "human": float(scores[1].mean()),
        "difference": float(difference.mean()), "difference_low": float(low), "difference_high": float(high),
    }  # fmt: skip


def _labels(log: Log, known: np.ndarray, target: TargetSpec) -> list[dict[str, Any]]:
    from scipy.stats import fisher_exact

    groups = {name: log.kind == name for name in (ACCEPTED, OVERRIDDEN, DEFERRED)}
    groups |= {f"decided {name}": log.decided == k for k, name in enumerate(target.classes)}
    found = []
    for name, own in groups.items():
        count, rest = int(own.sum()), int((~own).sum())
        if count == 0:
            continue
        seen, seen_rest = int(known[own].sum()), int(known[~own].sum())
        low, high = binomial_interval(seen, count)
        result: Any = fisher_exact([[seen, count - seen], [seen_rest, rest - seen_rest]])
        row = {
            "group": name, "n": count, "labelled": seen, "label_rate": seen / count, "low": low, "high": high,
            "rest_rate": seen_rest / rest if rest else math.nan, "p": float(result.pvalue),
        }  # fmt: skip
        found.append(row)
    return found


def _predicted(rows: RowScores, log: Log, known: np.ndarray, target: TargetSpec, seed: int) -> pd.DataFrame:
    if rows.probs is None:
        quantities = {f"predicted {target.name}": log.model}
    else:
        probs = rows.probs[log.place]
        # Two classes mirror each other; of many, only the confidence is told.
        first = (
            1 if target.num_classes == 2 else 0 if target.num_classes <= MOST_CLASSES else target.num_classes
        )
        listed = list(enumerate(target.classes))[first:]
        quantities = {f"probability of {name}": probs[:, k] for k, name in listed}
        quantities["confidence"] = rows.columns["confidence"][log.place]
    seen, hidden = known.astype(float), (~known).astype(float)
    statistics = {}
    for name, values in quantities.items():
        with_it, without = ratio(values * seen, seen), ratio(values * hidden, hidden)
        statistics[name] = lambda counts, a=with_it, b=without: a(counts) - b(counts)
    edges = bootstrap_intervals(statistics, len(known), seed=seed)
    table = pd.DataFrame({"quantity": list(quantities)})
    table["labelled"] = [float(values[known].mean()) for values in quantities.values()]
    table["unlabelled"] = [float(values[~known].mean()) for values in quantities.values()]
    table["difference"] = table["labelled"] - table["unlabelled"]
    table["low"], table["high"] = ([float(edges[name][side]) for name in quantities] for side in (0, 1))
    return table


def _feedback(labels: list[dict[str, Any]]) -> str:
    """What is wrong with the outcomes that were seen; empty if nothing is."""
    accepted = next((one for one in labels if one["group"] == ACCEPTED), None)
    num_accepted = accepted["n"] if accepted else 0
    others = sum(one["n"] for one in labels if one["group"] in (OVERRIDDEN, DEFERRED))
    hidden = [
        one
        for one in labels
        if one["n"] >= LEAST_ROWS and one["label_rate"] <= HARDLY and one["rest_rate"] >= MOSTLY
    ]
    strong = [
        one
        for one in labels
        if abs(one["label_rate"] - one["rest_rate"]) >= STRONG_GAP and one["p"] * len(labels) < STRONG_P
    ]
    if accepted and others >= LEAST_ROWS and num_accepted >= LEAST_ROWS:
        hidden += [accepted] if accepted["rest_rate"] <= HARDLY and accepted["label_rate"] >= MOSTLY else []
    flagged: Mapping[str, dict[str, Any]] = {one["group"]: one for one in (*hidden, *strong)}
    if not flagged:
        return ""
    texts = [
        f"{100 * one['label_rate']:.0f} % of rows {name} ({100 * one['rest_rate']:.0f} % of the rest)"
        for name, one in flagged.items()
    ]
    return (
        f"Feedback loop: an outcome was seen for {'; '.join(texts)}, so which outcomes are known depends on the "
        "decision. Metrics on these outcomes describe only the rows that were decided so, and retraining on them "
        "repeats the decisions: collect outcomes of a random sample of the other rows too."
    )


def _verdict(summary: list[dict[str, Any]], num_rows: int, is_class: bool) -> str:
    whole, thirds = summary[0], {one["group"]: one for one in summary[1:]}
    text = (
        f"{whole['n']} of {num_rows} rows have a decision: {100 * whole['override_rate']:.1f} % were overridden "
        f"({100 * whole['low']:.1f} to {100 * whole['high']:.1f} %), {100 * whole['defer_rate']:.1f} % deferred."
    )
    if not math.isnan(whole["agreement"]):
        text += f" Of decided rows {100 * whole['agreement']:.1f} % agree with the model."
    if all(name in thirds and thirds[name]["n"] >= LEAST_ROWS for name in (THIRDS[0], THIRDS[2])):
        text += (
            f" Overrides: {100 * thirds[THIRDS[2]]['override_rate']:.1f} % in the third where the model is most "
            f"unsure, {100 * thirds[THIRDS[0]]['override_rate']:.1f} % in the surest."
        )
    if whole["n_scored"]:
        shown = [f"{100 * whole[key]:.1f} %" if is_class else f"{whole[key]:.4g}" for key in _SHOWN]
        text += (
            f" On {whole['n_scored']} rows with an outcome the model has {'an accuracy' if is_class else 'an error'} "
            f"of {shown[0]}, people of {shown[1]} (difference {shown[2]}, {shown[3]} to {shown[4]})."
        )
    return text


_SHOWN = ("model", "human", "difference", "difference_low", "difference_high")
