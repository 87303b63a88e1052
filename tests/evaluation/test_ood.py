"""Detection of out-of-distribution rows: scikit-learn and hand counts as second routes, and what cannot be compared."""

import itertools
import time

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from bdl_train.errors import UsageError
from bdl_train.evaluation.ood import (
    FIGURES,
    intervals,
    ood_section,
    point_values,
    unusual_scores,
    weighted_values,
)
from bdl_train.evaluation.rows import RowScores


def classes(epistemic: np.ndarray, energy: bool = True, noise: float = 0.0, seed: int = 0) -> RowScores:
    """Rows with given mutual information; the other scores follow it, less well."""
    random = np.random.default_rng(seed)
    count = len(epistemic)
    blurred = epistemic + noise * random.random(count)
    columns = {
        "nll": np.zeros(count), "epistemic": epistemic, "total": blurred + 0.1, "confidence": 1 - blurred / 4,
    }  # fmt: skip
    if energy:
        columns["energy"] = blurred - 5
    return RowScores(columns, np.full((count, 3), 1 / 3))


def numbers(epistemic_std: np.ndarray, noise_std: float = 2.0) -> RowScores:
    columns = {"nll": 0 * epistemic_std, "epistemic_std": epistemic_std}
    return RowScores(columns | {"total_std": np.sqrt(noise_std**2 + epistemic_std**2)})


def fpr95_by_hand(inside: np.ndarray, outside: np.ndarray) -> float:
    """Try every threshold, lowest first: in-rows at or below it are accepted."""
    for threshold in sorted(inside):
        if np.mean(inside <= threshold) >= 0.95 - 1e-12:
            return float(np.mean(outside <= threshold))
    raise AssertionError


@pytest.mark.parametrize("seed", range(4))
def test_counts_give_what_scikit_learn_gives_with_sample_weights(seed: int):
    random = np.random.default_rng(seed)
    inside, outside = random.integers(0, 12, 70) / 4, random.integers(3, 15, 45) / 4  # many ties
    levels, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    weight = random.integers(0, 4, 115).astype(float)  # some rows are not drawn, some levels neither
    parts = (slice(0, 70), slice(70, 115))
    counts = [np.bincount(place[part], weights=weight[part], minlength=len(levels)) for part in parts]
    found = dict(zip(FIGURES, weighted_values(counts[0], counts[1]), strict=True))

    score, is_out = np.concatenate([inside, outside]), np.repeat([0, 1], [70, 45])
    assert found["auroc"] == pytest.approx(roc_auc_score(is_out, score, sample_weight=weight), abs=1e-12)
    ap = average_precision_score(is_out, score, sample_weight=weight)
    assert found["aupr_out"] == pytest.approx(ap, abs=1e-12)
    ap = average_precision_score(1 - is_out, -score, sample_weight=weight)
    assert found["aupr_in"] == pytest.approx(ap, abs=1e-12)
    fpr, tpr, _ = roc_curve(1 - is_out, -score, sample_weight=weight, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95 - 1e-12)], abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_points_are_those_of_counts_of_one_and_of_all_pairs(seed: int):
    random = np.random.default_rng(seed)
    inside, outside = random.integers(0, 30, 60) / 8, random.integers(8, 40, 33) / 8
    found = point_values(inside, outside)
    pairs = [float(out > own) + 0.5 * (out == own) for out, own in itertools.product(outside, inside)]
    assert found["auroc"] == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found["fpr95"] == pytest.approx(fpr95_by_hand(inside, outside), abs=1e-12)
    levels, place = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    counts = [np.bincount(part, minlength=len(levels)) for part in (place[:60], place[60:])]
    assert weighted_values(counts[0], counts[1]) == pytest.approx(
        [found[name] for name in FIGURES], abs=1e-12
    )


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        # 19 of 20 are accepted at 18, exactly 95 %.
        (np.arange(20.0), np.array([17.0, 18.0, 18.5, 30.0]), 0.5),
        # 18 of 19 are less than 95 %: all 19 have to be accepted.
        (np.arange(19.0), np.array([17.0, 17.5, 18.0, 18.5]), 0.75),
        # Rows tied with the last one needed are accepted too, in-rows and out-rows.
        (np.repeat([0.0, 1.0], [94, 6]), np.array([0.0, 1.0, 1.0, 2.0]), 0.75),
        (np.repeat([0.0, 1.0], [95, 5]), np.array([0.0, 1.0, 1.0, 2.0]), 0.25),
        (np.zeros(5), np.ones(3), 0.0),
        (np.zeros(5), np.zeros(3), 1.0),
    ],
)
def test_fpr95_by_hand(inside: np.ndarray, outside: np.ndarray, expected: float):
    assert point_values(inside, outside)["fpr95"] == expected == fpr95_by_hand(inside, outside)


def test_intervals_agree_with_the_standard_error_of_hanley_and_mcneil():
    random = np.random.default_rng(1)
    inside, outside = random.normal(0, 1, 900), random.normal(1, 1, 400)
    auroc = point_values(inside, outside)["auroc"]
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc) + 399 * (q1 - auroc**2) + 899 * (q2 - auroc**2)
    low, high = intervals(inside, outside, seed=3)["auroc"]
    # Their formula is for exponential scores, 1000 resamples know a standard deviation to 2 %: allow 12 %.
    assert (high - low) / (2 * 1.96) == pytest.approx(np.sqrt(variance / (900 * 400)), rel=0.12)
    assert low < auroc < high
    assert (
        intervals(inside, outside, seed=3)["auroc"]
        == (low, high)
        != intervals(inside, outside, seed=4)["auroc"]
    )


def test_ten_thousand_rows_against_as_many_take_seconds():
    random = np.random.default_rng(0)
    start = time.process_time()
    intervals(random.normal(size=10_000), random.normal(1, 1, 10_000), seed=0)
    assert time.process_time() - start < 6


def test_no_score_depends_on_the_order_of_rows_and_scores_are_larger_for_stranger_rows():
    rows = classes(np.array([0.0, 0.1, 0.4]))
    scores = unusual_scores(rows)
    assert list(scores) == ["mutual_information", "predictive_entropy", "max_probability", "energy"]
    assert all((np.diff(values) > 0).all() for values in scores.values())
    variance = unusual_scores(numbers(np.array([0.5, 3.0])))
    np.testing.assert_allclose(variance["epistemic_variance"], [0.25, 9.0])
    np.testing.assert_allclose(variance["total_variance"], [4.25, 13.0])


def test_a_section_names_the_best_score_of_each_out_set():
    random = np.random.default_rng(0)
    inside = classes(random.random(300) * 0.3, noise=0.5)
    far, near = classes(0.25 + 0.3 * random.random(200), noise=0.5, seed=1), classes(random.random(150) * 0.3)
    section = ood_section(inside, {"digits": far, "same": near}, seed=0)
    table = section.tables["detection"]
    columns = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
    assert list(table) == ["out_set", "score", *columns, "n_in", "n_out"]
    best = table.iloc[int(table["auroc"].to_numpy()[:4].argmax())]
    assert best["score"] == "mutual_information"
    assert "digits: told apart best by mutual information" in section.verdict
    assert f"{100 * best['auroc']:.1f} % of pairs" in section.verdict
    assert table["n_out"].tolist() == [200] * 4 + [150] * 4
    for name in ("auroc", "fpr95"):
        low, value, high = (table[f"{name}{end}"].to_numpy() for end in ("_low", "", "_high"))
        assert np.all((low <= value) & (value <= high))


def test_level_is_good_only_when_every_set_is_far_and_warns_of_one_that_is_not_told_apart():
    inside, far, near = (numbers(np.linspace(a, b, 80)) for a, b in ((0, 1), (2, 3), (0.0, 0.9)))
    assert ood_section(inside, {"far": far}, seed=0).level == "good"
    both = ood_section(inside, {"far": far, "near": near}, seed=0)
    assert both.level == "warn"
    assert "near: no score tells it apart" in both.verdict


def test_histograms_are_densities_over_shared_bins():
    random = np.random.default_rng(0)
    inside, outside = numbers(random.random(200)), numbers(random.standard_cauchy(100).clip(0, 1e3))
    table = ood_section(inside, {"wild": outside}, seed=0).tables["histogram"]
    assert list(table) == ["out_set", "score", "set", "left", "right", "density"]
    for _, group in table.groupby(["set", "score"]):
        mass = group["density"].to_numpy() * (group["right"].to_numpy() - group["left"].to_numpy())
        assert mass.sum() == pytest.approx(1)
    is_out = (table["set"] == "out").to_numpy()
    for edge in ("left", "right"):
        np.testing.assert_array_equal(table[edge].to_numpy()[is_out], table[edge].to_numpy()[~is_out])
    variance = np.square(outside.columns["epistemic_std"])
    first = is_out & (table["score"] == "epistemic_variance").to_numpy()
    left, right, density = (table[name].to_numpy()[first][3] for name in ("left", "right", "density"))
    assert density * (right - left) == pytest.approx(np.mean((variance >= left) & (variance < right)))


def test_rows_without_a_finite_score_are_counted_and_left_out():
    inside, outside = classes(np.linspace(0, 1, 60)), classes(np.linspace(0.5, 2, 50))
    inside.columns["epistemic"][:3] = np.nan
    outside.columns["energy"][:] = np.nan
    outside.columns["total"][7] = np.inf
    section = ood_section(inside, {"odd": outside}, seed=0)
    table = section.tables["detection"].set_index("score")
    assert list(table.index) == ["mutual_information", "predictive_entropy", "max_probability"]
    assert table["n_in"].tolist() == [57, 60, 60]
    assert table["n_out"].tolist() == [50, 49, 50]
    assert (
        "the data set's own rows: 3 of 60 rows are left out of mutual_information, it is not finite there."
        in (section.warnings)
    )
    assert "odd: 1 of 50 rows are left out of predictive_entropy, it is not finite there." in section.warnings
    assert "odd: the score energy is left out, it is not finite for any row." in section.warnings


def test_energy_may_be_absent():
    section = ood_section(
        classes(np.ones(60), energy=False), {"a": classes(np.arange(60.0), energy=False)}, seed=0
    )
    assert "energy" not in section.tables["detection"]["score"].tolist()
    assert any("energy is left out" in text for text in section.warnings)


def test_a_constant_score_is_half_and_said():
    same = numbers(np.zeros(60))
    section = ood_section(same, {"a": numbers(np.zeros(50))}, seed=0)
    table = section.tables["detection"]
    assert (
        table["auroc"].tolist() == table["auroc_low"].tolist() == table["auroc_high"].tolist() == [0.5, 0.5]
    )
    assert table["fpr95"].tolist() == [1, 1]
    assert sum("is the same for every row" in text for text in section.warnings) == 2
    assert section.level == "warn"
    # Constant within each set, but not the same: perfect.
    apart = ood_section(same, {"a": numbers(np.ones(50))}, seed=0)
    assert apart.tables["detection"]["auroc"].tolist() == [1, 1]
    assert apart.warnings == ()


def test_an_out_set_without_rows_is_a_warning_and_others_go_on():
    empty, some = numbers(np.zeros(0)), numbers(np.arange(9.0))
    section = ood_section(numbers(np.arange(60.0)), {"none": empty, "some": some}, seed=0)
    assert section.tables["detection"]["out_set"].unique().tolist() == ["some"]
    assert section.warnings == (
        "none: it has no rows, so nothing can be said of it.",
        "some: only 9 rows, its figures are rough.",
    )
    assert ood_section(numbers(np.arange(60.0)), {"none": empty}, seed=0).level == "empty"


def test_what_cannot_be_compared_is_refused():
    rows = numbers(np.arange(9.0))
    with pytest.raises(UsageError, match=r"needs one out-set or more in `ood`, got none"):
        ood_section(rows, {}, seed=0)
    with pytest.raises(UsageError, match="this part has none"):
        ood_section(numbers(np.zeros(0)), {"a": rows}, seed=0)
    with pytest.raises(UsageError, match="'a' of `ood` must be predicted by the same run: it has classes"):
        ood_section(rows, {"a": classes(np.arange(9.0))}, seed=0)
