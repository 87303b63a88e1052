"""Metrics within slices by pandas, gaps by scipy, and small and empty slices that are shown."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from bdl_train.errors import UsageError
from bdl_train.evaluation.metrics import Metric, metrics_of
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section, read_section, write_section
from bdl_train.evaluation.slices import Loss, gaps_of, losses_of, slices_section
from bdl_train.evaluation.slicing import Slice, parse_slices


def class_rows(probs: np.ndarray, y: np.ndarray) -> RowScores:
    prediction, confidence = probs.argmax(1), probs.max(1)
    nll = -np.log(probs[np.arange(len(y)), y])
    nothing = np.zeros(len(y))
    columns = {
        "y": y,
        "prediction": prediction,
        "confidence": confidence,
        "correct": (prediction == y).astype(float),
        "nll": nll,
        "brier": np.square(probs - np.eye(probs.shape[1])[y]).sum(1),
        "total": nothing,
        "aleatoric": nothing,
        "epistemic": nothing,
        "energy": nothing,
    }
    return RowScores(columns, probs)


def number_rows(error: np.ndarray) -> RowScores:
    return RowScores({"nll": error**2 / 2, "error": error})


def simple_score(rows: RowScores) -> list[Metric]:
    """Two metrics with intervals of a width that is easy to know."""
    nll = float(rows.columns["nll"].mean())
    found = [Metric("nll", nll, "nats", "surprise", "lower", nll - 0.1, nll + 0.1)]
    if rows.probs is not None:
        right = float(rows.columns["correct"].mean())
        found.append(Metric("accuracy", right, "share", "right", "higher", right - 0.1, right + 0.1))
        one = len(np.unique(rows.columns["y"])) < 2
        auroc = Metric("auroc", None, "share", "order", "higher", reason="one class only")
        found.append(auroc if one else Metric("auroc", 0.5, "share", "order", "higher", 0.4, 0.6))
    return found


def binary(count: int = 600, seed: int = 0) -> tuple[RowScores, pd.DataFrame]:
    random = np.random.default_rng(seed)
    p = random.uniform(0.05, 0.95, count)
    rows = class_rows(np.stack([1 - p, p], axis=1), (random.random(count) < p).astype(int))
    table = pd.DataFrame({"sex": random.choice(["f", "m"], count), "age": random.integers(20, 80, count)})
    return rows, table


def rows_by(section: Section, table: str, second: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of a table by slice and key."""
    found = section.tables[table].to_dict("records")
    return {(row["slice"], row[second]): {str(k): v for k, v in row.items()} for row in found}


def means_by(table: pd.DataFrame, keys: list[str], column: str) -> dict[tuple, float]:
    grouped: Any = table.groupby(keys)[column].mean()
    return {key if isinstance(key, tuple) else (key,): value for key, value in grouped.to_dict().items()}


def section_of(
    rows: RowScores, table: pd.DataFrame, *expressions: str, small: int = 30, unit: str = "kg"
) -> Section:
    slices, warnings = parse_slices(expressions, table)
    return slices_section(rows, slices, score=simple_score, unit=unit, seed=0, small=small, warnings=warnings)


# --- metrics ------------------------------------------------------------------------------------------------------


def test_a_reversal_within_departments_has_the_numbers_of_a_groupby():
    """Simpson's paradox: women are predicted worse overall, and better within each department."""
    wrong = {("a", "m"): (80, 24), ("a", "f"): (20, 4), ("b", "m"): (20, 14), ("b", "f"): (80, 48)}
    parts = [
        pd.DataFrame({"department": department, "sex": sex, "correct": [0] * bad + [1] * (count - bad)})
        for (department, sex), (count, bad) in wrong.items()
    ]
    table = pd.concat(parts, ignore_index=True)
    p = np.where(table["correct"], 0.8, 0.3)
    rows = class_rows(np.stack([p, 1 - p], axis=1), np.zeros(200, int))
    found = rows_by(section_of(rows, table, "sex", "department×sex"), "metrics", "key")
    accuracy = {name: row["value"] for (name, key), row in found.items() if key == "accuracy"}
    by_sex = means_by(table, ["sex"], "correct")
    by_both = means_by(table, ["department", "sex"], "correct")
    assert accuracy == pytest.approx(
        {"all": table["correct"].mean()}
        | {f"sex={sex}": value for (sex,), value in by_sex.items()}
        | {f"department={department} & sex={sex}": value for (department, sex), value in by_both.items()}
    )
    assert accuracy["sex=f"] < accuracy["sex=m"]
    assert accuracy["department=a & sex=f"] > accuracy["department=a & sex=m"]
    assert accuracy["department=b & sex=f"] > accuracy["department=b & sex=m"]


def test_every_metric_of_every_slice_is_that_of_its_rows_alone():
    rows, table = binary()
    slices, _ = parse_slices(["sex", "age>60"], table)
    section = slices_section(rows, slices, score=lambda some: metrics_of(some, "kg"), unit="kg", seed=0)
    found = rows_by(section, "metrics", "key")
    for one in slices:
        for metric in metrics_of(rows.take(np.flatnonzero(one.mask)), "kg"):
            assert found[one.name, metric.key]["value"] == pytest.approx(metric.value, nan_ok=True)
            assert found[one.name, metric.key]["n"] == one.mask.sum()


def test_small_and_empty_slices_are_flagged_not_hidden(tmp_path):
    rows, table = binary()
    table["one"] = ["x"] + ["y"] * 599
    table["few"] = ["u"] * 10 + ["v"] * 590
    section = section_of(rows, table, "few", "one", "age>200", "age>0")
    metrics = rows_by(section, "metrics", "key")
    assert list(section.tables["metrics"].columns) == [
        "slice", "column", "key", "value", "low", "high", "n", "unit", "better", "small", "reason",
    ]  # fmt: skip
    assert metrics["few=u", "nll"]["small"]
    assert not metrics["few=v", "nll"]["small"]
    assert metrics["age>200", "nll"]["reason"] == "no rows"
    assert np.isnan(metrics["age>200", "nll"]["value"])
    assert metrics["one=x", "auroc"]["reason"] == "one class only"
    assert np.isfinite(metrics["one=x", "nll"]["value"])
    assert np.isnan(metrics["one=x", "nll"]["low"])
    gaps = rows_by(section, "gaps", "loss")
    assert gaps["few=u", "nll"]["test"] == "permutation"
    assert gaps["few=u", "nll"]["small"]
    for name, reason in {
        "one=x": "one row only",
        "age>200": "no rows",
        "age>0": "in the rest no rows",
    }.items():
        assert gaps[name, "nll"]["reason"] == reason
        assert np.isnan(gaps[name, "nll"]["p"])
        assert np.isnan(gaps[name, "nll"]["p_adjusted"])
        assert not gaps[name, "nll"]["significant"]
    text = " ".join(section.warnings)
    for words in ("'few=u' (10)", "'one=x' (1)", "Slices without rows: 'age>200'", "selects all 600 rows"):
        assert words in text
    write_section(tmp_path, section)
    pd.testing.assert_frame_equal(
        read_section(tmp_path, "slices").tables["gaps"], section.tables["gaps"], check_dtype=False
    )


def test_the_worst_slice_is_found_among_all_and_among_those_not_small():
    rows, table = binary()
    table["g"] = np.repeat(["a", "b", "c", "d"], [200, 200, 190, 10])
    rows.columns["nll"][200:400] += 1
    rows.columns["nll"][590:] += 5
    section = section_of(rows, table, "g")
    worst = {(row["key"], row["among"]): row for row in section.tables["worst"].to_dict("records")}
    assert worst["nll", "not small"]["slice"] == "g=b"
    assert worst["nll", "all"]["slice"] == "g=d"
    assert worst["nll", "all"]["n"] == 10
    assert worst["nll", "all"]["overall"] == pytest.approx(rows.columns["nll"].mean())
    by_group = means_by(table.assign(correct=rows.columns["correct"]).head(590), ["g"], "correct")
    assert worst["accuracy", "not small"]["slice"] == f"g={min(by_group, key=lambda key: by_group[key])[0]}"
    assert section.level == "warn"
    assert section.verdict.startswith("Worst slice: g=b (n = 200), nll ")
    assert "over all rows, adjusted p < 0.001" in section.verdict


def test_noise_is_no_finding_and_what_cannot_be_compared_is_said():
    rows, table = binary()
    section = section_of(rows, table, "sex", "age")
    assert section.level == "good"
    assert section.verdict.startswith("None of 6 slices differs from the rest beyond chance (30 comparisons")
    section = section_of(rows, table, "age>200")
    assert (section.level, section.verdict.split(":")[0]) == ("note", "No slice can be compared")


def test_a_gap_in_rates_alone_is_a_finding():
    p = np.tile([0.9, 0.9, 0.1, 0.1], 100)
    y = np.tile([1, 0, 0, 1], 100)
    table = pd.DataFrame({"g": np.where(p > 0.5, "a", "b")})
    section = section_of(class_rows(np.stack([1 - p, p], axis=1), y), table, "g")
    assert section.level == "warn"
    assert section.verdict.startswith("Largest gap: g=a (n = 200), positive_rate 1 against 0.5")


def test_slices_of_other_rows_are_refused():
    rows, _ = binary()
    with pytest.raises(UsageError, match="'x' is of 3 rows, but 600 rows are scored"):
        slices_section(rows, [Slice("x", np.ones(3, bool), "x")], score=simple_score, unit="", seed=0)
    with pytest.raises(UsageError, match="no slices"):
        slices_section(rows, [], score=simple_score, unit="", seed=0)


# --- gaps ---------------------------------------------------------------------------------------------------------


def test_fairness_gaps_are_those_of_a_confusion_table():
    rows, table = binary()
    gaps = rows_by(section_of(rows, table, "sex"), "gaps", "loss")
    c = table.assign(y=rows.columns["y"], positive=rows.columns["prediction"])
    for loss, kept in {
        "positive_rate": c,
        "true_positive_rate": c[c["y"] == 1],
        "false_positive_rate": c[c["y"] == 0],
    }.items():
        rate, size = kept.groupby("sex")["positive"].mean(), kept.groupby("sex").size()
        gap = gaps["sex=f", loss]
        assert gap["difference"] == pytest.approx(rate["f"] - rate["m"])
        assert (gap["n"], gap["n_rest"]) == (size["f"], size["m"])
    assert gaps["sex=f", "error_rate"]["mean"] == pytest.approx(
        1 - rows.columns["correct"][table["sex"] == "f"].mean()
    )


def test_losses_follow_the_kind_of_the_target():
    rows = number_rows(np.array([1.0, -3.0]))
    assert [(loss.key, loss.unit) for loss in losses_of(rows, "kg")] == [
        ("nll", "nats"),
        ("absolute_error", "kg"),
    ]
    assert losses_of(rows, "kg")[1].values.tolist() == [1, 3]
    three = class_rows(np.full((4, 3), 1 / 3), np.zeros(4, int))
    assert [loss.key for loss in losses_of(three, "")] == ["nll", "error_rate"]


def test_gaps_are_adjusted_over_all_of_them():
    every = np.ones(100, bool)
    random = np.random.default_rng(5)
    losses = [Loss(name, random.exponential(size=100), every, "", True) for name in ("a", "b")]
    slices = [Slice(str(i), random.random(100) < 0.4, "x") for i in range(6)]
    gaps = gaps_of(slices, losses, seed=0, small=30)
    p = np.array([gap.p for gap in gaps])
    order = np.argsort(p)
    by_hand = np.empty(12)
    by_hand[order] = np.minimum.accumulate((p[order] * 12 / np.arange(1, 13))[::-1])[::-1]
    np.testing.assert_allclose([gap.p_adjusted for gap in gaps], by_hand)


def test_a_prediction_that_is_not_finite_is_a_reason():
    rows, table = binary()
    rows.columns["nll"][3] = np.inf
    rows.columns["correct"][4] = np.nan
    section = section_of(rows, table, "sex")
    gaps = section.tables["gaps"]
    assert set(gaps[gaps["loss"].isin(["nll", "error_rate", "positive_rate"])]["reason"]) == {
        "a prediction is not finite"
    }
    metrics = rows_by(section, "metrics", "key")
    assert metrics["all", "nll"]["reason"] == "not finite"
