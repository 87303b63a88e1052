"""Metrics against other libraries, brute force and closed forms; the model's own labels are calibrated."""

import itertools
import math
from itertools import permutations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, mean_pinball_loss
from torch.distributions import Categorical, Distribution, Normal, Poisson
from torchmetrics.functional.classification import multiclass_calibration_error

from bdl_train.evaluation.metrics import (
    adaptive_calibration_error,
    aurc,
    expected_calibration_error,
    inside,
    jittered_pit,
    metrics_of,
    pit_p_value,
)
from bdl_train.evaluation.rows import LEVELS, RowScores, score_rows
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import stats_of
from bdl_train.specs import TargetKind, TargetSpec

CLASSES = TargetSpec(TargetKind.CLASS, "species", ("a", "b", "c"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def scores_of(components: Distribution, y: np.ndarray, target: TargetSpec) -> RowScores:
    """Scores of an even mixture over the components `[C, B]`."""
    num_components = components.batch_shape[0]
    log_weights = torch.full((num_components,), -math.log(num_components), dtype=torch.float64)
    mixture = None if target.kind is TargetKind.CLASS else Mixture(components, log_weights)
    stats = stats_of(components, log_weights, torch.from_numpy(y))
    members = torch.arange(num_components)
    return score_rows(TilePrediction(slice(0, len(y)), stats, mixture, None, members), y, target)


def values(rows: RowScores) -> dict[str, float]:
    found = {metric.key: metric.value for metric in metrics_of(rows, "unit")}
    return {key: math.nan if value is None else value for key, value in found.items()}


def own_classes(num_rows: int, seed: int = 0, sharper: float = 1.0) -> RowScores:
    """Labels drawn from the mixture's own probabilities; `sharper` multiplies the logits that are then reported."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, num_rows, 3, generator=generator, dtype=torch.float64)
    logits = logits + 2 * torch.randn(num_rows, 3, generator=generator, dtype=torch.float64)
    probs = logits.softmax(-1).mean(0)
    y = torch.multinomial(probs, 1, generator=generator)[:, 0].numpy()
    return scores_of(Categorical(logits=sharper * logits), y, CLASSES)


def own_numbers(num_rows: int, target: TargetSpec, narrower: float = 1.0) -> RowScores:
    """Targets drawn from the mixture itself; `narrower` divides the spread that is then reported."""
    generator = torch.Generator().manual_seed(1)
    loc = torch.randn(5, num_rows, generator=generator, dtype=torch.float64)
    scale = 0.2 + torch.rand(5, num_rows, generator=generator, dtype=torch.float64)
    which = torch.randint(0, 5, (num_rows,), generator=generator)
    row = torch.arange(num_rows)
    noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    y = loc[which, row] + scale[which, row] * noise
    middle = loc.mean(0)
    return scores_of(Normal(middle + (loc - middle) / narrower, scale / narrower), y.numpy(), target)


# --- calibration errors ---------------------------------------------------------------------------------------


def test_ece_by_hand():
    confidence = np.array([0.45, 0.5, 0.95, 1.0])
    correct = np.array([1.0, 0.0, 1.0, 0.0])
    # Of ten bins (0.4, 0.5] holds two rows whose gaps 0.55 and -0.5 cancel, (0.9, 1] two of 0.05 and -1.
    assert expected_calibration_error(confidence, correct, 10) == pytest.approx((0.05 + 0.95) / 4)


@pytest.mark.parametrize("edge", [0.0, 1.0, 1 / 15, 8 / 15, 1 + 1e-7])
def test_every_confidence_falls_in_a_bin(edge: float):
    confidence = np.full(10, edge)
    wrong = np.zeros(10)
    assert expected_calibration_error(confidence, wrong) == pytest.approx(edge)
    assert adaptive_calibration_error(confidence, wrong) == pytest.approx(edge)


def test_ece_is_that_of_torchmetrics():
    rows = own_classes(500, sharper=2.0)
    assert rows.probs is not None
    confidence = rows.columns["confidence"]
    expected = multiclass_calibration_error(
        torch.from_numpy(rows.probs), torch.from_numpy(rows.columns["y"]), num_classes=3, n_bins=15
    )
    # On a bin's edge, which no random confidence hits, torchmetrics takes the bin above.
    assert not np.isin(confidence * 15, np.arange(16)).any()
    assert expected_calibration_error(confidence, rows.columns["correct"]) == pytest.approx(
        float(expected), abs=1e-6
    )


def test_adding_a_constant_to_the_logits_changes_no_metric():
    logits = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = np.arange(40) % 3
    one = values(scores_of(Categorical(logits=logits), y, CLASSES))
    other = values(scores_of(Categorical(logits=logits - 5.5), y, CLASSES))
    assert one == pytest.approx(other, rel=1e-10, abs=1e-12)


def test_the_models_own_labels_are_calibrated_and_sharpening_raises_the_errors():
    calibrated, sharp = values(own_classes(20_000)), values(own_classes(20_000, sharper=3.0))
    assert calibrated["ece"] < 0.012
    assert calibrated["ace"] < 0.012
    assert sharp["ece"] > 0.08
    assert sharp["ace"] > 0.08
    assert sharp["nll"] > calibrated["nll"]
    assert sharp["brier"] > calibrated["brier"]


def test_ace_has_bins_of_equal_mass():
    # 30 distinct confidences in 3 bins of 10; the gap of each by hand.
    confidence = np.linspace(0.4, 0.97, 30)
    correct = (np.arange(30) % 3 > 0).astype(float)
    gaps = [abs((correct[i : i + 10] - confidence[i : i + 10]).mean()) / 3 for i in range(0, 30, 10)]
    assert adaptive_calibration_error(confidence, correct, 3) == pytest.approx(sum(gaps))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.4, 0.6, 0.9, 1.0]), st.booleans()), min_size=1, max_size=12),
    st.randoms(),
)
def test_the_order_of_rows_changes_no_score_even_with_ties(rows: list[tuple[float, bool]], random: object):
    shuffled = rows.copy()
    random.shuffle(shuffled)  # pyright: ignore[reportAttributeAccessIssue]
    one, other = (np.array(each, dtype=float).T for each in (rows, shuffled))
    for metric in (expected_calibration_error, adaptive_calibration_error, aurc):
        assert metric(one[0], one[1]) == pytest.approx(metric(other[0], other[1]), abs=1e-12)


# --- selection ------------------------------------------------------------------------------------------------


def area(correct: np.ndarray) -> float:
    """Mean over n of the error among the first n rows."""
    return float(np.mean([1 - correct[: n + 1].mean() for n in range(len(correct))]))


def test_aurc_is_the_mean_over_all_orders_of_ties():
    confidence = np.array([0.9, 0.7, 0.7, 0.7, 0.3, 0.3])
    correct = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    areas = [
        area(correct[[0, *middle, *last]])
        for middle, last in itertools.product(permutations([1, 2, 3]), permutations([4, 5]))
    ]
    assert aurc(confidence, correct) == pytest.approx(np.mean(areas))


def test_aurc_of_a_perfect_and_a_useless_ranking():
    correct = np.array([1.0] * 6 + [0.0] * 2)
    assert aurc(np.linspace(1, 0, 8), correct) == pytest.approx((1 / 7 + 2 / 8) / 8)
    assert aurc(np.full(8, 0.5), correct) == pytest.approx(0.25)


# --- other scores of classes ----------------------------------------------------------------------------------


def test_nll_accuracy_and_brier_are_those_of_scikit_learn():
    rows = own_classes(200)
    assert rows.probs is not None
    y, found = rows.columns["y"], values(rows)
    assert found["nll"] == pytest.approx(log_loss(y, rows.probs, labels=[0, 1, 2]), rel=1e-9)
    assert found["accuracy"] == accuracy_score(y, rows.probs.argmax(1))
    expected = brier_score_loss(y, rows.probs, labels=[0, 1, 2], scale_by_half=False)  # pyright: ignore[reportArgumentType]
    assert found["brier"] == pytest.approx(expected, rel=1e-9)
    assert found["entropy"] == pytest.approx(found["aleatoric_entropy"] + found["mutual_information"])


# --- numbers --------------------------------------------------------------------------------------------------

RAW = TargetSpec(TargetKind.CONTINUOUS, "price")
TINY = TargetSpec(TargetKind.CONTINUOUS, "strain", loc=3.0, scale=0.01)


def test_targets_of_the_mixture_have_uniform_pit_values_and_nominal_coverage():
    rows = own_numbers(4000, RAW)
    assert scipy.stats.kstest(rows.columns["pit"], "uniform").pvalue > 0.01
    found = values(rows)
    for percent in (50, 80, 90, 95):
        error = math.sqrt(percent / 100 * (1 - percent / 100) / 4000)
        assert found[f"coverage_{percent}"] == pytest.approx(percent / 100, abs=4 * error)
    narrow = values(own_numbers(4000, RAW, narrower=2.0))
    assert narrow["coverage_90"] < 0.8
    assert narrow["nll"] > found["nll"]
    assert narrow["crps"] > found["crps"]


def test_coverage_from_pit_is_coverage_from_quantiles():
    rows = own_numbers(500, RAW)
    y, low, high = (rows.columns[name] for name in ("y", "lower_95", "upper_95"))
    np.testing.assert_array_equal(inside(rows, 0.95), (low <= y) & (y <= high))


@pytest.mark.parametrize("rate", [0.01, 0.3, 5.0, 200.0])
def test_coverage_of_counts_is_coverage_from_quantiles(rate: float):
    counts = np.random.default_rng(0).poisson(rate, 300)
    components = Poisson(torch.full((2, 300), rate, dtype=torch.float64))
    rows = scores_of(components, counts, TargetSpec(TargetKind.COUNT, "visits"))
    for level in (0.5, 0.8, 0.9, 0.95):
        low, high = scipy.stats.poisson.ppf([(1 - level) / 2, (1 + level) / 2], rate)
        np.testing.assert_array_equal(inside(rows, level), (low <= counts) & (counts <= high))
        assert inside(rows, level).mean() >= level - 0.07


def test_scores_are_in_the_targets_own_units():
    """By hand on the raw scale: one Gaussian N(3 + 0.01 m, (0.01 s)²) for each row."""
    generator = np.random.default_rng(0)
    m, s, z = generator.normal(size=60), 0.3 + generator.random(60), generator.normal(size=60)
    components = Normal(torch.from_numpy(m)[None], torch.from_numpy(s)[None])
    encoded = m + s * z
    found = values(scores_of(components, encoded, TINY))
    raw, mean, std = 3 + 0.01 * encoded, 3 + 0.01 * m, 0.01 * s
    assert found["nll"] == pytest.approx(-scipy.stats.norm.logpdf(raw, mean, std).mean(), rel=1e-9)
    assert found["rmse"] == pytest.approx(math.sqrt(np.mean((raw - mean) ** 2)), rel=1e-9)
    assert found["mae"] == pytest.approx(np.mean(np.abs(raw - mean)), rel=1e-9)
    draws = generator.normal(size=20_000)
    sampled = np.mean(np.abs(z[:, None] - draws) * std[:, None]) - 0.5 * np.mean(
        np.abs(draws[:10_000] - draws[10_000:])
    ) * np.mean(std)
    assert found["crps"] == pytest.approx(sampled, rel=0.02)
    assert found["interval_width_95"] == pytest.approx(2 * 1.959964 * std.mean(), rel=1e-6)
    assert found["total_std"] == pytest.approx(std.mean(), rel=1e-9)
    assert found["epistemic_std"] == 0


def test_a_change_of_units_moves_the_scores_as_it_must():
    one, tiny = values(own_numbers(100, RAW)), values(own_numbers(100, TINY))
    assert tiny["nll"] == pytest.approx(one["nll"] + math.log(0.01), rel=1e-9)
    for key in ("rmse", "mae", "crps", "interval_width_95", "total_std", "epistemic_std"):
        assert tiny[key] == pytest.approx(0.01 * one[key], rel=1e-6)
    assert tiny["coverage_80"] == one["coverage_80"]


# --- joining rows ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_partition_and_order_of_rows_gives_the_same_metrics(data: st.DataObject):
    for whole in (own_classes(60), own_numbers(60, TINY)):
        order = np.array(data.draw(st.permutations(range(60))))
        cuts = sorted(data.draw(st.sets(st.integers(1, 59), max_size=5)))
        parts = [
            RowScores(
                {name: column[rows] for name, column in whole.columns.items()},
                None if whole.probs is None else whole.probs[rows],
            )
            for rows in np.split(order, cuts)
        ]
        merged = parts[0]
        for part in parts[1:]:
            merged = part.merge(merged)
        assert values(merged) == pytest.approx(values(whole), rel=1e-12, abs=1e-14)
        assert values(RowScores.concatenate(parts)) == values(RowScores.concatenate(parts[:1] + parts[1:]))
        assert len(merged) == 60


# --- NaN ------------------------------------------------------------------------------------------------------


def test_one_nan_row_shows_in_every_metric():
    logits = torch.zeros(2, 5, 3, dtype=torch.float64)
    logits[0, 3, 0] = math.nan
    rows = scores_of(Categorical(logits=logits, validate_args=False), np.arange(5) % 3, CLASSES)
    found = values(rows)
    for key in ("nll", "accuracy", "brier", "ece", "ace", "aurc", "entropy", "mutual_information"):
        assert math.isnan(found[key]), key
    loc = torch.zeros(2, 5, dtype=torch.float64)
    loc[1, 2] = math.nan
    normal = Normal(loc, torch.ones_like(loc), validate_args=False)
    found = values(scores_of(normal, np.zeros(5), RAW))
    assert all(math.isnan(value) for key, value in found.items() if key != "aleatoric_std"), found


# --- quantiles and PIT values -----------------------------------------------------------------------------------


def test_pinball_and_widths_are_those_of_scikit_learn_and_of_gaussian_quantiles():
    random = np.random.default_rng(3)
    m, s = random.normal(size=200), 0.3 + random.random(200)
    encoded = m + s * random.normal(size=200)
    components = Normal(torch.from_numpy(m)[None], torch.from_numpy(s)[None])
    rows = scores_of(components, encoded, TINY)
    found, raw, mean, std = values(rows), 3 + 0.01 * encoded, 3 + 0.01 * m, 0.01 * s
    expected = []
    for level in LEVELS:
        quantile = scipy.stats.norm.ppf(level, mean, std)
        np.testing.assert_allclose(rows.quantile(level), quantile, rtol=1e-9)
        expected.append(mean_pinball_loss(raw, quantile, alpha=level))
    assert found["pinball"] == pytest.approx(np.mean(expected), rel=1e-8)
    for percent in (50, 80, 90, 95):
        width = 2 * scipy.stats.norm.ppf(0.5 + percent / 200) * std
        assert found[f"interval_width_{percent}"] == pytest.approx(width.mean(), rel=1e-8)


def test_pit_values_of_counts_are_uniform_and_a_shift_is_seen():
    rate = np.random.default_rng(4).uniform(0.5, 6, 3000)
    counts = np.random.default_rng(5).poisson(rate)
    target = TargetSpec(TargetKind.COUNT, "visits")
    own = scores_of(Poisson(torch.from_numpy(rate)[None]), counts, target)
    assert pit_p_value(own) > 0.01
    assert values(own)["pit_distance"] == pytest.approx(
        scipy.stats.kstest(jittered_pit(own), "uniform").statistic
    )
    assert pit_p_value(scores_of(Poisson(torch.from_numpy(1.2 * rate)[None]), counts, target)) < 1e-6


def test_the_epistemic_share_is_of_variances_and_of_entropies():
    two = scores_of(
        Normal(torch.tensor([[-1.0], [1.0]]).double(), torch.full((2, 1), 0.2).double()), np.zeros(1), RAW
    )
    assert values(two)["epistemic_share"] == pytest.approx(1 / 1.04)
    found = values(own_classes(200))
    assert found["epistemic_share"] == pytest.approx(found["mutual_information"] / found["entropy"])
