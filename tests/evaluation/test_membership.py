"""Attacks against closed forms, scikit-learn, loops over pairs, and the best test that there is."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from bdl_train.errors import UsageError
from bdl_train.evaluation.membership import (
    FEW_SHADOWS,
    judge,
    likelihood_ratio_attack,
    likelihood_ratios,
    logit_confidence,
    loss_threshold_attack,
)


def gaussian_losses(
    shift: float, n: int = 2000, m: int = 3000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(-shift, 1, n), random.normal(0, 1, m)


def shadow_setting(
    num_members: int, num_rows: int, shift: float, *, hardness: float = 3.0, share: float = 0.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Log densities `[M, N]` of rows that differ in hardness, and higher by `shift` where the member saw the row."""
    random = np.random.default_rng(seed)
    is_in = random.random((num_members, num_rows)) < share
    of_row = random.normal(0, hardness, num_rows)
    return of_row + shift * is_in + random.normal(size=is_in.shape), is_in


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_gaussian_losses_have_the_auc_of_the_closed_form(shift: float):
    inside, outside = gaussian_losses(shift)
    found = loss_threshold_attack(inside, outside, seed=0)
    expected = norm.cdf(shift / np.sqrt(2))
    # At most that of equal distributions, whose AUC has the standard error sqrt((n + m + 1) / 12nm).
    spread = np.sqrt((2000 + 3000 + 1) / (12 * 2000 * 3000))
    assert found.auc.value == pytest.approx(expected, abs=4 * spread)
    assert found.auc.low < expected < found.auc.high
    # Maximum of Φ(z + shift) − Φ(z), at z = −shift / 2; at rate 1 % the quantile itself is estimated from 30 rows.
    assert found.advantage.value == pytest.approx(2 * norm.cdf(shift / 2) - 1, abs=0.05)
    assert found.tpr_at_1_fpr.value == pytest.approx(norm.cdf(norm.ppf(0.01) + shift), abs=0.06)
    assert (found.n_in, found.n_out) == (2000, 3000)


def test_figures_are_those_of_scikit_learn_with_ties_too():
    inside, outside = (np.round(part, 1) for part in gaussian_losses(0.7, 400, 1200))
    found = loss_threshold_attack(inside, outside, seed=0)
    truth, score = np.repeat([1, 0], [400, 1200]), -np.concatenate([inside, outside])
    assert found.auc.value == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    assert found.advantage.value == pytest.approx((tpr - fpr).max(), abs=1e-12)
    assert found.tpr_at_1_fpr.value == tpr[fpr <= 0.01].max()
    assert found.tpr_at_01_fpr.value == tpr[fpr <= 0.001].max()
    for at, value in zip(found.fpr, found.tpr, strict=True):
        assert value == tpr[fpr <= at].max()
    assert (found.fpr[0], found.fpr[-1], found.tpr[-1]) == (0, 1, 1)


def test_intervals_have_the_width_that_the_closed_form_says():
    inside, outside = gaussian_losses(0.0, 300, 500)
    found = loss_threshold_attack(inside, outside, seed=3)
    expected = 2 * norm.ppf(0.975) * np.sqrt(801 / (12 * 300 * 500))
    # 1000 resamples know a standard deviation to 1 / sqrt(2000), their quantiles to about three times that.
    assert found.auc.high - found.auc.low == pytest.approx(expected, rel=0.12)
    assert loss_threshold_attack(inside, outside, seed=3).auc == found.auc
    assert loss_threshold_attack(inside, outside, seed=4).auc != found.auc


def test_without_a_leak_intervals_hold_a_half_and_the_advantage_is_that_of_chance():
    every = [loss_threshold_attack(*gaussian_losses(0.0, 100, 100, seed), seed=seed) for seed in range(40)]
    covered = sum(one.auc.low <= 0.5 <= one.auc.high for one in every)
    assert covered >= 33  # 38 expected, standard deviation 1.4
    mean = np.mean([one.advantage.value for one in every])
    # The limit is reached from below, with a correction of order 1 / sqrt(n).
    assert mean == pytest.approx(every[0].advantage_by_chance, rel=0.12)


def test_rates_that_are_less_than_a_row_are_not_told():
    few = loss_threshold_attack(*gaussian_losses(1.0, 500, 99), seed=0)
    assert np.isnan([few.tpr_at_1_fpr.value, few.tpr_at_1_fpr.low, few.tpr_at_01_fpr.value]).all()
    assert few.notes == (
        "1 % of the 99 rows that were not trained on is less than one row: no rate at 1 % is told",
    )
    some = loss_threshold_attack(*gaussian_losses(1.0, 500, 200), seed=0)
    assert np.isfinite(some.tpr_at_1_fpr.value)
    assert np.isnan(some.tpr_at_01_fpr.value)
    assert some.notes == ("the rate at 1 % false positives rests on the 2 highest of 200 other rows",)
    assert loss_threshold_attack(*gaussian_losses(1.0, 500, 1000), seed=0).notes == ()


def test_pairs_of_one_row_are_one_piece_of_evidence():
    inside, outside = gaussian_losses(0.4, 100, 100)
    scores, is_in = -np.concatenate([inside, outside])[None], np.repeat([True, False], 100)[None]
    alone = judge(scores, is_in, seed=1, name="one")
    copies = judge(np.repeat(scores, 5, 0), np.repeat(is_in, 5, 0), seed=1, name="five")
    assert copies.auc.value == pytest.approx(alone.auc.value, abs=1e-12)
    assert (copies.auc.low, copies.auc.high) == pytest.approx((alone.auc.low, alone.auc.high), abs=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_likelihood_ratio_comes_up_to_the_best_test_and_beats_the_loss(seed: int):
    """Neyman-Pearson with everything known: a Gaussian moved by 1.5, AUC Φ(1.5/√2), 20 % found at 1 %."""
    shift = 1.5
    log_prob, is_in = shadow_setting(64, 200, shift, seed=seed)
    found = likelihood_ratio_attack(log_prob, is_in, is_density=True, seed=0)
    assert found.notes[0].startswith("online")
    best = norm.cdf(shift / np.sqrt(2))
    # Means of 32 shadows widen each Gaussian by 1.5 %, variances of 32 are off by a quarter: that costs most at 1 %.
    assert best - 0.02 < found.auc.value < best + 0.015
    best_at_1 = norm.cdf(norm.ppf(0.01) + shift)
    assert 0.65 * best_at_1 < found.tpr_at_1_fpr.value < 1.15 * best_at_1
    by_loss = judge(log_prob, is_in, seed=0, name="loss")
    assert by_loss.auc.value < 0.7  # Φ(1.5 / sqrt(2 · (1 + 3²))) = 0.63
    assert found.auc.low > by_loss.auc.high
    assert found.tpr_at_1_fpr.low > by_loss.tpr_at_1_fpr.value


def test_rows_that_spread_differently_are_weighed_by_their_own_variance():
    """Half of the rows is ten times as noisy: the best test knows it, a shared variance does not."""
    random = np.random.default_rng(5)
    is_in = random.random((64, 200)) < 0.5
    std = np.where(np.arange(200) % 2, 1.0, 10.0)
    log_prob = 2.0 * is_in + std * random.normal(size=is_in.shape)
    found = likelihood_ratio_attack(log_prob, is_in, is_density=True, seed=0)
    exact = norm.logpdf(log_prob, 2.0, std) - norm.logpdf(log_prob, 0.0, std)
    assert found.auc.value == pytest.approx(roc_auc_score(is_in.ravel(), exact.ravel()), abs=0.02)


@pytest.mark.parametrize("num_members", [6, 20])
def test_scores_are_those_of_a_loop_over_pairs(num_members: int):
    x, is_in = shadow_setting(num_members, 40, 1.0, seed=2)
    found, note = likelihood_ratios(x, is_in, is_density=True)
    assert note.startswith("online")

    def shadows(m: int, i: int, kind: bool) -> np.ndarray:
        return np.array([x[j, i] for j in range(num_members) if j != m and is_in[j, i] == kind])

    for m in range(num_members):
        shared = {}
        for kind in (True, False):
            every = [shadows(m, i, kind) for i in range(40)]
            total = sum(np.square(one - one.mean()).sum() for one in every if len(one))
            shared[kind] = total / sum(max(len(one) - 1, 0) for one in every)
        for i in range(40):
            densities = []
            for kind in (True, False):
                own = shadows(m, i, kind)
                if len(own):
                    variance = own.var(ddof=1) if len(own) >= FEW_SHADOWS else shared[kind]
                    densities.append(norm.logpdf(x[m, i], own.mean(), np.sqrt(variance * (1 + 1 / len(own)))))
            expected = densities[0] - densities[1] if len(densities) == 2 else np.nan
            assert found[m, i] == pytest.approx(expected, rel=1e-8, abs=1e-9, nan_ok=True)


def test_where_few_members_saw_a_row_the_offline_form_is_used():
    log_prob, is_in = shadow_setting(12, 400, 2.0, share=0.04)
    log_prob = np.concatenate([log_prob, shadow_setting(12, 300, 0.0, share=0.0, seed=9)[0]], axis=1)
    is_in = np.concatenate([is_in, np.zeros((12, 300), bool)], axis=1)
    found = likelihood_ratio_attack(log_prob, is_in, is_density=True, seed=0)
    assert found.notes[0].startswith("offline")
    assert "trainer.member_fraction" in found.notes[0]
    assert found.n_in + found.n_out == is_in.size  # test rows too, as rows that nobody saw
    assert found.auc.value == pytest.approx(norm.cdf(2 / np.sqrt(2)), abs=0.04)
    scores, _ = likelihood_ratios(log_prob, is_in, is_density=True)
    others = np.delete(log_prob[:, 500], 3)
    variance = others.var(ddof=1) * (1 + 1 / 11)
    assert scores[3, 500] == pytest.approx((log_prob[3, 500] - others.mean()) / np.sqrt(variance), rel=1e-9)


@pytest.mark.parametrize("num_members", [5, 20])
def test_members_that_learn_nothing_from_a_row_give_nothing_away(num_members: int):
    covered = 0
    for seed in range(10):
        found = likelihood_ratio_attack(
            *shadow_setting(num_members, 60, 0.0, seed=seed), is_density=True, seed=seed
        )
        covered += found.auc.low <= 0.5 <= found.auc.high
        assert found.auc.value == pytest.approx(0.5, abs=0.12)
    assert covered >= 7  # 9.5 expected, standard deviation 0.7


def test_confidence_is_the_logit_up_to_what_float32_resolves():
    p = np.array([1e-6, 0.2, 0.5, 0.999])
    np.testing.assert_allclose(logit_confidence(np.log(p)), logit(p), rtol=1e-9)
    certain = logit_confidence(np.array([0.0, -1e-12]))
    assert certain == pytest.approx(-np.log(np.finfo(np.float32).eps), rel=1e-6)
    log_prob, is_in = shadow_setting(24, 300, 1.0)
    found = likelihood_ratio_attack(np.log(expit(log_prob)), is_in, is_density=False, seed=0)
    expected = likelihood_ratio_attack(log_prob, is_in, is_density=True, seed=0)
    assert found.auc.value == pytest.approx(expected.auc.value, abs=1e-6)


def test_members_of_the_same_rows_are_refused_with_the_key_to_change():
    log_prob, _ = shadow_setting(8, 50, 1.0)
    is_in = np.repeat(np.arange(50)[None] < 30, 8, axis=0)
    with pytest.raises(UsageError, match=r"all of them saw the same rows.*trainer\.member_fraction below 1"):
        likelihood_ratio_attack(log_prob, is_in, is_density=True, seed=0)


def test_what_cannot_be_attacked_is_refused():
    log_prob, is_in = shadow_setting(8, 50, 1.0)
    with pytest.raises(UsageError, match="3 members or more, here are 2: raise num_members"):
        likelihood_ratios(log_prob[:2], is_in[:2], is_density=True)
    with pytest.raises(UsageError, match=r"\[members, rows\], got \[8, 50\], \[8, 49\]"):
        likelihood_ratios(log_prob, is_in[:, 1:], is_density=True)
    with pytest.raises(UsageError, match="1 values that are not finite"):
        likelihood_ratios(
            np.where(np.arange(400).reshape(8, 50) == 7, np.nan, log_prob), is_in, is_density=True
        )
    with pytest.raises(UsageError, match="is unknown or 0"):
        likelihood_ratios(np.zeros((8, 50)), is_in, is_density=True)
    with pytest.raises(UsageError, match="The loss of 1 rows is NaN"):
        loss_threshold_attack(np.array([1.0, np.nan]), np.array([1.0]), seed=0)
    with pytest.raises(UsageError, match="needs rows of both kinds, got 2 trained on and 0 not"):
        loss_threshold_attack(np.array([1.0, 2.0]), np.array([]), seed=0)
