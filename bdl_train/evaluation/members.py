"""Each member alone: how good it is by itself, what the ensemble gains over it, and how far members disagree.

Shape letters: M members, B rows of a tile, N rows, K classes, G bins.
"""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bdl_train.evaluation.functionals import equal_width_bins, mean_of
from bdl_train.evaluation.metrics import NUM_BINS, Label, Measure
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section
from bdl_train.predictive.predict import TilePrediction
from bdl_train.predictive.stats import ClassStats, NumberStats, PredictiveStats
from bdl_train.specs import TargetSpec

MOST_NLL = 50_000_000
"""Members times rows up to which every single NLL is kept, for the interval of the best member."""


@dataclass(frozen=True)
class MemberScores:
    """Sums over rows for every member; `merge` joins disjoint rows.

    Attributes:
        ids: Ensemble indices, ascending.
        num_rows: N.
        sums: By loss (nll, and accuracy and brier, or mse and crps) the sum over rows `[M]`.
        mean_rows: By loss the mean over members of every row `[N]`.
        nll: `[M, N]` float32; empty `[M, 0]` where that would be too large.
        gaps: For classes `[M, G]`, sum of correct − confidence in each bin of confidence.
        distances: `[M, M]`: rows with different predicted classes, or the sum of squared differences of the means.
    """

    ids: list[int]
    num_rows: int
    sums: dict[str, np.ndarray]
    mean_rows: dict[str, np.ndarray]
    nll: np.ndarray
    gaps: np.ndarray
    distances: np.ndarray

    def merge(self, other: Self) -> Self:
        return type(self)(
            self.ids,
            self.num_rows + other.num_rows,
            {name: self.sums[name] + other.sums[name] for name in self.sums},
            {name: np.concatenate([self.mean_rows[name], other.mean_rows[name]]) for name in self.mean_rows},
            np.concatenate([self.nll, other.nll], axis=1),
            self.gaps + other.gaps,
            self.distances + other.distances,
        )

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """All of them at once: joining one by one would copy the rows again and again."""
        sums = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
        rows = {name: np.concatenate([part.mean_rows[name] for part in parts]) for name in parts[0].mean_rows}
        return cls(
            parts[0].ids,
            sum(part.num_rows for part in parts),
            sums,  # pyright: ignore[reportArgumentType]
            rows,
            np.concatenate([part.nll for part in parts], axis=1),
            np.sum([part.gaps for part in parts], axis=0),
            np.sum([part.distances for part in parts], axis=0),
        )

    @property
    def means(self) -> dict[str, np.ndarray]:
        """By metric, the value of each member `[M]`: nll, accuracy, brier, ece, or nll, rmse, crps."""
        found = {name: values / self.num_rows for name, values in self.sums.items()}
        if self.gaps.size:
            found["ece"] = np.abs(self.gaps).sum(1) / self.num_rows
        if "mse" in found:
            found["rmse"] = np.sqrt(found.pop("mse"))
        return found

    @property
    def best(self) -> int:
        """Position of the member with the least NLL; NaN is never the least, unless all are."""
        return int(np.argmin(np.nan_to_num(self.sums["nll"], nan=np.inf)))


def score_members(tile: TilePrediction, y: np.ndarray, target: TargetSpec, *, keep_nll: bool) -> MemberScores:
    """Score every member on one tile of rows.

    Args:
        tile: Made with `per_component=True` and these targets.
        y: `[B]` encoded targets.
        target: Brings scores to its units.
        keep_nll: Whether to keep every single NLL.
    """
    assert tile.per_component is not None
    ids, log_prob_MB = member_scores(tile.per_component, tile.members)
    nll_MB = -log_prob_MB.cpu().numpy() + math.log(target.scale)
    losses, gaps, distances = _losses(tile.stats, tile, y, target, ids)
    losses = {"nll": nll_MB, **losses}
    return MemberScores(
        ids,
        len(y),
        {name: values.sum(1) for name, values in losses.items()},
        {name: values.mean(0) for name, values in losses.items()},
        nll_MB.astype(np.float32) if keep_nll else np.empty((len(ids), 0), np.float32),
        gaps,
        distances,
    )


def member_scores(log_prob: Tensor, members: Tensor) -> tuple[list[int], Tensor]:
    """Each member's own log predictive density, from its components.

    Args:
        log_prob: `[C, B]` of every component.
        members: `[C]`, whose component it is.

    Returns:
        Member indices and `[M, B]` float64: log of the mean over the member's components.
    """
    ids = sorted(set(members.tolist()))
    own = [log_prob[(members == m).to(log_prob.device)].double() for m in ids]
    return ids, torch.stack([torch.logsumexp(one, dim=0) - math.log(len(one)) for one in own])


@singledispatch
def _losses(
    stats: PredictiveStats, tile: TilePrediction, y: np.ndarray, target: TargetSpec, ids: list[int]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Losses `[M, B]` beside the NLL, gaps and distances."""
    raise TypeError(f"No scores are known for {type(stats).__name__}.")


@_losses.register
def _(
    stats: ClassStats, tile: TilePrediction, y: np.ndarray, target: TargetSpec, ids: list[int]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    assert tile.member_probs is not None
    probs_MBK = tile.member_probs.cpu().numpy()
    prediction_MB, confidence_MB = probs_MBK.argmax(2), probs_MBK.max(2)
    correct_MB = np.where(np.isnan(confidence_MB), np.nan, prediction_MB == y)
    true_MB = np.take_along_axis(probs_MBK, y[None, :, None].astype(int), 2)[:, :, 0]
    # Σ_k (p_k − 1{k = y})² without the one-hot array
    brier_MB = np.square(probs_MBK).sum(2) - 2 * true_MB + 1
    bins = equal_width_bins(confidence_MB, NUM_BINS)
    gap_MB = correct_MB - confidence_MB
    gaps = np.stack(
        [np.bincount(own, weights=gap, minlength=NUM_BINS) for own, gap in zip(bins, gap_MB, strict=True)]
    )
    agree = np.zeros((len(ids), len(ids)))
    for k in range(probs_MBK.shape[2]):
        says_MB = (prediction_MB == k).astype(np.float32)
        agree += says_MB @ says_MB.T
    return {"accuracy": correct_MB, "brier": brier_MB}, gaps, len(y) - agree


@_losses.register
def _(
    stats: NumberStats, tile: TilePrediction, y: np.ndarray, target: TargetSpec, ids: list[int]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    assert tile.mixture is not None
    means, crps = [], []
    y_B = torch.from_numpy(y).to(stats.mean.device)
    for member in ids:
        index = torch.nonzero(tile.members == member)[:, 0].to(stats.mean.device)
        own = tile.mixture.part(index)
        means.append((own.weights @ own.components.mean.double()).cpu().numpy())
        crps.append(own.crps(y_B).cpu().numpy())
    mean_MB = np.stack(means) * target.scale
    centred = mean_MB - mean_MB.mean(0)
    product = centred @ centred.T
    own = np.diag(product)
    distances = np.maximum(own[:, None] + own[None, :] - 2 * product, 0)
    error_MB = mean_MB - y.astype(np.float64) * target.scale
    losses = {"mse": np.square(error_MB), "crps": np.stack(crps) * target.scale}
    return losses, np.empty((len(ids), 0)), distances


def member_measures(scores: MemberScores, rows: RowScores, unit: str) -> list[Measure]:
    """What a single member would have reached on the same rows, and what the ensemble gains over it.

    Args:
        scores: Of the members, over the rows in the same order.
        rows: Of the ensemble.
        unit: Of a numeric target.
    """
    best = scores.best
    which = f"of the best single member by NLL, number {scores.ids[best]}"
    found = []
    if scores.nll.shape[1] == scores.num_rows:
        found.append(Measure((Label("best_member_nll", "nats", which, "lower"),), mean_of(scores.nll[best])))
    else:
        value = scores.means["nll"][best]
        found.append(
            Measure(
                (Label("best_member_nll", "nats", which, "lower"),),
                lambda counts: np.where((counts == 1).all(1), value, np.nan),
            )
        )
    names = {
        "nll": ("nll", "nats"),
        "accuracy": ("accuracy", "share"),
        "brier": ("brier", "0..2"),
        "crps": ("crps", unit),
    }
    for name, (key, key_unit) in names.items():
        if name in scores.mean_rows:
            better = "higher" if name == "accuracy" else "lower"
            label = Label(f"mean_member_{key}", key_unit, "of a single member, on average", better)
            found.append(Measure((label,), mean_of(scores.mean_rows[name])))
    if "mse" in scores.mean_rows:
        squared = mean_of(scores.mean_rows["mse"])
        label = Label(
            "mean_member_rmse", unit, "of a single member, root of the mean square over members", "lower"
        )
        found.append(Measure((label,), lambda counts: np.sqrt(squared(counts))))
    gain = Label(
        "gain_nll", "nats", "how much less surprise than a single member, on average; at least 0", "higher"
    )
    found.append(Measure((gain,), mean_of(scores.mean_rows["nll"] - rows.columns["nll"])))
    return found  # fmt: skip


def members_section(scores: MemberScores, values: dict[str, float | None], unit: str) -> Section:
    """The chapter `members`: tables `members` (one row a member and metric), `compared` (ensemble against members) and
    `diversity` (pairs of members).

    Args:
        scores: Of the members.
        values: Metrics of the ensemble by key.
        unit: Of a numeric target.
    """
    means = scores.means
    members = pd.DataFrame({"member": scores.ids, **means})
    rows = []
    for key, each in means.items():
        higher = key == "accuracy"
        order = np.sort(each)
        rows.append(
            {
                "metric": key,
                "ensemble": values.get(key),
                "mean_member": float(np.mean(each)),
                "best_member_by_nll": float(each[scores.best]),
                "best_member_each": float(order[-1] if higher else order[0]),
                "worst_member": float(order[0] if higher else order[-1]),
                "better": "higher" if higher else "lower",
            }
        )
    count = len(scores.ids)
    per_row = scores.distances / scores.num_rows
    distance = per_row if "accuracy" in means else np.sqrt(per_row)
    i, j = np.meshgrid(np.arange(count), np.arange(count), indexing="ij")
    diversity = pd.DataFrame(
        {
            "one": np.array(scores.ids)[i.ravel()],
            "other": np.array(scores.ids)[j.ravel()],
            "distance": distance.ravel(),
        }
    )
    tables = {"members": members, "compared": pd.DataFrame(rows), "diversity": diversity}
    if count == 1:
        return Section(
            "members", "Members", "One member: there is no ensemble to compare it with.", "note", tables
        )
    typical = float(distance[~np.eye(count, dtype=bool)].mean())
    differ = (
        f"two members predict different classes on {100 * typical:.1f} % of the rows"
        if "accuracy" in means
        else f"the means of two members lie {typical:.3g} {unit} apart (root mean square)"
    )
    own, best, mean = values.get("nll"), float(np.min(means["nll"])), float(np.mean(means["nll"]))
    if own is None or not math.isfinite(own) or not math.isfinite(mean):
        return Section(
            "members",
            "Members",
            "The NLL is not finite: a member predicts impossible values.",
            "warn",
            tables,
        )
    better = int((means["nll"] > own).sum())
    verdict = (
        f"The ensemble's NLL of {own:.4g} beats {better} of {count} single members (mean {mean:.4g}, best {best:.4g}); "
        f"{differ}."
    )
    return Section("members", "Members", verdict, "good" if better >= count / 2 else "note", tables)
