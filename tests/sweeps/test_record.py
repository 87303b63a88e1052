"""The record of a sweep: what is written is read again, and what is damaged is named."""

import json
import math

import pytest

from bdl_train.errors import UsageError
from bdl_train.runs import read_json
from bdl_train.sweeps.record import Definition, SweepDir, Trial

DEFINITION = Definition(
    fixed=("data=uci",),
    axes=("seed=1,2",),
    sampler="grid",
    sweep_seed=0,
    objective="val/nll",
    direction="minimize",
    prune="none",
    prune_after_trials=4,
    prune_after_epochs=10,
)
TRIAL = Trial(
    number=3, words=("seed=2",), run="r3", status="pruned", reason="late", curve=((1, 0.5), (2, math.inf))
)


def test_what_is_written_is_read_again(tmp_path):
    folder = SweepDir(tmp_path)
    folder.write(DEFINITION, ["cluster=inline"], 5)
    assert folder.read() == (DEFINITION, ["cluster=inline"], 5)
    folder.save(TRIAL)
    assert folder.trials() == {3: TRIAL}


def test_the_name_follows_from_what_is_asked_for():
    other = Definition(**{**vars(DEFINITION), "sweep_seed": 1})
    assert DEFINITION.name() == Definition(**vars(DEFINITION)).name() != other.name()
    assert other.differences(DEFINITION) == ["sweep_seed 0 is now 1"]


def test_a_folder_without_a_sweep_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"holds no sweep: sweep\.json is missing"):
        SweepDir(tmp_path).read()


@pytest.mark.parametrize(
    "change",
    [{"run": "../elsewhere"}, {"number": 4}, {"status": "odd"}, {"words": 3}, {"curve": [1]}, {"run": None}],
)
def test_a_damaged_trial_is_named(tmp_path, change):
    folder = SweepDir(tmp_path)
    folder.save(TRIAL)
    path = folder.trial(3)
    path.write_text(json.dumps({**read_json(path), **change}))
    with pytest.raises(UsageError, match=r"0003\.json is damaged"):
        folder.trials()


def test_a_damaged_definition_is_named(tmp_path):
    folder = SweepDir(tmp_path)
    folder.definition.write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        folder.read()
