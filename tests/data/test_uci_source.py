"""UCI sets: stored splits, the published recipe, gap splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdl_train.data import Data
from bdl_train.data._datamodule import source_from
from bdl_train.data.uci import gap_split, published_split
from bdl_train.errors import UsageError

NAMES = ["concrete", "energy", "kin8nm", "power-plant", "protein-tertiary-structure", "wine-quality-red"]
SETTINGS: dict[str, Any] = {
    "_target_": "bdl_train.data.uci.Uci", "name": "toy", "split": 0, "protocol": "standard", "val_fraction":
    0.1, "batch_size": 8,
}  # fmt: skip


def load(root: str | Path, *, seed: int = 0, **changed: Any) -> Data:
    return source_from({**SETTINGS, **changed}).load(str(root), seed)


def toy(num_rows: int = 40) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {"X": random.normal(size=(num_rows, 3)), "y": random.normal(size=num_rows)}


def store(folder: Path, name: str, **arrays: Any) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)


def test_raw_table_is_split_by_the_published_recipe(tmp_path: Path):
    store(tmp_path / "uci", "toy", **toy())
    data = load(tmp_path, split=2)
    np.random.seed(1)
    order = [np.random.choice(range(40), 40, replace=False) for _ in range(3)][2]
    np.testing.assert_array_equal(data.test.rows, order[36:])
    assert set(data.train.rows) | set(data.val.rows) == set(order[:36])
    assert [len(data.train), len(data.val)] == [32, 4]


def test_stored_split_is_used_as_it_is(tmp_path: Path):
    rows = np.random.default_rng(3).permutation(40).astype(np.uint16)
    store(tmp_path / "uci", "toy", **toy(), train_idx=rows[None, :30], test_idx=rows[None, 30:])
    data = load(tmp_path, val_fraction=0.0)
    np.testing.assert_array_equal(data.train.rows, rows[:30])
    np.testing.assert_array_equal(data.test.rows, rows[30:])
    X = toy()["X"]
    expected = (X - X[rows[:30]].mean(0)) / X[rows[:30]].std(0)
    np.testing.assert_allclose(data.test.x, expected[rows[30:]], rtol=1e-5, atol=1e-6)


def test_validation_rows_come_from_train_and_follow_the_seed(tmp_path: Path):
    store(tmp_path / "uci", "toy", **toy())
    one, other = load(tmp_path, seed=0), load(tmp_path, seed=1)
    np.testing.assert_array_equal(one.test.rows, other.test.rows)
    assert not np.array_equal(one.val.rows, other.val.rows)
    assert len(np.intersect1d(one.val.rows, one.test.rows)) == 0


def test_gap_holds_out_the_middle_third_of_one_feature(tmp_path: Path):
    store(tmp_path / "uci", "toy", **toy())
    feature = toy()["X"][:, 1]
    data = load(tmp_path, split=1, protocol="gap")
    inside = feature[data.test.rows]
    outside = feature[np.concatenate([data.train.rows, data.val.rows])]
    assert len(inside) == 14
    assert ((outside < inside.min()) | (outside > inside.max())).all()
    assert (outside < inside.min()).sum() == (outside > inside.max()).sum() == 13


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "enrgy"}, r"'enrgy'\. Did you mean 'energy'\? Choose one of: energy, toy"),
        ({"split": 2}, r"data\.split=2 does not exist: data\.name=toy has the standard splits 0 to 1"),
        ({"split": 3, "protocol": "gap"}, "has the gap splits 0 to 2"),
        ({"split": -1}, r"data\.split: input should be greater than or equal to 0"),
        ({"protocol": "gaps"}, r"data\.protocol: input should be 'standard' or 'gap', got 'gaps'"),
        ({"split": 1}, r"train and test parts share 1 rows \(the first is row 4\)"),
    ],
)
def test_bad_settings_and_overlapping_splits_are_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
):
    train_idx, test_idx = np.array([[0, 1, 2, 3], [0, 1, 2, 4]]), np.array([[4, 5], [4, 5]])
    store(tmp_path / "uci", "toy", **toy(), train_idx=train_idx, test_idx=test_idx)
    store(tmp_path / "uci", "energy", **toy())
    with pytest.raises(UsageError, match=message):
        load(tmp_path, **changed)


def test_files_that_do_not_hold_a_table_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"toy\.npz does not exist\. Point data\.root"):
        load(tmp_path)
    store(tmp_path / "uci", "toy", X=toy()["X"])
    with pytest.raises(UsageError, match="lacks y; it has: X"):
        load(tmp_path)
    store(tmp_path / "uci", "toy", X=toy()["X"], y=np.zeros(3))
    with pytest.raises(UsageError, match=r"must hold X \[N, D\] and y \[N\], got \[40, 3\] and \[3\]"):
        load(tmp_path)
    store(tmp_path / "uci", "toy", X=toy()["X"], y=np.where(np.arange(40) == 7, np.nan, 0.0))
    with pytest.raises(UsageError, match=r"1 NaN or infinite values \(the first in row 7\)"):
        load(tmp_path)
    (tmp_path / "uci" / "toy.npz").write_bytes(b"PK, but no archive")
    with pytest.raises(UsageError, match=r"toy\.npz cannot be read as an npz file"):
        load(tmp_path)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", NAMES)
def test_recipe_gives_the_stored_splits(data_root: str, name: str):
    with np.load(Path(data_root) / "uci" / f"{name}.npz", allow_pickle=False) as stored:
        num_rows, train_idx, test_idx = len(stored["y"]), stored["train_idx"], stored["test_idx"]
    for split in range(len(train_idx)):
        train_rows, test_rows = published_split(num_rows, split)
        np.testing.assert_array_equal(train_rows, train_idx[split])
        np.testing.assert_array_equal(test_rows, test_idx[split])


@pytest.mark.shared_data
@pytest.mark.parametrize("name", NAMES)
def test_gap_recipe_agrees_with_the_stored_gaps(data_root: str, name: str):
    with np.load(Path(data_root) / "uci" / f"{name}.npz", allow_pickle=False) as stored:
        X = stored["X"]
    with np.load(Path(data_root) / "uci_gap" / f"{name}.npz", allow_pickle=False) as stored:
        test_idx = stored["test_idx"].astype(int)
    for feature, expected in enumerate(test_idx):
        train_rows, test_rows = gap_split(X, feature)
        assert len(train_rows) + len(test_rows) == len(X)
        # The published wine gaps have one row less than a third.
        assert len(test_rows) - len(expected) == (1 if name == "wine-quality-red" else 0)
        # Only rows with the value at an edge of the gap may differ: they are ties.
        values = X[:, feature]
        edges = {edge for rows in (expected, test_rows) for edge in (values[rows].min(), values[rows].max())}
        assert {float(values[row]) for row in np.setxor1d(test_rows, expected)} <= edges


@pytest.mark.shared_data
def test_both_protocols_load(data_root: str):
    standard = load(data_root, name="energy", split=19)
    assert [len(part) for part in (standard.train, standard.val, standard.test)] == [622, 69, 77]
    gap = load(data_root, name="energy", split=7, protocol="gap")
    assert [len(part) for part in (gap.train, gap.val, gap.test)] == [461, 51, 256]
    assert load(data_root, name="concrete").notes["duplicated_rows"] == 25
