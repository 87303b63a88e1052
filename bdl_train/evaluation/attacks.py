"""Adversarial attacks on the whole ensemble, and whether its uncertainty notices them.

The gradients are those of the mixture, the steps are taken by the adversarial-robustness-toolbox, and what comes out is
scored like any other rows. Shape letters: N rows, B rows of a batch, D columns, K classes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.features import Number, features_of, sample_rows
from bdl_train.evaluation.functionals import Statistic, mean_of, ranking
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Level, Section
from bdl_train.evaluation.sensitivity import ROWS
from bdl_train.predictive.differentiable import MixtureModule
from bdl_train.specs import InputSpec, TargetSpec

KEY, TITLE = "attacks", "Adversarial attacks"
PGD_STEPS, PGD_REACH = 20, 2.5
"""Steps of PGD, and how far they lead together, in units of epsilon (Madry et al. 2018 take 2.5)."""


def attacks_section(
    module: MixtureModule,
    part: Part,
    *,
    inputs: InputSpec,
    target: TargetSpec,
    strengths: Sequence[float],
    seed: int,
    max_rows: int,
    score: Callable[[Part], RowScores],
) -> Section:
    """Attack rows by FGSM and PGD within an L∞ ball, knowing the true target, and score what comes out.

    The loss that is climbed is log(1 − p̄(y)) − log p̄(y) of the mixture for classes: it rises with the NLL, so its
    signs are those of the NLL's gradient, but they outlive the rounding of p̄(y) to 1. For numbers it is the squared
    error of the mean. PGD starts at random in the ball for classes, at the row itself for numbers.

    Args:
        module: The mixture that gives gradients.
        part: Encoded rows with targets.
        inputs, target: As in the artefact; its transform says which columns are numbers.
        strengths: Values of epsilon: for images in pixel values (of 255, 1 or more), for tables in training standard
            deviations. Images stay within 0 and 255 and are rounded to whole pixel values that keep to epsilon. In
            tables only numbers move that are there; categories, missing values and their flags do not.
        seed: Of the sample of rows, the random starts, and the bootstrap.
        max_rows: Most rows that are attacked.
        score: Scores encoded rows, e.g. with a `Predictor`.

    Returns:
        `curves`: kind (fgsm, pgd), severity (epsilon; 0 are the rows as they are), metric (accuracy or rmse, nll,
        total, epistemic: means over rows, of standard deviations for numbers), value, low, high, n. `detection`: kind,
        severity, score (total, epistemic), auroc (attacked rows against the same rows as they are; above a half if the
        score rises), low, high, n.

    Raises:
        UsageError: the toolbox is not installed, bad strengths, no rows, no numeric column.

    Source:
        Goodfellow et al. (2015), arXiv:1412.6572, Section 4; Madry et al. (2018), arXiv:1706.06083, Section 2.1.
    """
    strengths = _checked(strengths, inputs)
    sample = sample_rows(part, max_rows, seed)
    space = _Pixels(sample.x) if inputs.is_image else _Columns.of(sample.x, module)
    attacker = _Attacker(module, target, space, sample.y, seed)
    clean = score(sample)
    curves, detection = [], []
    notes = [] if len(sample) == len(part) else [f"{len(sample)} of {len(part)} rows, taken at random."]
    for kind, attack in attacker.kinds().items():
        curves += _curve(clean, seed, kind=kind, severity=0.0)
        for strength in strengths:
            moved = attack(strength)
            stored = Part(space.stored(moved, strength), sample.y, sample.rows)
            attacked = score(stored)
            curves += _curve(attacked, seed, kind=kind, severity=strength)
            detection += _detection(clean, attacked, seed, kind=kind, severity=strength)
        if inputs.is_image:
            before, after = (attacker.mean_loss(x) for x in (moved, space.start_of(stored.x)))
            notes.append(
                f"Rounding to whole pixel values took the mean loss under {kind} at epsilon {strengths[-1]:g} from "
                f"{before:.3g} to {after:.3g}."
            )
    tables = {"curves": pd.DataFrame(curves), "detection": pd.DataFrame(detection)}
    verdict, level = _verdict(tables["curves"], tables["detection"], inputs, strengths[-1])
    return Section(KEY, TITLE, verdict, level, tables, tuple(notes))


def _checked(strengths: Sequence[float], inputs: InputSpec) -> list[float]:
    values = sorted({float(one) for one in strengths} - {0.0})
    least = 1.0 if inputs.is_image else 0.0
    unit = "pixel values of 255, 1 or more" if inputs.is_image else "training standard deviations, above 0"
    if not values or not np.isfinite(values).all() or values[0] < least:
        raise UsageError(f"strengths must be one or more finite numbers ({unit}), got {list(strengths)}.")
    return values


@dataclass(frozen=True)
class _Pixels:
    """Images `[N, C, H, W]` uint8, attacked as pixel values in [0, 1]."""

    x: np.ndarray
    unit = 1 / 255
    clip = (0.0, 1.0)
    batch_size = ROWS["image"]

    def start_of(self, x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32) / 255

    @property
    def mask(self) -> np.ndarray:
        return np.ones(self.x.shape, np.float32)

    def network_inputs(self, module: MixtureModule, x: Tensor) -> Tensor:
        return module.from_pixels(x)

    def stored(self, moved: np.ndarray, strength: float) -> np.ndarray:
        """Rounded, to the last whole value within epsilon where rounding would leave the ball."""
        reach = np.floor(strength)
        own = self.x.astype(np.float64)
        levels = np.clip(np.rint(moved.astype(np.float64) * 255), own - reach, own + reach)
        return np.clip(levels, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class _Columns:
    """Rows `[N, D]` float32; the mask `[N, D]` is 1 for the numbers that may move."""

    x: np.ndarray
    mask: np.ndarray
    unit = 1.0
    clip = None
    batch_size = ROWS["table"]

    @classmethod
    def of(cls, x: np.ndarray, module: MixtureModule) -> "_Columns":
        mask = np.zeros(x.shape, np.float32)
        for feature in features_of(module.inputs, module.transform):
            if isinstance(feature, Number):
                mask[:, feature.column] = feature.known(x)
        if not mask.any():
            raise UsageError(
                "No row has a numeric column that an attack could move: categories are left alone."
            )
        return cls(x, mask)

    def start_of(self, x: np.ndarray) -> np.ndarray:
        return x

    def network_inputs(self, module: MixtureModule, x: Tensor) -> Tensor:
        return x

    def stored(self, moved: np.ndarray, strength: float) -> np.ndarray:
        return moved


class _LogOdds(nn.Module):
    """Σ over rows of log(1 − p(y)) − log p(y), from log probabilities `[B, K]` and one-hot labels."""

    def forward(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        is_own = labels > 0
        others = torch.logsumexp(log_probs.masked_fill(is_own, -torch.inf), dim=1)
        return (others - log_probs[is_own]).sum()


class _SquaredError(nn.Module):
    """Σ over rows, in units of the standardised target."""

    def forward(self, mean: Tensor, y: Tensor) -> Tensor:
        return (mean - y).square().sum()


class _Outputs(nn.Module):
    """What the loss takes: log probabilities, or the mean of numbers as networks are trained on it."""

    def __init__(self, module: MixtureModule, space: _Pixels | _Columns) -> None:
        super().__init__()
        self.mixture, self._space = module, space

    def forward(self, x: Tensor) -> Tensor:
        x = self._space.network_inputs(self.mixture, x)
        if self.mixture.is_class:
            return self.mixture.log_probs(x)
        return (self.mixture.mean(x) - self.mixture.target.loc) / self.mixture.target.scale


class _Attacker:
    """Both attacks on the same rows, through one estimator of the toolbox."""

    def __init__(
        self, module: MixtureModule, target: TargetSpec, space: _Pixels | _Columns, y: np.ndarray, seed: int
    ) -> None:
        self._space, self._seed, self._is_class = space, seed, module.is_class
        make_estimator, self._make_fgsm, self._make_pgd = _toolbox(module.is_class)
        settings: dict[str, Any] = {"loss": _SquaredError()}
        self._y = y.astype(np.float32)
        if module.is_class:
            settings = {"loss": _LogOdds(), "nb_classes": target.num_classes}
            self._y = np.eye(target.num_classes, dtype=np.float32)[y]
        self._estimator = make_estimator(
            model=_Outputs(module, space),
            input_shape=space.x.shape[1:],
            clip_values=space.clip,
            device_type="cpu" if module.device.type == "cpu" else "gpu",
            **settings,
        )

    def kinds(self) -> Mapping[str, Callable[[float], np.ndarray]]:
        """From a strength to moved rows, as the attack left them."""
        return {"fgsm": self._fgsm, "pgd": self._pgd}

    def mean_loss(self, x: np.ndarray) -> float:
        """Of rows as the estimator sees them: NLL of classes, squared error of numbers."""
        with _seeded(self._seed):
            found = self._estimator.predict(x, batch_size=self._space.batch_size)
        loss = -(found * self._y).sum(1) if self._is_class else np.square(found[:, 0] - self._y)
        return float(loss.mean())

    def _fgsm(self, strength: float) -> np.ndarray:
        eps = strength * self._space.unit
        return self._run(self._make_fgsm, eps=eps, eps_step=eps)

    def _pgd(self, strength: float) -> np.ndarray:
        eps = strength * self._space.unit
        step, starts = (
            PGD_REACH * eps / PGD_STEPS,
            int(self._is_class),
        )  # random starts exist for classes only
        return self._run(
            self._make_pgd, eps=eps, eps_step=step, max_iter=PGD_STEPS, num_random_init=starts, verbose=False
        )

    def _run(self, make: Callable[..., Any], **settings: Any) -> np.ndarray:
        attack = make(self._estimator, norm=np.inf, batch_size=self._space.batch_size, **settings)
        start, mask = self._space.start_of(self._space.x), self._space.mask
        with _seeded(self._seed):
            moved = attack.generate(x=start, y=self._y, mask=mask)
        return np.where(mask > 0, moved, start)  # FGSM on numbers forgets the mask


def _toolbox(is_class: bool) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The estimator and both attacks of the adversarial-robustness-toolbox."""
    try:
        from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
        from art.estimators.classification import PyTorchClassifier
        from art.estimators.regression import PyTorchRegressor
    except ImportError as error:
        raise UsageError(
            "Attacks need the adversarial-robustness-toolbox: install it with `pip install 'bdl_train[attacks]'`."
        ) from error
    return PyTorchClassifier if is_class else PyTorchRegressor, FastGradientMethod, ProjectedGradientDescent


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The toolbox draws from the global generators of numpy and torch: seeded here, and left as they were."""
    state = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        np.random.set_state(state)


def _curve(rows: RowScores, seed: int, **where: object) -> list[dict[str, object]]:
    columns = rows.columns
    statistics: dict[str, Statistic] = {}
    if rows.probs is not None:
        statistics["accuracy"] = mean_of(columns["correct"])
    else:
        squared = mean_of(np.square(columns["error"]))
        statistics["rmse"] = lambda counts: np.sqrt(squared(counts))
    parts = {"nll": columns["nll"], **_doubts(rows)}
    statistics |= {name: mean_of(values) for name, values in parts.items()}
    return [
        {**where, "metric": name, **found}
        for name, found in _with_intervals(statistics, len(rows), seed).items()
    ]


def _detection(clean: RowScores, attacked: RowScores, seed: int, **where: object) -> list[dict[str, object]]:
    """Rows are resampled together with their attacked selves."""
    after, is_attacked = _doubts(attacked), np.repeat([False, True], len(clean))

    def auroc(name: str, before: np.ndarray) -> Statistic:
        areas = ranking(np.concatenate([before, after[name]]), is_attacked)
        return lambda counts: areas(np.concatenate([counts, counts], axis=1))[:, 0]

    statistics = {name: auroc(name, before) for name, before in _doubts(clean).items()}
    found = _with_intervals(statistics, len(clean), seed)
    return [{**where, "score": name, "auroc": one.pop("value"), **one} for name, one in found.items()]


def _doubts(rows: RowScores) -> dict[str, np.ndarray]:
    end = "" if rows.probs is not None else "_std"
    return {name: rows.columns[name + end] for name in ("total", "epistemic")}


def _with_intervals(
    statistics: Mapping[str, Statistic], num_rows: int, seed: int
) -> dict[str, dict[str, float]]:
    edges, once = bootstrap_intervals(statistics, num_rows, seed=seed), np.ones((1, num_rows))
    return {
        name: {
            "value": float(statistic(once)[0]),
            "low": float(edges[name][0]),
            "high": float(edges[name][1]),
            "n": num_rows,
        }
        for name, statistic in statistics.items()
    }


def _verdict(
    curves: pd.DataFrame, detection: pd.DataFrame, inputs: InputSpec, strength: float
) -> tuple[str, Level]:
    """In words; `warn` if the strongest PGD leaves epistemic uncertainty no higher than before."""
    metric = curves["metric"].iloc[0]
    main = curves[curves["metric"] == metric].set_index(["kind", "severity"])["value"]
    auroc = detection[detection["score"] == "epistemic"].set_index(["kind", "severity"])
    rises = float(auroc["low"].loc["pgd", strength]) > 0.5
    unit = "pixel values of 255" if inputs.is_image else "training standard deviations"
    words = "rises" if rises else "does not rise for certain"
    return (
        f"At epsilon {strength:g} ({unit}) the {metric} goes from {main.loc['pgd', 0.0]:.3g} to "
        f"{main.loc['fgsm', strength]:.3g} under FGSM and {main.loc['pgd', strength]:.3g} under PGD. Epistemic "
        f"uncertainty {words} on rows attacked by PGD: it tells them from the same rows unattacked with an AUROC of "
        f"{auroc['auroc'].loc['pgd', strength]:.3f} (FGSM: {auroc['auroc'].loc['fgsm', strength]:.3f}), 0.5 being "
        "chance."
    ), "note" if rises else "warn"
