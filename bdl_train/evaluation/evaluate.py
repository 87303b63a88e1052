"""Score a posterior predictive on one part of a data set, and write the evaluation.

Shape letters: C components, B rows of a tile, N rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import Statistic, bootstrap_intervals, mean_of, statistics_of
from bdl_train.evaluation.metrics import Metric, metrics_of
from bdl_train.evaluation.rows import RowScores, score_rows
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir, sha256, write_bytes, write_json
from bdl_train.specs import TargetSpec


@dataclass(frozen=True)
class Evaluation:
    """Scores of one part: metrics with meanings, and every row."""

    metrics: list[Metric]
    rows: RowScores
    row_ids: np.ndarray
    target: TargetSpec


def evaluate(predictor: Predictor, part: Part, target: TargetSpec) -> Evaluation:
    """Score the mixture, and every member alone for comparison.

    Args:
        predictor: Of the run.
        part: Encoded rows with targets.
        target: Brings scores to the target's units.
    """
    if len(part) == 0:
        raise UsageError(
            "This part of the data has no rows to score: choose another `part`, or data.val_fraction above 0."
        )
    x, y = torch.from_numpy(part.x), torch.from_numpy(part.y)
    scored, member_log_prob, members = [], [], []
    for tile in predictor(x, y, per_component=True):
        scored.append(score_rows(tile, part.y[tile.rows], target))
        assert tile.per_component is not None
        members, log_prob = member_scores(tile.per_component, tile.members)
        member_log_prob.append(log_prob)
    rows = RowScores.concatenate(scored)
    jacobian = math.log(target.scale)
    nll_MN = -torch.cat(member_log_prob, dim=1).cpu().numpy() + jacobian
    nll_M = nll_MN.mean(1)
    metrics = [
        *metrics_of(rows, target.name),
        Metric(
            "best_member_nll",
            float(nll_M.min()),
            "nats",
            f"of the best single member, number {members[int(nll_M.argmin())]}",
            "lower",
        ),
        Metric("mean_member_nll", float(nll_M.mean()), "nats", "of a single member, on average", "lower"),
    ]
    statistics = {
        **statistics_of(rows),
        "best_member_nll": mean_of(nll_MN[nll_M.argmin()]),
        "mean_member_nll": mean_of(nll_MN.mean(0)),
    }
    return Evaluation(_with_intervals(metrics, statistics, len(rows)), rows, part.rows, target)


def _with_intervals(
    metrics: Sequence[Metric], statistics: Mapping[str, Statistic], num_rows: int
) -> list[Metric]:
    intervals = bootstrap_intervals(statistics, num_rows)
    edges = {
        key: tuple(edge if math.isfinite(edge) else None for edge in pair) for key, pair in intervals.items()
    }
    return [replace(one, low=edges[one.key][0], high=edges[one.key][1]) for one in metrics]


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


def write_evaluation(run: RunDir, name: str, evaluation: Evaluation, split: str) -> dict[str, float | None]:
    """Write `evaluation/<name>/`; returns the flat metrics, keyed `split/metric`."""
    folder = run.evaluation(name)
    flat = {f"{split}/{metric.key}": metric.value for metric in evaluation.metrics}
    write_json(folder / "metrics.json", flat)
    count = len(evaluation.rows)
    detail = pd.DataFrame(
        [
            {
                "key": f"{split}/{metric.key}",
                "slice": "all",
                "value": metric.value,
                "low": metric.low,
                "high": metric.high,
                "n": count,
                "unit": metric.unit,
                "meaning": metric.meaning,
                "better": metric.better,
                "reason": None if metric.value is not None and math.isfinite(metric.value) else "not finite",
            }
            for metric in evaluation.metrics
        ]
    )
    _write_parquet(folder / "metrics_detail.parquet", detail)
    columns = {"row": evaluation.row_ids, **evaluation.rows.columns}
    if evaluation.rows.probs is not None:
        names = evaluation.target.classes
        columns |= {f"p_{name}": evaluation.rows.probs[:, k] for k, name in enumerate(names)}
    _write_parquet(folder / "predictions.parquet", pd.DataFrame(columns))
    files = ("metrics.json", "metrics_detail.parquet", "predictions.parquet")
    write_json(folder / "hashes.json", {file: sha256(folder / file) for file in files})
    return flat


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    write_bytes(path, table.to_parquet(index=False))
