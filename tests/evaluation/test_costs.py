"""Costs of decisions by enumeration, and savings that are paired."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.costs import cost_section
from bdl_train.evaluation.rows import RowScores


def classes(count: int, seed: int, decimals: int = 9) -> RowScores:
    """Calibrated rows of three classes."""
    random = np.random.default_rng(seed)
    probs = random.dirichlet([0.4, 0.5, 0.6], count)
    y = np.array([random.choice(3, p=row) for row in probs])
    total = np.asarray(stats.entropy(probs, axis=1)).round(decimals)
    columns = {
        "y": y, "prediction": probs.argmax(1), "confidence": probs.max(1), "total": total, "epistemic": 0.1 * total,
        "correct": (probs.argmax(1) == y).astype(float), "nll": -np.log(probs[np.arange(count), y]),
    }  # fmt: skip
    return RowScores(columns, probs)


CLASSES, ACTIONS = ("well", "ill", "dying"), ("send home", "treat", "operate", "defer")
MATRIX = [[0.0, 1.0, 5.0, 0.8], [4.0, 0.5, 2.0, 0.8], [40.0, 9.0, 1.0, 0.8]]


def costs(rows: RowScores, matrix: Any = MATRIX, **settings: Any):
    return cost_section(
        rows, **{"matrix": matrix, "classes": CLASSES, "actions": ACTIONS, "seed": 0, **settings}
    )


def test_the_action_and_its_cost_are_those_of_enumeration():
    rows = classes(300, 14)
    assert rows.probs is not None
    taken, expected, argmax = [], [], []
    for row in rows.probs:
        means = [sum(row[k] * MATRIX[k][a] for k in range(3)) for a in range(4)]
        taken.append(means.index(min(means)))
        expected.append(min(means))
        likeliest = MATRIX[int(row.argmax())]
        argmax.append(likeliest.index(min(likeliest)))
    paid = np.array([MATRIX[k][a] for k, a in zip(rows.columns["y"], taken, strict=True)])
    plain = np.array([MATRIX[k][a] for k, a in zip(rows.columns["y"], argmax, strict=True)])
    found = costs(rows)
    summary = found.tables["summary"].set_index("policy")
    assert summary.loc["least_expected", "mean_cost"] == pytest.approx(paid.mean())
    assert summary.loc["least_expected", "expected_cost"] == pytest.approx(np.mean(expected))
    assert summary.loc["argmax", "mean_cost"] == pytest.approx(plain.mean())
    assert summary.loc["argmax", "saving"] == pytest.approx((plain - paid).mean())
    constant = [np.mean([MATRIX[k][a] for k in rows.columns["y"]]) for a in range(4)]
    assert summary.loc["best_constant", "mean_cost"] == pytest.approx(min(constant))
    majority = int(np.bincount(rows.columns["y"]).argmax())
    assert summary.loc["majority", "mean_cost"] == pytest.approx(constant[int(np.argmin(MATRIX[majority]))])
    assert summary.loc["oracle", "mean_cost"] == pytest.approx(
        np.mean([min(MATRIX[k]) for k in rows.columns["y"]])
    )
    actions = found.tables["actions"].set_index("action")
    assert list(actions) == ["n", "share", "expected_cost", "mean_cost", "share_argmax"]
    assert actions["n"].tolist() == [taken.count(a) for a in range(4)]
    assert actions["share_argmax"].tolist() == [argmax.count(a) / 300 for a in range(4)]
    assert actions.loc["defer", "mean_cost"] == pytest.approx(0.8)
    treated = np.array(taken) == 1
    assert actions.loc["treat", "mean_cost"] == pytest.approx(paid[treated].mean())
    assert actions.loc["treat", "expected_cost"] == pytest.approx(np.array(expected)[treated].mean())


def test_the_interval_of_a_saving_is_paired():
    rows = classes(500, 15)
    summary = costs(rows).tables["summary"].set_index("policy")
    own = summary.loc["least_expected"]
    assert own["saving"] == own["saving_low"] == own["saving_high"] == 0.0
    assert rows.probs is not None
    cost, y = np.array(MATRIX), rows.columns["y"]
    chosen, argmax = (rows.probs @ cost).argmin(1), cost.argmin(1)[rows.probs.argmax(1)]
    difference = cost[y, argmax] - cost[y, chosen]
    width = summary.loc["argmax", "saving_high"] - summary.loc["argmax", "saving_low"]
    assert width / 3.92 == pytest.approx(difference.std() / math.sqrt(500), rel=0.1)


def test_calibrated_rows_pay_what_they_expect_and_overconfident_ones_warn():
    rows = classes(4000, 16)
    good = costs(rows)
    own = good.tables["summary"].set_index("policy").loc["least_expected"]
    assert own["low"] <= own["expected_cost"] <= own["high"]
    assert good.level == "good"
    assert rows.probs is not None
    wrong = RowScores(rows.columns, rows.probs[:, [1, 2, 0]])
    bad = costs(wrong)
    assert bad.level == "warn"
    assert "calibrated" in bad.verdict


def test_zero_one_costs_are_the_error_rate():
    rows = classes(200, 17)
    found = costs(rows, 1 - np.eye(3), actions=CLASSES).tables["summary"].set_index("policy")
    assert found.loc["least_expected", "mean_cost"] == pytest.approx(1 - rows.columns["correct"].mean())
    assert found.loc["argmax", "saving"] == 0.0


@pytest.mark.parametrize(
    ("matrix", "settings", "message"),
    [
        (MATRIX[:2], {}, r"cost must have 3 rows .* of 4 costs .*, got rows of \[4, 4\] costs"),
        ([[0.0, 1.0]] * 3, {}, r"got rows of \[2, 2, 2\] costs"),
        ([*MATRIX[:2], [1.0]], {}, r"got rows of \[4, 4, 1\] costs"),
        ([1.0, 2.0, 3.0], {}, r"got rows of \[1, 1, 1\] costs"),
        (7, {}, r"cost must have 3 rows"),
        ([[-1.0, 1.0, 5.0, 0.8], *MATRIX[1:]], {}, "got -1.0 for the class well and the action send home"),
        ([*MATRIX[:2], [1.0, math.nan, 1.0, 1.0]], {}, "got nan for the class dying and the action treat"),
        ([["a", 1, 1, 1], *MATRIX[1:]], {}, "cost must hold numbers only"),
        (
            MATRIX,
            {"actions": ("a", "b", "a", "c")},
            "cost needs actions with different names, got: a, b, a, c",
        ),
        (MATRIX[:2], {"classes": CLASSES[:2]}, "there are 3 classes"),
    ],
)
def test_a_wrong_matrix_is_one_message(matrix: Any, settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        costs(classes(20, 0), matrix, **settings)


def test_numbers_have_no_costs_and_broken_rows_are_counted():
    with pytest.raises(UsageError, match="this run's target is a number: remove `cost`"):
        costs(RowScores({"nll": np.zeros(20)}))
    rows = classes(50, 0)
    assert rows.probs is not None
    rows.probs[:2] = np.nan
    found = costs(rows)
    assert found.warnings == ("2 rows without finite probabilities are left out.",)
    assert set(found.tables["summary"]["n"]) == {48}
