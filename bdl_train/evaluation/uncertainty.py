"""What uncertainty says about single rows: its parts, the most uncertain and the most wrong rows, predictive bands.

Shape letters: N rows.
"""

import numpy as np
import pandas as pd
from scipy import stats

from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section
from bdl_train.specs import TargetSpec

MOST_POINTS = 1500
MOST_EXAMPLES = 24
FEWEST_ROWS = 30


def uncertainty_section(rows: RowScores, target: TargetSpec) -> Section:
    """The chapter `uncertainty`: tables `histogram` (of each part) and `error_by_uncertainty` (ten groups of rows).

    Args:
        rows: Scored rows.
        target: Names the unit.
    """
    is_class = rows.probs is not None
    parts = (
        ("total", "aleatoric", "epistemic") if is_class else ("total_std", "aleatoric_std", "epistemic_std")
    )
    unit = "nats" if is_class else target.name
    loss = 1 - rows.columns["correct"] if is_class else np.abs(rows.columns["error"])
    total = rows.columns[parts[0]]
    known = np.isfinite(total) & np.isfinite(loss)
    if not known.any():
        return Section.empty("uncertainty", "Uncertainty", "No row has a finite uncertainty.")
    highest = float(np.quantile(total[known], 0.995))
    edges = np.linspace(0, highest if highest > 0 else 1.0, 31)
    pieces = []
    for part in parts:
        values = rows.columns[part][known]
        counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
        pieces.append(pd.DataFrame({"part": part, "left": edges[:-1], "right": edges[1:], "n": counts}))
    order = np.argsort(total[known], kind="stable")
    groups = [group for group in np.array_split(order, 10) if len(group)]
    by_group = pd.DataFrame(
        {
            "group": range(1, len(groups) + 1),
            "uncertainty": [float(total[known][group].mean()) for group in groups],
            "error": [float(loss[known][group].mean()) for group in groups],
            "epistemic": [float(rows.columns[parts[2]][known][group].mean()) for group in groups],
            "n": [len(group) for group in groups],
        }
    )
    tables = {"histogram": pd.concat(pieces, ignore_index=True), "error_by_uncertainty": by_group}
    name = "error rate" if is_class else f"mean absolute error ({unit})"
    spread = float(np.ptp(total[known]))
    if spread <= 1e-9 * max(1.0, highest):
        verdict = "Uncertainty is the same for every row: it cannot tell good predictions from bad ones."
        return Section("uncertainty", "Uncertainty", verdict, "warn", tables)
    if np.ptp(loss[known]) == 0:
        verdict = (
            f"The {name} is {loss[known][0]:.3g} for every row: there is nothing for uncertainty to find."
        )
        return Section("uncertainty", "Uncertainty", verdict, "note", tables)
    found = stats.spearmanr(total[known], loss[known])
    rank, p = float(found.statistic), float(found.pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    first, last = by_group["error"].iloc[0], by_group["error"].iloc[-1]
    share = _epistemic_share(rows)
    verdict = (
        f"The {name} goes from {first:.3g} in the surest tenth of the rows to {last:.3g} in the most uncertain "
        f"(rank correlation {rank:.2f}); {100 * share:.0f} % of the uncertainty is epistemic, "
        f"{'which more data would lower' if share >= 0.1 else 'so that more data would hardly lower it'}."
    )
    if known.sum() < FEWEST_ROWS:
        verdict = f"Too few rows to tell whether uncertainty finds the errors: {int(known.sum())}."
        return Section("uncertainty", "Uncertainty", verdict, "note", tables)
    useful = rank > 0 and p < 0.05
    if not useful:
        verdict += " Uncertainty does not find the errors."
    return Section("uncertainty", "Uncertainty", verdict, "good" if useful else "warn", tables)


def _epistemic_share(rows: RowScores) -> float:
    c = rows.columns
    if rows.probs is not None:
        return float(np.nansum(c["epistemic"]) / max(np.nansum(c["total"]), 1e-300))
    return float(np.nansum(c["epistemic_std"] ** 2) / max(np.nansum(c["total_std"] ** 2), 1e-300))


def examples_section(
    rows: RowScores, row_ids: np.ndarray, target: TargetSpec, table: pd.DataFrame | None, x: np.ndarray
) -> Section:
    """The chapter `examples`: tables `uncertain` and `wrong`, with the raw columns or the pixels of each row.

    Args:
        rows: Scored rows.
        row_ids: `[N]` positions in the source.
        target: Names the classes.
        table: Raw columns of these rows in the same order; None = there are none.
        x: `[N, ...]` encoded inputs; images are taken from it.
    """
    c = rows.columns
    is_class = rows.probs is not None
    total, badness = (c["epistemic"], c["nll"]) if is_class else (c["total_std"], np.abs(c["error"]))
    tables = {}
    for name, score in (("uncertain", total), ("wrong", badness)):
        # NaN first: such a row is as bad as it gets.
        picked = np.argsort(-np.where(np.isnan(score), np.inf, score), kind="stable")[:MOST_EXAMPLES]
        tables[name] = _described(rows.take(picked), row_ids[picked], target, table, x, picked)
    where = "disagree" if is_class else "are unsure"
    verdict = (
        f"The rows on which the members {where} most, and those that were predicted worst: look for wrong labels, rare "
        "cases and inputs that do not belong."
    )
    return Section("examples", "Examples", verdict, "note", tables)


def _described(
    rows: RowScores,
    row_ids: np.ndarray,
    target: TargetSpec,
    table: pd.DataFrame | None,
    x: np.ndarray,
    picked: np.ndarray,
) -> pd.DataFrame:
    c = rows.columns
    shown: dict[str, object] = {"row": row_ids}
    if rows.probs is not None:
        names = np.array(target.classes, dtype=object)
        shown |= {
            "true": names[c["y"].astype(int)],
            "predicted": names[c["prediction"].astype(int)],
            "confidence": c["confidence"],
            "total": c["total"],
            "epistemic": c["epistemic"],
            "nll": c["nll"],
        }
    else:
        shown |= {
            name: c[name]
            for name in ("y", "mean", "error", "lower_95", "upper_95", "total_std", "epistemic_std")
        }
    found = pd.DataFrame(shown)
    if table is not None:
        raw = table.iloc[picked].reset_index(drop=True).astype(str)
        raw = raw.rename(columns={name: f"input {name}" for name in raw.columns})
        found = pd.concat([found, raw], axis=1)
    if x.ndim == 4:
        found["pixels"] = [one.tobytes() for one in np.ascontiguousarray(x[picked])]
        found["shape"] = [",".join(map(str, x.shape[1:]))] * len(picked)
    return found


def bands_section(rows: RowScores, target: TargetSpec, table: pd.DataFrame | None, seed: int) -> Section:
    """The chapter `bands` of a numeric target: table `points`, rows with mean, central intervals, target and features.

    Args:
        rows: Scored rows.
        target: Names the unit.
        table: Raw columns of these rows in the same order; None = there are none.
        seed: Of the choice of rows, when there are more than can be drawn.
    """
    if rows.probs is not None:
        return Section.empty("bands", "Predictive bands", "Classes have no bands.")
    count = len(rows)
    picked = np.arange(count)
    warnings = ()
    if count > MOST_POINTS:
        picked = np.sort(np.random.default_rng(seed).permutation(count)[:MOST_POINTS])
        warnings = (f"{MOST_POINTS} of {count} rows, chosen at random",)
    names = ("y", "mean", "lower_50", "upper_50", "lower_95", "upper_95", "aleatoric_std", "epistemic_std")
    points = pd.DataFrame({name: rows.columns[name][picked] for name in names})
    if table is not None:
        numbers = table.iloc[picked].apply(pd.to_numeric, errors="coerce").reset_index(drop=True)
        kept = [
            name for name in numbers.columns if name != target.name and numbers[name].notna().mean() > 0.5
        ]
        points = pd.concat([points, numbers[kept].add_prefix("input ")], axis=1)
    error = rows.columns["error"]
    var = np.var(rows.columns["y"])
    r2 = float(1 - np.mean(error**2) / var) if var > 0 else float("nan")
    verdict = (
        f"The mean explains {100 * r2:.1f} % of the variance of {target.name}; bands are central 50 % and 95 % "
        "intervals of the mixture."
    )
    return Section("bands", "Predictive bands", verdict, "note", {"points": points}, warnings)
