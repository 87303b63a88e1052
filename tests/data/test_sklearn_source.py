"""scikit-learn's bundled sets."""

from typing import Any

import numpy as np
import pytest
import sklearn.datasets

from bdl_train.data import Data
from bdl_train.data._datamodule import source_from
from bdl_train.errors import UsageError
from bdl_train.specs import TargetKind

SETTINGS: dict[str, Any] = {
    "_target_": "bdl_train.data.sklearn.Sklearn", "name": "iris", "split": 0, "test_fraction": 0.2,
    "val_fraction": 0.1, "batch_size": 8,
}  # fmt: skip


def load(seed: int = 0, **changed: Any) -> Data:
    return source_from({**SETTINGS, **changed}).load("", seed)


@pytest.mark.parametrize(
    ("name", "num_rows", "num_columns", "classes"),
    [
        ("breast_cancer", 569, 30, ("malignant", "benign")),
        ("diabetes", 442, 10, ()),
        ("digits", 1797, 64, tuple("0123456789")),
        ("iris", 150, 4, ("setosa", "versicolor", "virginica")),
        ("wine", 178, 13, ("class_0", "class_1", "class_2")),
    ],
)
def test_every_set_loads(name: str, num_rows: int, num_columns: int, classes: tuple[str, ...]):
    data = load(name=name)
    parts = (data.train, data.val, data.test)
    np.testing.assert_array_equal(np.sort(np.concatenate([part.rows for part in parts])), np.arange(num_rows))
    assert len(data.test) == round(0.2 * num_rows)
    assert data.inputs.shape == (num_columns,)
    assert data.target.classes == classes
    kind = TargetKind.CONTINUOUS if name == "diabetes" else TargetKind.CLASS
    assert data.target.kind is kind
    y = getattr(sklearn.datasets, f"load_{name}")().target
    for part in parts:
        assert np.isfinite(part.x).all()
        decoded = part.y * data.target.scale + data.target.loc
        np.testing.assert_allclose(decoded, y[part.rows], rtol=1e-5)


def test_constant_pixels_of_digits_survive():
    data = load(name="digits")
    assert "pixel_0_0" in data.notes["constant_columns"]
    assert (data.train.x[:, data.inputs.names.index("pixel_0_0")] == 0).all()


def test_split_number_chooses_the_test_rows():
    rows = [load(split=split, seed=seed).test.rows for split, seed in ((0, 0), (0, 9), (1, 0))]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])


def test_unknown_set_is_refused_with_the_choices():
    with pytest.raises(UsageError, match=r"data\.name: input should be .* got 'irish'.*'iris'"):
        load(name="irish")
