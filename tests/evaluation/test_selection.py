"""Which rows to leave to a human: brute force and closed forms, and the guarantee by simulation."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bdl_train.evaluation.selection import (
    NUM_THRESHOLDS,
    binomial_interval,
    empirical_policy,
    guaranteed_policy,
    risk_coverage,
)


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
