"""The inline launcher: stacks one after another in this process. Same interface, no Ray."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.distributed.split import halves
from bdl_train.distributed.work import work
from bdl_train.training.train_stack import StackTask

TICK_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Inline(Launcher):
    """Stacks one after another.

    Attributes:
        members_per_stack: Most members of a stack; null = chosen by the plan.
        cpus_per_stack: Threads; null = all.
        gpus_per_stack: 0 = CPU, 1 = the first GPU.
    """

    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]

    num_workers = 1

    def resources(self) -> Resources:
        import torch

        return Resources(len(os.sched_getaffinity(0)), torch.cuda.device_count())

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        waiting = deque(tasks)
        with _ticking(tick):
            while waiting:
                task = waiting.popleft()
                results[task.id] = work(task, job)
                if results[task.id]["status"] == "split":  # by a session of this run under Ray
                    waiting.extendleft(reversed(halves(task)))
        return results


@contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Calls `tick` from a thread while the block runs, and once at its end."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(TICK_S):
            tick()

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        tick()
