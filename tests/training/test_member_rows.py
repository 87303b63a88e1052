"""Members on rows of their own (`trainer.member_fraction`): drawn, used and recorded as one and the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stack_runs import CASES, at_step, atoms, data, hashes, task
from tiny_problems import config_of, node_of

from bdl_train.data import Data
from bdl_train.distributed.outcome import write_posterior
from bdl_train.errors import UsageError
from bdl_train.posteriors.artefact import read_artefact, training_rows
from bdl_train.runs import read_json
from bdl_train.training.problem import Recipe
from bdl_train.training.train_stack import train_stack

N, HALF = 26, 13
CPU = torch.device("cpu")


def halved(config: dict[str, Any], fraction: float = 0.5) -> dict[str, Any]:
    return {**config, "trainer": {**config["trainer"], "member_fraction": fraction}}


def rows_of(members: Sequence[int], fraction: float = 0.5, **other: Any) -> np.ndarray | None:
    return Recipe.of({**halved(config_of(), fraction), **other}, data()).member_rows(data(), members)


def spoiled_but(rows: np.ndarray, tiny: Data) -> Data:
    """The data with absurd inputs and targets in every training row that is not among `rows`."""
    x, y = tiny.train.x.copy(), tiny.train.y.copy()
    out = np.setdiff1d(np.arange(len(y)), rows)
    x[out] = 1e6
    y[out] = y[out] + 1e6 if y.dtype.kind == "f" else (y[out] + 1) % 3
    return replace(tiny, train=replace(tiny.train, x=x, y=y))


def test_rows_are_drawn_without_replacement_for_each_member_whatever_the_stack():
    rows = rows_of(range(40))
    assert rows is not None
    assert rows.shape == (40, HALF)
    assert (np.diff(rows, axis=1) > 0).all()  # ascending, no row twice
    assert rows.min() == 0
    assert rows.max() == N - 1
    assert len({tuple(own) for own in rows}) == 40
    alone = rows_of([7])
    assert alone is not None
    np.testing.assert_array_equal(alone[0], rows[7])
    other = rows_of([7], seed=6)
    assert other is not None
    assert not np.array_equal(other[0], alone[0])


def test_every_row_is_as_likely_as_any_other():
    rows = rows_of(range(2000))
    assert rows is not None
    share = np.bincount(rows.ravel(), minlength=N) / 2000
    assert np.abs(share - 0.5).max() < 5 * np.sqrt(0.25 / 2000)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 13), (0.3, 8), (1e-9, 1), (1.0, 26), (0.99, 26)])
def test_the_potentials_n_is_the_number_of_a_members_own_rows(fraction: float, expected: int):
    config = halved(config_of(data={"batch_size": 5}), fraction)
    problem, _ = Recipe.of(config, data()).problem(data(), [0, 1], 0, CPU)
    assert problem.potential.num_data == expected
    assert problem.steps_per_epoch == expected // min(5, expected)
    assert problem.num_steps == 6 * problem.steps_per_epoch
    rows = rows_of([0, 1], fraction)
    assert rows is None if expected == N else rows is not None and rows.shape == (2, expected)


@pytest.mark.parametrize("case", ["deep_ensemble", "early_stopping", "anchored", "swag", "swag_conv"])
def test_a_member_never_sees_the_rows_of_others(case: str, run):
    """Batch-norm statistics of the drawn posterior included: the files of members are the same, bit for bit."""
    name, config = CASES[case]
    config, tiny = halved(config), data(name)
    rows = Recipe.of(config, tiny).member_rows(tiny, [0, 1, 2])
    assert rows is not None
    plain = train_stack(task(), config, tiny, run("plain"))
    for m in range(3):
        spoiled = train_stack(task(), config, spoiled_but(rows[m], tiny), run(f"spoiled{m}"))
        same = [
            a["sha256"] == b.get("sha256") for a, b in zip(plain["members"], spoiled["members"], strict=True)
        ]
        assert same == [other == m for other in range(3)]


def test_a_member_is_the_one_trained_on_its_rows_as_the_whole_train_part(run):
    """Another route: cut the train part to one member's rows, and train it with fraction 1."""
    config, tiny = config_of(inference=node_of("inference", "anchored"), data={"batch_size": 5}), data()
    train_stack(task((0, 3)), halved(config), tiny, run("halved"))
    rows = rows_of([3])
    assert rows is not None
    part = tiny.train
    cut = replace(tiny, train=replace(part, x=part.x[rows[0]], y=part.y[rows[0]], rows=part.rows[rows[0]]))
    train_stack(task((3,)), config, cut, run("cut"))
    torch.testing.assert_close(atoms(run("halved"), 3), atoms(run("cut"), 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("executor", ["vmap", "loop"])
def test_a_member_alone_is_the_member_of_a_stack(executor: str, run):
    config = halved(config_of(trainer={"executor": executor, "max_epochs": 10}))
    train_stack(task((4, 2, 0)), config, data(), run("stack"))
    train_stack(task((2,)), config, data(), run("alone"))
    torch.testing.assert_close(atoms(run("stack"), 2), atoms(run("alone"), 2), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", ["anchored", "swag"])
def test_stopped_and_resumed_is_straight_through_bit_for_bit(case: str, run, monkeypatch):
    name, config = CASES[case]
    straight = train_stack(task(), halved(config), data(name), run("straight"))
    resumed = run("resumed")
    resumed.path.mkdir()
    with monkeypatch.context() as patched:
        at_step(patched, case, 5, lambda state: resumed.stop_file.touch())
        assert train_stack(task(), halved(config), data(name), resumed)["status"] == "stopped"
    resumed.stop_file.unlink()
    assert hashes(train_stack(task(), halved(config), data(name), resumed)) == hashes(straight)


def test_a_fraction_that_leaves_out_no_row_trains_as_ever(run, straight):
    name, config = CASES["deep_ensemble"]
    result = train_stack(task(), halved(config, 0.99), data(name), run("almost"))
    assert hashes(result) == hashes(straight("deep_ensemble"))


def test_a_batch_of_own_rows_is_split_over_ranks():
    with pytest.raises(UsageError, match=r"a row for each rank in a batch of 3: .*trainer.member_fraction"):
        Recipe.of(halved(config_of(), 0.1), data()).check_ranks(data(), 4)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_recorded_rows_are_the_source_rows_that_were_used(fraction: float, run):
    tiny, config = data(), halved(config_of(), fraction)
    source = np.arange(N)[::-1] * 10 + 7  # ids in the source, in an order of their own
    tiny = replace(tiny, train=replace(tiny.train, rows=source))
    recipe, here = Recipe.of(config, tiny), run("recorded")
    result = train_stack(task((0, 1, 4)), config, tiny, here)
    lost = {"id": 2, "status": "failed", "reason": "its worker died"}
    entries = sorted([*result["members"], lost], key=lambda entry: entry["id"])
    write_posterior(here, config, recipe, tiny, entries, {"s0": result})
    meta = read_artefact(here.posterior).meta
    assert meta["num_data"] == result["num_data"] == (HALF if fraction < 1 else N)
    assert {entry["train_rows"] for entry in meta["members"]} == {"train" if fraction == 1 else "member_rows"}
    found = training_rows(here.posterior, meta)
    assert list(found) == [0, 1, 4]
    for member, ids in found.items():
        expected = recipe.member_rows(tiny, [member])
        np.testing.assert_array_equal(ids, source if expected is None else source[expected[0]])
        assert ids.dtype == np.int64


def test_rows_that_were_changed_or_never_recorded_are_refused(run):
    tiny, config, here = data(), halved(config_of()), run("damaged")
    result = train_stack(task((0, 1)), config, tiny, here)
    write_posterior(here, config, Recipe.of(config, tiny), tiny, result["members"], {"s0": result})
    meta = read_json(here.posterior / "posterior.json")
    with pytest.raises(UsageError, match="has not recorded which rows"):
        training_rows(here.posterior, {**meta, "files": {}})
    with pytest.raises(UsageError, match=r"damaged: ValueError member_rows has 2 rows for 3 members"):
        training_rows(here.posterior, {**meta, "members": [*meta["members"], meta["members"][0]]})
    with pytest.raises(UsageError, match="damaged: KeyError"):
        training_rows(
            here.posterior, {**meta, "members": [{**one, "train_rows": "other"} for one in meta["members"]]}
        )
    path = here.posterior / "rows.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="SHA-256"):
        training_rows(here.posterior, meta)
