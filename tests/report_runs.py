"""Run directories with an evaluation, made of a few numbers without any training."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import norm

from bdl_train.config import compose
from bdl_train.evaluation.calibration import calibration_section
from bdl_train.evaluation.deferral import deferral_section
from bdl_train.evaluation.metrics import metrics_of
from bdl_train.evaluation.rows import RowScores
from bdl_train.evaluation.section import Section, write_section
from bdl_train.evaluation.uncertainty import bands_section, examples_section, uncertainty_section
from bdl_train.events import EventWriter
from bdl_train.files import write_bytes, write_json
from bdl_train.runs import RunDir
from bdl_train.specs import TargetKind, TargetSpec

CLASSES = ("<script>alert(1)</script>", "b & c", "plain")
NUMBER = TargetSpec(TargetKind.CONTINUOUS, "price")
CLASS = TargetSpec(TargetKind.CLASS, "kind", CLASSES)


def class_rows(count: int = 120) -> RowScores:
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.ones(3), count)
    y = np.array([random.choice(3, p=one) for one in probs])
    entropy = -(probs * np.log(probs)).sum(1)
    own = probs[np.arange(count), y]
    columns = {
        "y": y, "prediction": probs.argmax(1), "confidence": probs.max(1), "correct": (probs.argmax(1) == y) * 1.0,
        "nll": -np.log(own), "brier": np.square(probs - np.eye(3)[y]).sum(1), "total": entropy,
        "aleatoric": 0.9 * entropy, "epistemic": 0.1 * entropy, "energy": random.normal(size=count),
    }  # fmt: skip
    return RowScores(columns, probs)


def number_rows(count: int = 120) -> RowScores:
    random = np.random.default_rng(0)
    mean, std = random.normal(10, 3, count), random.uniform(0.5, 1.5, count)
    z = random.normal(size=count)
    columns = {"y": mean + std * z, "mean": mean, "median": mean, "error": -std * z, "pit": norm.cdf(z)}
    columns |= {"pit_below": columns["pit"], "nll": z**2 / 2 + np.log(std) + 0.92, "crps": std}
    columns |= {"total_std": std, "aleatoric_std": 0.9 * std, "epistemic_std": 0.4 * std}
    for percent in (50, 80, 90, 95):
        edge = norm.ppf(0.5 + percent / 200) * std
        columns |= {f"lower_{percent}": mean - edge, f"upper_{percent}": mean + edge}
    return RowScores(columns)


def chapters(rows: RowScores, target: TargetSpec) -> list[Section]:
    """Those that need nothing but scores."""
    metrics = {one.key: one for one in metrics_of(rows, target.name, target.classes)}
    table = pd.DataFrame({"<b>age</b>": np.arange(len(rows)) / 7, "other": ["x"] * len(rows)})
    ids, x = np.arange(len(rows)), np.zeros((len(rows), 2))
    metric = "rmse" if rows.probs is None else "risk"
    return [
        calibration_section(rows, metrics),
        uncertainty_section(rows, target),
        deferral_section(
            None, rows, metric=metric, target_risk=None, by="total", confidence=None, slices=[], unit=target.name,
            seed=0,
        ),
        examples_section(rows, ids, target, table, x),
        bands_section(rows, target, table, 0),
    ]  # fmt: skip


@cache
def config_text() -> str:
    return yaml.safe_dump(compose("train", ["num_members=2", "trainer.max_epochs=20"]), sort_keys=False)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDir]:
    """A complete run of two members with an evaluation `test` of these rows, and any chapters."""

    def make(
        rows: RowScores, target: TargetSpec, sections: list[Section] | None = None, **manifest: object
    ) -> RunDir:
        run = RunDir(tmp_path / "experiment" / "20260101-000000-abcdef")
        run.path.mkdir(parents=True)
        run.config.write_text(config_text())
        members = [
            {"id": m, "status": "done", "best_epoch": 18 + m, "stack": "000", "seed": m} for m in range(2)
        ]
        write_json(
            run.manifest,
            {
                "status": "complete", "finished": "2026-01-01T00:00:00Z", "members": members, "num_data": 300,
                "data": {"name": "<i>set</i>", "fingerprint": "f" * 64}, "wall_time_s": 75.0, "device_time_s": 12.0,
                "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []}, "packages": {"torch": "2"},
                "code": {"version": "0.1.0", "commit": "c" * 40, "clean": True}, "hashes": {"config.yaml": "a" * 64},
            }
            | manifest,
        )  # fmt: skip
        events = EventWriter(run.stack("000") / "events.jsonl")
        events.write("started", [(None, {"members": [0, 1], "device": "cpu", "executor": "vmap"})], step=0)
        for epoch in range(1, 21):
            for key in ("train/nll", "val/nll"):
                events.write(key, [(m, 1 / epoch + m / 10) for m in range(2)], step=10 * epoch)
        events.write("progress", [(None, {"step": 200, "num_steps": 200})], step=200)
        events.close()
        write_json(run.posterior / "posterior.json", {"target": target.to_json()})
        folder = run.evaluation("test")
        metrics = metrics_of(rows, target.name, target.classes)
        detail = [
            {
                "key": f"test/{one.key}", "slice": "all", "value": one.value, "low": one.value, "high": one.value,
                "n": len(rows), "unit": one.unit, "meaning": one.meaning, "better": one.better, "reason": one.reason,
            }
            for one in metrics
        ]  # fmt: skip
        write_bytes(folder / "metrics_detail.parquet", pd.DataFrame(detail).to_parquet(index=False))
        columns = {"row": np.arange(len(rows)), **rows.columns}
        if rows.probs is not None:
            columns |= {f"p_{name}": rows.probs[:, k] for k, name in enumerate(target.classes)}
        write_bytes(folder / "predictions.parquet", pd.DataFrame(columns).to_parquet(index=False))
        write_json(folder / "hashes.json", {"predictions.parquet": "b" * 64})
        for section in sections or []:
            write_section(folder / "sections", section)
        return run

    return make
