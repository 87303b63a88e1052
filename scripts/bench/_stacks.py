"""What benchmarks of single stacks share: a config of shipped choices, and one stack trained as `bdl train` does it."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bdl_train.data import Data
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import train_stack

CONF = Path(__file__).parents[2] / "conf"
CHOICES = {
    "prior": "gaussian", "optimizer": "adam", "scheduler": "constant", "trainer": "default",
}  # fmt: skip
"""Where a benchmark names no other."""


def config_of(*, batch_size: int, seed: int = 0, **groups: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A resolved config, read without Hydra: the shipped YAML of a choice and what differs from it.

    Args:
        batch_size: Examples a member and step.
        seed: Of the run.
        groups: (choice, changed settings) of `model`, `likelihood`, `inference`, and of what is not as in `CHOICES`.
    """
    chosen = {group: (choice, {}) for group, choice in CHOICES.items()} | groups
    config: dict[str, Any] = {
        group: {**yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()), **changed}
        for group, (choice, changed) in chosen.items()
    }
    return config | {"data": {"batch_size": batch_size}, "seed": seed}


def seconds_of(data: Data, config: Mapping[str, Any], num_members: int, gpus: int = 0) -> tuple[float, int]:
    """Seconds and steps of a whole stack, on one core or one GPU: its start, its training, its files."""
    with tempfile.TemporaryDirectory() as folder:
        task = StackTask("000", tuple(range(num_members)), cpus=1, gpus=gpus)
        start = time.perf_counter()
        result = train_stack(task, config, data, RunDir(Path(folder)))
        seconds = time.perf_counter() - start
    assert all(member["status"] == "done" for member in result["members"])
    return seconds, result["steps"]
