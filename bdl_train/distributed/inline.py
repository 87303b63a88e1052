"""The inline launcher: stacks one after another in this process. Same interface, no Ray."""

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Annotated, Any

from pydantic import Field

from bdl_train.build import allowed_packages, allowing
from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.distributed.follow_ups import follow_ups
from bdl_train.distributed.work import work
from bdl_train.training.prepared import StackTask

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
    ranks_per_stack = 1
    concurrent = False  # threads of torch and the logs are the process's

    def resources(self) -> Resources:
        import torch

        return Resources(len(os.sched_getaffinity(0)), torch.cuda.device_count())

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        raised: list[BaseException] = []
        packages = allowed_packages()

        def work_through() -> None:
            waiting = deque(tasks)
            try:
                with allowing(packages):
                    while waiting:
                        task = waiting.popleft()
                        results[task.id] = work(task, job)
                        waiting.extendleft(reversed(follow_ups(task, results[task.id])))
            except BaseException as error:
                raised.append(error)

        # Beside the main thread, which alone is given signals: Lightning would answer them in its own way there.
        # A daemon, so that a second Ctrl-C need not wait for it.
        stacks = Thread(target=work_through, name="stacks", daemon=True)
        stacks.start()
        while stacks.is_alive():
            stacks.join(TICK_S)
            tick()
        if raised:
            raise raised[0]
        return results
