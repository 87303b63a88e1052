"""Tables and pictures from the files of a run directory."""

from io import BytesIO

import numpy as np
import pandas as pd
from PIL import Image

from bdl_train.evaluation.metrics import expected_calibration_error, inside
from bdl_train.evaluation.rows import RowScores
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking.outcome import (
    coverage,
    members_table,
    metrics_table,
    planned_stacks,
    plots,
    reliability,
)


def test_a_run_that_is_not_finished_has_no_outcome(tmp_path):
    run = RunDir(tmp_path)
    assert (metrics_table(run), members_table(run), plots(run), planned_stacks(run)) == (None, None, {}, {})


def test_the_table_of_members_says_how_each_ended(tmp_path):
    members = [
        {"id": 0, "stack": "000", "status": "done", "seed": 5, "best_epoch": 7, "file": "x", "sha256": "y"},
        {"id": 1, "stack": "001a", "status": "failed", "reason": "diverged"},
    ]
    write_json(tmp_path / "manifest.json", {"status": "partial", "members": members})
    table = members_table(RunDir(tmp_path))
    assert table is not None
    assert table.columns == ("member", "status", "stack", "seed", "best_epoch", "reason")
    assert table.rows == [(0, "done", "000", 5, 7, None), (1, "failed", "001a", None, None, "diverged")]


def test_the_table_of_metrics_has_units_and_of_older_runs_what_they_have(tmp_path):
    folder = RunDir(tmp_path).evaluation("test")
    folder.mkdir(parents=True)
    row = {"key": "test/nll", "slice": "all", "value": 0.5, "n": 9, "unit": "nats", "reason": None}
    pd.DataFrame([row]).to_parquet(folder / "metrics_detail.parquet")
    table = metrics_table(RunDir(tmp_path))
    assert table is not None
    assert dict(zip(table.columns, table.rows[0], strict=True)) == {
        "key": "test/nll",
        "value": 0.5,
        "unit": "nats",
        "n": 9,
    }


def test_the_table_of_metrics_has_intervals_and_no_slices(tmp_path):
    folder = RunDir(tmp_path).evaluation("new")
    folder.mkdir(parents=True)
    row = {"key": "test/nll", "slice": "all", "value": 0.5, "low": 0.4, "high": None, "n": 9}
    pd.DataFrame([row, {**row, "slice": "age>65"}]).to_parquet(folder / "metrics_detail.parquet")
    assert metrics_table(RunDir(tmp_path)) is None
    table = metrics_table(RunDir(tmp_path), "new")
    assert table is not None
    assert table.columns == ("key", "value", "low", "high", "n")
    assert table.rows == [("test/nll", 0.5, 0.4, None, 9)]


def test_the_bins_of_the_diagram_are_those_of_the_calibration_error():
    random = np.random.default_rng(0)
    confidence = np.concatenate([random.uniform(0.3, 1, 500), [1.0, 0.0, 1 / 15]])
    correct = (random.uniform(size=503) < confidence).astype(float)
    bins = reliability(confidence, correct)
    gap = sum(count * abs(accuracy - mean) for mean, accuracy, count in bins) / 503
    np.testing.assert_allclose(gap, expected_calibration_error(confidence, correct), rtol=1e-12)


def test_the_coverage_curve_goes_through_the_metric():
    pit = np.random.default_rng(0).uniform(size=400) ** 1.3
    levels = np.array([0.5, 0.95])
    rows = RowScores({"nll": pit, "pit": pit, "pit_below": pit})
    expected = [inside(rows, level).mean() for level in levels]
    np.testing.assert_allclose(coverage(pit, pit, levels), expected)


def size(png):
    image = Image.open(BytesIO(png))
    image.load()
    return image.size


def test_pictures_follow_the_kind_of_target(tmp_path):
    random = np.random.default_rng(0)
    kinds = {
        "classes": (
            {"confidence": random.uniform(size=50), "correct": np.r_[np.ones(49), np.nan]},
            {"reliability"},
        ),
        "numbers": ({"pit": random.uniform(size=50), "pit_below": np.zeros(50)}, {"pit", "coverage"}),
        "nothing": ({"y": np.zeros(3)}, set()),
    }
    kinds["classes"][0]["confidence"][-1] = np.nan
    for name, (columns, expected) in kinds.items():
        folder = RunDir(tmp_path / name).evaluation("test")
        folder.mkdir(parents=True)
        pd.DataFrame(columns).to_parquet(folder / "predictions.parquet")
        found = plots(RunDir(tmp_path / name))
        assert set(found) == expected
        assert all(size(png) == (540, 480) for png in found.values())
