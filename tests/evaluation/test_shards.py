"""Shards of rows and members, in any order, are the one-process result."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_posteriors import small_artefact, write_artefact

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation import shards
from bdl_train.evaluation.shards import (
    Posterior,
    Shard,
    one_after_another,
    plan_shards,
    score_in_shards,
    score_part,
)
from bdl_train.predictive.predict import Predictor


def backwards(function: Callable[..., Any], shared: tuple[Any, ...], tasks: Sequence[Shard]) -> Iterable[Any]:
    return one_after_another(function, shared, np.random.default_rng(0).permutation(np.array(tasks, object)))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("member_shards", [1, 2, 5])
@pytest.mark.parametrize("method", ["ensemble", "swag"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian", "student_t", "poisson"])
def test_shards_of_rows_and_members_are_the_whole(
    likelihood: str, method: str, member_shards: int, tmp_path: Path
):
    torch.set_num_threads(1)
    artefact = small_artefact(likelihood, method, num_members=5, num_draws=3)
    write_artefact(tmp_path, artefact)
    random = np.random.default_rng(1)
    classes = artefact.target.num_classes
    y = random.integers(0, classes or 9, 47)
    part = Part(
        random.normal(size=(47, 3)).astype(np.float32),
        y if classes or likelihood == "poisson" else y.astype(np.float32),
        np.arange(47),
    )
    rows, members = score_part(Predictor(artefact), part, artefact.target)
    tasks = plan_shards(47, artefact.posterior.ids, 4, member_shards)
    assert len(tasks) == 4 * member_shards
    where = Posterior(tmp_path, "cpu", None)
    found, found_members = score_in_shards(part, artefact, where, tasks, backwards)
    for name, values in rows.columns.items():
        # float32 matrix products of other shapes round in another way
        np.testing.assert_allclose(found.columns[name], values, rtol=2e-5, atol=2e-6, err_msg=name)
    if rows.probs is not None:
        assert found.probs is not None
        np.testing.assert_allclose(found.probs, rows.probs, rtol=1e-5, atol=1e-7)
    assert found_members.ids == members.ids
    for name, values in members.means.items():
        np.testing.assert_allclose(found_members.means[name], values, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found_members.distances, members.distances, rtol=1e-4, atol=1e-5)


def test_shards_share_rows_and_members_evenly_and_never_leave_one_empty():
    tasks = plan_shards(10, [4, 2, 9], 3, 2)
    assert [shard.rows for shard in tasks[::2]] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert [shard.members for shard in tasks[:2]] == [(2,), (4, 9)]
    assert len(plan_shards(2, [0], 8, 1)) == 2
    with pytest.raises(UsageError, match="member_shards=4, but the posterior has 3 members"):
        plan_shards(10, [4, 2, 9], 3, 4)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_threads_that_share_the_rows_change_nothing(likelihood: str, monkeypatch: pytest.MonkeyPatch):
    artefact = small_artefact(likelihood, "atoms", num_members=4)
    random = np.random.default_rng(2)
    y = (
        random.integers(0, 3, 101)
        if likelihood == "categorical"
        else random.normal(size=101).astype(np.float32)
    )
    part = Part(random.normal(size=(101, 3)).astype(np.float32), y, np.arange(101))
    torch.set_num_threads(1)
    alone, _ = score_part(Predictor(artefact), part, artefact.target)
    monkeypatch.setattr(shards, "ROWS_FOR_THREADS", 50)
    told: list[int] = []
    torch.set_num_threads(3)
    try:
        shared, members = score_part(Predictor(artefact), part, artefact.target, tick=told.append)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    for name, values in alone.columns.items():
        np.testing.assert_allclose(shared.columns[name], values, rtol=1e-5, atol=1e-6, err_msg=name)
    assert members.num_rows == max(told) == 101
