"""Run directories of a few numbers."""

import pytest
from report_runs import make_run

__all__ = ["make_run"]


@pytest.fixture(autouse=True)
def _known_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages do not compose configs again and again; `command_of` has tests of its own."""
    monkeypatch.setattr("bdl_train.evaluation.report.provenance.command_of", lambda config: ["num_members=2"])
