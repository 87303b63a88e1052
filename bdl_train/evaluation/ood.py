"""How well uncertainty tells rows of another kind from those of this data set (out-of-distribution detection).

Shape letters: N rows, G levels: the distinct values of a score, ascending.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import LEVEL, resamples_for
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section

KEY, TITLE = "ood", "Out-of-distribution detection"
FIGURES = ("auroc", "aupr_out", "aupr_in", "fpr95")
NUM_BINS = 40
FEW_ROWS = 50
"""Below so many rows of an out-set its figures are called rough."""
CLEAR_AUROC = 0.9
"""The verdict is good if every out-set's best score is above this with its whole interval."""


def unusual_scores(rows: RowScores) -> dict[str, np.ndarray]:
    """Scores `[N]` that are larger the more unusual a row looks; what these rows have no column for is left out.

    Classes: mutual_information and predictive_entropy (nats), max_probability (1 − confidence), energy (Liu et al.
    2020, arXiv:2010.03759, equation 4 at temperature 1). Numbers: epistemic_variance and total_variance (squared
    units of the target).
    """
    c = rows.columns
    if rows.probs is None:
        return {
            "epistemic_variance": np.square(c["epistemic_std"]),
            "total_variance": np.square(c["total_std"]),
        }
    found = {
        "mutual_information": c["epistemic"],
        "predictive_entropy": c["total"],
        "max_probability": 1 - c["confidence"],
    }
    return found | ({"energy": c["energy"]} if "energy" in c else {})


def point_values(inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    """The figures of one score, by scikit-learn.

    auroc: the share of pairs in which the out-row scores higher than the in-row, ties counted half. aupr_out, aupr_in:
    average precision with out-rows, or in-rows, as the positive class (not interpolated). fpr95: the share of out-rows
    taken for in when at least 95 % of the in-rows are accepted: at the lowest threshold that accepts so many, together
    with all rows tied with it.

    Source:
        Hendrycks & Gimpel (2017), arXiv:1610.02136, Section 2; Liang et al. (2018), arXiv:1706.02690, Section 4.3.

    Args:
        inside, outside: `[N_in]` and `[N_out]` finite scores, one or more of each.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    score = np.concatenate([inside, outside])
    is_out = np.repeat([0, 1], [len(inside), len(outside)])
    # 95 % of the in-rows as a whole number of them: 0.95 · n is rounded.
    num_accepted = -(-95 * len(inside) // 100)
    out_share, in_share, _ = roc_curve(1 - is_out, -score, drop_intermediate=False)
    reached = np.rint(in_share * len(inside)) >= num_accepted
    return {
        "auroc": float(roc_auc_score(is_out, score)),
        "aupr_out": float(average_precision_score(is_out, score)),
        "aupr_in": float(average_precision_score(1 - is_out, -score)),
        "fpr95": float(out_share[reached.argmax()]),
    }


def weighted_values(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """The figures in the order of `FIGURES`, from counts of rows at each level: no sorting is left to do.

    Args:
        inside, outside: `[G]` counts of in-rows and of out-rows; either has a positive sum.
    """
    up_to_in, up_to_out = np.cumsum(inside), np.cumsum(outside)
    num_in, num_out = up_to_in[-1], up_to_out[-1]
    from_in, from_out = num_in - up_to_in + inside, num_out - up_to_out + outside
    # Levels that no row was drawn from add nothing, whatever their precision.
    precision_out = from_out / np.maximum(from_in + from_out, 1)
    precision_in = up_to_in / np.maximum(up_to_in + up_to_out, 1)
    accepted = (100 * up_to_in >= 95 * num_in).argmax()
    return np.array(
        [
            outside @ (up_to_in - inside / 2) / (num_in * num_out),
            outside @ precision_out / num_out,
            inside @ precision_in / num_in,
            up_to_out[accepted] / num_out,
        ]
    )


def intervals(inside: np.ndarray, outside: np.ndarray, *, seed: int) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the figures; in-rows and out-rows are resampled apart, each to its own number.

    Args:
        inside, outside: `[N_in]` and `[N_out]` finite scores, one or more of each.
        seed: Of the resamples.
    """
    levels, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    random = np.random.default_rng(seed)
    values = []
    for _ in range(resamples_for(len(inside) + len(outside))):
        counts = [
            np.bincount(part[random.integers(len(part), size=len(part))], minlength=len(levels))
            for part in (place[: len(inside)], place[len(inside) :])
        ]
        values.append(weighted_values(counts[0], counts[1]))
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(FIGURES)}


def ood_section(inside: RowScores, outside: Mapping[str, RowScores], *, seed: int) -> Section:
    """Compare the rows of a part with those of other data sets that the same posterior predicted.

    Args:
        inside: Rows of the data set that was trained on, not used in training.
        outside: Name of an out-set to its rows; their targets are not used.
        seed: Of the intervals.

    Returns:
        Tables `detection` (one row an out-set and score: the figures of `point_values` with their intervals, n_in,
        n_out) and `histogram` (out_set, score, set, left, right, density).

    Raises:
        UsageError: no out-set is given, no in-rows, or classes against numbers.
    """
    if not outside:
        raise UsageError("Out-of-distribution detection needs one out-set or more in `ood`, got none.")
    if len(inside) == 0:
        raise UsageError(
            "Out-of-distribution detection needs rows of the run's own data set, this part has none."
        )
    warnings: list[str] = []
    of_inside = _finite(unusual_scores(inside), "the data set's own rows", warnings)
    if inside.probs is not None and "energy" not in inside.columns:
        warnings.append("The score energy is left out: these predictions hold no `energy` column.")
    detection: list[dict[str, Any]] = []
    histogram: list[dict[str, Any]] = []
    for out_set, rows in outside.items():
        if (rows.probs is None) != (inside.probs is None):
            raise UsageError(
                f"The out-set '{out_set}' of `ood` must be predicted by the same run: it has "
                f"{_kind(rows)}, the run's own rows have {_kind(inside)}."
            )
        if len(rows) == 0:
            warnings.append(f"{out_set}: it has no rows, so nothing can be said of it.")
            continue
        if len(rows) < FEW_ROWS:
            warnings.append(f"{out_set}: only {len(rows)} rows, its figures are rough.")
        for score, values in _finite(unusual_scores(rows), out_set, warnings).items():
            if score not in of_inside:
                continue
            own = of_inside[score]
            if own.min() == own.max() == values.min() == values.max():
                warnings.append(
                    f"{out_set}: {score} is the same for every row, so it tells nothing (AUROC 0.5)."
                )
            detection.append(_detection_row(out_set, score, own, values, seed))
            histogram += _histogram_rows(out_set, score, own, values)
    if not detection:
        return Section(
            KEY, TITLE, "No out-set has rows to compare: see the warnings.", "empty", {}, tuple(warnings)
        )
    tables = {"detection": pd.DataFrame(detection), "histogram": pd.DataFrame(histogram)}
    verdict, level = _verdict(tables["detection"])
    return Section(KEY, TITLE, verdict, level, tables, tuple(warnings))


def _kind(rows: RowScores) -> str:
    return "a numeric target" if rows.probs is None else "classes"


def _finite(scores: Mapping[str, np.ndarray], where: str, warnings: list[str]) -> dict[str, np.ndarray]:
    """The finite values of each score; what is left out is added to `warnings`."""
    found = {}
    for name, values in scores.items():
        finite = np.isfinite(values)
        lost = len(values) - int(finite.sum())
        if len(values) and lost == len(values):
            warnings.append(f"{where}: the score {name} is left out, it is not finite for any row.")
        elif lost:
            warnings.append(
                f"{where}: {lost} of {len(values)} rows are left out of {name}, it is not finite there."
            )
        if finite.any():
            found[name] = np.asarray(values, np.float64)[finite]
    return found


def _detection_row(
    out_set: str, score: str, inside: np.ndarray, outside: np.ndarray, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"out_set": out_set, "score": score}
    values, edges = point_values(inside, outside), intervals(inside, outside, seed=seed)
    for name in FIGURES:
        row |= {name: values[name], f"{name}_low": edges[name][0], f"{name}_high": edges[name][1]}
    return row | {"n_in": len(inside), "n_out": len(outside)}


def _histogram_rows(
    out_set: str, score: str, inside: np.ndarray, outside: np.ndarray
) -> list[dict[str, Any]]:
    """Densities of both sets over the same bins, equally wide but for the last, which takes a long tail whole."""
    lowest, highest = min(inside.min(), outside.min()), max(inside.max(), outside.max())
    knee = max(np.quantile(inside, 0.99), np.quantile(outside, 0.99))
    if knee - lowest > 1e-12 * max(abs(lowest), abs(knee), 1e-280):
        edges = np.linspace(lowest, knee, NUM_BINS)
        edges = np.append(edges, max(highest, knee + (edges[1] - edges[0])))
    else:  # nearly all rows have one value
        edges = np.array([lowest, max(highest, lowest + max(abs(lowest), 1.0))])
    rows = []
    for name, values in (("in", inside), ("out", outside)):
        density = np.histogram(values, edges)[0] / len(values) / np.diff(edges)
        rows += [
            {"out_set": out_set, "score": score, "set": name, "left": left, "right": right, "density": value}
            for left, right, value in zip(edges[:-1], edges[1:], density, strict=True)
        ]
    return rows


def _verdict(detection: pd.DataFrame) -> tuple[str, Level]:
    texts, lows = [], []
    for out_set, group in detection.groupby("out_set", sort=False):
        best = group.loc[group["auroc"].idxmax()]
        interval = f"AUROC {best['auroc']:.3f}, {best['auroc_low']:.3f} to {best['auroc_high']:.3f}"
        name = str(best["score"]).replace("_", " ")
        lows.append(float(best["auroc_low"]))
        if lows[-1] <= 0.5:
            texts.append(
                f"{out_set}: no score tells it apart; the best, {name}, is no better than chance ({interval})."
            )
            continue
        texts.append(
            f"{out_set}: told apart best by {name}, which is higher for the out-row in {100 * best['auroc']:.1f} % of "
            f"pairs ({interval}); where 95 % of in-rows are accepted, {100 * best['fpr95']:.1f} % of out-rows pass too."
        )
    level: Level = "warn" if min(lows) <= 0.5 else "good" if min(lows) > CLEAR_AUROC else "note"
    return " ".join(texts), level
