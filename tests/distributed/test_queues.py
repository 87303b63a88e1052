"""Which module knows the state of a submission."""

import pytest

from bdl_train.distributed import slurm
from bdl_train.distributed.queues import state_of, states_of


def test_the_system_names_the_module(monkeypatch):
    monkeypatch.setattr(slurm, "states_of", lambda all_of_them: [one["ids"][0] for one in all_of_them])
    assert state_of({"system": "slurm", "ids": ["running"]}) == "running"
    first, second = {"system": "slurm", "ids": ["a"]}, {"system": "slurm", "ids": ["b"]}
    assert states_of([second, {"system": "pbs"}, first]) == ["b", "unknown", "a"]


@pytest.mark.parametrize("system", ["pbs", "", None, "../x", "os.path", "inline"])
def test_of_other_systems_nothing_is_known(system):
    assert state_of({"system": system}) == "unknown"


@pytest.mark.parametrize("system", ["slurm", "ray_job"])
@pytest.mark.parametrize("ids", [5, None, "1"])
def test_a_damaged_submission_breaks_no_listing(system, ids):
    assert states_of([{"system": system, "ids": ids}, {}]) == ["unknown", "unknown"]
