"""What people decided on the model's rows: how often they differed, who was right, and whose outcomes were ever seen.

Shape letters: N rows, D decisions, K classes.
"""

import csv
import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.data._levels import MISSING, level_text
from bdl_train.data._stream import is_csv, read_table
from bdl_train.errors import UsageError, nearest, unknown_choice
from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.deferral import binomial_interval
from bdl_train.evaluation.functionals import mean_of, ratio
from bdl_train.evaluation.metrics import MOST_CLASSES
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section
from bdl_train.specs import TargetKind, TargetSpec

KEY, TITLE = "decisions", "Human decisions"
ACCEPTED, OVERRIDDEN, DEFERRED = "accepted", "overridden", "deferred"
WORDS = {"accept": ACCEPTED, "override": OVERRIDDEN, "defer": DEFERRED}
THIRDS = ("surest third", "middle third", "most unsure third")
HARDLY, MOSTLY, LEAST_ROWS = 0.05, 0.5, 5
"""Outcomes are called missing for a kind of decision of 5 rows or more if 5 % of it have one, and half of the rest."""
STRONG_GAP, STRONG_P = 0.2, 0.01
"""Label rates differ strongly from this gap on, if Fisher's test, times the number of tests, is below the second."""
STRONG_SHIFT = 0.05
"""Of a mean predicted probability between rows with and without an outcome, to be told; of a number, in its std."""


def read_decisions(path: str | Path) -> pd.DataFrame:
    """Read a log of decisions.

    Args:
        path: CSV or parquet with the columns `row` (row id, a whole number) and `action` (`accept`, `defer`, `override`
            or what was decided instead, e.g. the name of a class); `label` (the outcome that was seen later, may be
            missing), `by` and `time` may be there, and others are kept.

    Returns:
        Indexed by `line` of the file (of a parquet file: the number of the record, from 1): `row` int64, `action` text,
        `label` text or None, and the other columns as they are.

    Raises:
        UsageError: unreadable, no decision, a column is missing, or a cell is wrong; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"decisions={path} is not a file.")
    table = _csv_table(path) if is_csv(path) else read_table(path)
    if table.index.name is None:
        table.index = pd.RangeIndex(1, len(table) + 1, name="line")
    if table.empty:
        raise UsageError(f"{path} has no decisions: give each a line with row and action.")
    for name in ("row", "action"):
        if name not in table:
            raise UsageError(
                f"{path} lacks the column '{name}'.{nearest(name, map(str, table))} It has: "
                f"{', '.join(map(str, table.columns[:20]))}."
            )
    if "label" not in table:
        table["label"] = None
    lines = table.index.tolist()
    table["row"] = [_row_id(cell, path, line) for cell, line in zip(table["row"], lines, strict=True)]
    table["action"] = [_action(cell, path, line) for cell, line in zip(table["action"], lines, strict=True)]
    table["label"] = pd.Series([_text(cell) for cell in table["label"]], table.index, dtype=object)
    return table


def _csv_table(path: Path) -> pd.DataFrame:
    """All cells as text. Not by pandas, which cannot tell the line of a row."""
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    rows, lines = [], []
    try:
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t|", key=first.count), skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            for cells in reader:
                if not any(cells):
                    continue
                if len(cells) > len(header):
                    raise UsageError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells under {len(header)} columns."
                    )
                rows.append(cells + [""] * (len(header) - len(cells)))
                lines.append(reader.line_num)
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice:
        raise UsageError(f"{path} has two columns named '{twice[0]}': rename one.")
    return pd.DataFrame(rows, pd.Index(lines, name="line"), header, dtype=object)


def _text(cell: Any) -> str | None:
    if cell is None or cell is pd.NA or cell != cell:
        return None
    text = level_text(cell)
    return None if text == MISSING else text


def _row_id(cell: Any, path: Path, line: int) -> int:
    try:
        return int(_text(cell) or "")
    except ValueError as error:
        raise UsageError(
            f"{path}, line {line}: row must be a row id, a whole number, got '{cell}'."
        ) from error


def _action(cell: Any, path: Path, line: int) -> str:
    text = _text(cell)
    if text is None:
        raise UsageError(
            f"{path}, line {line}: action is missing; write accept, defer, override or what was decided."
        )
    return text


@dataclass(frozen=True)
class _Log:
    """Decisions `[D]` on known rows, one a row.

    Attributes:
        place: Positions of their rows.
        kind: ACCEPTED, OVERRIDDEN or DEFERRED.
        model, decided, label: Class indices or numbers; NaN where a decision or an outcome is not known.
    """

    place: np.ndarray
    kind: np.ndarray
    model: np.ndarray
    decided: np.ndarray
    label: np.ndarray


def _value(text: str, what: str, line: Any, target: TargetSpec) -> float:
    if target.kind is TargetKind.CLASS:
        if text in target.classes:
            return float(target.classes.index(text))
        known = target.classes if what == "label" else (*WORDS, *target.classes)
        raise UsageError(f"Decisions, line {line}: {unknown_choice(what, text, known)}")
    try:
        return float(text)
    except ValueError as error:
        others = "" if what == "label" else f"{', '.join(WORDS)} or "
        raise UsageError(f"Decisions, line {line}: {what} must be {others}a number, got '{text}'.") from error


def _log(
    rows: RowScores, row_ids: np.ndarray, decisions: pd.DataFrame, target: TargetSpec, warnings: list[str]
) -> _Log:
    place_of = {int(row): i for i, row in enumerate(row_ids)}
    places = np.array([place_of.get(int(row), -1) for row in decisions["row"]])
    unknown = places < 0
    if unknown.any():
        some = ", ".join(str(row) for row in decisions["row"][unknown][:5])
        warnings.append(
            f"{int(unknown.sum())} decisions are on rows that this part has not (row ids {some}): left out."
        )
    repeated = decisions["row"].duplicated(keep="last").to_numpy() & ~unknown
    if repeated.any():
        warnings.append(
            f"{int(repeated.sum())} decisions were followed by another on the same row: the last counts."
        )
    column = "prediction" if target.kind is TargetKind.CLASS else "mean"
    model, uncertainty = rows.columns[column].astype(np.float64), _uncertainty(rows)
    broken = ~unknown & ~repeated & ~np.isfinite(uncertainty[places])
    if broken.any():
        warnings.append(f"{int(broken.sum())} decisions are on rows without a finite prediction: left out.")
    clash = [name for name in target.classes if name.lower() in WORDS]
    if clash:
        warnings.append(
            f"The action '{clash[0]}' is read as the word of the log, not as the class of that name."
        )
    kept = ~unknown & ~repeated & ~broken
    place, table = places[kept], decisions[kept]
    predicted = model[place]
    decided, kinds = np.full(len(place), np.nan), []
    for i, (line, action) in enumerate(zip(table.index, table["action"], strict=True)):
        word = WORDS.get(str(action).lower())
        if word is None:
            decided[i] = _value(str(action), "action", line, target)
            word = ACCEPTED if decided[i] == predicted[i] else OVERRIDDEN
        elif word == ACCEPTED:
            decided[i] = predicted[i]
        elif word == OVERRIDDEN and target.num_classes == 2:
            decided[i] = 1 - predicted[i]
        kinds.append(word)
    label = [
        math.nan if text is None else _value(text, "label", line, target)
        for line, text in zip(table.index, map(_text, table["label"]), strict=True)
    ]
    return _Log(place, np.array(kinds, dtype=object), predicted, decided, np.array(label, np.float64))


def _uncertainty(rows: RowScores) -> np.ndarray:
    return rows.columns["total_std" if rows.probs is None else "total"]


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
    log = _log(rows, row_ids, decisions, target, warnings)
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


def _summary(rows: RowScores, log: _Log, target: TargetSpec, seed: int) -> list[dict[str, Any]]:
    is_class = target.kind is TargetKind.CLASS
    uncertainty = _uncertainty(rows)
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


def _labels(log: _Log, known: np.ndarray, target: TargetSpec) -> list[dict[str, Any]]:
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


def _predicted(rows: RowScores, log: _Log, known: np.ndarray, target: TargetSpec, seed: int) -> pd.DataFrame:
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
