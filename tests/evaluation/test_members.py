"""Members alone, against the same scores of a one-member ensemble; joined in any order."""

import math

import numpy as np
import pytest
import torch
from small_posteriors import small_artefact

from bdl_train.data import Part
from bdl_train.evaluation.evaluate import evaluate
from bdl_train.evaluation.members import MemberScores, members_section
from bdl_train.evaluation.shards import score_part
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.predict import Predictor


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def part_for(artefact: Artefact, count: int = 80) -> Part:
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 3)).astype(np.float32)
    classes = artefact.target.num_classes
    y = random.integers(0, classes, count) if classes else random.normal(size=count).astype(np.float32)
    return Part(x, y if classes else np.abs(y), np.arange(count))


def alone(artefact: Artefact, member: int) -> Artefact:
    from dataclasses import replace

    return replace(artefact, posterior=artefact.posterior.only(member))


@pytest.mark.parametrize("method", ["ensemble", "atoms", "swag"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian", "student_t"])
def test_a_member_scores_as_an_ensemble_of_one(likelihood: str, method: str):
    artefact = small_artefact(likelihood, method, num_draws=4)
    part = part_for(artefact)
    _, members = score_part(Predictor(artefact), part, artefact.target)
    for place, member in enumerate(members.ids):
        one = alone(artefact, member)
        values = {metric.key: metric.value for metric in evaluate(Predictor(one), part, one.target).metrics}
        for key, each in members.means.items():
            assert each[place] == pytest.approx(values[key], rel=2e-5, abs=2e-6), (key, member)


def test_disagreement_counts_rows_and_distances_of_means():
    artefact = small_artefact("categorical", "ensemble")
    part = part_for(artefact)
    _, members = score_part(Predictor(artefact), part, artefact.target)
    said = [
        score_part(Predictor(alone(artefact, m)), part, artefact.target)[0].columns["prediction"]
        for m in members.ids
    ]
    for i in range(3):
        for j in range(3):
            assert members.distances[i, j] == (said[i] != said[j]).sum()
    numbers = small_artefact("gaussian", "atoms")
    part = part_for(numbers)
    _, members = score_part(Predictor(numbers), part, numbers.target)
    mean = [
        score_part(Predictor(alone(numbers, m)), part, numbers.target)[0].columns["mean"] for m in range(3)
    ]
    assert members.distances[0, 2] == pytest.approx(np.square(mean[0] - mean[2]).sum(), rel=1e-5)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_parts_join_in_any_order(likelihood: str):
    artefact = small_artefact(likelihood, "atoms")
    part = part_for(artefact)
    whole_rows, whole = score_part(Predictor(artefact), part, artefact.target)
    pieces = [
        score_part(Predictor(artefact), Part(part.x[i], part.y[i], part.rows[i]), artefact.target)
        for i in (slice(50, 80), slice(0, 20), slice(20, 50))
    ]
    joined = pieces[0][1].merge(pieces[1][1]).merge(pieces[2][1])
    for name, values in whole.sums.items():
        np.testing.assert_allclose(joined.sums[name], values, rtol=1e-6)
    np.testing.assert_allclose(joined.distances, whole.distances, rtol=1e-6)
    np.testing.assert_allclose(joined.nll[:, 30:50], whole.nll[:, :20], rtol=1e-5)
    assert len(whole_rows) == joined.num_rows
    again = MemberScores.concatenate([piece for _, piece in pieces])
    np.testing.assert_allclose(again.gaps, joined.gaps)
    np.testing.assert_allclose(again.mean_rows["nll"], joined.mean_rows["nll"])


def test_the_gain_over_the_mean_member_is_never_negative_and_its_interval_is_paired():
    artefact = small_artefact("categorical", "ensemble")
    found = {m.key: m for m in evaluate(Predictor(artefact), part_for(artefact), artefact.target).metrics}
    gain, own, mean = found["gain_nll"], found["nll"], found["mean_member_nll"]
    values = np.array([[one.value, one.low, one.high] for one in (gain, own, mean)], float)
    assert values[0, 0] == pytest.approx(values[2, 0] - values[1, 0], abs=1e-9)
    assert values[0, 0] >= 0
    widths = values[:, 2] - values[:, 1]
    assert widths[0] < widths[1]


def test_the_section_says_how_many_members_are_beaten():
    artefact = small_artefact("categorical", "ensemble")
    evaluation = evaluate(Predictor(artefact), part_for(artefact), artefact.target)
    values = {metric.key: metric.value for metric in evaluation.metrics}
    section = members_section(evaluation.members, values, "")
    own = values["nll"]
    assert own is not None
    beaten = int((evaluation.members.means["nll"] > own).sum())
    assert f"beats {beaten} of 3 single members" in section.verdict
    assert set(section.tables) == {"members", "compared", "diversity"}
    one = alone(artefact, 1)
    single = evaluate(Predictor(one), part_for(artefact), one.target)
    assert "One member" in members_section(single.members, {}, "").verdict


def test_energy_is_the_mean_of_the_negative_log_normalisers():
    artefact = small_artefact("categorical", "ensemble")
    part = part_for(artefact)
    rows, _ = score_part(Predictor(artefact), part, artefact.target)
    expected = 0.0
    (draws,) = artefact.posterior.draw(chunk_size=100)
    for flat in draws.flat:
        network = artefact.network()
        params = artefact.layout.unflatten(flat)
        outputs = torch.func.functional_call(network, params, (torch.from_numpy(part.x),)).detach().double()
        expected = expected - torch.logsumexp(outputs, 1).numpy() / 3
    np.testing.assert_allclose(rows.columns["energy"], expected, rtol=1e-5, atol=1e-6)
    two = small_artefact("bernoulli", "ensemble")
    rows, _ = score_part(Predictor(two), part_for(two), two.target)
    assert np.isfinite(rows.columns["energy"]).all()
    assert math.isfinite(rows.columns["energy"].mean())
