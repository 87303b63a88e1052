"""What decisions cost: each row gets the action of least expected cost under its predictive.

Shape letters: N rows, K classes, A actions.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.functionals import mean_of
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section

KEY, TITLE = "costs", "Costs of decisions"


def cost_section(
    test: RowScores,
    *,
    matrix: Sequence[Sequence[float]],
    classes: Sequence[str],
    actions: Sequence[str],
    seed: int,
) -> Section:
    """What decisions cost if each row gets the action of least expected cost under its predictive.

    The action is argmin_a Σ_k p(k) · cost[k, a]; of equal ones the first. Compared with, on the same rows:
    `argmax` (the cheapest action if the likeliest class were the true one), `majority` (always the cheapest action for
    the most frequent class), `best_constant` (always the one action that is cheapest on these rows, known only
    afterwards), `oracle` (the true class is known).

    Source:
        Elkan (2001), The foundations of cost-sensitive learning, equation 1; a deferring action has one flat cost
        (Chow 1970).

    Args:
        test: Rows of a classification.
        matrix: `[K, A]`, the cost of each action if the true class is that of the row, in any one unit.
        classes: Names of the K classes.
        actions: Names of the A actions.
        seed: Of the intervals.

    Returns:
        Tables `actions` (action, n, share, expected_cost, mean_cost, share_argmax: of rows that get it) and `summary`
        (policy, n, mean_cost, low, high, expected_cost, saving, saving_low, saving_high: against `least_expected`).

    Raises:
        UsageError: a wrong shape, a cost that is negative or not a number, no classes.
    """
    cost = _cost_matrix(test, matrix, classes, actions)
    assert test.probs is not None
    finite = np.isfinite(test.probs).all(1)
    if not finite.any():
        raise UsageError("cost needs rows with finite probabilities, this part has none.")
    warnings = (
        () if finite.all() else (f"{int((~finite).sum())} rows without finite probabilities are left out.",)
    )
    probs, y = test.probs[finite].astype(np.float64), test.columns["y"][finite].astype(int)
    expected, cheapest = probs @ cost, cost.argmin(1)
    majority = int(np.bincount(y, minlength=len(cost)).argmax())
    taken = {
        "least_expected": expected.argmin(1),
        "argmax": cheapest[probs.argmax(1)],
        "majority": np.full(len(y), cheapest[majority]),
        "best_constant": np.full(len(y), cost[y].mean(0).argmin()),
        "oracle": cheapest[y],
    }
    paid = {name: cost[y, action] for name, action in taken.items()}
    summary = _cost_summary(
        paid, {name: expected[np.arange(len(y)), one] for name, one in taken.items()}, seed
    )
    chosen = taken["least_expected"]
    shares = pd.DataFrame(
        [
            {
                "action": name,
                "n": int((chosen == a).sum()),
                "share": float((chosen == a).mean()),
                "expected_cost": _mean(expected[chosen == a, a]),
                "mean_cost": _mean(cost[y, a][chosen == a]),
                "share_argmax": float((taken["argmax"] == a).mean()),
            }
            for a, name in enumerate(actions)
        ]
    )
    verdict, level = _cost_verdict(summary.set_index("policy"))
    return Section(KEY, TITLE, verdict, level, {"actions": shares, "summary": summary}, warnings)


def _cost_matrix(
    test: RowScores, matrix: Sequence[Sequence[float]], classes: Sequence[str], actions: Sequence[str]
) -> np.ndarray:
    if test.probs is None:
        raise UsageError("cost is a matrix over classes, and this run's target is a number: remove `cost`.")
    shape = f"{len(classes)} rows (the true class: {', '.join(classes)}) of {len(actions)} costs ({', '.join(actions)})"
    if len(set(actions)) < len(actions) or not actions:
        raise UsageError(f"cost needs actions with different names, got: {', '.join(actions) or 'none'}.")
    given = list(matrix) if isinstance(matrix, Sequence | np.ndarray) else []
    lengths = [len(row) if isinstance(row, Sequence | np.ndarray) else 1 for row in given]
    if lengths != [len(actions)] * len(classes) or len(classes) != test.probs.shape[1]:
        raise UsageError(
            f"cost must have {shape}, got rows of {lengths} costs; there are {test.probs.shape[1]} classes."
        )
    try:
        cost = np.asarray(matrix, np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"cost must hold numbers only: {error}.") from error
    wrong = ~(np.isfinite(cost) & (cost >= 0))
    if wrong.any():
        k, a = np.argwhere(wrong)[0]
        raise UsageError(
            f"cost must hold finite numbers of 0 or more, got {cost[k, a]} for the class {classes[k]} and the action "
            f"{actions[a]}: to reward an action, add a constant to the row."
        )
    return cost


def _cost_summary(
    paid: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], seed: int
) -> pd.DataFrame:
    own = paid["least_expected"]
    statistics = {name: mean_of(cost) for name, cost in paid.items()}
    statistics |= {f"{name} saving": mean_of(cost - own) for name, cost in paid.items()}
    edges = bootstrap_intervals(statistics, len(own), seed=seed)
    return pd.DataFrame(
        [
            {
                "policy": name,
                "n": len(cost),
                "mean_cost": _mean(cost),
                "low": edges[name][0],
                "high": edges[name][1],
                "expected_cost": _mean(expected[name]),
                "saving": _mean(cost - own),
                "saving_low": edges[f"{name} saving"][0],
                "saving_high": edges[f"{name} saving"][1],
            }
            for name, cost in paid.items()
        ]
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _cost_verdict(summary: pd.DataFrame) -> tuple[str, Level]:
    own, argmax, constant = (summary.loc[name] for name in ("least_expected", "argmax", "best_constant"))
    text = (
        f"The action of least expected cost costs {own['mean_cost']:.4g} a row ({own['low']:.4g} to {own['high']:.4g}; "
        f"the model expected {own['expected_cost']:.4g}). It saves {argmax['saving']:.4g} ({argmax['saving_low']:.4g} "
        f"to {argmax['saving_high']:.4g}) against acting on the likeliest class, and {constant['saving']:.4g} "
        f"({constant['saving_low']:.4g} to {constant['saving_high']:.4g}) against always taking the best single action."
    )
    if argmax["saving_high"] < 0 or constant["saving_high"] < 0:
        return f"{text} A simpler rule is cheaper: are the probabilities calibrated?", "warn"
    if argmax["saving_low"] > 0 and constant["saving_low"] > 0:
        return text, "good"
    return text, "note"
