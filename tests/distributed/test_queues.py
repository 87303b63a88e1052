"""Which module knows the state of a submission."""

import pytest

from bdl_train.distributed import slurm
from bdl_train.distributed.queues import state_of


def test_the_system_names_the_module(monkeypatch):
    monkeypatch.setattr(slurm, "state_of", lambda submission: "running")
    assert state_of({"system": "slurm", "ids": ["1"]}) == "running"


@pytest.mark.parametrize("system", ["pbs", "", None, "../x", "os.path", "inline"])
def test_of_other_systems_nothing_is_known(system):
    assert state_of({"system": system}) == "unknown"
