"""The inline launcher: stacks one after another in this process. Same interface, no Ray."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.errors import UsageError
from bdl_train.training.train_stack import StackTask, train_stack

log = logging.getLogger(__name__)

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
    gpus_per_stack: Annotated[float, Field(ge=0)]

    num_workers = 1

    def resources(self) -> Resources:
        import torch

        return Resources(len(os.sched_getaffinity(0)), torch.cuda.device_count())

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(TICK_S):
                tick()

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            for task in tasks:
                if job.run.stop_file.exists():
                    results[task.id] = {"status": "stopped"}
                    continue
                try:
                    results[task.id] = train_stack(task, job.config, job.data, job.run)
                except UsageError:
                    raise
                except Exception as error:
                    log.exception("Stack %s failed", task.id)
                    results[task.id] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        finally:
            done.set()
            watcher.join()
            tick()
        return results
