"""The chapter on recalibration: paired differences of each metric, and what is told of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from distorted_rows import PRICE, classes, ece, number_rows, numbers, species

from bdl_train.errors import UsageError
from bdl_train.evaluation.recalibration import (
    IsotonicCalibration,
    QuantileRecalibration,
    TemperatureScaling,
    VarianceScaling,
)
from bdl_train.evaluation.recalibration_chapter import recalibration_section
from bdl_train.evaluation.rows import score_rows
from bdl_train.evaluation.section import read_section, write_section


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


COLUMNS = [
    "method", "metric", "unit", "better", "before", "after", "difference", "low", "high", "verdict", "n",
]  # fmt: skip


def test_a_section_of_classes_compares_row_by_row(tmp_path):
    val, test = classes(3000, 28, 3.0), classes(1000, 29, 3.0)
    maps = [method.fit(val) for method in (TemperatureScaling, IsotonicCalibration)]
    after = [(one, one.apply(test)) for one in maps]
    section = recalibration_section(test, after, target=species(3), seed=0)
    table = section.tables["metrics"]
    assert list(table) == COLUMNS
    assert table["metric"].tolist() == ["nll", "ece", "ace", "brier", "accuracy"] * 2
    nll = table.iloc[0]
    gain = after[0][1].columns["nll"] - test.columns["nll"]
    assert nll["difference"] == pytest.approx(gain.mean())
    error = gain.std() / math.sqrt(1000)
    # An edge of 1000 resamples is off by some 8 % of the standard error.
    assert (nll["low"], nll["high"]) == pytest.approx(
        (gain.mean() - 1.96 * error, gain.mean() + 1.96 * error), abs=0.4 * error
    )
    found: dict[str, Any] = table[table["method"] == "temperature"].set_index("metric")["verdict"].to_dict()
    assert found == {
        "nll": "better",
        "ece": "better",
        "ace": "better",
        "brier": "better",
        "accuracy": "no clear change",
    }
    assert section.level == "good"
    assert "helped on the 1000 test rows" in section.verdict
    assert section.warnings == ()
    assert table["before"].tolist()[1] == pytest.approx(ece(test))
    assert section.tables["fitted"]["num_val"].tolist() == [3000, 3000]
    assert list(section.tables["maps"]) == ["method", "curve", "x", "value"]
    assert set(section.tables["maps"]["curve"]) == {"a", "b", "c"}
    write_section(tmp_path, section)
    assert read_section(tmp_path, "recalibration").verdict == section.verdict


def test_a_section_of_numbers_says_what_is_missing_and_what_is_too_little():
    val, (tile, y) = number_rows(60, 30, 2.0), numbers(500, 31, 2.0)
    before = score_rows(tile, y, PRICE)
    widened, mapped = VarianceScaling.fit(val), QuantileRecalibration.fit(val, num_bins=5)
    after = [(widened, widened.apply(tile, y, PRICE)), (mapped, mapped.apply(before))]
    section = recalibration_section(before, after, target=PRICE, seed=0)
    table = section.tables["metrics"].set_index(["method", "metric"])
    assert table.loc[("variance", "coverage_90"), "verdict"] == "better"
    assert table.loc[("variance", "interval_width_95"), "verdict"] == "-"
    assert float(table["before"].to_dict()["variance", "pit_p_value"]) < 1e-6
    assert table.loc[("variance", "crps"), "verdict"] == "better"
    assert table.loc[("quantile", "crps"), "verdict"] == "not available"
    assert len(section.warnings) == 3
    assert all("60 validation rows only, fewer than 100" in one for one in section.warnings[:2])
    assert section.warnings[2] == (
        "quantile: scores alone do not give crps, pinball, interval_width_95 after the map."
    )


def test_a_map_that_hurts_is_a_warning():
    test = classes(800, 32, 1.0)
    wrong = TemperatureScaling(800, 4.0)
    section = recalibration_section(test, [(wrong, wrong.apply(test))], target=species(3), seed=0)
    assert section.level == "warn"
    assert "Temperature 4, from 800 validation rows, hurt on the 800 test rows" in section.verdict


def test_a_section_needs_a_map_and_the_same_rows():
    test = classes(50, 33, 1.0)
    with pytest.raises(UsageError, match="no map was fitted"):
        recalibration_section(test, [], target=species(3), seed=0)
    with pytest.raises(ValueError, match="not those before it"):
        recalibration_section(
            test, [(TemperatureScaling(200, 1.5), test.take(np.arange(49)))], target=species(3), seed=0
        )
