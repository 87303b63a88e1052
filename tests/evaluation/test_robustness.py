"""Robustness sweeps: scorers whose uncertainty grows or stays put get different verdicts, and numbers known by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from small_posteriors import INPUTS, small_artefact

from bdl_train.data import Part
from bdl_train.data._table import TableTransform
from bdl_train.errors import UsageError
from bdl_train.evaluation import bootstrap
from bdl_train.evaluation.corruptions import CORRUPTIONS
from bdl_train.evaluation.evaluate import evaluate
from bdl_train.evaluation.metrics import metrics_of
from bdl_train.evaluation.robustness import Sweep, robustness_section
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section, read_section, write_section
from bdl_train.evaluation.table_shifts import covariate_shift
from bdl_train.predictive.predict import Predictor
from bdl_train.specs import InputSpec, TargetKind, TargetSpec

Score = Callable[[Part], RowScores]

SWEEP = Sweep(
    corruptions=("gaussian_noise", "contrast"),
    severities=(1, 3, 5),
    noise=(0.5, 1.0),
    num_missing=(1, 2),
    tilts=(0.5, 1.0),
    label_shares=(0.1, 0.4),
    max_features=None,
    max_rows=None,
)
TWO = TargetSpec(TargetKind.CLASS, "kind", ("no", "yes"))
PIXELS = InputSpec((1, 28, 28), pixel_mean=(0.4,), pixel_std=(0.2,))
PRICE = TargetSpec(TargetKind.CONTINUOUS, "price")
TABLE = InputSpec((4,), (1, 1, 1, 1), ("w0", "w1", "w2", "w3"))
WEIGHTS = np.array([0.1, 2.0, 0.0, -1.0])


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 200)


def images(count: int = 300) -> Part:
    random = np.random.default_rng(0)
    x = random.integers(40, 200, (count, 1, 28, 28), dtype=np.uint8)
    return Part(x, random.integers(0, 2, count), np.arange(count))


def classes_of(y: np.ndarray, correct: np.ndarray, total: np.ndarray, epistemic: np.ndarray) -> RowScores:
    confidence = np.full(len(y), 0.9)
    prediction = np.where(correct, y, 1 - y)
    probs = np.where(prediction[:, None] == np.arange(2), 0.9, 0.1)
    columns = {
        "y": y,
        "prediction": prediction,
        "confidence": confidence,
        "correct": correct.astype(float),
        "nll": -np.log(probs[np.arange(len(y)), y]),
        "brier": np.square(probs - np.eye(2)[y]).sum(1),
        "total": total,
        "aleatoric": total - epistemic,
        "epistemic": epistemic,
        "energy": -total,
    }
    return RowScores(columns, probs)


def by_distance(clean: Part, growth: float) -> Score:
    """Wrong where pixels left the clean ones far behind; uncertainty grows by `growth` times that distance."""
    threshold = np.random.default_rng(1).random(len(clean))

    def score(part: Part) -> RowScores:
        moved = np.abs(part.x.astype(float) - clean.x[part.rows]).mean((1, 2, 3)) / 255
        total = 0.2 + growth * moved
        return classes_of(part.y, threshold[part.rows] > 0.05 + 2 * moved, total, 0.3 * total)

    return score


def table(count: int = 400) -> Part:
    random = np.random.default_rng(0)
    x = random.standard_normal((count, 4)).astype(np.float32)
    y = x @ WEIGHTS + 0.1 * random.standard_normal(count)
    return Part(x, y.astype(np.float32), np.arange(count))


def linear(growth: float) -> Score:
    """The true weights; the predictive is Gaussian, and `growth` widens it away from the origin."""

    def score(part: Part) -> RowScores:
        mean = part.x @ WEIGHTS
        epistemic = 0.05 + growth * np.square(part.x).sum(1)
        std = np.hypot(0.1, epistemic)
        pit = stats.norm.cdf(part.y, mean, std)
        edges = [stats.norm.ppf(q, mean, std) for q in (0.025, 0.5, 0.975)]
        return RowScores(
            {
                "y": part.y,
                "mean": mean,
                "total_std": std,
                "aleatoric_std": np.full(len(mean), 0.1),
                "epistemic_std": epistemic,
                "nll": -stats.norm.logpdf(part.y, mean, std),
                "crps": np.abs(mean - part.y),
                "pit": pit,
                "pit_below": pit,
                "lower_95": edges[0],
                "median": edges[1],
                "upper_95": edges[2],
                "error": mean - part.y,
            }
        )

    return score


def of_images(score: Score, part: Part, **changes: Any) -> Section:
    sweep = replace(SWEEP, **{"label_shares": (), **changes})
    return robustness_section(score, part, inputs=PIXELS, transform=None, target=TWO, seed=3, sweep=sweep)


def of_table(score: Score, part: Part, target: TargetSpec = PRICE, **changes: Any) -> Section:
    return robustness_section(
        score, part, inputs=TABLE, transform=None, target=target, seed=3, sweep=replace(SWEEP, **changes)
    )


def curve(section: Section, kind: str, metric: str) -> dict[str, dict[float, Any]]:
    """Column, then severity."""
    found = section.tables["curves"]
    mine = found[(found["kind"] == kind) & (found["metric"] == metric)]
    steps = mine["severity"].tolist()
    return {
        name: dict(zip(steps, mine[name].tolist(), strict=True)) for name in ("value", "low", "high", "n")
    }


def left_out(section: Section) -> dict[str, dict[str, Any]]:
    """Feature, then column, in the order of the table."""
    return {row["feature"]: row for row in section.tables["missing"].to_dict("records")}


def answers(section: Section) -> dict[str, str]:
    growth = section.tables["growth"]
    return dict(zip(growth["kind"], growth["as_it_should"], strict=True))


# --- verdicts ----------------------------------------------------------------------------------------------------


def test_uncertainty_that_follows_the_error_is_good():
    section = of_images(by_distance(images(), 3.0), images())
    assert answers(section) == {"gaussian_noise": "yes", "contrast": "yes"}
    assert section.level == "good"
    assert "gets worse under 2 of 2 kinds" in section.verdict
    assert "predictive entropy grows as it should under 2 of those 2." in section.verdict
    growth = section.tables["growth"]
    for column in ("uncertainty_rank", "epistemic_rank", "error_rank", "agreement"):
        np.testing.assert_allclose(growth[column], 1)
    np.testing.assert_allclose(growth["epistemic_change"], 0.3 * growth["uncertainty_change"])
    for name in ("error", "uncertainty", "epistemic"):
        low, value, high = (growth[f"{name}_change{edge}"].to_numpy() for edge in ("_low", "", "_high"))
        assert np.all((low < value) & (value < high))
    # Accuracy falls by 2 and uncertainty rises by 3 times the distance.
    np.testing.assert_allclose(growth["error_change"], growth["uncertainty_change"] * 2 / 3, rtol=0.25)


def test_wrong_labels_of_images_lower_the_accuracy_and_leave_the_uncertainty():
    section = of_images(by_distance(images(), 3.0), images(), label_shares=(0.2, 0.4))
    assert answers(section)["label_noise"] == "exempt"
    accuracy = list(curve(section, "label_noise", "accuracy")["value"].values())
    assert accuracy == sorted(accuracy, reverse=True)
    assert len(set(curve(section, "label_noise", "entropy")["value"].values())) == 1


@pytest.mark.parametrize("growth", [0.0, -0.2, 0.001])
def test_uncertainty_that_does_not_grow_is_named(growth: float):
    section = of_images(by_distance(images(), growth), images())
    assert answers(section) == {"gaussian_noise": "no", "contrast": "no"}
    assert section.level == "warn"
    assert "under 0 of those 2, not under gaussian_noise and contrast." in section.verdict
    assert np.isnan(section.tables["growth"]["agreement"].tolist()).all() == (growth == 0)


def test_one_severity_without_growth_is_enough_for_a_no():
    clean = images()
    honest, constant = by_distance(clean, 3.0), by_distance(clean, 0.0)

    def score(part: Part) -> RowScores:
        moved = np.abs(part.x.astype(float) - clean.x[part.rows]).mean()
        return (constant if 10 < moved < 14 else honest)(part)

    mild, middle, strong = (
        np.abs(changed.astype(float) - clean.x).mean()
        for changed in (
            CORRUPTIONS["gaussian_noise"](clean.x, s, np.random.default_rng(0)) for s in (1, 2, 3)
        )
    )
    assert mild < 10 < middle < 14 < strong
    section = of_images(score, clean, corruptions=("gaussian_noise",), severities=(1, 2, 3, 5))
    assert answers(section) == {"gaussian_noise": "no"}
    assert section.tables["growth"]["uncertainty_change"].tolist()[0] > 0.1


def test_where_nothing_breaks_nothing_has_to_grow():
    def score(part: Part) -> RowScores:
        return classes_of(part.y, np.ones(len(part), bool), np.full(len(part), 0.2), np.zeros(len(part)))

    section = of_images(score, images())
    assert set(answers(section).values()) == {"error does not grow"}
    assert section.level == "note"
    assert "None of 2 kinds of shift makes accuracy worse" in section.verdict
    assert np.isnan(section.tables["growth"]["breaks_at"].tolist()).all()


def test_accuracy_breaks_first_where_it_is_lower_at_the_mildest_severity():
    section = of_images(by_distance(images(), 3.0), images())
    accuracy = {kind: curve(section, kind, "accuracy")["value"] for kind in SWEEP.corruptions or ()}
    worst = min(accuracy, key=lambda kind: accuracy[kind][1.0])
    before, after = accuracy[worst][0.0], accuracy[worst][1.0]
    assert (
        f"breaks first under {worst}, at severity 1: accuracy {before:.3g} to {after:.3g}" in section.verdict
    )
    assert section.tables["growth"]["breaks_at"].tolist() == [1.0, 1.0]


def test_values_that_are_not_finite_are_told():
    honest = by_distance(images(), 3.0)

    def score(part: Part) -> RowScores:
        rows = honest(part)
        if not np.array_equal(part.x, images().x):
            rows.columns["total"][0] = np.nan
        return rows

    section = of_images(score, images(), corruptions=("fog",))
    assert answers(section) == {"fog": "undefined"}
    assert section.level == "warn"
    assert "not finite under fog" in section.verdict


# --- numbers -----------------------------------------------------------------------------------------------------


def test_curves_are_the_metrics_of_shifted_rows_and_their_intervals():
    part = images()
    score = by_distance(part, 3.0)
    section = of_images(score, part)
    clean = {metric.key: metric.value for metric in metrics_of(score(part), "class")}
    for metric in ("nll", "accuracy", "ece", "entropy", "mutual_information"):
        for kind in ("gaussian_noise", "contrast"):
            found = curve(section, kind, metric)
            assert list(found["value"]) == [0, 1, 3, 5]
            assert found["value"][0.0] == pytest.approx(clean[metric])
            assert set(found["n"].values()) == {300}
    # Contrast needs no randomness, so its rows are known here.
    shifted = score(replace(part, x=CORRUPTIONS["contrast"](part.x, 5, np.random.default_rng())))
    expected = {metric.key: metric.value for metric in metrics_of(shifted, "class")}
    for metric in ("nll", "accuracy", "ece", "entropy", "mutual_information"):
        assert curve(section, "contrast", metric)["value"][5.0] == pytest.approx(expected[metric])
    worst = {name: found[5.0] for name, found in curve(section, "contrast", "accuracy").items()}
    half = 1.96 * shifted.columns["correct"].std() / np.sqrt(300)
    assert worst["low"] == pytest.approx(worst["value"] - half, abs=0.35 * half)
    assert worst["high"] == pytest.approx(worst["value"] + half, abs=0.35 * half)


def test_changes_are_paired():
    part = images()
    section = of_images(by_distance(part, 3.0), part, corruptions=("contrast",))
    change = section.tables["growth"].iloc[0]
    # Rows differ little in how far they move, so the paired change is much sharper than accuracies of two samples.
    moved = np.abs(CORRUPTIONS["contrast"](part.x, 5, np.random.default_rng()).astype(float) - part.x).mean(
        (1, 2, 3)
    )
    half = 1.96 * 3 * moved.std() / 255 / np.sqrt(len(part))
    width = change["uncertainty_change_high"] - change["uncertainty_change_low"]
    assert width == pytest.approx(2 * half, rel=0.3)


def test_numbers_have_their_own_measures_and_verdict():
    part = table()
    good, bad = of_table(linear(0.2), part), of_table(linear(0.0), part)
    assert answers(good)["feature_noise"] == "yes"
    assert answers(bad)["feature_noise"] == "no"
    assert "RMSE gets worse" in bad.verdict
    assert bad.level == "warn"
    rmse = curve(bad, "feature_noise", "rmse")["value"]
    # Noise of strength s on every feature adds s² |w|² to the squared error.
    for strength in (0.5, 1.0):
        expected = np.sqrt(0.1**2 + strength**2 * np.square(WEIGHTS).sum())
        assert rmse[strength] == pytest.approx(expected, rel=5 / np.sqrt(2 * len(part)))
    assert curve(bad, "feature_noise", "coverage_95")["value"][0.0] > 0.9
    assert curve(bad, "feature_noise", "coverage_95")["value"][1.0] < 0.3


def test_missing_features_are_sorted_by_the_damage_that_they_do():
    part = table()
    section = of_table(linear(0.0), part)
    missing = left_out(section)
    assert list(missing)[:3] == ["w1", "w3", "w0"]
    assert "w1 is missed most" in section.verdict
    noise = part.y - part.x @ WEIGHTS
    clean = np.sqrt(np.square(noise).mean())
    for i, name in enumerate(TABLE.names):
        expected = np.sqrt(np.square(noise + WEIGHTS[i] * part.x[:, i]).mean())
        assert missing[name]["rmse"] == pytest.approx(expected, rel=1e-5)
        assert missing[name]["rmse_change"] == pytest.approx(expected - clean, abs=1e-6)
    assert missing["w2"]["damage"] == 0
    assert all(row["damage_low"] <= row["damage"] <= row["damage_high"] for row in missing.values())
    # k features at random: on average k / F of the squared weights is lost.
    rmse = curve(section, "missing_features", "rmse")["value"]
    for count in (1, 2):
        expected = np.sqrt(0.1**2 + count / 4 * np.square(WEIGHTS).sum())
        assert rmse[float(count)] == pytest.approx(expected, rel=0.12)


def test_label_noise_costs_what_it_must_and_is_exempt():
    part = Part(table().x, np.random.default_rng(4).integers(0, 2, 400), np.arange(400))

    def score(part: Part) -> RowScores:
        right = np.random.default_rng(4).integers(0, 2, 400)[part.rows]
        sure = np.random.default_rng(5).random(400)[part.rows] < 0.9
        total = 0.3 + np.square(part.x).mean(1) / 10
        rows = classes_of(right, sure, total, total / 2)
        return classes_of(part.y, rows.columns["prediction"] == part.y, total, total / 2)

    section = of_table(score, part, TWO)
    assert answers(section)["label_noise"] == "exempt"
    accuracy = curve(section, "label_noise", "accuracy")["value"]
    for share in (0.1, 0.4):
        # A flipped label turns right into wrong and wrong into right.
        expected = accuracy[0.0] * (1 - share) + (1 - accuracy[0.0]) * share
        assert accuracy[share] == pytest.approx(expected, abs=4 * np.sqrt(0.09 * share / 400))
    assert len(set(curve(section, "label_noise", "entropy")["value"].values())) == 1
    assert not any("label_noise" in one for one in section.warnings)


def test_uncertainty_that_depends_on_labels_is_suspicious():
    honest = linear(0.0)

    def score(part: Part) -> RowScores:
        rows = honest(part)
        rows.columns["total_std"] = 0.1 + np.abs(rows.columns["error"])
        return rows

    assert any("must not depend on targets" in one for one in of_table(score, table()).warnings)


def test_a_tilt_weighs_the_clean_rows_and_knows_how_few_they_are():
    part, score = table(300), linear(0.1)
    section = of_table(score, part, tilts=(0.5, 1.0, 3.0), num_missing=(), noise=(), label_shares=())
    assert section.tables["growth"]["kind"].tolist() == ["covariate_shift"]
    nll = curve(section, "covariate_shift", "nll")
    seed = np.random.SeedSequence(3, spawn_key=(2, 2))
    rows = covariate_shift(part.x, 1.0, np.random.default_rng(seed))
    values = score(part).columns["nll"]
    assert nll["value"][1.0] == pytest.approx(values[rows].mean())
    # The spread of a ratio of weighted sums over rows that are drawn whole, by linearisation.
    weight = np.bincount(rows, minlength=300)
    spread = np.sqrt(np.square(weight * (values - values[rows].mean())).sum()) / weight.sum()
    assert nll["high"][1.0] - nll["low"][1.0] == pytest.approx(2 * 1.96 * spread, rel=0.35)
    naive = values[rows].std() / np.sqrt(300)
    assert spread > 1.3 * naive
    worth = [one for one in section.warnings if "different ones only" in one]
    assert len(worth) == 1
    assert "severity 3" in worth[0]


# --- what is scored ----------------------------------------------------------------------------------------------


def test_kinds_do_not_depend_on_one_another_and_seeds_matter():
    part = images(60)
    score = by_distance(part, 3.0)
    alone = of_images(score, part, corruptions=("shot_noise",), severities=(2,))
    among = of_images(score, part, corruptions=("fog", "shot_noise", "frost"), severities=(2, 4))
    both = [curve(section, "shot_noise", "entropy")["value"] for section in (alone, among)]
    assert both[0] == {severity: both[1][severity] for severity in (0.0, 2.0)}
    other = robustness_section(
        score, part, inputs=PIXELS, transform=None, target=TWO, seed=4,
        sweep=replace(SWEEP, corruptions=("shot_noise",), severities=(2,)),
    )  # fmt: skip
    assert (
        curve(other, "shot_noise", "entropy")["value"][2.0]
        != curve(alone, "shot_noise", "entropy")["value"][2.0]
    )


def test_all_kinds_run_and_tell_about_it_and_rows_are_capped():
    part, told, sizes = images(70), [], []
    honest = by_distance(part, 3.0)

    def score(part: Part) -> RowScores:
        sizes.append(part.rows.tolist())
        return honest(part)

    section = robustness_section(
        score, part, inputs=PIXELS, transform=None, target=TWO, seed=3, say=told.append,
        sweep=replace(SWEEP, corruptions=None, severities=(1, 5), max_rows=20),
    )  # fmt: skip
    assert section.tables["growth"]["kind"].tolist() == [*CORRUPTIONS, "label_noise"]
    assert [line.split()[0] for line in told] == [*CORRUPTIONS, "label_noise"]
    assert len({tuple(rows) for rows in sizes}) == 1
    assert len(set(sizes[0])) == 20
    assert len(sizes) == 1 + 2 * 15 + 2
    assert section.warnings[0] == "20 of 70 rows, chosen at random (max_rows)."
    assert "only 20 rows" in section.warnings[1]
    assert set(section.tables) == {"curves", "growth"}


def test_features_are_capped_and_too_many_missing_ones_are_left_out():
    section = of_table(linear(0.0), table(60), max_features=2, num_missing=(1, 4, 9))
    assert len(section.tables["missing"]) == 2
    assert list(curve(section, "missing_features", "rmse")["value"]) == [0, 1, 4]
    assert any("2 of 4 features" in one for one in section.warnings)
    assert any("[9] missing ones are left out" in one for one in section.warnings)


def test_categories_of_a_transform_go_missing_by_name():
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"size": random.normal(5, 2, 80), "colour": random.choice(["red", "blue"], 80)})
    transform = TableTransform.fit(frame)
    seen = []

    def score(part: Part) -> RowScores:
        seen.append(part.x)
        return classes_of(part.y, part.x[:, 1] + part.x[:, 2] > 0, np.ones(len(part)), np.zeros(len(part)))

    part = Part(transform.apply(frame), random.integers(0, 2, 80), np.arange(80))
    section = robustness_section(
        score, part, inputs=transform.input_spec, transform=transform, target=TWO, seed=0, sweep=SWEEP
    )
    missing = left_out(section)
    assert list(missing) == ["colour", "size"]
    assert [row["accuracy"] for row in missing.values()] == [0, 1]
    assert [row["accuracy_change"] for row in missing.values()] == [-1, 0]


@pytest.mark.parametrize(
    ("likelihood", "kinds"),
    [
        ("categorical", ["feature_noise", "missing_features", "covariate_shift", "label_noise"]),
        ("gaussian", ["feature_noise", "missing_features", "covariate_shift", "label_noise"]),
    ],
)
def test_a_real_posterior_is_swept_and_the_section_can_be_written(
    likelihood: str, kinds: list[str], tmp_path: Path
):
    artefact = small_artefact(likelihood)
    random = np.random.default_rng(0)
    x = random.standard_normal((60, 3)).astype(np.float32)
    y = random.integers(0, 3, 60) if artefact.target.num_classes else x[:, 0]
    predictor = Predictor(artefact)

    def score(part: Part) -> RowScores:
        return evaluate(predictor, part, artefact.target).rows

    part = Part(x, y, np.arange(60))
    section = robustness_section(
        score, part, inputs=INPUTS, transform=None, target=artefact.target, seed=0,
        sweep=replace(SWEEP, noise=(1.0,), num_missing=(1,), tilts=(0.5,), label_shares=(0.3,)),
    )  # fmt: skip
    assert section.tables["growth"]["kind"].tolist() == kinds
    assert answers(section)["label_noise"] == "exempt"
    assert set(section.tables["missing"]["feature"]) == {"a", "b", "c"}
    write_section(tmp_path, section)
    read = read_section(tmp_path, "robustness")
    assert read.verdict == section.verdict
    for name, one in section.tables.items():
        pd.testing.assert_frame_equal(read.tables[name], one)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    empty = Part(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    with pytest.raises(UsageError, match="no rows to shift"):
        of_table(linear(0.0), empty)
    floats = Part(np.zeros((5, 1, 28, 28), np.float32), np.zeros(5, np.int64), np.arange(5))
    with pytest.raises(UsageError, match=r"got float32 \[5, 1, 28, 28\]"):
        of_images(by_distance(images(), 1.0), floats)
    section = of_images(by_distance(images(60), 1.0), images(60), severities=())
    assert "No kind of shift" in section.verdict


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"severities": (1, 6)}, "from 1 to 5, got 6"),
        ({"severities": (3, 1)}, r"severities must rise from above 0, got \[3, 1\]"),
        ({"noise": (0.0, 1.0)}, "noise must rise from above 0"),
        ({"label_shares": (0.5, 1.5)}, "between 0 and 1, got 1.5"),
        ({"corruptions": ("smog",)}, "image corruption 'smog'"),
        ({"max_rows": 0}, "max_rows must be 1 or more"),
    ],
)
def test_impossible_sweeps_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        replace(SWEEP, **settings)
