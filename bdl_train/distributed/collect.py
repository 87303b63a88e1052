"""The launcher that trains nothing: it takes the results that jobs of their own left in the run directory."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.distributed.follow_ups import follow_ups
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import stored_result

MISSING = {"status": "failed", "reason": "its job ended without a result"}


@dataclass(frozen=True, kw_only=True)
class Collect(Launcher):
    """Members whose stack has no whole result count as lost; a later `bdl train resume=RUN` trains them."""

    num_workers = None
    members_per_stack = None
    cpus_per_stack = 1
    gpus_per_stack = 0.0
    ranks_per_stack = 1

    def resources(self) -> Resources:
        return Resources(1, 0)

    @property
    def needs_whole_plan(self) -> bool:
        return True

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        results, waiting = {}, deque(tasks)
        while waiting:
            task = waiting.popleft()
            results[task.id] = stored_result(task, job.run) or dict(MISSING)
            waiting.extendleft(reversed(follow_ups(task, results[task.id])))
        tick()
        return results
