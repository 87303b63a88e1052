"""Rows of the list, and what came of a run."""

from bdl_train.runs import RunDir
from bdl_train.tracking.dashboard.files import config_of, json_of, outcome_of, row_of, status_of


def test_a_finished_run_in_the_list(class_run):
    row = row_of(class_run, class_run.path.parents[1].resolve())
    assert row["id"] == f"breast_cancer/{class_run.path.name}"
    assert (row["status"], row["method"], row["members"], row["done"], row["failed"]) == (
        "complete",
        "swag",
        2,
        2,
        0,
    )
    assert set(row["metrics"]) == {"test/nll", "test/accuracy", "test/ece"}


def test_an_empty_run_in_the_list(tmp_path):
    run = RunDir(tmp_path / "a" / "b")
    run.path.mkdir(parents=True)
    row = row_of(run, tmp_path.resolve())
    assert (row["status"], row["members"], row["metrics"], row["method"]) == ("interrupted", 0, {}, "")
    assert "cannot be read" in config_of(run)
    assert json_of(run.plan) == {}
    run.manifest.write_text("[]")
    assert status_of(run) == "damaged"


def test_calibration_of_classes_and_of_numbers(class_run, number_run):
    classes, numbers = outcome_of(class_run), outcome_of(number_run)
    assert sum(rows for _, _, rows in classes["reliability"]) == 114
    assert {one["key"] for one in classes["metrics"]} >= {"test/nll", "test/accuracy"}
    assert len(numbers["coverage"]) == 19
    assert sum(numbers["pit"]) / len(numbers["pit"]) == 1.0 or abs(sum(numbers["pit"]) / 15 - 1) < 1e-9
