"""Splits, validation parts and targets."""

import numpy as np
import pytest

from bdl_train.data import Data, Part, check_split, cut_validation, encode_target, fit_target, is_constant
from bdl_train.data._splits import random_split
from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec, TargetKind, TargetSpec


def test_validation_is_cut_from_train_and_keeps_the_order_of_the_rows():
    train_rows = np.array([90, 3, 70, 5, 60, 8, 44, 2, 1, 7])
    kept, val = cut_validation(train_rows, 0.3, seed=4)
    assert len(val) == 3
    assert sorted([*kept, *val]) == sorted(train_rows)
    position = {row: i for i, row in enumerate(train_rows)}
    for rows in (kept, val):
        assert [position[row] for row in rows] == sorted(position[row] for row in rows)


def test_validation_part_depends_on_the_seed_only():
    rows = np.arange(1000)
    first, again, other = (cut_validation(rows, 0.1, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert len(np.intersect1d(first, other)) < 40


def test_small_sets_get_one_validation_row_and_fraction_zero_gets_none():
    assert [len(part) for part in cut_validation(np.arange(3), 0.1, 0)] == [2, 1]
    assert [len(part) for part in cut_validation(np.arange(3), 0.0, 0)] == [3, 0]
    with pytest.raises(UsageError, match=r"data\.val_fraction=0\.9 leaves no training row out of 2"):
        cut_validation(np.arange(2), 0.9, 0)


def test_random_split_covers_all_rows_and_follows_its_number():
    parts = random_split(101, split=3, test_fraction=0.2)
    np.testing.assert_array_equal(np.sort(np.concatenate([*parts.values()])), np.arange(101))
    assert len(parts["test"]) == 20
    assert not np.array_equal(parts["test"], random_split(101, split=4, test_fraction=0.2)["test"])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": [0, 1, 2], "test": [2, 3]}, r"train and test parts share 1 rows \(the first is row 2\)"),
        ({"train": [0, 1], "val": [1], "test": [3]}, "train and val parts share 1 rows"),
        ({"train": [0, 1], "val": [3], "test": [3]}, "val and test parts share 1 rows"),
        ({"train": [0, 9], "test": [3]}, "names row 9, the table has rows 0 to 4"),
        ({"train": [0, -1], "test": [3]}, "names row -1, the table has rows 0 to 4"),
        ({"train": [], "test": [3]}, "train part has no rows"),
    ],
)
def test_bad_splits_are_refused(parts: dict[str, list[int]], message: str):
    with pytest.raises(UsageError, match=message):
        check_split({name: np.array(rows, dtype=np.int64) for name, rows in parts.items()}, 5)


def test_target_statistics_come_from_the_training_rows():
    y = np.array([1.0, 2.0, 6.0, 1e6])
    target = fit_target(y, np.array([0, 1, 2]), TargetKind.CONTINUOUS, "y", ())
    assert target.loc == pytest.approx(3.0)
    assert target.scale == pytest.approx(np.sqrt((4 + 1 + 9) / 3))


@pytest.mark.parametrize("scale", [1e-2, 1e-9, 1e9])
def test_targets_of_any_scale_are_standardised_and_come_back(scale: float):
    y = 5.0 + scale * np.random.default_rng(0).standard_normal(500)
    target = fit_target(y, np.arange(400), TargetKind.CONTINUOUS, "y", ())
    encoded = encode_target(y, target)
    assert encoded.dtype == np.float32
    assert encoded[:400].std() == pytest.approx(1.0, rel=1e-5)
    decoded = encoded.astype(np.float64) * target.scale + target.loc
    np.testing.assert_allclose(decoded, y, rtol=0, atol=1e-5 * scale)


def test_heavy_tailed_targets_stay_finite():
    y = np.random.default_rng(0).standard_t(1.0, 10_000) * 1e8
    target = fit_target(y, np.arange(9_000), TargetKind.CONTINUOUS, "y", ())
    encoded = encode_target(y, target)
    assert np.isfinite(encoded).all()
    assert encoded[:9_000].std() == pytest.approx(1.0, rel=1e-3)


def test_constant_target_has_scale_one():
    y = np.full(50, 0.1)
    target = fit_target(y, np.arange(40), TargetKind.CONTINUOUS, "y", ())
    assert target.scale == 1.0
    assert np.abs(encode_target(y, target)).max() < 1e-6


def test_constant_is_relative_to_the_size_of_the_values():
    assert is_constant(np.array([0.1 + 0.2, 0.3]))
    assert is_constant(np.zeros(3))
    assert not is_constant(np.array([1e-15, 2e-15]))
    assert not is_constant(np.array([1e6, 1e6 + 1e-3]))


@pytest.mark.parametrize(
    ("y", "kind", "classes", "message"),
    [
        ([1.0, np.nan, 2.0], TargetKind.CONTINUOUS, (), r"has 1 NaN or infinite values \(the first in row 1"),
        ([1.0, 2.0, np.inf], TargetKind.CONTINUOUS, (), "the first in row 2"),
        ([1e200, -1e200, 0.0], TargetKind.CONTINUOUS, (), r"up to 1e\+200, too large"),
        ([0.0, 1.0, 1.5], TargetKind.CLASS, ("a", "b"), r"whole numbers for kind 'class', got 1\.5 in row 2"),
        ([0, 1, 2], TargetKind.CLASS, ("a", "b"), r"labels 0\.\.2, expected 0\.\.1"),
        ([-1, 1, 0], TargetKind.CLASS, ("a", "b"), r"labels -1\.\.1, expected 0\.\.1"),
        ([0, 0, 0], TargetKind.CLASS, ("a",), "has 1 class"),
        ([0, 3, -2], TargetKind.COUNT, (), "counts of 0 or more, got -2"),
        ([0.5, 3, 2], TargetKind.COUNT, (), r"got 0\.5 in row 0"),
    ],
)
def test_bad_targets_are_refused(y: list[float], kind: TargetKind, classes: tuple[str, ...], message: str):
    with pytest.raises(UsageError, match=message):
        fit_target(np.array(y), np.arange(3), kind, "y", classes)


def test_labels_and_counts_become_int64():
    counts = fit_target(np.array([0.0, 7.0]), np.arange(2), TargetKind.COUNT, "y", ())
    encoded = encode_target(np.array([0.0, 7.0]), counts)
    assert encoded.dtype == np.int64
    assert encoded.tolist() == [0, 7]


def some_data(x_test: float) -> Data:
    train, val, test = (
        Part(np.full((n, 2), value, np.float32), np.zeros(n, np.float32), np.arange(n))
        for n, value in ((3, 0.0), (1, 0.0), (2, x_test))
    )
    return Data(
        "some", train, val, test, InputSpec((2,), (1, 1), ("a", "b")), TargetSpec(TargetKind.CONTINUOUS)
    )


def test_fingerprint_follows_the_arrays():
    assert some_data(1.0).fingerprint() == some_data(1.0).fingerprint()
    assert some_data(1.0).fingerprint() != some_data(2.0).fingerprint()


def test_a_set_without_training_rows_cannot_be_trained_on():
    data = some_data(0.0)
    data.require_train()
    empty = Part(data.train.x[:0], data.train.y[:0], data.train.rows[:0])
    with pytest.raises(UsageError, match=r"data\.name=ood has a test part only \(2 rows\)"):
        Data("ood", empty, empty, data.test, data.inputs, data.target).require_train()
