"""How alike members are, against their predictions looked at one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_chains import some_rows
from small_posteriors import small_artefact

from bdl_train.evaluation.likeness import pair_measures, pairs_of, told_of_pairs
from bdl_train.evaluation.members import MemberScores
from bdl_train.evaluation.shards import score_part
from bdl_train.predictive.predict import Predictor


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def scores_of(likelihood: str, num_members: int = 3) -> tuple[MemberScores, list[dict[str, np.ndarray]]]:
    """Scores of the members, and the columns of each member's own evaluation."""
    artefact = small_artefact(likelihood, "ensemble", num_members=num_members)
    part = some_rows(artefact, 60)
    _, members = score_part(Predictor(artefact), part, artefact.target)
    alone = [replace(artefact, posterior=artefact.posterior.only(m)) for m in range(num_members)]
    return members, [score_part(Predictor(one), part, one.target)[0].columns for one in alone]


def test_errors_of_numbers_correlate_about_zero():
    scores, alone = scores_of("gaussian")
    errors = np.stack([one["error"] for one in alone]).astype(float)
    norms = np.linalg.norm(errors, axis=1)
    distance, correlation = pair_measures(scores)
    np.testing.assert_allclose(correlation, errors @ errors.T / np.outer(norms, norms), rtol=1e-4)
    by_hand = np.sqrt(np.square(errors[:, None] - errors[None]).mean(-1))
    np.testing.assert_allclose(distance, by_hand, rtol=1e-4, atol=1e-4)


def test_surprise_of_classes_correlates_over_rows():
    scores, alone = scores_of("categorical")
    disagreement, correlation = pair_measures(scores)
    np.testing.assert_allclose(correlation, np.corrcoef(np.stack([one["nll"] for one in alone])), rtol=1e-4)
    said = np.stack([one["prediction"] for one in alone])
    np.testing.assert_allclose(disagreement, (said[:, None] != said[None]).mean(-1))


def test_each_pair_is_listed_once_and_the_metrics_are_their_means():
    scores, _ = scores_of("gaussian", num_members=4)
    pairs, metrics = pairs_of(scores, "price")
    distance, correlation = pair_measures(scores)
    listed = list(zip(pairs["one"], pairs["other"], strict=True))
    assert listed == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    values = {one.key: one for one in metrics}
    off = ~np.eye(4, dtype=bool)
    assert values["member_disagreement"].value == pytest.approx(distance[off].mean())
    assert values["member_disagreement"].unit == "price"
    assert values["member_correlation"].value == pytest.approx(correlation[off].mean())
    assert f"{correlation[off].mean():.2f}" in told_of_pairs(metrics)[0]


def test_without_pairs_or_kept_scores_there_is_nothing_to_tell():
    scores, _ = scores_of("gaussian", num_members=1)
    pairs, metrics = pairs_of(scores, "price")
    assert (len(pairs), metrics, told_of_pairs(metrics)) == (0, [], [])
    scores, _ = scores_of("categorical")
    _, metrics = pairs_of(replace(scores, nll=scores.nll[:, :0]), "kind")
    values = {one.key: one for one in metrics}
    assert values["member_disagreement"].value is not None
    assert values["member_correlation"].value is None
    assert "too many to be kept" in str(values["member_correlation"].reason)
    assert told_of_pairs(metrics) == []
