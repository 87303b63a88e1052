"""What members say by themselves, against each member's own posterior predicted alone."""

import dataclasses

import numpy as np
import pytest
import torch
from small_posteriors import small_artefact

from bdl_train.data import Part
from bdl_train.evaluation.member_views import LEAST_ROWS, MOST_ROWS, MemberViews, member_views, some_rows
from bdl_train.posteriors.artefact import Artefact
from bdl_train.predictive.predict import Predictor
from bdl_train.predictive.stats import ClassStats

LIKELIHOODS = ("categorical", "bernoulli", "heteroscedastic_gaussian", "student_t", "poisson")


def part(artefact: Artefact, count: int) -> Part:
    random = np.random.default_rng(0)
    whole = random.integers(0, artefact.target.num_classes or 4, count)
    is_whole = artefact.target.num_classes or artefact.target.kind.value == "count"
    y = whole.astype(np.int64) if is_whole else random.normal(size=count).astype(np.float32)
    return Part(random.normal(size=(count, 3)).astype(np.float32), y, np.arange(count))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_each_member_is_what_its_own_posterior_predicts(likelihood):
    artefact = small_artefact(likelihood, "swag", num_members=3, num_draws=4)
    rows = part(artefact, 11)
    predictor = Predictor(artefact)
    predictor.block_rows = predictor.tile_rows = 4  # three tiles
    found = member_views(predictor, rows, artefact.target)
    assert len(found) == 3
    for m in range(3):
        alone = Predictor(dataclasses.replace(artefact, posterior=artefact.posterior.only(m)))
        (tile,) = alone(torch.from_numpy(rows.x), torch.from_numpy(rows.y))
        np.testing.assert_allclose(
            -found.log_prob[m], tile.stats.nll + np.log(artefact.target.scale), rtol=1e-5
        )
        if isinstance(tile.stats, ClassStats):
            assert found.probs is not None
            np.testing.assert_allclose(found.probs[m], tile.stats.probs, rtol=1e-5)
        else:
            assert found.mean is not None
            assert found.variance is not None
            np.testing.assert_allclose(found.mean[m], tile.stats.mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.variance[m], tile.stats.total, rtol=1e-5)


def test_members_of_several_posteriors_are_joined_in_order():
    artefact = small_artefact("heteroscedastic_gaussian", num_members=3)
    rows = part(artefact, 5)
    parts = [
        dataclasses.replace(artefact, posterior=artefact.posterior.only(*some)) for some in ([0, 1], [2])
    ]
    joined = MemberViews.joined([member_views(Predictor(one), rows, artefact.target) for one in parts])
    whole = member_views(Predictor(artefact), rows, artefact.target)
    np.testing.assert_allclose(joined.log_prob, whole.log_prob, rtol=1e-6)
    assert joined.mean is not None
    assert whole.mean is not None
    np.testing.assert_allclose(joined.mean, whole.mean, rtol=1e-5)
    np.testing.assert_array_equal(whole.of([2, 0]).log_prob, whole.log_prob[[2, 0]])


@pytest.mark.parametrize(
    ("num_rows", "num_classes", "kept"),
    [(50, 1, 50), (MOST_ROWS + 1, 1, MOST_ROWS), (30_000, 100, 2000), (30_000, 10_000, LEAST_ROWS)],
)
def test_rows_of_a_large_part_are_taken_evenly(num_rows, num_classes, kept):
    ids = np.arange(num_rows)
    some = some_rows(Part(ids[:, None].astype(np.float32), ids, ids), num_classes)
    assert len(some) == kept
    assert (some.rows[0], some.rows[-1]) == (0, num_rows - 1)
    assert set(np.diff(some.rows)) <= {num_rows // kept, num_rows // kept + 1}
    np.testing.assert_array_equal(some.x[:, 0], some.rows)
