"""Deferral: the curve by hand, and what a policy does to test rows, slices and numbers."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.deferral import deferral_section
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.selection import empirical_policy, risk_coverage


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
