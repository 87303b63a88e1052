"""Score a posterior predictive on one part of a data set, and write the evaluation.

Shape letters: C components, B rows of a tile, N rows.
"""

import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from bdl_train.data import Part
from bdl_train.errors import UsageError
from bdl_train.evaluation.bootstrap import metrics_with_intervals
from bdl_train.evaluation.members import MOST_NLL, MemberScores, member_measures
from bdl_train.evaluation.metrics import Metric
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section, write_section
from bdl_train.evaluation.shards import score_part
from bdl_train.files import sha256, write_bytes, write_json
from bdl_train.predictive.predict import Predictor
from bdl_train.runs import RunDir
from bdl_train.specs import TargetSpec

SECTIONS, ASKED = "sections", "asked.json"


@dataclass(frozen=True)
class Evaluation:
    """Scores of one part: metrics with meanings, every row, and every member."""

    metrics: list[Metric]
    rows: RowScores
    members: MemberScores
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
    keep_nll = len(part) * predictor.posterior.num_members <= MOST_NLL
    rows, members = score_part(predictor, part, target, keep_nll=keep_nll)
    return assemble(rows, members, part.rows, target)


def assemble(rows: RowScores, members: MemberScores, row_ids: np.ndarray, target: TargetSpec) -> Evaluation:
    """The evaluation of scored rows."""
    extra = member_measures(members, rows, target.name)
    metrics = metrics_with_intervals(rows, target.name, target.classes, extra=extra)
    return Evaluation(metrics, rows, members, row_ids, target)


def write_evaluation(
    run: RunDir,
    name: str,
    evaluation: Evaluation,
    split: str,
    chapters: Iterable[Section] = (),
    asked: Sequence[str] = (),
    diagnostics: Sequence[Metric] = (),
) -> dict[str, float | None]:
    """Write `evaluation/<name>/`; returns the flat metrics, keyed `split/metric` and `diagnostics/metric`.

    Args:
        run: The run.
        name: Of the evaluation.
        evaluation: Metrics and rows.
        split: What the rows are.
        chapters: Written one by one into `sections/` as they come; those of an earlier evaluation go.
        asked: The words of `bdl evaluate`, kept in `asked.json` for the report.
        diagnostics: Of the posterior, beside the metrics of the split.
    """
    folder = run.evaluation(name)
    shutil.rmtree(folder / SECTIONS, ignore_errors=True)
    (folder / "report.html").unlink(missing_ok=True)
    # Whoever reads between now and the end finds no hashes, or files that do not match those that there were.
    (folder / "hashes.json").unlink(missing_ok=True)
    keyed = [
        *((f"{split}/{metric.key}", metric) for metric in evaluation.metrics),
        *((f"diagnostics/{metric.key}", metric) for metric in diagnostics),
    ]
    flat = {key: metric.value for key, metric in keyed}
    files = ["metrics.json", "metrics_detail.parquet", "predictions.parquet"]
    write_json(folder / files[0], flat)
    (folder / ASKED).unlink(missing_ok=True)
    if asked:
        write_json(folder / ASKED, {"words": list(asked)})
        files.append(ASKED)
    columns = {"row": evaluation.row_ids, **evaluation.rows.columns}
    if evaluation.rows.probs is not None:
        names = evaluation.target.classes
        columns |= {f"p_{name}": evaluation.rows.probs[:, k] for k, name in enumerate(names)}
    _write_parquet(folder / files[2], pd.DataFrame(columns))
    details = _details(keyed, len(evaluation.rows))
    _write_parquet(folder / files[1], details)
    sliced = []
    for section in chapters:
        files += [f"{SECTIONS}/{file}" for file in write_section(folder / SECTIONS, section)]
        if section.key == "slices" and "metrics" in section.tables:
            sliced.append(section.tables["metrics"].query("slice != 'all'"))
    detail = [details, *(_slice_details(one, split) for one in sliced)]
    _write_parquet(folder / files[1], pd.concat(detail, ignore_index=True))
    write_json(folder / "hashes.json", {file: sha256(folder / file) for file in files})
    return flat


def _details(keyed: Sequence[tuple[str, Metric]], num_rows: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "key": key,
                "slice": "all",
                "value": metric.value,
                "low": metric.low,
                "high": metric.high,
                "n": num_rows,
                "unit": metric.unit,
                "meaning": metric.meaning,
                "better": metric.better,
                "reason": _reason(metric),
            }
            for key, metric in keyed
        ]
    )


def _slice_details(metrics: pd.DataFrame, split: str) -> pd.DataFrame:
    kept = metrics[["key", "slice", "value", "low", "high", "n", "unit", "better", "reason"]]
    return kept.assign(key=split + "/" + kept["key"], meaning=None)


def _reason(metric: Metric) -> str | None:
    if metric.value is not None and math.isfinite(metric.value):
        return None
    return metric.reason or "not finite"


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    write_bytes(path, table.to_parquet(index=False))
