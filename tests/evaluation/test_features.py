"""Features of a table with and without a transform, and rows that are sampled by the seed."""

import numpy as np
import pytest

from bdl_train.data import Part
from bdl_train.data._table import CategoryColumn, NumericColumn, TableTransform
from bdl_train.errors import UsageError
from bdl_train.evaluation.features import Category, Number, features_of, sample_rows
from bdl_train.specs import InputSpec

TRANSFORM = TableTransform(
    (
        NumericColumn("age", 40.0, 8.0, False),
        CategoryColumn("colour", ("blue", "green", "red")),
        NumericColumn("height", 1.7, 0.1, True),
        NumericColumn("planet", 3.0, 0.0, False),
    )
)


def part_of(count: int = 40) -> Part:
    generator = np.random.default_rng(0)
    x = np.zeros((count, 7), np.float32)
    x[:, [0, 4]] = generator.normal(size=(count, 2))
    x[np.arange(count), 1 + generator.integers(0, 3, count)] = 1
    x[:5, 4], x[:5, 5] = 0, 1  # five missing heights
    x[5, 1:4] = 0  # a colour never seen
    return Part(x, np.zeros(count, np.float32), np.arange(count))


def test_rows_are_sampled_by_the_seed():
    part = part_of(100)
    one, again, other = (sample_rows(part, 30, seed) for seed in (1, 1, 2))
    assert one.rows.tolist() == again.rows.tolist() != other.rows.tolist()
    assert sorted(set(one.rows)) == one.rows.tolist()
    assert sample_rows(part, 100, 0) is part


def test_features_without_a_transform():
    unknown = features_of(InputSpec((2,), (1, 1), ("a", "b")), None)
    assert [(one.name, one.column) for one in unknown if isinstance(one, Number)] == [("a", 0), ("b", 1)]
    assert all(np.isnan(one.std) for one in unknown if isinstance(one, Number))
    with pytest.raises(UsageError, match="'b' fills several columns"):
        features_of(InputSpec((3,), (1, 2), ("a", "b")), None)
    assert features_of(TRANSFORM.input_spec, TRANSFORM) == [
        Number("age", 0, 8.0, None),
        Category("colour", slice(1, 4)),
        Number("height", 4, 0.1, 5),
        Number("planet", 6, 0.0, None),
    ]
