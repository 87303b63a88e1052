"""Tasks for tests of `ray_map`, in a module that workers can import."""

import os
from pathlib import Path

from bdl_train.errors import UsageError


def double(factor: int, task: int) -> int:
    return factor * task


def die_once(folder: Path, task: int) -> int:
    marker = folder / str(task)
    if task == 1 and not marker.exists():
        marker.touch()
        os._exit(1)
    return task


def die(task: int) -> int:
    os._exit(1)


def refuse(task: int) -> int:
    raise UsageError(f"task {task} is wrong")
