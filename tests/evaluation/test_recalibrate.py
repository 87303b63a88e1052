"""Recorded maps belong to one posterior, and a tampered file is one message, never another prediction."""

import json
from typing import Any

import pytest

from bdl_train.errors import UsageError
from bdl_train.evaluation.recalibrate import FILE, record, recorded
from bdl_train.evaluation.recalibration import (
    IsotonicCalibration,
    QuantileRecalibration,
    TemperatureScaling,
    VarianceScaling,
)
from bdl_train.files import write_json
from bdl_train.runs import RunDir

MAPS = (
    TemperatureScaling(80, 1.5),
    IsotonicCalibration(80, ((0.1, 0.9),), ((0.2, 0.7),)),
    VarianceScaling(80, 0.8),
    QuantileRecalibration(80, (0.0, 0.4, 1.0), (0.0, 0.5, 1.0)),
)


@pytest.fixture
def run(tmp_path) -> RunDir:
    made = RunDir(tmp_path)
    made.posterior.mkdir()
    write_json(made.posterior / "posterior.json", {"schema_version": 1})
    record(made, MAPS)
    return made


@pytest.mark.parametrize("one", MAPS, ids=lambda one: one.method)
def test_maps_come_back_as_they_were_fitted(run, one):
    assert recorded(run, one.method) == one


def test_a_further_map_joins_the_others_until_the_posterior_changes(run):
    record(run, [TemperatureScaling(90, 2.0)])
    assert recorded(run, "temperature") == TemperatureScaling(90, 2.0)
    assert recorded(run, "variance") == MAPS[2]
    write_json(run.posterior / "posterior.json", {"schema_version": 1, "members": []})
    with pytest.raises(UsageError, match="fitted to another posterior"):
        recorded(run, "variance")
    record(run, [TemperatureScaling(90, 2.0)])
    with pytest.raises(UsageError, match="recalibration"):
        recorded(run, "variance")


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("temperature", {"temperature": 0}), ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": None}), ("temperature", {"temperature": 1e300}),
        ("temperature", {"num_rows": -1}), ("variance", {"scale": 0}), ("variance", {"scale": "x"}),
        ("isotonic", {"y": [[0.2, 4.0]]}), ("isotonic", {"x": []}), ("isotonic", {"x": [[None, 1.0]]}),
        ("isotonic", {"x": [[0.9, 0.1]]}), ("quantile", {"knots": [0.0, 1.0]}), ("quantile", {"knots": ["a", 1, 2]}),
        ("quantile", {"values": [0.0, 0.0, 1.0]}), ("quantile", {"knots": [0.0, 0.9, 0.4]}),
    ],
)  # fmt: skip
def test_values_that_no_fit_gives_are_refused(run, method: str, changed: dict[str, Any]):
    path = run.posterior / FILE
    held = json.loads(path.read_text())
    held["maps"][method] |= changed
    path.write_text(json.dumps(held))
    with pytest.raises(UsageError, match="damaged"):
        recorded(run, method)


@pytest.mark.parametrize("content", ["[]", '{"maps": null}', '{"maps": [1]}', "no json"])
def test_a_damaged_file_is_named_when_read_and_replaced_when_written(run, content: str):
    (run.posterior / FILE).write_text(content)
    with pytest.raises(UsageError):
        recorded(run, "temperature")
    record(run, MAPS)
    assert recorded(run, "temperature") == MAPS[0]
