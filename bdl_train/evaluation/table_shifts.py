"""Shifts of tables as networks see them: noise, missing cells, rows from elsewhere, wrong labels.

Shape letters: N rows, D columns, F original features.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.random import Generator

from bdl_train.data._table import CategoryColumn, NumericColumn, TableTransform
from bdl_train.errors import UsageError, unknown_choice
from bdl_train.specs import InputSpec


def table_features(inputs: InputSpec) -> dict[str, slice]:
    """The encoded columns of each original feature, in order.

    Raises:
        UsageError: the inputs are no table.
    """
    if len(inputs.shape) != 1:
        raise UsageError(
            f"Shifts of tables need inputs [N, D], got examples of shape {list(inputs.shape)}: leave them out."
        )
    groups = inputs.groups or (1,) * inputs.shape[0]
    names = inputs.names or tuple(f"x{i}" for i in range(len(groups)))
    stops = np.cumsum(groups).tolist()
    return {name: slice(stop - width, stop) for name, stop, width in zip(names, stops, groups, strict=True)}


def feature_noise(
    x: np.ndarray, inputs: InputSpec, transform: TableTransform | None, strength: float, random: Generator
) -> np.ndarray:
    """Noise on every feature that leaves each the same correlation with its clean self, 1/√(1 + strength²).

    A number gets Gaussian noise of `strength` standard deviations of the training part. A category is drawn again
    from the rows of `x` with probability 1 − 1/√(1 + strength²): an indicator that is drawn again with probability p
    keeps the correlation 1 − p. Missing cells of a number that has a flag for them stay missing, and a column that
    was constant in training stays what the transform made of it.

    Args:
        x: `[N, D]` encoded.
        inputs: Names and widths of the features.
        transform: What encoded them; None = every column is a number in training standard deviations.
        strength: At least 0.
        random: The only source of randomness.

    Returns:
        A new `[N, D]` float32.
    """
    if strength < 0:
        raise UsageError(f"The strength of feature noise must be 0 or more, got {strength}: change it.")
    out, count = x.astype(np.float32), len(x)
    chance = 1 - 1 / np.sqrt(1 + strength**2)
    for column, place in zip(_columns(inputs, transform), table_features(inputs).values(), strict=True):
        if isinstance(column, CategoryColumn):
            drawn = np.where(
                random.random(count) < chance, random.integers(count, size=count), np.arange(count)
            )
            out[:, place] = x[drawn, place]
        elif column is None:
            out[:, place] += strength * random.standard_normal(out[:, place].shape)
        else:
            noise = strength * random.standard_normal(count)
            disturbed = column.std > 0
            missing = x[:, place.start + 1] > 0.5 if column.flag_missing else np.zeros(count, bool)
            out[:, place.start] += np.where(missing, 0, noise) * disturbed
    return out


def _columns(
    inputs: InputSpec, transform: TableTransform | None
) -> Sequence[NumericColumn | CategoryColumn | None]:
    """A transform's column for every feature; None where there is no transform."""
    features = table_features(inputs)
    if transform is None:
        return [None] * len(features)
    if transform.input_spec.groups != tuple(place.stop - place.start for place in features.values()):
        raise UsageError(
            f"The transform makes features of widths {list(transform.input_spec.groups)}, the inputs have "
            f"{list(inputs.groups)}: take both from the same run."
        )
    return transform.columns


def missing_cells(
    x: np.ndarray, inputs: InputSpec, transform: TableTransform | None, lost: np.ndarray
) -> np.ndarray:
    """What the transform makes of rows some of whose features have no value.

    A number becomes its mean, flagged if it has a flag; a category its missing level if training had one, else the
    level of rare ones if there is one, else zeros.

    Args:
        x: `[N, D]` encoded.
        lost: `[N, F]` truth values.

    Returns:
        A new `[N, D]` float32.
    """
    _columns(inputs, transform)
    blank = np.zeros(x.shape[1], np.float32)
    if transform is not None:
        blank = transform.apply(pd.DataFrame({name: [None] for name in transform.names}, dtype=object))[0]
    places = table_features(inputs).values()
    widths = [place.stop - place.start for place in places]
    return np.where(np.repeat(lost, widths, axis=1), blank, x).astype(np.float32)


def missing_columns(
    x: np.ndarray, inputs: InputSpec, transform: TableTransform | None, features: Sequence[str]
) -> np.ndarray:
    """The same with whole features missing, by name.

    Raises:
        UsageError: an unknown feature.
    """
    names = list(table_features(inputs))
    for feature in features:
        if feature not in names:
            raise UsageError(unknown_choice("feature", feature, names))
    lost = np.isin(names, list(features))
    return missing_cells(x, inputs, transform, np.broadcast_to(lost, (len(x), len(names))))


def covariate_shift(x: np.ndarray, strength: float, random: Generator) -> np.ndarray:
    """Rows drawn anew with weights exp(strength · score), score = the standardised first principal component.

    An exponential tilt: of a Gaussian score it moves the mean by `strength` standard deviations and keeps the spread.
    Given x, targets are distributed as before (Shimodaira, 2000, Section 1). The component points to where its
    largest loading is positive.

    Args:
        x: `[N, D]` encoded.
        strength: Of the tilt; negative values tilt the other way.

    Returns:
        Positions `[N]`, drawn with replacement.
    """
    centred = x - x.mean(0, dtype=np.float64)
    direction = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    direction *= np.sign(direction[np.abs(direction).argmax()])
    score = centred @ direction
    spread = score.std()
    if spread > 0:
        score = score / spread
    logit = strength * score
    weight = np.exp(logit - logit.max())
    return random.choice(len(x), size=len(x), p=weight / weight.sum())


def label_noise(y: np.ndarray, share: float, num_classes: int | None, random: Generator) -> np.ndarray:
    """Wrong targets on round(share · N) random rows.

    A class becomes any other class, all equally likely. Numbers are passed on in a circle through the chosen rows in
    random order, so that none keeps its own place and their distribution stays as it was.

    Args:
        y: `[N]` labels 0..K-1, or numbers.
        share: From 0 to 1. Fewer than two chosen rows leave numbers as they are.
        num_classes: K; None for numbers.

    Returns:
        A new `[N]`, of the same type.
    """
    if not 0 <= share <= 1:
        raise UsageError(f"The share of wrong labels must lie between 0 and 1, got {share}: change it.")
    if num_classes is not None and num_classes < 2:
        raise UsageError(f"Labels have no other class to change to: got {num_classes} class.")
    out = y.copy()
    chosen = random.permutation(len(y))[: round(share * len(y))]
    if num_classes is None:
        out[chosen] = y[np.roll(chosen, 1)]
    else:
        out[chosen] = (y[chosen] + random.integers(1, num_classes, len(chosen))) % num_classes
    return out
