"""Human decisions: compared by hand, and outcomes that decisions hid."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bdl_train.errors import UsageError
from bdl_train.evaluation.decisions import decisions_section
from bdl_train.evaluation.rows import RowScores
from bdl_train.specs import TargetKind, TargetSpec

LOAN = TargetSpec(TargetKind.CLASS, "loan", ("repaid", "default"))
THREE = TargetSpec(TargetKind.CLASS, "kind", ("a", "b", "c"))
PRICE = TargetSpec(TargetKind.CONTINUOUS, "price")


def classes(count: int, num_classes: int = 2, seed: int = 0) -> RowScores:
    random = np.random.default_rng(seed)
    probs = random.dirichlet(np.ones(num_classes), count)
    y = np.array([random.choice(num_classes, p=row) for row in probs])
    columns = {
        "nll": np.zeros(count), "y": y, "prediction": probs.argmax(1), "confidence": probs.max(1),
        "total": np.asarray(stats.entropy(probs, axis=1)),
    }  # fmt: skip
    return RowScores(columns, probs)


def log(rows: list[int], actions: list[str], labels: Sequence[str | None] = ()) -> pd.DataFrame:
    index = pd.RangeIndex(2, len(rows) + 2, name="line")
    given = list(labels) or [None] * len(rows)
    columns = {"row": rows, "action": actions, "label": pd.Series(given, index, dtype=object)}
    return pd.DataFrame(columns, index)


def test_rates_and_scores_are_those_by_hand():
    rows = RowScores(
        {
            "nll": np.zeros(6), "y": np.array([0, 1, 1, 2, 0, 2]), "prediction": np.array([0, 1, 2, 2, 1, 0]),
            "confidence": np.full(6, 0.5), "total": np.array([0.1, 0.1, 0.5, 0.5, 0.9, 0.9]),
        },
        np.full((6, 3), 1 / 3),
    )  # fmt: skip
    # Row ids 10..15: agreed, overridden to c (wrong), to b (right), deferred, overridden without a class, a = agreed.
    decisions = log(
        [10, 11, 12, 13, 14, 15],
        ["accept", "c", "b", "Defer", "override", "a"],
        ["a", "b", "b", "c", None, "c"],
    )
    found = decisions_section(rows, np.arange(10, 16), decisions, target=THREE, seed=0)
    summary = found.tables["summary"]
    assert list(summary) == [
        "group", "n", "share_decided", "override_rate", "low", "high", "defer_rate", "agreement", "score", "n_scored",
        "model", "human", "difference", "difference_low", "difference_high",
    ]  # fmt: skip
    whole = summary.to_dict("records")[0]
    assert (whole["n"], whole["share_decided"], whole["override_rate"]) == (6, 1.0, 0.5)
    assert (whole["defer_rate"], whole["agreement"]) == (pytest.approx(1 / 6), 0.4)
    # Known decisions with an outcome: rows 10, 11, 12, 15. The model is right on 10, 11; people on 10, 12.
    assert (whole["n_scored"], whole["model"], whole["human"], whole["difference"]) == (4, 0.5, 0.5, 0.0)
    reference = stats.binomtest(3, 6).proportion_ci(0.95)
    assert (whole["low"], whole["high"]) == pytest.approx((reference.low, reference.high))
    assert summary["group"].tolist() == ["all", "surest third", "middle third", "most unsure third"]
    assert summary["override_rate"].tolist() == [0.5, 0.5, 0.5, 0.5]
    assert summary["model"].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert summary["human"].tolist() == [0.5, 0.5, 1.0, 0.0]
    assert (
        "1 overrides do not say what was decided instead: people are scored without them." in found.warnings
    )
    assert found.verdict.startswith("6 of 6 rows have a decision: 50.0 % were overridden")
    labels = found.tables["labels"].set_index("group")
    assert labels["n"].to_dict() == {
        "accepted": 2, "overridden": 3, "deferred": 1, "decided a": 2, "decided b": 1, "decided c": 1,
    }  # fmt: skip
    assert labels.loc["overridden", "label_rate"] == pytest.approx(2 / 3)
    assert labels.loc["overridden", "rest_rate"] == 1.0


def test_an_override_of_two_classes_is_the_other_one():
    rows = classes(40, seed=1)
    y, prediction = rows.columns["y"], rows.columns["prediction"]
    names = [LOAN.classes[k] for k in y]
    found = decisions_section(
        rows, np.arange(40), log(list(range(40)), ["override"] * 40, names), target=LOAN, seed=0
    )
    whole = found.tables["summary"].to_dict("records")[0]
    assert whole["human"] == pytest.approx(np.mean(1 - prediction == y))
    assert whole["model"] == pytest.approx(np.mean(prediction == y))
    assert whole["difference_low"] <= whole["difference"] <= whole["difference_high"]


def test_overrides_are_told_by_how_unsure_the_model_was():
    rows = classes(300, seed=2)
    unsure = rows.columns["total"] > np.quantile(rows.columns["total"], 2 / 3)
    actions = ["override" if one else "accept" for one in unsure]
    found = decisions_section(rows, np.arange(300), log(list(range(300)), actions), target=LOAN, seed=0)
    assert found.tables["summary"]["override_rate"].tolist() == [pytest.approx(1 / 3), 0.0, 0.0, 1.0]
    assert "100.0 % in the third where the model is most unsure, 0.0 % in the surest" in found.verdict


def test_numbers_are_scored_by_their_absolute_error():
    mean = np.array([10.0, 20.0, 30.0, 40.0])
    rows = RowScores(
        {"nll": 0 * mean, "y": mean + 1, "mean": mean, "total_std": np.array([1.0, 2.0, 3.0, 4.0])}
    )
    decisions = log([0, 1, 2, 3], ["accept", "21.5", "override", "defer"], ["11", "21", "31", None])
    found = decisions_section(rows, np.arange(4), decisions, target=PRICE, seed=0)
    whole = found.tables["summary"].to_dict("records")[0]
    assert whole["score"] == "mean absolute error"
    assert (whole["n_scored"], whole["model"], whole["human"], whole["difference"]) == (2, 1.0, 0.75, -0.25)
    with pytest.raises(
        UsageError, match="line 2: action must be accept, override, defer or a number, got 'dear'"
    ):
        decisions_section(rows, np.arange(4), log([0], ["dear"]), target=PRICE, seed=0)


def test_rows_that_are_unknown_repeated_or_broken_are_counted():
    rows = classes(10)
    rows.columns["total"][3] = np.nan
    decisions = log([0, 99, 1, 1, 98, 3], ["accept", "accept", "override", "accept", "accept", "accept"])
    found = decisions_section(rows, np.arange(10), decisions, target=LOAN, seed=0)
    assert found.tables["summary"]["n"].tolist()[0] == 2
    assert found.tables["summary"]["override_rate"].tolist()[0] == 0.0
    assert found.warnings == (
        "2 decisions are on rows that this part has not (row ids 99, 98): left out.",
        "1 decisions were followed by another on the same row: the last counts.",
        "1 decisions are on rows without a finite prediction: left out.",
        "The log holds no outcome (column `label`), so nobody can say who was right.",
    )
    nowhere = decisions_section(rows, np.arange(10), log([50], ["accept"]), target=LOAN, seed=0)
    assert (nowhere.level, nowhere.tables) == ("empty", {})


@pytest.mark.parametrize(
    ("actions", "labels", "message"),
    [
        (["accept", "defualt"], [None, None], "line 3: Unknown action 'defualt'. Did you mean 'default'"),
        (
            ["accept", "defer"],
            ["repaid", "paid"],
            "line 3: Unknown label 'paid'.*Choose one of: default, repaid",
        ),
        (["accept", "defer"], ["accept", None], "line 2: Unknown label 'accept'"),
    ],
)
def test_an_unknown_word_names_its_line(actions: list[str], labels: list[str | None], message: str):
    with pytest.raises(UsageError, match=message):
        decisions_section(classes(5), np.arange(5), log([0, 1], actions, labels), target=LOAN, seed=0)


def test_a_class_with_the_name_of_a_word_and_outcomes_against_the_data_are_warnings():
    target = TargetSpec(TargetKind.CLASS, "offer", ("accept", "reject"))
    rows = classes(4)
    names = [target.classes[k] for k in rows.columns["y"]]
    names[0] = target.classes[1 - rows.columns["y"][0]]
    found = decisions_section(
        rows, np.arange(4), log([0, 1, 2, 3], ["accept"] * 4, names), target=target, seed=0
    )
    assert (
        "The action 'accept' is read as the word of the log, not as the class of that name." in found.warnings
    )
    assert "1 of 4 outcomes in the log differ from the target in the data." in found.warnings


# --- outcomes that decisions hide -------------------------------------------------------------------------------


def labelled(rows: RowScores, seen: np.ndarray, target: TargetSpec = LOAN) -> list[str | None]:
    return [target.classes[k] if one else None for k, one in zip(rows.columns["y"], seen, strict=True)]


def test_outcomes_only_of_accepted_rows_are_a_feedback_loop():
    rows = classes(200, seed=3)
    kinds = np.random.default_rng(0).choice(["accept", "override", "defer"], 200)
    decisions = log(list(range(200)), kinds.tolist(), labelled(rows, kinds == "accept"))
    found = decisions_section(rows, np.arange(200), decisions, target=LOAN, seed=0)
    assert found.level == "warn"
    assert "an outcome was seen for 100 % of rows accepted (0 % of the rest)" in found.verdict
    assert "retraining on them repeats the decisions" in found.verdict
    assert found.tables["labels"].set_index("group").loc["accepted", "p"] < 1e-20


@pytest.mark.parametrize("others", [["defer"] * 5, ["defer"] * 3 + ["override"] * 3])
def test_nearly_no_outcomes_of_few_rows_warn_where_a_test_could_not(others: list[str]):
    actions = ["accept"] * 5 + others
    rows = classes(len(actions), 3, seed=4)
    decisions = log(list(range(len(actions))), actions, labelled(rows, np.arange(len(actions)) < 4, THREE))
    found = decisions_section(rows, np.arange(len(actions)), decisions, target=THREE, seed=0)
    p = found.tables["labels"]["p"].to_numpy()
    assert p.min() * len(p) > 0.01
    assert found.level == "warn"
    fewer = decisions_section(rows, np.arange(len(actions)), decisions.head(9), target=THREE, seed=0)
    assert fewer.level == "note"  # 4 rows are too few to speak of


def test_outcomes_of_one_decided_class_only_are_a_feedback_loop():
    """Selective labels: a loan that was refused cannot default, whoever refused it."""
    rows = classes(300, seed=5)
    decided = np.where(np.random.default_rng(1).random(300) < 0.2, 1, 0) ^ rows.columns["prediction"]
    decisions = log(list(range(300)), [LOAN.classes[k] for k in decided], labelled(rows, decided == 0))
    found = decisions_section(rows, np.arange(300), decisions, target=LOAN, seed=0)
    assert found.level == "warn"
    assert "0 % of rows decided default (100 % of the rest)" in found.verdict
    probability = found.tables["predicted"].set_index("quantity").loc["probability of default"]
    assert rows.probs is not None
    assert probability["labelled"] == pytest.approx(rows.probs[decided == 0, 1].mean())
    assert probability["unlabelled"] == pytest.approx(rows.probs[decided == 1, 1].mean())
    assert probability["high"] < 0
    assert any("mean probability of default" in text for text in found.warnings)


def test_different_label_rates_warn_by_a_test_and_equal_ones_do_not():
    rows = classes(400, seed=6)
    random = np.random.default_rng(2)
    kinds = np.array(["accept", "override"])[random.integers(0, 2, 400)]
    for rate, level in ((0.35, "warn"), (0.7, "note")):
        seen = random.random(400) < np.where(kinds == "accept", 0.7, rate)
        decisions = log(list(range(400)), kinds.tolist(), labelled(rows, seen))
        found = decisions_section(rows, np.arange(400), decisions, target=LOAN, seed=0)
        assert found.level == level
        row = found.tables["labels"].set_index("group").loc["accepted"]
        accepted = kinds == "accept"
        table = [[(seen & own).sum(), (~seen & own).sum()] for own in (accepted, ~accepted)]
        # Fisher's test from the hypergeometric distribution: all tables no likelier than this one.
        chances = stats.hypergeom.pmf(np.arange(401), 400, seen.sum(), accepted.sum())
        assert row["p"] == pytest.approx(
            chances[chances <= chances[table[0][0]] * (1 + 1e-7)].sum(), rel=1e-6
        )
        assert row["label_rate"] == pytest.approx(seen[accepted].mean())
        assert row["rest_rate"] == pytest.approx(seen[~accepted].mean())


def test_the_shift_between_rows_with_and_without_an_outcome_has_the_interval_of_two_means():
    rows = classes(600, 3, seed=7)
    seen = np.random.default_rng(3).random(600) < 0.5
    decisions = log(list(range(600)), ["accept"] * 600, labelled(rows, seen, THREE))
    found = decisions_section(rows, np.arange(600), decisions, target=THREE, seed=0)
    table = found.tables["predicted"].set_index("quantity")
    assert list(table.index) == ["probability of a", "probability of b", "probability of c", "confidence"]
    assert rows.probs is not None
    one, other = rows.probs[seen, 0], rows.probs[~seen, 0]
    row = table.loc["probability of a"]
    assert row["difference"] == pytest.approx(one.mean() - other.mean())
    error = math.sqrt(one.var() / len(one) + other.var() / len(other))
    assert (row["high"] - row["low"]) / 3.92 == pytest.approx(error, rel=0.1)
    assert found.level == "note"
    assert not any("another kind" in text for text in found.warnings)
