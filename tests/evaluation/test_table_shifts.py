"""Shifts of tables: missing cells are what the transform says; noise, tilts and wrong labels have known moments."""

import numpy as np
import pandas as pd
import pytest

from bdl_train.data._levels import MISSING, OTHER
from bdl_train.data._table import TableTransform
from bdl_train.errors import UsageError
from bdl_train.evaluation.table_shifts import (
    covariate_shift,
    feature_noise,
    label_noise,
    missing_cells,
    missing_columns,
    table_features,
)
from bdl_train.specs import InputSpec


def raw(count: int = 4000) -> pd.DataFrame:
    """A number, one with gaps, a constant one, a category, one with gaps, one with rare levels."""
    random = np.random.default_rng(2)
    gaps = random.random(count) < 0.2
    return pd.DataFrame(
        {
            "age": random.normal(40, 9, count),
            "income": np.where(gaps, np.nan, random.normal(3, 2, count)),
            "constant": np.full(count, 7.0),
            "colour": random.choice(["red", "green", "blue"], count, p=[0.5, 0.3, 0.2]),
            "job": pd.Series(random.choice(["a", "b"], count)).where(random.random(count) > 0.1, None),
            "town": random.choice(list("abcdefgh"), count, p=[0.4, 0.3, *[0.05] * 6]),
        }
    )


TABLE = raw()
TRANSFORM = TableTransform.fit(TABLE, max_categories=3)
X, INPUTS = TRANSFORM.apply(TABLE), TRANSFORM.input_spec
PLAIN = InputSpec((3,), (1, 1, 1), ("a", "b", "c"))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_table_has_all_kinds_of_columns():
    levels = [getattr(column, "levels", ()) for column in TRANSFORM.columns]
    assert MISSING in levels[4]
    assert OTHER in levels[5]
    assert INPUTS.groups == (1, 2, 1, 3, 3, 3)
    assert table_features(INPUTS)["colour"] == slice(4, 7)


# --- missing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [*([name] for name in TRANSFORM.names), ["income", "job"], []])
def test_a_missing_feature_is_what_the_transform_makes_of_empty_cells(lost: list[str]):
    empty = TABLE.copy()
    for name in lost:
        empty[name] = pd.Series([None] * len(empty), dtype=object)
    np.testing.assert_array_equal(missing_columns(X, INPUTS, TRANSFORM, lost), TRANSFORM.apply(empty))


def test_missing_cells_in_numbers_by_hand():
    found = missing_columns(X, INPUTS, TRANSFORM, ["income", "colour", "job", "town"])
    np.testing.assert_array_equal(found[:, 1:3], np.tile([0.0, 1.0], (len(X), 1)))  # the mean, flagged
    assert not found[:, 4:7].any()  # no level for it
    job, town = list(TRANSFORM.columns[4].to_json()["levels"]), list(TRANSFORM.columns[5].to_json()["levels"])
    assert (found[:, 7 + job.index(MISSING)] == 1).all()
    assert (found[:, 10 + town.index(OTHER)] == 1).all()
    np.testing.assert_array_equal(found[:, [0, 3]], X[:, [0, 3]])


def test_cells_are_lost_row_by_row():
    lost = np.zeros((len(X), 6), bool)
    lost[3, 1] = lost[5, 3] = True
    found = missing_cells(X, INPUTS, TRANSFORM, lost)
    rows, columns = np.nonzero(found != X)
    assert set(rows) <= {3, 5}
    assert set(columns) <= {1, 2, 4, 5, 6}
    np.testing.assert_array_equal(found[3, 1:3], [0, 1])


def test_without_a_transform_all_columns_are_numbers():
    x = rng().standard_normal((5, 3)).astype(np.float32)
    found = missing_columns(x, PLAIN, None, ["b"])
    np.testing.assert_array_equal(found, x * np.array([1, 0, 1]))
    wide = InputSpec((3,), (1, 2), ("a", "b"))
    np.testing.assert_array_equal(missing_columns(x, wide, None, ["b"])[:, 1:], 0)
    nameless = InputSpec((3,))
    np.testing.assert_array_equal(missing_columns(x, nameless, None, ["x1"]), found)


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_every_feature_keeps_the_same_correlation_with_its_clean_self(strength: float):
    found = feature_noise(X, INPUTS, TRANSFORM, strength, rng())
    assert found.dtype == np.float32
    expected = 1 / np.sqrt(1 + strength**2)
    present = X[:, 2] == 0
    columns = [(X[:, 0], found[:, 0]), (X[present, 1], found[present, 1])]
    columns += [(X[:, k], found[:, k]) for k in range(4, 13)]
    for clean, noisy in columns:
        # A correlation estimated from n rows is off by at most 1 / sqrt(n); indicators of rare levels by some more.
        assert np.corrcoef(clean, noisy)[0, 1] == pytest.approx(expected, abs=6 / np.sqrt(len(clean)))
    assert (found[:, 0] - X[:, 0]).std() == pytest.approx(strength, rel=5 / np.sqrt(2 * len(X)))


def test_noise_leaves_categories_valid_and_what_has_no_value_alone():
    found = feature_noise(X, INPUTS, TRANSFORM, 1.0, rng())
    for group in (slice(4, 7), slice(7, 10), slice(10, 13)):
        np.testing.assert_array_equal(np.sort(found[:, group], axis=1), np.sort(X[:, group], axis=1))
        np.testing.assert_allclose(
            found[:, group].mean(0), X[:, group].mean(0), atol=5 * 0.5 / np.sqrt(len(X))
        )
    missing = X[:, 2] == 1
    np.testing.assert_array_equal(found[missing, 1], X[missing, 1])
    np.testing.assert_array_equal(found[:, [2, 3]], X[:, [2, 3]])
    np.testing.assert_array_equal(feature_noise(X, INPUTS, TRANSFORM, 0.0, rng()), X)


def test_noise_without_a_transform():
    x = np.zeros((20_000, 3), np.float32)
    found = feature_noise(x, PLAIN, None, 0.7, rng())
    np.testing.assert_allclose(found.std(0), 0.7, rtol=5 / np.sqrt(2 * len(x)))
    np.testing.assert_allclose(np.corrcoef(found.T)[np.triu_indices(3, 1)], 0, atol=5 / np.sqrt(len(x)))
    np.testing.assert_array_equal(found, feature_noise(x, PLAIN, None, 0.7, rng()))


# --- tilts and labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0])
def test_a_tilt_moves_a_gaussian_by_its_strength_and_keeps_its_spread(strength: float):
    z = rng(1).standard_normal((40_000, 3))
    # A component of standard deviation 3 along (0.6, 0.8, 0), 1 elsewhere.
    along = np.array([0.6, 0.8, 0.0])
    x = (z + 2 * np.outer(z @ along, along)).astype(np.float32)
    rows = covariate_shift(x, strength, rng())
    assert rows.shape == (40_000,)
    score, other = x[rows] @ along / 3, x[rows] @ np.array([0.8, -0.6, 0.0])
    # exp(strength²) fewer rows' worth of weight.
    tolerance = 6 * np.sqrt(np.exp(strength**2) / len(x)) + 0.01
    assert score.mean() == pytest.approx(strength, abs=tolerance)
    assert score.std() == pytest.approx(1, abs=2 * tolerance)
    assert other.mean() == pytest.approx(0, abs=2 * tolerance)


def test_a_tilt_of_equal_rows_or_an_extreme_one_is_possible():
    assert len(set(covariate_shift(np.ones((500, 2), np.float32), 3.0, rng()))) > 250
    x = np.arange(10, dtype=np.float32)[:, None]
    assert set(covariate_shift(x, 1000.0, rng())) == {9}
    assert set(covariate_shift(x, -1000.0, rng())) == {0}


def test_wrong_labels_are_as_many_as_asked_for_and_uniform_over_the_others():
    y = np.repeat(np.arange(4), 10_000)
    found = label_noise(y, 0.3, 4, rng())
    wrong = found != y
    assert wrong.sum() == 12_000
    counts = np.array([[(wrong & (y == a) & (found == b)).sum() for b in range(4)] for a in range(4)])
    np.testing.assert_allclose(counts[~np.eye(4, dtype=bool)], 1000, atol=5 * np.sqrt(1000))
    np.testing.assert_array_equal(label_noise(y, 0.0, 4, rng()), y)
    assert (label_noise(y, 1.0, 2, rng()) != y).all()


def test_wrong_numbers_are_those_of_other_rows():
    y = rng().standard_normal(1001).astype(np.float32)
    found = label_noise(y, 0.4, None, rng())
    assert found.dtype == np.float32
    assert (found != y).sum() == 400
    np.testing.assert_array_equal(np.sort(found), np.sort(y))
    np.testing.assert_array_equal(label_noise(y[:2], 0.5, None, rng()), y[:2])


# --- refusals ----------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match=r"feature 'colours'.*Did you mean 'colour'"):
        missing_columns(X, INPUTS, TRANSFORM, ["colours"])
    with pytest.raises(UsageError, match="0 or more, got -1"):
        feature_noise(X, INPUTS, TRANSFORM, -1, rng())
    with pytest.raises(UsageError, match="same run"):
        feature_noise(X[:, :3], PLAIN, TRANSFORM, 1, rng())
    with pytest.raises(UsageError, match=r"\[1, 8, 8\]"):
        table_features(InputSpec((1, 8, 8)))
    with pytest.raises(UsageError, match=r"between 0 and 1, got 1\.5"):
        label_noise(np.zeros(4), 1.5, None, rng())
    with pytest.raises(UsageError, match="got 1 class"):
        label_noise(np.zeros(4, int), 0.5, 1, rng())
