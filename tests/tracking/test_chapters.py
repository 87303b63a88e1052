"""Chapters of an evaluation as a tracker reads them: what is damaged says so and hides nothing else."""

import json

import numpy as np
import pandas as pd
import pytest

from bdl_train.errors import UsageError
from bdl_train.evaluation.evaluate import SECTIONS as WRITTEN_TO
from bdl_train.evaluation.section import Section, write_section
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.tracking.chapters import (
    MOST_BYTES,
    SECTIONS,
    Chapter,
    chapter_rows,
    chapter_table,
    chapters,
    evaluations,
)

CURVE = pd.DataFrame({"coverage": [0.5, 1.0], "risk": [0.1, np.nan], "name": ["a", None]})


@pytest.fixture
def run(tmp_path) -> RunDir:
    """Two chapters, written by the code that writes them."""
    one = RunDir(tmp_path)
    folder = one.evaluation("test") / SECTIONS
    write_section(
        folder, Section("deferral", "Deferral", "It is worth it.", "good", {"curve": CURVE}, ("w",))
    )
    write_section(folder, Section.empty("calibration", "Calibration", "No rows."))
    return one


def test_the_folder_is_the_one_that_is_written():
    assert SECTIONS == WRITTEN_TO


def test_what_was_written_is_read(run):
    assert chapters(run) == [
        Chapter("calibration", "Calibration", "No rows.", "empty"),
        Chapter("deferral", "Deferral", "It is worth it.", "good", ("w",), ("curve",)),
    ]
    table = chapter_table(run, "deferral", "curve")
    assert table.columns == ("coverage", "risk", "name")
    assert table.rows[0] == (0.5, 0.1, "a")
    assert table.num_left_out == 0


def test_chapters_stand_in_the_order_in_which_they_were_written(run):
    hashes = {"metrics.json": "", "sections/deferral.json": "", "sections/calibration.json": ""}
    write_json(run.evaluation("test") / "hashes.json", hashes)
    assert [one.key for one in chapters(run)] == ["deferral", "calibration"]
    (run.evaluation("test") / "hashes.json").write_text("3")
    assert [one.key for one in chapters(run)] == ["calibration", "deferral"]


def test_no_evaluation_has_no_chapters(tmp_path):
    assert (evaluations(RunDir(tmp_path)), chapters(RunDir(tmp_path))) == ([], [])


def test_the_own_evaluation_comes_first(run):
    for name in ("zoo", "new", ".tmp"):
        run.evaluation(name).mkdir()
    assert evaluations(run) == ["test", "new", "zoo"]


HEAD = {"title": "T", "verdict": "V", "level": "note", "warnings": [], "tables": []}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        ("[" * 100_000, "recursion"),
        (
            json.dumps({**HEAD, "level": "fine"}),
            "its level is 'fine', expected one of good, note, warn, empty",
        ),
        (json.dumps({**HEAD, "verdict": 3}), "expected a text, got int"),
        (json.dumps({**HEAD, "warnings": "w"}), "expected a list of texts, got str"),
        (json.dumps({**HEAD, "tables": ["../../predictions"]}), "'../../predictions' is no name of a table"),
        (json.dumps({"title": "T"}), "'verdict' is missing"),
        (" " * (MOST_BYTES + 1), "it has 1,048,577 bytes, 1,048,576 at most were expected"),
    ],
)
def test_a_damaged_chapter_is_one_line_and_hides_no_other(run, content, why):
    (run.evaluation("test") / SECTIONS / "calibration.json").write_text(content)
    damaged, other = chapters(run)
    assert (damaged.key, damaged.level, damaged.tables) == ("calibration", "damaged", ())
    assert damaged.verdict.startswith("calibration.json cannot be read: ")
    assert why in damaged.verdict
    assert "\n" not in damaged.verdict
    assert other.key == "deferral"


def test_tables_that_are_missing_or_damaged_are_named(run):
    path = run.evaluation("test") / SECTIONS / "deferral.curve.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(
        UsageError, match=r"deferral\.curve\.parquet is damaged \(.*\): evaluate the run again"
    ):
        chapter_table(run, "deferral", "curve")
    path.unlink()
    with pytest.raises(UsageError, match=r"deferral\.curve\.parquet is missing"):
        chapter_table(run, "deferral", "curve")


def test_many_rows_are_cut_and_counted_and_bytes_are_left_out(run):
    table = pd.DataFrame(
        {"row": range(2500), "pixels": [b"\x00\x01"] * 2500, "when": pd.Timestamp("2026-01-02")}
    )
    write_section(run.evaluation("test") / SECTIONS, Section("examples", "E", "v", "note", {"wrong": table}))
    found = chapter_table(run, "examples", "wrong")
    assert (len(found.rows), found.num_left_out) == (1000, 1500)
    assert found.columns == ("row", "when")
    assert found.rows[999] == (999, "2026-01-02 00:00:00")
    assert chapter_rows(run, "examples", "wrong", most=1)[0]["pixels"] == b"\x00\x01"


def test_a_table_without_rows_has_its_columns(run):
    write_section(run.evaluation("test") / SECTIONS, Section("x", "X", "v", "note", {"none": CURVE.iloc[:0]}))
    found = chapter_table(run, "x", "none")
    assert (found.columns, found.rows) == (("coverage", "risk", "name"), [])
