"""What of an evaluation reaches wandb, and that damage of its files stops nothing else."""

import logging
import threading
from pathlib import Path

import pandas as pd
import pytest
import wandb

from bdl_train.evaluation.section import Section, write_section
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking._wandb_outcome import outcome_rows
from bdl_train.tracking.chapters import SECTIONS

CURVE = pd.DataFrame(
    {"coverage": [0.5, 1.0], "risk": [0.1, 0.2], "ideal": [0.0, 0.2], "low": [0, 0.1], "high": [0.3, 0.3]}
)
EXAMPLE = {"row": 5, "true": "a", "predicted": "b", "confidence": 0.9, "shape": "1,2,2", "pixels": b"\0" * 4}
METRIC = {"key": "test/nll", "slice": "all", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "unit": "nats"}


def evaluated(run: RunDir, name: str = "test") -> Path:
    folder = run.evaluation(name)
    sections = [
        Section("deferral", "Deferral", "Worth it.", "good", {"curve": CURVE}),
        Section("big", "Big", "Much.", "warn", {"rows": pd.DataFrame({"i": range(1200)})}, ("one", "two")),
        Section("examples", "Examples", "Look.", "note", {"wrong": pd.DataFrame([EXAMPLE])}),
    ]
    for one in sections:
        write_section(folder / SECTIONS, one)
    detail = pd.DataFrame([METRIC, {**METRIC, "slice": "age>65", "value": 0.9}])
    detail.to_parquet(folder / "metrics_detail.parquet")
    return folder


def logged(run: RunDir) -> dict:
    return {key: value for row in outcome_rows(run) for key, value in row.items()}


@pytest.fixture(autouse=True)
def quiet(no_key):
    """wandb without a key and without what it remembers."""


def test_words_tables_plots_and_images_of_an_evaluation(run):
    evaluated(run)
    rows = logged(run)
    assert set(rows) == {
        "plot/risk_coverage", "examples/wrong", "table/metrics", "evaluation/chapters",
        "evaluation/deferral/curve", "evaluation/big/rows", "evaluation/examples/wrong",
    }  # fmt: skip
    words = rows["evaluation/chapters"]
    assert words.columns == ["chapter", "title", "level", "verdict", "warnings", "tables"]
    big = words.data[0]
    assert big == ["big", "Big", "warn", "Much.", "one\ntwo", "rows (the first 1,000 of 1,200 rows)"]
    assert len(rows["evaluation/big/rows"].data) == 1000
    assert rows["evaluation/deferral/curve"].data[1] == [1.0, 0.2, 0.2, 0.1, 0.3]
    # Those of slices are not metrics of all rows; the interval stands beside the value.
    assert rows["table/metrics"].columns == ["key", "value", "low", "high", "unit", "n"]
    assert rows["table/metrics"].data == [["test/nll", 0.5, 0.4, 0.6, "nats", 9]]
    (image,) = rows["examples/wrong"]
    assert isinstance(image, wandb.Image)
    assert image._caption == "true a, predicted b, confidence 0.9"
    assert "pixels" not in rows["evaluation/examples/wrong"].columns


def test_other_evaluations_have_names_of_their_own(run):
    evaluated(run)
    evaluated(run, "new")
    names = set(logged(run))
    assert {
        "plot_new/risk_coverage",
        "examples_new/wrong",
        "table_new/metrics",
        "evaluation_new/chapters",
    } <= names
    assert "plot/risk_coverage" in names


def test_a_chapter_on_calibration_takes_the_place_of_the_plain_picture(run):
    folder = evaluated(run)
    predictions = pd.DataFrame({"confidence": [0.6, 0.9], "correct": [1.0, 0.0]})
    predictions.to_parquet(folder / "predictions.parquet")
    plain = {key for key in logged(run) if key.startswith("plot/")}
    assert plain == {"plot/risk_coverage", "plot/reliability"}
    (folder / "predictions.parquet").write_bytes(b"none")  # not read then
    bins = pd.DataFrame({"probability": [0.7], "frequency": [0.5], "low": [0.1], "high": [0.9], "n": [2]})
    write_section(folder / SECTIONS, Section("calibration", "C", "v", "good", {"reliability": bins}))
    assert "plot/reliability" in logged(run)


DAMAGED = {
    "sections/big.json": ("big.json cannot be read", {"evaluation/big/rows"}),
    "sections/big.rows.parquet": ("big.rows.parquet is damaged", {"evaluation/big/rows"}),
    "sections/deferral.curve.parquet": (
        "deferral.curve.parquet is damaged",
        {"evaluation/deferral/curve", "plot/risk_coverage"},
    ),
    "sections/examples.wrong.parquet": (
        "examples.wrong.parquet is damaged",
        {"evaluation/examples/wrong", "examples/wrong"},
    ),
    "metrics_detail.parquet": ("ArrowInvalid", {"table/metrics"}),
    "predictions.parquet": ("ArrowInvalid", set()),
}


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_file_is_said_and_the_rest_is_logged(file, run, caplog):
    folder = evaluated(run)
    whole = set(logged(run))
    (folder / file).write_bytes(b"{ no more")
    with caplog.at_level(logging.WARNING):
        rows = logged(run)
    said, lost = DAMAGED[file]
    assert said in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)
    assert set(rows) == whole - lost
    words = {one[0]: one for one in rows["evaluation/chapters"].data}
    assert set(words) == {"big", "deferral", "examples"}
    assert (words["deferral"][-1] == "curve (cannot be read)") == file.startswith("sections/deferral")
    assert (words["big"][2] == "damaged") == file.endswith("big.json")


def finish(one, run: RunDir) -> None:
    one.start(run, {})
    one.finish("complete", {})


def test_the_end_of_a_run_logs_its_evaluation(run, fake, tracker):
    evaluated(run)
    finish(tracker(mode="offline"), run)
    keys = {key for row in fake[0].rows for key in row}
    assert {"evaluation/chapters", "plot/risk_coverage", "table/metrics"} <= keys
    assert fake[0].finished == 0


def test_offline_for_real(run, tracker):
    evaluated(run)
    finish(tracker(mode="offline"), run)
    (file,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for key in (b"evaluation/chapters", b"plot/risk_coverage", b"examples/wrong"):
        assert key in content


def test_tables_that_take_too_long_are_told_and_the_rest_is_dropped(run, fake, tracker, monkeypatch, caplog):
    evaluated(run)
    go_on, seen, log = threading.Event(), [], fake[0].log

    def slow(row):
        seen.append(list(row))
        if "table/metrics" in row:
            go_on.wait(10)
        log(row)

    monkeypatch.setattr(fake[0], "log", slow)
    finish(tracker(mode="offline", finish_timeout_s=1.0), run)
    go_on.set()
    for thread in [one for one in threading.enumerate() if one.name == "wandb tables"]:
        thread.join(10)
    assert "wandb took only 2 of the tables and plots: 0.5 s were too short" in caplog.text
    assert "raise tracking.finish_timeout_s" in caplog.text
    assert seen == [["plot/risk_coverage"], ["examples/wrong"], ["table/metrics"]]
    assert fake[0].finished == 0


def test_a_damaged_evaluation_ends_no_training(run, fake, tracker, caplog):
    folder = evaluated(run)
    write_json(folder / "hashes.json", 3)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"\xff{")
    finish(tracker(mode="offline"), run)
    assert fake[0].finished == 0
    assert fake[0].summary["status"] == "complete"
    (words,) = [row["evaluation/chapters"] for row in fake[0].rows if "evaluation/chapters" in row]
    assert {one[2] for one in words.data} == {"damaged"}
