"""From many values to a judgement: which chains have mixed, and what the numbers come to."""

import numpy as np
import pytest

from bdl_train.evaluation import mixing
from bdl_train.evaluation.diagnostics import ess_bulk, ess_tail, rhat_by_chance, split_rhat
from bdl_train.evaluation.mixing import MIXED, Mixing, mixing_metrics


def draws(num_values: int = 40, num_members: int = 4, num_draws: int = 200, seed: int = 0) -> np.ndarray:
    """Independent draws `[V, M, K]` of members that stand at places of their own."""
    random = np.random.default_rng(seed)
    return random.normal(size=(num_values, num_members, num_draws)) + 3 * np.arange(num_members)[:, None]


def test_each_value_is_diagnosed_within_members_and_across_them(monkeypatch: pytest.MonkeyPatch):
    values = draws(7, 3, 31)
    whole = Mixing.of(values)
    for v in range(7):
        for m in range(3):
            alone = values[v, m][None]
            assert whole.rhat[v, m] == pytest.approx(float(split_rhat(alone)))
            assert whole.bulk[v, m] == pytest.approx(float(ess_bulk(alone)))
            assert whole.tail[v, m] == pytest.approx(float(ess_tail(alone)))
        assert whole.rhat_across[v] == pytest.approx(float(split_rhat(values[v])))
        assert whole.bulk_total[v] == pytest.approx(float(ess_bulk(values[v])))
    monkeypatch.setattr(mixing, "AT_A_TIME", 100)
    np.testing.assert_allclose(Mixing.of(values).rhat, whole.rhat)


def test_members_in_different_modes_have_mixed_all_the_same():
    of = Mixing.of(draws())
    assert np.median(of.rhat_across) > 1.5
    assert not of.unmixed.any()


def test_one_chain_that_drifts_is_found_among_many():
    values = draws(num_members=8)
    values[:, 5] += np.linspace(0, 3, 200)
    assert np.flatnonzero(Mixing.of(values).unmixed).tolist() == [5]


def test_a_chain_that_never_moves_has_not_mixed():
    values = draws()
    values[:, 2] = 1.0
    of = Mixing.of(values)
    assert np.flatnonzero(of.unmixed).tolist() == [2]
    assert np.isnan(of.rhat[:, 2]).all()


@pytest.mark.parametrize(("num_draws", "num_members"), [(16, 1), (16, 10)])
def test_independent_draws_alarm_in_one_case_of_twenty_at_most(num_draws: int, num_members: int):
    # The worst case: all values of a chain are one. 400 cases: 5 % + 3 standard errors is 8.3 %.
    alarms = sum(Mixing.of(draws(1, num_members, num_draws, seed)).unmixed.any() for seed in range(400))
    assert alarms / 400 < 0.083


def test_many_chains_that_drift_a_little_are_all_found():
    # No one of ten chains is beyond doubt by itself, but half of them are beyond the limit.
    values = draws(num_members=10, num_draws=30) + np.linspace(0, 2, 30)
    of = Mixing.of(values)
    typical = float(np.median(of.by_member))
    assert of.limit < typical < rhat_by_chance(30, 0.05 / 10) + 0.1
    assert of.unmixed.sum() > 5


def test_the_limit_is_that_of_convention_unless_draws_are_few():
    assert Mixing.of(draws(2, 2, 1000)).limit == MIXED
    assert Mixing.of(draws(2, 2, 20)).limit == pytest.approx(rhat_by_chance(20, 0.05))
    assert rhat_by_chance(20, 0.05) > MIXED


def test_metrics_are_medians_and_extremes_and_have_meanings():
    predictions, energy = Mixing.of(draws()), Mixing.of(draws(1))
    metrics = mixing_metrics(predictions, energy)
    values = {one.key: one.value for one in metrics}
    assert values["rhat_within_median"] == pytest.approx(np.median(predictions.rhat))
    assert values["rhat_within_max"] == pytest.approx(predictions.rhat.max())
    assert values["rhat_within_worst_member"] == pytest.approx(np.median(predictions.rhat, axis=0).max())
    assert values["rhat_across_median"] == pytest.approx(np.median(predictions.rhat_across))
    assert values["ess_bulk_min"] == pytest.approx(predictions.bulk.min())
    assert values["ess_tail_median"] == pytest.approx(np.median(predictions.tail))
    assert values["ess_bulk_total_min"] == pytest.approx(predictions.bulk_total.min())
    assert values["potential_rhat_within_max"] == pytest.approx(energy.rhat.max())
    assert values["potential_rhat_across"] == pytest.approx(energy.rhat_across[0])
    assert values["potential_ess_bulk_min"] == pytest.approx(energy.bulk.min())
    assert values["num_draws"] == 200
    assert len({one.meaning for one in metrics}) == len(metrics)
    assert "potential_rhat_across" not in {one.key for one in mixing_metrics(predictions, None)}


def test_metrics_without_a_value_say_why():
    alone = {one.key: one for one in mixing_metrics(Mixing.of(draws(num_members=1)), None)}
    assert alone["rhat_across_median"].value is None
    assert alone["rhat_across_median"].reason == "there is one member"
    still = {one.key: one for one in mixing_metrics(Mixing.of(np.ones((3, 2, 8))), None)}
    assert still["rhat_within_median"].value is None
    assert "same in every draw" in str(still["rhat_within_median"].reason)
    stuck = np.repeat([0.0, 1.0], 10)[None, None] * np.ones((3, 2, 1))
    assert {one.key: one for one in mixing_metrics(Mixing.of(stuck), None)}["rhat_within_max"].reason == (
        "the chains stand still"
    )
