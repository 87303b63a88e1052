"""A part of a launcher's machines, for one of several trainings that use it side by side."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from bdl_train.distributed import Job, Launcher, Resources, plan
from bdl_train.training.prepared import StackTask


def room(launcher: Launcher) -> int:
    """How many stacks the launcher can train at the same time."""
    each = plan.room(launcher.resources(), launcher.cpus_per_stack or 1, launcher.gpus_per_stack)
    return min(each // launcher.ranks_per_stack, launcher.num_workers or each)


class Share(Launcher):
    """Plans for one of `num_shares` equal parts, so that the trainings side by side fill the machines.

    Where a part would be too small for a stack the plan is made for all of it, and stacks wait for one another.

    Args:
        launcher: Carries everything out.
        num_shares: Trainings at the same time.
    """

    def __init__(self, launcher: Launcher, num_shares: int) -> None:
        self._launcher = launcher
        self.concurrent = launcher.concurrent
        self.members_per_stack = launcher.members_per_stack
        self.cpus_per_stack = launcher.cpus_per_stack
        self.gpus_per_stack = launcher.gpus_per_stack
        self.ranks_per_stack = launcher.ranks_per_stack
        self.num_workers = launcher.num_workers and max(1, launcher.num_workers // num_shares)
        part = divided(launcher.resources(), num_shares)
        holds = (
            plan.room(part, launcher.cpus_per_stack or 1, launcher.gpus_per_stack) >= launcher.ranks_per_stack
        )
        self._resources = part if holds else launcher.resources()

    def resources(self) -> Resources:
        return self._resources

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        return self._launcher.launch(tasks, job, tick)


def divided(whole: Resources, num_shares: int) -> Resources:
    """One of so many parts: some of the machines, or where there are fewer, a part of the largest one."""
    machines = sorted(whole.machines, key=lambda one: (one[1], one[0]), reverse=True)
    if len(machines) >= num_shares:
        return Resources.of_nodes(machines[: len(machines) // num_shares])
    on_each = math.ceil(num_shares / len(machines))
    cpus, gpus = machines[0]
    return Resources.of_nodes([(cpus // on_each, float(gpus // on_each))])
