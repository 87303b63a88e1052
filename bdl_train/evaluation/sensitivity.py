"""How much each input moves the prediction and its uncertainty: gradients, and finite differences beside them.

Shape letters: N rows, B rows of a batch, D columns, L levels of a category.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bdl_train.data import Part
from bdl_train.data._table import TableTransform
from bdl_train.evaluation.bootstrap import bootstrap_intervals
from bdl_train.evaluation.features import Category, Number, features_of, sample_rows, take
from bdl_train.evaluation.functionals import mean_of
from bdl_train.evaluation.section import Section
from bdl_train.predictive.differentiable import MixtureModule
from bdl_train.specs import InputSpec, TargetSpec

KEY, TITLE = "sensitivity", "Sensitivity to the inputs"
AGREE = 0.05
"""Finite differences may be off by this share of the gradient; more is told as a warning."""
ROWS = {"table": 512, "image": 32}
"""Rows that are differentiated at a time."""


def sensitivity_section(
    module: MixtureModule,
    part: Part,
    *,
    inputs: InputSpec,
    transform: TableTransform | None,
    target: TargetSpec,
    seed: int,
    max_rows: int,
) -> Section:
    """Mean absolute derivatives of what is predicted, over rows.

    What is predicted is the predictive mean of numbers in the target's units, and the probability of the predicted
    class. `epistemic` is `MixtureModule.epistemic`: mutual information in nats, or the standard deviation of the
    members' means.

    Args:
        module: The mixture.
        part: Encoded rows.
        inputs, transform, target: As in the artefact.
        seed: Of the sample of rows and of the bootstrap.
        max_rows: Most rows.

    Returns:
        For tables, `features`, the largest effect first: feature, kind (`number` or `category`), gradient (per training
        standard deviation), gradient_raw (per unit of the feature), finite_difference (central, with a step of ε^(1/3)
        for an arithmetic of precision ε; for a category the mean absolute change when its level is switched to each
        other one), disagreement (mean absolute difference of the two), epistemic_gradient (for a category, change),
        effect (gradient of numbers, change of categories) with low and high, n (rows, without those where the number is
        missing), rank. What does not apply is NaN. For images, `pixels`: channel, row, column, gradient,
        epistemic_gradient, per whole range of a pixel.

    Raises:
        UsageError: no rows, or unclear features.

    Source:
        Baehrens et al. (2010), JMLR 11, "How to explain individual classification decisions", Section 2. Step of
        finite differences: Press et al., Numerical Recipes, Section 5.7.
    """
    sample = sample_rows(part, max_rows, seed)
    warnings = [] if len(sample) == len(part) else [f"{len(sample)} of {len(part)} rows, taken at random."]
    if inputs.is_image:
        return _pixel_section(module, sample, warnings)
    features, probe = features_of(inputs, transform), _Probe(module, sample.x)
    if not probe.finite.all():
        warnings.append(
            f"Left out, their prediction being not finite: {int((~probe.finite).sum())} of the rows."
        )
        probe = _Probe(module, sample_rows(take(sample, probe.finite), max_rows, seed).x)
    rows = [
        _number_row(probe, one, seed) if isinstance(one, Number) else _category_row(probe, one, seed)
        for one in features
    ]
    table = pd.DataFrame(rows).sort_values("effect", ascending=False, kind="stable", ignore_index=True)
    table["rank"] = table["effect"].rank(ascending=False, method="min").astype(int)
    warnings += _doubts(table, probe.step, target.scale)
    return Section(KEY, TITLE, _verdict(table, target), "note", {"features": table}, tuple(warnings))


class _Probe:
    """Rows at which the mixture is differentiated. What is predicted of a row is fixed where it is not moved."""

    def __init__(self, module: MixtureModule, x: np.ndarray) -> None:
        self.module = module
        self.x = torch.from_numpy(x).to(module.dtype)
        self.step = float(torch.finfo(module.dtype).eps ** (1 / 3))
        self.predicted = torch.zeros(len(x), dtype=torch.long)
        if module.is_class:
            self.predicted = _batched(lambda x: module.log_probs(x).argmax(1), self.x, ROWS["table"])
        self.gradient, self.epistemic_gradient = (
            _gradients(value, self.x, self.predicted, ROWS["table"]) for value in (self._one, self._doubt)
        )
        self.value, self.doubt = self.values(self.x), self.doubts(self.x)
        self.finite = np.isfinite(self.gradient + self.epistemic_gradient).all(1) & np.isfinite(self.value)

    def values(self, x: Tensor) -> np.ndarray:
        """What is predicted of moved rows, `[N]`."""
        return self._over_rows(self._one, x)

    def doubts(self, x: Tensor) -> np.ndarray:
        """The epistemic uncertainty of moved rows, `[N]`."""
        return self._over_rows(self._doubt, x)

    @torch.no_grad()
    def _over_rows(self, f: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> np.ndarray:
        parts = zip(x.split(ROWS["table"]), self.predicted.split(ROWS["table"]), strict=True)
        return torch.cat([f(part, label) for part, label in parts]).cpu().numpy()

    def difference(self, column: int) -> np.ndarray:
        """Central finite difference of what is predicted, `[N]`, per unit of a column."""
        above, below = self.x.clone(), self.x.clone()
        above[:, column] += self.step
        below[:, column] -= self.step
        moved = (above - below)[:, column].double().numpy()  # the step that rounding left
        return (self.values(above) - self.values(below)) / moved

    def _one(self, x: Tensor, predicted: Tensor) -> Tensor:
        return predicted_value(self.module, x, predicted)

    def _doubt(self, x: Tensor, _: Tensor) -> Tensor:
        return self.module.epistemic(x)


def predicted_value(module: MixtureModule, x: Tensor, predicted: Tensor) -> Tensor:
    """`[B]`: the probability of the classes `predicted`, or the mean of numbers in the target's units."""
    if not module.is_class:
        return module.mean(x)
    return module.log_probs(x).exp().gather(1, predicted.to(module.device)[:, None]).squeeze(1)


def _batched(f: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([f(part) for part in x.split(size)]).cpu()


def _gradients(
    value: Callable[[Tensor, Tensor], Tensor], x: Tensor, predicted: Tensor, size: int
) -> np.ndarray:
    """Derivatives of a value per row, `[N, D]`: rows do not mix, so the gradient of the sum holds them all."""
    found = []
    for part, label in zip(x.split(size), predicted.split(size), strict=True):
        leaf = part.clone().requires_grad_(True)
        found.append(torch.autograd.grad(value(leaf, label).sum(), leaf)[0])
    return torch.cat(found).double().numpy()


def _number_row(probe: _Probe, feature: Number, seed: int) -> dict[str, object]:
    known = feature.known(probe.x.numpy())
    gradient = probe.gradient[known, feature.column]
    difference = probe.difference(feature.column)[known]
    mean = _mean(np.abs(gradient))
    return {
        "feature": feature.name,
        "kind": "number",
        "gradient": mean,
        "gradient_raw": mean / feature.std if feature.std != 0 else 0.0,
        "finite_difference": _mean(np.abs(difference)),
        "disagreement": _mean(np.abs(difference - gradient)),
        "epistemic_gradient": _mean(np.abs(probe.epistemic_gradient[known, feature.column])),
        **_effect(np.abs(gradient), seed),
    }


def _category_row(probe: _Probe, feature: Category, seed: int) -> dict[str, object]:
    own_NL = probe.x[:, feature.columns]
    num_levels = own_NL.shape[1]
    change, doubt, switches = (np.zeros(len(own_NL)) for _ in range(3))
    for level in range(num_levels):
        is_other = own_NL[:, level].numpy() == 0
        moved = probe.x.clone()
        moved[:, feature.columns] = torch.eye(num_levels, dtype=moved.dtype)[level]
        change += is_other * np.abs(probe.values(moved) - probe.value)
        doubt += is_other * np.abs(probe.doubts(moved) - probe.doubt)
        switches += is_other
    change, doubt = (one[switches > 0] / switches[switches > 0] for one in (change, doubt))
    return {
        "feature": feature.name,
        "kind": "category",
        "gradient": np.nan,
        "gradient_raw": np.nan,
        "finite_difference": _mean(change),
        "disagreement": np.nan,
        "epistemic_gradient": _mean(doubt),
        **_effect(change, seed),
    }


def _mean(values: np.ndarray) -> float:
    """0 without rows: what is never moved moves nothing."""
    return float(values.mean()) if len(values) else 0.0


def _effect(values: np.ndarray, seed: int) -> dict[str, object]:
    low = high = np.nan
    if len(values):
        low, high = bootstrap_intervals({"effect": mean_of(values)}, len(values), seed=seed)["effect"]
    return {"effect": _mean(values), "low": low, "high": high, "n": len(values)}


def _doubts(table: pd.DataFrame, step: float, scale: float) -> list[str]:
    """What to know beside the numbers: features that cannot move, and gradients that differ from differences."""
    names, gradient, off = (table[name].to_numpy() for name in ("feature", "gradient", "disagreement"))
    still = names[table["n"].to_numpy() == 0]
    warnings = (
        [f"Never moved, being constant or missing in all rows: {', '.join(still)}."] if len(still) else []
    )
    # Rounding of the values is ε, over a step of ε^(1/3); in units of the scale on which networks work.
    excess = off - AGREE * gradient - 10 * step**2 * scale
    apart = np.flatnonzero(excess > 0)
    if len(apart):
        worst = apart[excess[apart].argmax()]
        warnings.append(
            f"Gradients and finite differences disagree by more than {AGREE:.0%} for {', '.join(names[apart])}, most "
            f"for '{names[worst]}': by {off[worst]:.3g} on a gradient of {gradient[worst]:.3g}. Kinks of ReLU networks "
            "and very steep functions explain this; a smooth network should not show it."
        )
    return warnings


def _verdict(table: pd.DataFrame, target: TargetSpec) -> str:
    what = "The probability of the predicted class" if target.num_classes else f"The mean of '{target.name}'"
    names, effects, doubts = (table[name].to_numpy() for name in ("feature", "effect", "epistemic_gradient"))
    top = [f"{name} ({effect:.3g})" for name, effect in zip(names[:3], effects[:3], strict=True)]
    listed = top[0] if len(top) == 1 else f"{', '.join(top[:-1])} and {top[-1]}"
    how = "per training standard deviation of a number"
    if "category" in set(table["kind"]):
        how += ", or per switch of a category"
    return (
        f"{what} moves most with {listed} {how}; the epistemic uncertainty moves most with "
        f"{names[doubts.argmax()]} ({doubts.max():.3g})."
    )


def _pixel_section(module: MixtureModule, sample: Part, warnings: list[str]) -> Section:
    size, pixels = ROWS["image"], torch.from_numpy(sample.x).to(module.dtype) / 255
    predicted = torch.zeros(len(sample), dtype=torch.long)
    if module.is_class:
        predicted = _batched(lambda x: module.log_probs(module.from_pixels(x)).argmax(1), pixels, size)
    gradient, doubt = (
        np.abs(_gradients(value, pixels, predicted, size)).mean(0)
        for value in (
            lambda x, label: predicted_value(module, module.from_pixels(x), label),
            lambda x, _: module.epistemic(module.from_pixels(x)),
        )
    )
    axes = dict(
        zip(("channel", "row", "column"), (axis.ravel() for axis in np.indices(gradient.shape)), strict=True)
    )
    table = pd.DataFrame({**axes, "gradient": gradient.ravel(), "epistemic_gradient": doubt.ravel()})
    channel, row, column = np.unravel_index(gradient.argmax(), gradient.shape)
    verdict = (
        f"The prediction moves most with the pixel in row {row}, column {column} of channel {channel}: "
        f"{gradient.max():.3g} per whole range of its value, {gradient.mean():.3g} on average over pixels."
    )
    return Section(KEY, TITLE, verdict, "note", {"pixels": table}, tuple(warnings))
