"""Maps from the pooled predictive to a better calibrated one, fitted on validation scores and never on a member alone.

Members that are calibrated each are an ensemble that is too cautious (Rahaman & Thiery, 2021, arXiv:2007.08792), so
every map takes the mixture. What a map leaves without a meaning is NaN: the parts aleatoric and epistemic belong to
the members, and a recalibrated distribution has none.

Shape letters: N rows, K classes, J knots, R resamples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, xlogy

from bdl_train.errors import UsageError
from bdl_train.evaluation.rows import INTERVALS, RowScores, score_rows
from bdl_train.predictive.affine import scaled
from bdl_train.predictive.mixture import Mixture
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import ClassStats, NumberStats, stats_of
from bdl_train.specs import TargetSpec

SMALLEST_PROB = float(np.finfo(np.float32).tiny)
"""Probabilities below are taken for this one: what a network in float32 tells from 0."""
TEMPERATURES = (0.01, 100.0)
SMALLEST_GAP = 1e-9
"""Between two knots of a quantile map, and of a count's probability before its density is taken."""
QUANTILES = {"median": 0.5} | {
    f"{side}_{round(100 * level)}": (1 + sign * level) / 2
    for level in INTERVALS
    for side, sign in (("lower", -1), ("upper", 1))
}
"""Columns of `RowScores` that hold a quantile, and its level."""


@dataclass(frozen=True)
class Recalibration(ABC):
    """A fitted map; its class says how it is fitted and applied.

    Attributes:
        num_rows: Validation rows that it was fitted on, n.
        method: Its name in tables.
    """

    num_rows: int

    method: ClassVar[str]
    gives_moments: ClassVar[bool] = True
    """Whether mean and variance of `on_tile` are the recalibrated ones."""

    def __post_init__(self) -> None:
        """Stored maps are untrusted.

        Raises:
            ValueError: values that no fit gives.
        """
        if isinstance(self.num_rows, bool) or not isinstance(self.num_rows, int) or self.num_rows < 1:
            raise ValueError(f"num_rows must be 1 or more, got {self.num_rows!r}")

    @abstractmethod
    def describe(self) -> str:
        """In a few words, with its main number."""

    def curves(self, classes: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Corners of what can be drawn of it, by name: arguments and values; nothing unless it is a map of [0, 1]."""
        return {}

    def on_tile(self, tile: TilePrediction) -> TilePrediction:
        """The predictive of a tile after the map, as far as it is a mixture or probabilities again."""
        return tile

    def levels(self, levels: Sequence[float]) -> np.ndarray:
        """The levels whose quantiles, of `on_tile`, are the recalibrated ones of `levels`."""
        return np.asarray(levels, float)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`, for the class that wrote it."""
        return cls(**{field.name: _tuples(stored[field.name]) for field in fields(cls)})


@dataclass(frozen=True)
class ClassMap(Recalibration):
    """A map of the probabilities of classes."""

    @abstractmethod
    def log_probs(self, probs: np.ndarray) -> np.ndarray:
        """Log of the recalibrated probabilities, `[N, K]`."""

    def apply(self, rows: RowScores) -> RowScores:
        """The recalibrated scores; what is of members (aleatoric, epistemic) is NaN."""
        assert rows.probs is not None
        return _class_rows(rows, self.log_probs(rows.probs))

    def on_tile(self, tile: TilePrediction) -> TilePrediction:
        assert isinstance(tile.stats, ClassStats)
        probs = torch.from_numpy(np.exp(self.log_probs(tile.stats.mean_probs.cpu().numpy())))
        unknown = torch.full((len(probs),), torch.nan, dtype=torch.float64)
        return replace(tile, stats=ClassStats(1.0, probs, unknown, unknown))


@dataclass(frozen=True)
class TemperatureScaling(ClassMap):
    """Classes: p_k^(1/T) / Σ_j p_j^(1/T) of the mixture's probabilities; the ranking of the classes stays.

    Source:
        Guo et al. (2017), arXiv:1706.04599, Section 4.2, here of the mixture's log probabilities.
    """

    temperature: float

    method: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("temperature", self.temperature)

    @classmethod
    def fit(cls, val: RowScores) -> Self:
        """The T of least NLL on validation rows, within `TEMPERATURES`.

        The NLL is convex in 1/T, so that its minimum over log T is the only one.

        Raises:
            UsageError: rows of one class only, or all of them right, so that the NLL falls until T is 0; NaN.
        """
        probs_NK, y = _class_scores(val, "A temperature")
        log_probs_NK, rows = _log(probs_NK), np.arange(len(y))
        if (log_probs_NK[rows, y] >= log_probs_NK.max(1)).all():
            raise UsageError(
                f"A temperature cannot be fitted: all {len(y)} validation rows are right, so that any smaller one "
                "looks better. Raise data.val_fraction."
            )

        def nll(log_temperature: float) -> float:
            return -float(log_softmax(log_probs_NK / math.exp(log_temperature), axis=1)[rows, y].mean())

        low, high = np.log(TEMPERATURES)
        found = minimize_scalar(nll, bounds=(low, high), method="bounded", options={"xatol": 1e-7})
        return cls(len(y), math.exp(float(found.x)))  # pyright: ignore[reportAttributeAccessIssue]

    def log_probs(self, probs: np.ndarray) -> np.ndarray:
        return log_softmax(_log(probs) / self.temperature, axis=1)

    def describe(self) -> str:
        low, high = TEMPERATURES
        edge = not 1.01 * low < self.temperature < high / 1.01
        return f"temperature {self.temperature:.3g}{' (the edge of what is searched)' if edge else ''}"

    def curves(self, classes: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of two classes: the map of the probability of one; with more it depends on all the others."""
        if len(classes) > 2:
            return {}
        x = np.linspace(0, 1, 101)
        probs = np.exp(log_softmax(_log(np.stack([1 - x, x], axis=1)) / self.temperature, axis=1))
        return {classes[-1]: (x, probs[:, 1])}


@dataclass(frozen=True)
class IsotonicCalibration(ClassMap):
    """Classes: a monotone map of each class's probability against the rest, then divided by their sum.

    Two classes share one map, of the last one's probability. A row that every map sends to 0 keeps its probabilities.
    At last one row in n + 1 is given to the uniform guess, so that no probability falls below 1 / (K (n + 1)), with n
    validation rows, and the NLL stays finite. A class that no validation row has keeps its probability before the
    division.

    Source:
        Zadrozny & Elkan (2002), Transforming classifier scores into accurate multiclass probability estimates.

    Attributes:
        x, y: The corners of each class's map (of one map for two classes), straight in between and flat outside.
    """

    x: tuple[tuple[float, ...], ...]
    y: tuple[tuple[float, ...], ...]

    method: ClassVar[str] = "isotonic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.x) != len(self.y) or not self.x:
            raise ValueError(f"{len(self.x)} maps have {len(self.y)} lists of values")
        for x, y in zip(self.x, self.y, strict=True):
            _check_map(x, y, strictly=False)

    @classmethod
    def fit(cls, val: RowScores) -> Self:
        """Least squares among monotone maps, class by class.

        Raises:
            UsageError: rows of one class only; NaN.
        """
        from sklearn.isotonic import IsotonicRegression

        probs_NK, y = _class_scores(val, "An isotonic map")
        x_maps, y_maps = [], []
        for k in range(probs_NK.shape[1])[-1:] if probs_NK.shape[1] == 2 else range(probs_NK.shape[1]):
            if not (y == k).any():
                x_maps.append((0.0, 1.0))
                y_maps.append((0.0, 1.0))
                continue
            one = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(probs_NK[:, k], y == k)
            x_maps.append(tuple(map(float, one.X_thresholds_)))
            y_maps.append(tuple(map(float, one.y_thresholds_)))
        return cls(len(y), tuple(x_maps), tuple(y_maps))

    def log_probs(self, probs: np.ndarray) -> np.ndarray:
        probs_NK = probs.astype(np.float64)
        num_classes = probs_NK.shape[1]
        maps = list(zip(self.x, self.y, strict=True))
        if num_classes == 2:
            last = np.interp(probs_NK[:, 1], *maps[0])
            mapped_NK = np.stack([1 - last, last], axis=1)
        else:
            mapped_NK = np.stack([np.interp(probs_NK[:, k], *maps[k]) for k in range(num_classes)], axis=1)
        total_N1 = mapped_NK.sum(1, keepdims=True)
        divided_NK = np.where(total_N1 == 0, probs_NK, mapped_NK / np.where(total_N1 == 0, 1.0, total_N1))
        return np.log((self.num_rows * divided_NK + 1 / num_classes) / (self.num_rows + 1))

    def describe(self) -> str:
        return f"isotonic maps of {sum(map(len, self.x))} corners"

    def curves(self, classes: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        names = classes[-len(self.x) :]
        return {name: (np.array(x), np.array(y)) for name, x, y in zip(names, self.x, self.y, strict=True)}


@dataclass(frozen=True)
class VarianceScaling(Recalibration):
    """Continuous numbers: the whole mixture is widened about its mean m by a factor s, Y' = m + s (Y − m).

    Source:
        Laves et al. (2021), arXiv:2104.12376 (σ scaling), here of a mixture.
    """

    scale: float

    method: ClassVar[str] = "variance"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive("scale", self.scale)

    @classmethod
    def fit(cls, val: RowScores) -> Self:
        """By moments, from scores alone: s² = mean(error² / total variance). A few outliers can decide it.

        Raises:
            UsageError: no rows, counts, NaN, or a predictive without any spread.
        """
        c = val.columns
        _require_numbers(val, "A variance scale")
        if (c["pit"] > c["pit_below"]).any():
            raise UsageError(
                "A variance scale cannot be fitted to counts, whose spread follows from their mean: "
                "recalibrate the quantiles instead."
            )
        ratio = np.square(c["error"] / np.where(c["total_std"] > 0, c["total_std"], np.nan))
        return cls(len(val), _positive_root(float(_finite(ratio, "A variance scale").mean())))

    @classmethod
    def fit_mixtures(cls, parts: Sequence[tuple[Mixture, np.ndarray]]) -> Self:
        """By maximum likelihood, from the validation part's mixtures and its encoded targets `[B]`.

        The likelihood of a mixture may have several maxima in s: a grid around the moments' s finds the best one's
        place. For one Gaussian component it is the moments' s.

        Raises:
            UsageError: no rows, counts, NaN, or a predictive without any spread.
        """
        pairs = [(mixture, torch.from_numpy(y)) for mixture, y in parts if len(y)]
        ratios, num_rows = [], 0
        for mixture, y in pairs:
            stats = stats_of(mixture.components, mixture.log_weights, None)
            assert isinstance(stats, NumberStats)
            ratios.append(((y.to(stats.mean.device) - stats.mean).square() / stats.total).cpu().numpy())
            num_rows += len(y)
        if not num_rows:
            raise UsageError(_NO_ROWS)
        start = _positive_root(float(_finite(np.concatenate(ratios), "A variance scale").mean()))

        def nll(log_scale: float) -> float:
            total = 0.0
            for mixture, y in pairs:
                wide = scaled(mixture, math.exp(log_scale))
                total += float(
                    stats_of(wide.components, wide.log_weights, y.to(wide.components.mean.device)).nll.sum()
                )
            return total / num_rows

        grid = math.log(start) + np.linspace(-2.5, 2.5, 11)
        best = int(np.clip(np.argmin([nll(one) for one in grid]), 1, len(grid) - 2))
        found = minimize_scalar(
            nll, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-6}
        )
        return cls(num_rows, math.exp(float(found.x)))  # pyright: ignore[reportAttributeAccessIssue]

    def apply(self, tile: TilePrediction, y: np.ndarray, target: TargetSpec) -> RowScores:
        """The recalibrated scores of a tile; scores alone do not say what the widened mixture gives."""
        return score_scaled(tile, y, target, self.scale)

    def on_tile(self, tile: TilePrediction) -> TilePrediction:
        assert tile.mixture is not None
        wide = scaled(tile.mixture, self.scale)
        return replace(tile, stats=stats_of(wide.components, wide.log_weights, None), mixture=wide)

    def describe(self) -> str:
        return f"spread times {self.scale:.3g}"


def score_scaled(tile: TilePrediction, y: np.ndarray, target: TargetSpec, scale: float) -> RowScores:
    """The scores of a tile whose mixture is widened about its mean: exact, all of them.

    Args:
        tile: With a mixture of continuous components.
        y: `[B]` encoded targets.
        target: Brings scores to the target's units.
        scale: The factor of every standard deviation.

    Raises:
        UsageError: counts or classes.
    """
    if tile.mixture is None:
        raise UsageError(f"The spread of '{target.name}' cannot be scaled: it is a class, not a number.")
    wide = scaled(tile.mixture, scale)
    stats = stats_of(wide.components, wide.log_weights, torch.from_numpy(y).to(wide.components.mean.device))
    return score_rows(replace(tile, stats=stats, mixture=wide, per_component=None), y, target)


@dataclass(frozen=True)
class QuantileRecalibration(Recalibration):
    """Numbers: a monotone piecewise linear map R of [0, 1]; the new distribution function is R(F(y)).

    Its density is f(y) R'(F(y)). R(0) = 0 and R(1) = 1, and one row that is spread evenly over [0, 1] is added to the
    n validation rows, so that R' is at least 1 / (n + 1) and the density stays positive wherever f is.

    Source:
        Kuleshov et al. (2018), arXiv:1807.00263, Algorithm 1, with few knots instead of one for each row: the slope
        between two neighbouring rows says nothing of a density. Counts enter by their mean over all values between
        P(Y < y) and P(Y ≤ y) (Czado et al., 2009, the PIT that is not randomised).

    Attributes:
        knots, values: `J` arguments and values of R, from 0 to 1, both increasing.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]

    method: ClassVar[str] = "quantile"
    gives_moments: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_map(self.knots, self.values, strictly=True)

    @classmethod
    def fit(cls, val: RowScores, *, num_bins: int) -> Self:
        """Knots at the quantiles of the PIT values, at most `num_bins` − 1 of them between 0 and 1.

        Args:
            val: Validation scores.
            num_bins: Of equal mass. On n rows of a calibrated model the map costs about num_bins / (2 n) nats.

        Raises:
            UsageError: fewer rows than bins, or NaN.
        """
        _require_numbers(val, "A quantile map")
        low, high = val.columns["pit_below"], _finite(val.columns["pit"], "A quantile map")
        if not 2 <= num_bins <= len(val):
            raise UsageError(
                f"A quantile map of {num_bins} bins needs 2 bins or more and a validation row for each, there are "
                f"{len(val)} rows: lower the number of bins or raise data.val_fraction."
            )
        spread = low[:, None] + (high - low)[:, None] * np.array([0.1, 0.3, 0.5, 0.7, 0.9])
        wished = np.quantile(spread, np.arange(1, num_bins) / num_bins)
        knots = [0.0]
        for one in wished:
            if one - knots[-1] > SMALLEST_GAP and 1 - one > SMALLEST_GAP:
                knots.append(float(one))
        at = np.array([*knots, 1.0])
        width = np.where(high > low, high - low, 1.0)
        share = [
            np.where(high > low, np.clip((one - low) / width, 0, 1), high <= one).mean() for one in at[1:-1]
        ]
        values = (len(val) * np.array([0.0, *share, 1.0]) + at) / (len(val) + 1)
        return cls(len(val), tuple(at.tolist()), tuple(values.tolist()))

    def at(self, pit: np.ndarray) -> np.ndarray:
        """R of probabilities, of any shape."""
        return np.interp(pit, self.knots, self.values)

    def slope(self, pit: np.ndarray) -> np.ndarray:
        """R' of probabilities; at a knot that of the piece to its left."""
        piece = np.clip(np.searchsorted(self.knots, pit, side="left") - 1, 0, len(self.knots) - 2)
        return np.where(np.isnan(pit), np.nan, (np.diff(self.values) / np.diff(self.knots))[piece])

    def levels(self, levels: Sequence[float]) -> np.ndarray:
        """R⁻¹, of the pooled predictive itself."""
        return np.interp(levels, self.values, self.knots)

    def quantiles(self, mixture: Mixture, target: TargetSpec) -> dict[str, np.ndarray]:
        """The recalibrated median and edges of intervals, `[B]` each, in the target's units, exact."""
        found_QB = mixture.quantile(torch.from_numpy(self.levels(list(QUANTILES.values())))).cpu().numpy()
        return dict(zip(QUANTILES, found_QB * target.scale + target.loc, strict=True))

    def apply(self, rows: RowScores, quantiles: Mapping[str, np.ndarray] | None = None) -> RowScores:
        """The recalibrated scores.

        New: pit, pit_below, nll (− log R' is added; of a count it is −log of R(P(Y ≤ y)) − R(P(Y < y))), and the
        columns of `QUANTILES`. Mean, error, standard deviations and CRPS do not follow from scores: they are NaN.

        Args:
            rows: Scores of the pooled predictive.
            quantiles: As from `quantiles`, `[N]` each; without them the columns of `QUANTILES` are NaN.
        """
        c = rows.columns
        low, high = c["pit_below"], c["pit"]
        new_low, new_high = self.at(low), self.at(high)
        # The difference of nearly equal values has no digits left.
        jumps = high - low > SMALLEST_GAP
        gain = np.where(jumps, (new_high - new_low) / np.where(jumps, high - low, 1.0), self.slope(high))
        new = {name: np.full(len(rows), np.nan) for name in c}
        new |= {"y": c["y"], "nll": c["nll"] - np.log(gain), "pit": new_high, "pit_below": new_low}
        return RowScores(new | {name: value for name, value in (quantiles or {}).items() if name in c})

    def describe(self) -> str:
        return f"a quantile map of {len(self.knots) - 1} pieces"

    def curves(self, classes: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {"all": (np.array(self.knots), np.array(self.values))}


# --- scores -------------------------------------------------------------------------------------------------------

_NO_ROWS = "There are no validation rows to recalibrate with: set data.val_fraction above 0."


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value < 1e6:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _check_map(x: Sequence[float], y: Sequence[float], *, strictly: bool) -> None:
    """A monotone map of [0, 1]; `strictly` from (0, 0) to (1, 1)."""
    at, values = np.asarray(x, float), np.asarray(y, float)
    fits = at.ndim == values.ndim == 1 and len(at) == len(values) >= (2 if strictly else 1)
    if not fits or not (np.isfinite(at).all() and np.isfinite(values).all()):
        raise ValueError("a map needs as many finite arguments as values")
    inside = (values >= 0).all() and (values <= 1).all()
    rising = (np.diff(at) > 0).all() and (np.diff(values) >= 0).all()
    ends = not strictly or ((np.diff(values) > 0).all() and [*at[[0, -1]], *values[[0, -1]]] == [0, 1, 0, 1])
    if not (inside and rising and ends):
        raise ValueError("a map must rise within [0, 1]")


def _tuples(stored: Any) -> Any:
    """Lists of json as tuples, however deep."""
    return tuple(map(_tuples, stored)) if isinstance(stored, list | tuple) else stored


def _log(probs: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs.astype(np.float64), SMALLEST_PROB))


def _class_rows(rows: RowScores, log_probs: np.ndarray) -> RowScores:
    """Scores of new log probabilities `[N, K]`; columns that they do not give are NaN."""
    y, probs = rows.columns["y"].astype(int), np.exp(log_probs)
    prediction, confidence = probs.argmax(1), probs.max(1)
    one_hot = np.eye(probs.shape[1])[y]
    new = {name: np.full(len(rows), np.nan) for name in rows.columns}
    new |= {
        "y": rows.columns["y"],
        "prediction": prediction,
        "confidence": confidence,
        "correct": np.where(np.isnan(confidence), np.nan, prediction == y),
        "nll": -log_probs[np.arange(len(y)), y],
        "brier": np.square(probs - one_hot).sum(1),
        "total": -xlogy(probs, probs).sum(1),
    }
    return RowScores(new, probs)


def _class_scores(val: RowScores, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities `[N, K]` and labels `[N]`, of two classes or more."""
    if val.probs is None:
        raise UsageError(f"{what} is for classes, and these are scores of numbers.")
    if len(val) == 0:
        raise UsageError(_NO_ROWS)
    y = val.columns["y"].astype(int)
    if len(np.unique(y)) < 2:
        raise UsageError(
            f"{what} cannot be fitted: all {len(y)} validation rows are of class {y[0]}, two classes or more are "
            "needed. Raise data.val_fraction."
        )
    return _finite(val.probs.astype(np.float64), what), y


def _require_numbers(val: RowScores, what: str) -> None:
    if val.probs is not None:
        raise UsageError(f"{what} is for numbers, and these are scores of classes.")
    if len(val) == 0:
        raise UsageError(_NO_ROWS)


def _finite(values: np.ndarray, what: str) -> np.ndarray:
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        raise UsageError(
            f"{what} cannot be fitted: {int(bad.sum())} of {len(values)} validation rows have scores that are not "
            "finite. Look for a member that predicts NaN or without any spread."
        )
    return values


def _positive_root(square: float) -> float:
    if square <= 0:
        raise UsageError(
            "A variance scale cannot be fitted: every validation row is predicted without any error."
        )
    return math.sqrt(square)
