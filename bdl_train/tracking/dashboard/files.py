"""Small readings of a run directory. A damaged file is an empty answer here: the page says so and shows the rest."""

import json
from pathlib import Path
from typing import Any

from bdl_train.runs import RunDir, glance_at_config
from bdl_train.tracking.outcome import coverage, metrics_table, reliability

HEADLINES = ("test/nll", "test/accuracy", "test/rmse", "test/crps", "test/ece", "test/coverage_95")


def json_of(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def status_of(run: RunDir) -> str:
    """As `RunDir.status`; `damaged` where it cannot be told."""
    try:
        return run.status()
    except (ValueError, KeyError, TypeError):
        return "damaged"


def config_of(run: RunDir) -> str:
    """The config as text; secrets were masked when it was written."""
    try:
        return run.config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"config.yaml cannot be read: {error}"


def row_of(run: RunDir, root: Path) -> dict[str, Any]:
    """One run in the list."""
    config = glance_at_config(run)
    plan, manifest, metrics = json_of(run.plan), json_of(run.manifest), json_of(run.metrics)
    stacks = plan.get("stacks") if isinstance(plan.get("stacks"), list) else []
    members = manifest.get("members") if isinstance(manifest.get("members"), list) else []
    states = [one.get("status") for one in members or [] if isinstance(one, dict)]
    target = (
        config.get("inference", {}).get("_target_", "") if isinstance(config.get("inference"), dict) else ""
    )
    data = config.get("data") if isinstance(config.get("data"), dict) else {}
    total = sum(
        len(one["members"]) for one in stacks or [] if isinstance(one, dict) and _is_list(one.get("members"))
    )
    return {
        "id": run.path.resolve().relative_to(root).as_posix(),
        "experiment": run.path.parent.name,
        "name": run.path.name,
        "status": status_of(run),
        "method": str(target).split(".")[-2] if str(target).count(".") > 1 else "",
        "members": total,
        "done": sum(state == "done" for state in states) if states else None,
        "failed": sum(state == "failed" for state in states) if states else None,
        "split": data.get("split") if data else None,
        "seed": config.get("seed"),
        "metrics": {key: metrics[key] for key in HEADLINES if isinstance(metrics.get(key), int | float)},
    }


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def outcome_of(run: RunDir) -> dict[str, Any]:
    """Metrics with their meaning, and the numbers behind the calibration plots."""
    import numpy as np

    try:
        table = metrics_table(run)
        metrics = [] if table is None else [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    except Exception as error:  # pyarrow has many kinds for a damaged file
        return {"damaged": f"metrics_detail.parquet: {error}"}
    found: dict[str, Any] = {"metrics": metrics}
    path = run.evaluation("test") / "predictions.parquet"
    if not path.is_file():
        return found
    try:
        import pyarrow.parquet as parquet

        names = set(parquet.read_schema(path).names)
        if {"confidence", "correct"} <= names:
            columns = parquet.read_table(path, columns=["confidence", "correct"])
            confidence, correct = (
                columns[name].to_numpy().astype(float) for name in ("confidence", "correct")
            )
            known = ~np.isnan(confidence)
            found["reliability"] = reliability(confidence[known], correct[known])
        elif {"pit", "pit_below"} <= names:
            columns = parquet.read_table(path, columns=["pit", "pit_below"])
            pit, below = (columns[name].to_numpy().astype(float) for name in ("pit", "pit_below"))
            known = ~np.isnan(pit)
            levels = np.linspace(0.05, 0.95, 19)
            found["coverage"] = [
                [float(a), float(b)]
                for a, b in zip(levels, coverage(below[known], pit[known], levels), strict=True)
            ]
            found["pit"] = (np.histogram(pit[known], 15, (0, 1))[0] / max(1, known.sum()) * 15).tolist()
    except Exception as error:
        found["damaged"] = f"predictions.parquet: {error}"
    return found
