"""Sections of an evaluation: written, read back, or empty with a reason."""

import json

import pandas as pd
import pytest

from bdl_train.errors import UsageError
from bdl_train.evaluation.section import Section, read_section, section_or_reason, write_section


def test_a_section_reads_back_as_written(tmp_path):
    table = pd.DataFrame({"slice": ["a", "b"], "value": [0.5, float("nan")], "n": [3, 4]})
    written = Section("slices", "Slices", "Worst: a", "warn", {"worst": table}, ("b is small",))
    assert write_section(tmp_path, written) == ["slices.worst.parquet", "slices.json"]
    found = read_section(tmp_path, "slices")
    pd.testing.assert_frame_equal(found.tables["worst"], table)
    assert (found.title, found.verdict, found.level, found.warnings) == (
        "Slices", "Worst: a", "warn", ("b is small",),
    )  # fmt: skip


def test_what_an_input_does_not_allow_is_a_reason_and_other_errors_are_not_hidden():
    def refuse() -> Section:
        raise UsageError("slices names 'sxe', which the table has not.")

    found = section_or_reason("slices", "Slices", refuse)
    assert (found.level, found.verdict, found.tables) == (
        "empty",
        "slices names 'sxe', which the table has not.",
        {},
    )
    with pytest.raises(ZeroDivisionError):
        section_or_reason("slices", "Slices", lambda: 1 / 0)  # pyright: ignore[reportArgumentType]


def test_a_damaged_section_is_one_message(tmp_path):
    write_section(tmp_path, Section("ood", "OOD", "-", tables={"scores": pd.DataFrame({"a": [1]})}))
    (tmp_path / "ood.scores.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="damaged"):
        read_section(tmp_path, "ood")


@pytest.mark.parametrize(
    "changed",
    [
        {"level": "fine"},
        {"level": ["good"]},
        {"verdict": 3},
        {"warnings": [1]},
        {"tables": ["../x"]},
        {"tables": 5},
    ],
)
def test_a_head_that_nobody_wrote_is_refused(tmp_path, changed):
    write_section(tmp_path, Section("ood", "OOD", "-"))
    head = json.loads((tmp_path / "ood.json").read_text())
    (tmp_path / "ood.json").write_text(json.dumps(head | changed))
    with pytest.raises(UsageError, match="damaged"):
        read_section(tmp_path, "ood")
