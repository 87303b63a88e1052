"""Model inversion: inputs made up to suit a class, and whether they come out nearer to training rows than to others.

Shape letters: B reconstructions, N rows, K classes, R relabelled splits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import LEVEL

MOST_ROWS = 2000
"""Training rows of a class, and held-out rows, that reconstructions are compared with."""
LEAST_ROWS = 5
SPLITS = 999
MOST_KEPT = 16
"""Reconstructions that go into the table of values."""
ALL = "all"


@dataclass(frozen=True)
class Inversion:
    """What the probe found.

    Attributes:
        table: One row a class and one for `all`, and one for `all` within each slice. slice, its name or "all"; target;
            n, training rows and as many held-out rows compared with; starts, reconstructions; log_prob, mean log
            p(class) that they reached; nearest_train, nearest_other, mean distances; ratio of the two (geometric mean;
            below 1 = nearer to training rows), low, high; p_value.
        reconstructions: Values of some: target, start, position in the flattened input, value.
        warnings: What was left out.
    """

    table: pd.DataFrame
    reconstructions: pd.DataFrame
    warnings: tuple[str, ...] = ()


def inversion_probe(
    log_prob: Callable[[Tensor], Tensor],
    start: Tensor,
    targets: Tensor,
    *,
    steps: int,
    lr: float,
    l2: float,
    tv: float,
    train_x: Tensor,
    train_y: Tensor,
    other_x: Tensor,
    other_y: Tensor,
    seed: int,
    names: Sequence[str] = (),
    slices: Sequence[tuple[str, np.ndarray, np.ndarray]] = (),
) -> Inversion:
    """Reconstruct inputs of each class, and measure how near they are to training rows and to held-out rows of it.

    Nearest distances are compared between equally many rows of both kinds, for the same reconstruction. The interval
    and the one-sided p-value come from exchanging training and held-out rows of a class at random: without a leak they
    are exchangeable, however alike the reconstructions are (which a test that takes them for independent forgets).

    Args:
        log_prob: From inputs `[B, ...]` as the network sees them to log p(class) `[B, K]`, differentiable.
        start: `[B, ...]`, where the ascents begin.
        targets: `[B]` int64, the class of each.
        steps, lr, l2, tv: Of `reconstruct`.
        train_x, train_y: `[N, ...]` and `[N]`, the training rows, inputs as the network sees them.
        other_x, other_y: The same of rows that were not trained on, drawn as the training rows were.
        seed: Of subsets and exchanges.
        names: Of the classes; their numbers if empty.
        slices: Subgroups: a name, and which training and which held-out rows are in it, truth values `[N]` each. The
            same reconstructions are compared with these rows alone.

    Raises:
        UsageError: shapes that do not fit, no class with enough rows of both kinds, or an ascent that diverged.

    Source:
        Fredrikson et al. (2015), CCS, Algorithm 1, with a penalty in place of its denoising; exchange of labels:
        Good (2005), Permutation, Parametric and Bootstrap Tests of Hypotheses, Section 3.2.
    """
    if start.shape[1:] != train_x.shape[1:] or start.shape[1:] != other_x.shape[1:]:
        raise UsageError(
            f"start, train_x and other_x must hold inputs of one shape, got {list(start.shape[1:])}, "
            f"{list(train_x.shape[1:])} and {list(other_x.shape[1:])}."
        )
    found, reached = reconstruct(log_prob, start, targets, steps=steps, lr=lr, l2=l2, tv=tv)
    random = np.random.default_rng(seed)
    probe = _Probe(found, reached, targets, names)
    rows, warnings = probe.compared(train_x, train_y, other_x, other_y, random)
    if not rows:
        raise UsageError(f"No class can be probed: {'; '.join(warnings)}.")
    table = [{"slice": ALL} | row for row in rows]
    for name, seen, held in slices:
        of_train, of_other = (torch.from_numpy(mask).to(train_x.device) for mask in (seen, held))
        own, _ = probe.compared(
            train_x[of_train], train_y[of_train], other_x[of_other], other_y[of_other], random
        )
        if own:
            table.append({"slice": name} | own[-1])
        else:
            warnings.append(
                f"slice {name}: no class has {LEAST_ROWS} training and {LEAST_ROWS} held-out rows"
            )
    return Inversion(pd.DataFrame(table), _values(found, targets, names), tuple(warnings))


@dataclass(frozen=True)
class _Probe:
    """Reconstructions `[B, ...]`, the log p(target) they reached, and their targets `[B]`."""

    found: Tensor
    reached: Tensor
    targets: Tensor
    names: Sequence[str]

    def compared(
        self, train_x: Tensor, train_y: Tensor, other_x: Tensor, other_y: Tensor, random: np.random.Generator
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """A row a class that has rows enough of both kinds, and last one for all of them; and what was left out."""
        rows, warnings = [], []
        shift, null = 0.0, np.zeros(SPLITS)
        for target in self.targets.unique().tolist():
            name = str(self.names[target]) if self.names else str(target)
            own = self.targets == target
            train, other = train_x[train_y == target], other_x[other_y == target]
            n = min(len(train), len(other), MOST_ROWS)
            if n < LEAST_ROWS:
                warnings.append(
                    f"class {name}: {len(train)} training and {len(other)} held-out rows, it takes {LEAST_ROWS} of each"
                )
                continue
            some = [
                part[torch.from_numpy(random.choice(len(part), n, replace=False))] for part in (train, other)
            ]
            distance = _distances(self.found[own], torch.cat(some))
            near_train, near_other = distance[:, :n].min(1), distance[:, n:].min(1)
            log_ratio = np.log(near_train / near_other)
            by_chance = _exchanged(distance, n, random)
            shift, null = shift + log_ratio.sum(), null + by_chance
            summary = _summary(log_ratio.mean(), by_chance / len(log_ratio))
            rows.append(_row(name, n, self.reached[own], near_train, near_other) | summary)
        if not rows:
            return [], warnings
        starts = [row["starts"] for row in rows]
        count = sum(starts)
        total: dict[str, Any] = {"target": ALL, "n": sum(row["n"] for row in rows), "starts": count}
        for column in ("log_prob", "nearest_train", "nearest_other"):
            total[column] = float(np.average([row[column] for row in rows], weights=starts))
        return [*rows, total | _summary(shift / count, null / count)], warnings


def reconstruct(
    log_prob: Callable[[Tensor], Tensor],
    start: Tensor,
    targets: Tensor,
    *,
    steps: int,
    lr: float,
    l2: float,
    tv: float,
) -> tuple[Tensor, Tensor]:
    """Ascend log p(target | x) − l2 ‖x‖² − tv · TV(x) from each start, by Adam with a rate that falls to 0 linearly.

    Args:
        log_prob: From `[B, ...]` to `[B, K]`, rows independent of each other.
        start: `[B, ...]`.
        targets: `[B]` int64.
        steps: Of the ascent.
        lr: First learning rate, in units of the inputs.
        l2: Weight of the squared norm.
        tv: Weight of the total variation, the sum of absolute differences of neighbouring pixels; 0 for tables.

    Returns:
        Inputs `[B, ...]`, and log p(target) that they reach `[B]`.

    Raises:
        UsageError: `tv` above 0 for inputs that are no images, or values that are not finite.
    """
    if tv > 0 and start.ndim != 4:
        raise UsageError(
            f"Total variation is of images [rows, channels, height, width], the inputs are {list(start.shape)}: "
            "set its weight to 0."
        )
    x = start.detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=lr, maximize=True)
    place = torch.arange(len(x), device=x.device)
    for step in range(steps):
        value = log_prob(x)[place, targets].sum() - l2 * x.square().sum()
        if tv > 0:
            value = value - tv * (x.diff(dim=-1).abs().sum() + x.diff(dim=-2).abs().sum())
        (x.grad,) = torch.autograd.grad(value, x)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
    found = x.detach()
    if not bool(torch.isfinite(found).all()):
        raise UsageError("The ascent of the inversion probe gave values that are not finite: lower its lr.")
    with torch.no_grad():
        return found, log_prob(found)[place, targets]


def _distances(found: Tensor, rows: Tensor) -> np.ndarray:
    """Euclidean distances `[B, N]`."""
    one, other = (part.detach().flatten(1).double().cpu() for part in (found, rows))
    # By differences: the expanded square loses the digits of small distances.
    distance = torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return np.maximum(distance, np.finfo(np.float64).tiny)


def _exchanged(distance: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """Sums over reconstructions of log(nearest of one half / nearest of the other) for random halves, `[R]`."""
    drawn = np.empty(SPLITS)
    for r in range(SPLITS):
        order = random.permutation(2 * n)
        one, other = distance[:, order[:n]].min(1), distance[:, order[n:]].min(1)
        drawn[r] = np.log(one / other).sum()
    return drawn


def _summary(mean: float, null: np.ndarray) -> dict[str, float]:
    """Ratio, interval and p-value: a leak is taken to shift the log ratio, whose spread is that of exchanged rows."""
    low, high = np.quantile(null, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "ratio": float(np.exp(mean)),
        "low": float(np.exp(mean - high)),
        "high": float(np.exp(mean - low)),
        "p_value": float((1 + (null <= mean).sum()) / (1 + SPLITS)),
    }


def _row(name: str, n: int, reached: Tensor, train: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    return {
        "target": name,
        "n": n,
        "starts": len(reached),
        "log_prob": float(reached.mean()),
        "nearest_train": float(train.mean()),
        "nearest_other": float(other.mean()),
    }


def _values(found: Tensor, targets: Tensor, names: Sequence[str]) -> pd.DataFrame:
    """The first reconstructions of every class in turn, until enough are kept."""
    place = np.zeros(len(targets), int)
    for target in targets.unique():
        own = (targets == target).cpu().numpy()
        place[own] = np.arange(own.sum())
    kept = np.argsort(place, kind="stable")[:MOST_KEPT]
    flat = found.flatten(1).double().cpu().numpy()[kept]
    labels = [int(target) for target in targets[torch.from_numpy(kept)]]
    return pd.DataFrame(
        {
            "target": np.repeat([names[k] if names else str(k) for k in labels], flat.shape[1]),
            "start": np.repeat(place[kept], flat.shape[1]),
            "position": np.tile(np.arange(flat.shape[1]), len(flat)),
            "value": flat.ravel(),
        }
    )
