"""Files that a run did not train on: columns in any order, classes by name, one clear message for what does not fit."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from bdl_train.data import Part
from bdl_train.data._foreign import read_foreign, seen_before
from bdl_train.data._table import TableTransform
from bdl_train.errors import UsageError
from bdl_train.specs import InputSpec, TargetKind, TargetSpec

TRAIN = pd.DataFrame({"age": [20.0, 40.0, 60.0], "sex": ["f", "m", "f"]})
TRANSFORM = TableTransform.fit(TRAIN)
CLASSES = TargetSpec(TargetKind.CLASS, "income", ("high", "low"))
PRICE = TargetSpec(TargetKind.CONTINUOUS, "price", loc=10.0, scale=2.0)


def read(path: Any, target: TargetSpec = CLASSES, needs_target: bool = True, **given: Any):
    settings = {"inputs": TRANSFORM.input_spec, "transform": TRANSFORM, **given}
    return read_foreign(str(path), ".", target=target, key="data.path", needs_target=needs_target, **settings)


def write(tmp_path, name="new.csv", **columns: list[Any]):
    pd.DataFrame(columns).to_csv(tmp_path / name, index=False)
    return tmp_path / name


def test_columns_in_another_order_are_the_same_rows(tmp_path):
    one = read(write(tmp_path, age=[30, 50], sex=["m", "f"], income=["low", "high"]))
    other = read(write(tmp_path, "b.csv", income=["low", "high"], extra=[1, 2], sex=["m", "f"], age=[30, 50]))
    np.testing.assert_array_equal(one.part.x, other.part.x)
    assert one.part.y.tolist() == other.part.y.tolist() == [1, 0]
    assert (one.name, one.has_target) == ("new", True)
    assert other.table is not None
    assert list(other.table["extra"]) == ["1", "2"]


def test_numbers_are_standardised_as_in_training(tmp_path):
    found = read(write(tmp_path, age=[30], sex=["m"], price=["14"]), PRICE)
    assert found.part.y.tolist() == [2.0]
    assert found.part.y.dtype == np.float32


@pytest.mark.parametrize(
    ("columns", "target", "words"),
    [
        ({"aeg": [1], "income": ["low"]}, CLASSES, "lacks 1 of 2 input columns: age. Did you mean 'aeg'"),
        ({"age": [1], "Income": ["low"]}, CLASSES, "lacks the target column 'income'. Did you mean 'Income'"),
        ({"age": [1], "income": ["mid"]}, CLASSES, "class 'mid' in column 'income', row 0; the run knows high, low"),
        ({"age": [1, 2], "income": ["low", ""]}, CLASSES, "a missing target in column 'income', row 1"),
        ({"age": [1], "price": ["cheap"]}, PRICE, "held numbers in training"),
        ({"age": [1], "price": [""]}, PRICE, "1 missing or infinite values (the first in row 0)"),
        ({"age": ["old"], "income": ["low"]}, CLASSES, "Column 'age' held numbers in training"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_message(tmp_path, columns, target, words: str):
    with pytest.raises(UsageError) as caught:
        read(write(tmp_path, **{"sex": ["m"] * len(next(iter(columns.values()))), **columns}), target)
    assert words in str(caught.value)


def test_unseen_categories_and_rows_of_the_training_are_counted(tmp_path):
    found = read(write(tmp_path, age=[20, 40, 30], sex=["f", "m", "x"], income=["low", "low", "high"]))
    assert found.unseen == {"sex": 1}
    train = Part(TRANSFORM.apply(TRAIN), np.zeros(3, int), np.arange(3))
    assert seen_before(found.part, train) == 2


def test_an_outside_set_needs_no_targets(tmp_path):
    found = read(write(tmp_path, age=[1], sex=["x"], income=["mid"]), needs_target=False)
    assert not found.has_target
    assert not read(write(tmp_path, "b.csv", age=[1], sex=["m"]), needs_target=False).has_target


def test_images_of_another_size_or_with_other_classes(tmp_path):
    pixels = InputSpec((1, 8, 8), pixel_mean=(0.4,), pixel_std=(0.2,))
    target = TargetSpec(TargetKind.CLASS, "class", ("0", "1", "2"))
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.array([0, 2, 1, 0]))
    found = read(tmp_path / "a.npz", target, inputs=pixels, transform=None)
    assert found.part.x.shape == (4, 1, 8, 8)
    assert found.part.y.tolist() == [0, 2, 1, 0]
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 9, 9), np.uint8), y=np.zeros(4, int))
    with pytest.raises(UsageError, match=r"images of \[1, 9, 9\], the run was trained on \[1, 8, 8\]"):
        read(tmp_path / "b.npz", target, inputs=pixels, transform=None)
    np.savez(tmp_path / "c.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4))
    with pytest.raises(UsageError, match="has the class '3', the run knows 0, 1, 2"):
        read(tmp_path / "c.npz", target, inputs=pixels, transform=None)
    assert not read(tmp_path / "c.npz", target, False, inputs=pixels, transform=None).has_target


def test_a_run_without_a_transform_reads_no_table(tmp_path):
    with pytest.raises(UsageError, match="without a stored table transform"):
        read(write(tmp_path, age=[1]), inputs=InputSpec((3,)), transform=None)
