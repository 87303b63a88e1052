"""What a Ray task runs: one stack, or one rank of it, in a worker that others may have used before."""

import signal
from contextlib import suppress
from typing import Any

from bdl_train.build import allowing
from bdl_train.distributed import Job
from bdl_train.distributed.ray_places import note_place
from bdl_train.distributed.work import work
from bdl_train.training.ownership import whereabouts
from bdl_train.training.prepared import StackTask
from bdl_train.training.ranks import joined

BLIND = "blind"
"""Status of a task on a node that does not see the run directory."""


def work_remotely(
    task: StackTask, job: Job, packages: tuple[str, ...], rank: int = 0, token: str = ""
) -> dict[str, Any]:
    """As `work`; on a node that does not see the run directory, `{"status": "blind", "id": ..., "node": ...}`."""
    import ray

    # Ray takes a task back by this signal. One that has begun reads the STOP file instead, and saves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    node = ray.get_runtime_context().get_node_id()
    with allowing(packages):
        if not job.run.config.is_file():
            return {"status": BLIND, "id": node, "node": whereabouts()["node"]}
        with suppress(OSError):  # a full disk
            note_place(job.run.stack(task.id), rank, node)
        if task.ranks == 1:
            return work(task, job)
        address, gpu = ray.util.get_node_ip_address(), task.gpus > 0
        with joined(job.run.stack(task.id), rank, task.ranks, token, address, gpu=gpu) as ranks:
            return work(task, job, ranks)
