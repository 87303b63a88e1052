import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stack_runs import CASES, data, task

from bdl_train.runs import RunDir
from bdl_train.training.train_stack import train_stack


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("BDL_ALLOW", "tiny_problems")


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], RunDir]:
    return lambda name: RunDir(tmp_path / name)


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The result of each case trained without a stop, once in a session."""

    @functools.cache
    def result(case: str) -> dict[str, Any]:
        name, config = CASES[case]
        return train_stack(task(), config, data(name), RunDir(tmp_path_factory.mktemp(case)))

    return result
