"""Deferral and costs: brute force and closed forms, the guarantee by simulation, decisions by enumeration."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.deferral import (
    NUM_THRESHOLDS,
    binomial_interval,
    cost_section,
    deferral_section,
    empirical_policy,
    guaranteed_policy,
    risk_coverage,
)
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


def numbers(count: int, seed: int) -> RowScores:
    random = np.random.default_rng(seed)
    std = random.gamma(2.0, 1.0, count)
    error = std * random.standard_normal(count)
    return RowScores({"nll": std, "error": error, "total_std": std, "epistemic_std": std[::-1].copy()})


def section(val: RowScores | None, test: RowScores, **settings: Any):
    chosen = {
        "metric": "risk", "target_risk": None, "by": "total", "confidence": None, "slices": (), "unit": "", "seed": 0,
    } | settings  # fmt: skip
    return deferral_section(val, test, **chosen)


# --- risk and coverage ------------------------------------------------------------------------------------------


def test_risk_coverage_is_the_mean_over_all_orders_of_ties():
    uncertainty, loss = np.array([0.2, 0.1, 0.2, 0.2, 0.5]), np.array([1.0, 0.25, 0.0, 0.5, 0.75])
    orders = [
        order for order in itertools.permutations(range(5)) if (np.diff(uncertainty[list(order)]) >= 0).all()
    ]
    assert len(orders) == 6
    by_hand = np.mean([np.cumsum(loss[list(order)]) / np.arange(1, 6) for order in orders], axis=0)
    table = risk_coverage(uncertainty, loss)
    np.testing.assert_allclose(table["risk"], by_hand, rtol=1e-12)
    np.testing.assert_allclose(table["coverage"], [0.2, 0.4, 0.6, 0.8, 1.0])
    assert table["threshold"].tolist() == [0.1, 0.2, 0.2, 0.2, 0.5]


def test_the_curve_has_the_risk_the_perfect_order_and_intervals_at_each_coverage():
    rows = classes(250, 0, decimals=2)
    table = section(None, rows).tables["curve"]
    assert list(table) == ["coverage", "risk", "ideal", "low", "high"]
    assert len(table) == 100
    brute = risk_coverage(rows.columns["total"], 1 - rows.columns["correct"])
    kept = np.rint(table["coverage"] * 250).astype(int)
    np.testing.assert_allclose(table["risk"], brute["risk"][kept - 1], rtol=1e-12)
    wrong = int((1 - rows.columns["correct"]).sum())
    np.testing.assert_allclose(table["ideal"], np.maximum(kept - (250 - wrong), 0) / kept, rtol=1e-12)
    # With everything kept it is the interval of a mean.
    last = table.iloc[-1]
    std = math.sqrt(last["risk"] * (1 - last["risk"]) / 250)
    assert (last["high"] - last["low"]) / 3.92 == pytest.approx(std, rel=0.1)


def test_the_curve_of_a_number_is_in_its_units():
    rows = numbers(300, 1)
    error = rows.columns["error"]
    rmse = section(None, rows, metric="rmse").tables["curve"].iloc[-1]
    assert [rmse["risk"], rmse["ideal"]] == pytest.approx([np.sqrt(np.mean(error**2))] * 2)
    assert rmse["low"] < rmse["risk"] < rmse["high"]
    mae = section(None, rows, metric="mae").tables["curve"]
    order = np.argsort(rows.columns["total_std"])
    assert mae["risk"].iloc[49] == pytest.approx(np.abs(error[order[:150]]).mean())


def test_without_a_target_the_verdict_compares_with_the_perfect_and_a_random_order():
    rows = classes(400, 2)
    found = section(None, rows, by="confidence")
    assert set(found.tables) == {"curve"}
    assert found.level == "note"
    wrong = 1 - rows.columns["correct"]
    area = risk_coverage(1 - rows.columns["confidence"], wrong)["risk"].mean()
    assert f"is {area:.4g} (" in found.verdict
    error, ranks = wrong.mean(), np.arange(1, 401)
    perfect = np.mean(np.maximum(ranks - (400 - wrong.sum()), 0) / ranks)
    assert f"has {perfect:.4g} (excess {area - perfect:.4g}" in found.verdict
    assert f"random one {error:.4g}" in found.verdict
    keepable = empirical_policy(1 - rows.columns["confidence"], wrong, 0.05).coverage
    assert f"{100 * keepable:.1f} % of rows" in found.verdict


def test_an_order_that_is_no_better_than_random_is_a_warning_and_a_perfect_one_has_no_excess():
    rows = classes(200, 3)
    wrong = 1 - rows.columns["correct"]
    rows.columns["total"] = wrong + 0.0
    assert "(excess 0, 0 to 0)" in section(None, rows).verdict
    rows.columns["total"] = 1 - wrong
    found = section(None, rows)
    assert found.level == "warn"
    assert found.verdict.endswith("does not tell which rows go wrong.")


# --- the choice of a threshold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_empirical_threshold_is_that_of_brute_force(seed: int):
    random = np.random.default_rng(seed)
    uncertainty, loss = random.integers(0, 20, 80) / 4, random.random(80) * (random.random(80) < 0.4)
    most = float(np.quantile(risk_coverage(uncertainty, loss)["risk"], 0.6))
    shares = [
        (np.mean(uncertainty < t), loss[uncertainty < t].mean())
        for t in [*np.unique(uncertainty)[1:], np.inf]
    ]
    best = max(share for share, risk in shares if risk <= most)
    policy = empirical_policy(uncertainty, loss, most)
    assert policy.coverage == best == policy.keeps(uncertainty).mean()
    assert policy.mean_loss == pytest.approx(loss[policy.keeps(uncertainty)].mean())
    assert policy.mean_loss <= most
    assert empirical_policy(uncertainty, loss, 2.0).threshold == np.inf
    lowest = empirical_policy(uncertainty, loss, -1.0)
    assert lowest.mean_loss == pytest.approx(min(risk for _, risk in shares))
    assert not lowest.keeps(uncertainty).any()


def test_a_target_that_is_met_exactly_is_met():
    wrong = np.zeros(100)
    wrong[[3, 60]] = 1
    assert empirical_policy(np.arange(100.0), wrong, 0.02).coverage == 1.0


def test_the_guaranteed_threshold_solves_the_binomial_tail():
    uncertainty, wrong = np.arange(1000.0), np.zeros(1000)
    wrong[[400, 600, 700, 950]] = 1
    policy = guaranteed_policy(uncertainty, wrong, 0.02, 0.05)
    # P(at most e errors of n | rate = bound) = delta / Q at the chosen coverage, and the next one breaks the target.
    kept = round(1000 * policy.coverage)
    errors = int(wrong[:kept].sum())
    assert stats.binom.cdf(errors, kept, policy.mean_loss) == pytest.approx(0.05 / NUM_THRESHOLDS, rel=1e-9)
    assert policy.mean_loss <= 0.02
    assert policy.threshold == (np.inf if kept == 1000 else uncertainty[kept])
    tighter = guaranteed_policy(uncertainty, wrong, policy.mean_loss * 0.999, 0.05)
    assert tighter.coverage < policy.coverage


def test_the_bound_is_that_of_the_rows_below_the_threshold_also_with_ties():
    random = np.random.default_rng(0)
    u = random.integers(0, 7, 2000).astype(float)
    wrong = (random.random(2000) < 0.02 * u).astype(float)
    policy = guaranteed_policy(u, wrong, 0.06, 0.05)
    kept = policy.keeps(u)
    assert policy.coverage == kept.mean() < 1
    tail = stats.binom.cdf(wrong[kept].sum(), kept.sum(), policy.mean_loss)
    assert tail == pytest.approx(0.05 / NUM_THRESHOLDS, rel=1e-9)


def test_without_enough_rows_even_no_error_guarantees_nothing():
    policy = guaranteed_policy(np.arange(50.0), np.zeros(50), 0.02, 0.05)
    assert math.isnan(policy.threshold)
    # Zero errors of n: (1 − bound)^n = delta / Q.
    assert policy.mean_loss == pytest.approx(1 - (0.05 / NUM_THRESHOLDS) ** (1 / 50))
    assert policy.coverage == 1.0


@pytest.mark.parametrize(
    "rate",
    [
        lambda u: 0.3 * u,  # rises through the target
        lambda u: 0.105 + 0 * u,  # of no use: at every threshold just above the target
        lambda u: np.where(u < 0.3, 0.15, np.where(u < 0.6, 0.02, 0.2)),  # worst where it is surest
    ],
)
def test_the_guarantee_holds_over_repeats_and_the_empirical_choice_has_none(rate: Callable[[Any], Any]):
    random, target, delta, repeats = np.random.default_rng(0), 0.1, 0.05, 1000
    levels = np.arange(100) / 100  # equally likely, so that the risk below a threshold is a mean over levels
    fails, chosen = np.zeros(2), 0
    for _ in range(repeats):
        u = random.choice(levels, 400)
        wrong = (random.random(400) < rate(u)).astype(float)
        guaranteed = guaranteed_policy(u, wrong, target, delta)
        chosen += not math.isnan(guaranteed.threshold)
        for i, policy in enumerate((guaranteed, empirical_policy(u, wrong, target))):
            kept = policy.keeps(levels)
            fails[i] += kept.any() and rate(levels[kept]).mean() > target
    # Three standard errors of a share of delta.
    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / repeats)
    assert fails[0] / repeats <= allowed
    assert fails[1] / repeats > 2 * allowed
    assert chosen > 0 or rate(levels[:50]).min() > target


def test_binomial_intervals_cover_by_enumeration():
    for rate in (0.03, 0.4):
        inside = [low <= rate <= high for low, high in (binomial_interval(e, 40) for e in range(41))]
        assert stats.binom.pmf(np.arange(41), 40, rate)[inside].sum() >= 0.95
    assert binomial_interval(0, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert binomial_interval(20, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)


# --- the policy on test rows ------------------------------------------------------------------------------------


def test_a_policy_is_reported_for_all_rows_and_each_slice():
    val, test = classes(2000, 4), classes(1500, 5)
    mask = np.arange(1500) < 300
    none = SimpleNamespace(name="nobody", mask=np.zeros(1500, bool))
    slices = (SimpleNamespace(name="first", mask=mask), none)
    found = section(val, test, target_risk=0.1, slices=slices)
    table = found.tables["policy"]
    assert list(table) == [
        "slice", "n", "share_deferred", "risk_kept", "low", "high", "risk_deferred", "target", "threshold",
    ]  # fmt: skip
    threshold = empirical_policy(val.columns["total"], 1 - val.columns["correct"], 0.1).threshold
    assert table["threshold"].tolist() == [threshold] * 3
    wrong, kept = 1 - test.columns["correct"], test.columns["total"] < threshold
    for i, part in enumerate((np.ones(1500, bool), mask)):
        row = table.iloc[i]
        assert row["n"] == part.sum()
        assert row["share_deferred"] == pytest.approx((part & ~kept).sum() / part.sum())
        assert row["risk_kept"] == pytest.approx(wrong[part & kept].mean())
        assert row["risk_deferred"] == pytest.approx(wrong[part & ~kept].mean())
        reference = stats.binomtest(int(wrong[part & kept].sum()), int((part & kept).sum())).proportion_ci(
            0.95
        )
        assert (row["low"], row["high"]) == pytest.approx((reference.low, reference.high))
    assert table.iloc[2]["n"] == 0
    assert math.isnan(table.iloc[2]["risk_kept"])
    assert f"{100 * table['share_deferred'][0]:.1f} % of test rows are deferred" in found.verdict


def test_a_guarantee_defers_more_than_the_empirical_choice():
    val, test = classes(2000, 4), classes(1500, 5)
    plain, sure = (section(val, test, target_risk=0.1, confidence=level) for level in (None, 0.95))
    shares = [one.tables["policy"]["share_deferred"].tolist()[0] for one in (plain, sure)]
    assert shares[0] < shares[1]
    assert sure.tables["policy"]["high"].tolist()[0] <= 0.1
    assert sure.level == "good"
    assert "guaranteed with 95 %" in sure.verdict


def test_a_policy_for_numbers_is_in_their_units():
    val, test = numbers(1500, 6), numbers(1200, 7)
    found = section(val, test, metric="rmse", target_risk=1.5, unit="mpg")
    row = found.tables["policy"].iloc[0]
    kept = test.columns["total_std"] < row["threshold"]
    error = test.columns["error"]
    assert row["risk_kept"] == pytest.approx(np.sqrt(np.mean(error[kept] ** 2)))
    assert row["low"] < row["risk_kept"] < row["high"]
    assert np.sqrt(np.mean(val.columns["error"][val.columns["total_std"] < row["threshold"]] ** 2)) <= 1.5
    assert "root mean squared error at 1.5 mpg" in found.verdict


def test_a_missed_target_and_slices_above_it_warn():
    val, test = classes(2000, 8), classes(1500, 9)
    test.columns["correct"][:750] = 0  # a shift
    halves = [
        SimpleNamespace(name=name, mask=(np.arange(1500) < 750) == (name == "bad"))
        for name in ("bad", "good")
    ]
    found = section(val, test, target_risk=0.1, slices=halves)
    assert found.level == "warn"
    assert "The target is missed" in found.verdict
    assert [text.partition(":")[0] for text in found.warnings] == ["Slice bad"]


def test_a_target_met_by_few_rows_is_not_called_good():
    test = classes(40, 9)
    test.columns["correct"][:] = 1.0
    found = section(classes(2000, 8), test, target_risk=0.1)
    row = found.tables["policy"].to_dict("records")[0]
    assert row["risk_kept"] == 0.0
    assert row["high"] > 0.1
    assert found.level == "note"
    assert "the interval reaches above it" in found.verdict


def test_a_target_out_of_reach_says_how_low_the_risk_gets():
    val, test = classes(300, 10, decimals=0), classes(200, 11)
    found = section(val, test, target_risk=0.001)
    losses, level = 1 - val.columns["correct"], val.columns["total"]
    lowest = min(losses[level <= top].mean() for top in np.unique(level))
    assert found.level == "warn"
    assert f"the lowest error rate on 300 validation rows is {100 * lowest:.2f} %" in found.verdict
    row = found.tables["policy"].iloc[0]
    assert row["share_deferred"] == 1.0
    assert math.isnan(row["threshold"])
    assert math.isnan(row["risk_kept"])
    bound = section(val, test, target_risk=0.001, confidence=0.95)
    assert "the lowest 95 % upper bound of the error rate on 300" in bound.verdict


def test_rows_that_are_not_finite_are_counted_and_their_slices_stay_in_place():
    test = classes(200, 12)
    test.columns["total"][:5] = np.nan
    mask = np.arange(200) < 50
    found = section(classes(200, 13), test, target_risk=0.3, slices=(SimpleNamespace(name="s", mask=mask),))
    assert found.tables["policy"]["n"].tolist() == [195, 45]
    assert found.warnings[0] == "5 of 200 test rows are left out: uncertainty or loss is not finite."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "rsik"}, "Unknown defer.metric 'rsik'. Did you mean 'risk'"),
        ({"metric": "rmse"}, "defer.metric=rmse does not fit this target: use risk."),
        ({"by": "aleatoric"}, "Unknown defer.by 'aleatoric'.*confidence, epistemic, total"),
        ({"target_risk": 1.5}, "defer.target must lie between 0 and 1 for risk, got 1.5"),
        ({"target_risk": math.nan}, "defer.target must lie between 0 and 1 for risk, got nan"),
        (
            {"target_risk": 0.1, "confidence": 95},
            "defer.confidence must lie between 0 and 1, or be null, got 95",
        ),
    ],
)
def test_a_wrong_setting_is_one_message(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        section(classes(50, 0), classes(50, 1), **settings)


def test_a_policy_needs_validation_rows_and_numbers_have_no_guarantee():
    with pytest.raises(UsageError, match=r"data\.val_fraction above 0"):
        section(None, classes(50, 1), target_risk=0.1)
    with pytest.raises(UsageError, match=r"defer\.confidence=0\.9 asks for a guarantee, .* error rates only"):
        section(numbers(50, 0), numbers(50, 1), metric="mae", target_risk=1.0, confidence=0.9)
    with pytest.raises(UsageError, match=r"Unknown defer\.by 'confidence'"):
        section(None, numbers(50, 1), metric="mae", by="confidence")


# --- costs ------------------------------------------------------------------------------------------------------

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
        costs(numbers(20, 0))
    rows = classes(50, 0)
    assert rows.probs is not None
    rows.probs[:2] = np.nan
    found = costs(rows)
    assert found.warnings == ("2 rows without finite probabilities are left out.",)
    assert set(found.tables["summary"]["n"]) == {48}
