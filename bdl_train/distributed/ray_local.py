"""The Ray launcher on this machine: one plain task a stack, driven by our own loop over `ray.wait`.

Plain tasks, not actors, Tune or Train: they start in under a second, and a dead worker costs one task.
"""

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.build import allowed_packages, allowing
from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.errors import UsageError
from bdl_train.training.train_stack import StackTask, train_stack

log = logging.getLogger(__name__)

TICK_S = 0.25
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run`, Ray would otherwise upload the current folder and start each worker with uv.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
}


@dataclass(frozen=True, kw_only=True)
class RayLocal(Launcher):
    """A private Ray on this machine.

    Attributes:
        num_workers: Stacks at the same time; null = as many as fit.
        members_per_stack: Most members of a stack; null = chosen by the plan.
        cpus_per_stack: Threads a stack; null = an equal share.
        gpus_per_stack: Share of a GPU a stack; 0 = CPU.
        num_cpus, num_gpus: What Ray may hand out; null = what this process may use.
        max_retries: Times a stack whose worker died is started again, from its checkpoint.
    """

    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0)]
    num_cpus: Annotated[int, Field(ge=1)] | None
    num_gpus: Annotated[int, Field(ge=0)] | None
    max_retries: Annotated[int, Field(ge=0)]

    def resources(self) -> Resources:
        gpus = self.num_gpus
        if gpus is None:
            gpus = 0
            if self.gpus_per_stack > 0:
                import torch

                gpus = torch.cuda.device_count()
        return Resources(self.num_cpus or len(os.sched_getaffinity(0)), gpus)

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        ray = start(self.resources())
        remote = ray.remote(max_retries=0)(_train_remotely)
        shared = ray.put(job)
        packages = allowed_packages()

        def submit(task: StackTask) -> Any:
            return remote.options(num_cpus=task.cpus, num_gpus=task.gpus, name=f"stack-{task.id}").remote(
                task, shared, packages
            )

        results: dict[str, dict[str, Any]] = {}
        crashes = dict.fromkeys((task.id for task in tasks), 0)
        pending = {submit(task): task for task in tasks}
        while pending:
            ready, _ = ray.wait(list(pending), timeout=TICK_S)
            tick()
            for reference in ready:
                task = pending.pop(reference)
                try:
                    results[task.id] = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    if isinstance(cause, UsageError):
                        raise cause from None
                    log.error("Stack %s failed:\n%s", task.id, error)
                    results[task.id] = {"status": "failed", "reason": f"{type(cause).__name__}: {cause}"}
                except ray.exceptions.RayError as error:
                    crashes[task.id] += 1
                    reason = f"its worker process died ({type(error).__name__})"
                    if crashes[task.id] > self.max_retries or job.run.stop_file.exists():
                        results[task.id] = {
                            "status": "failed",
                            "reason": f"{reason} {crashes[task.id]} times",
                        }
                        log.error("Stack %s is given up: %s", task.id, reason)
                    else:
                        log.warning("Stack %s: %s, it starts again from its checkpoint", task.id, reason)
                        pending[submit(task)] = task
        tick()
        return results

    def close(self) -> None:
        stop()


def _train_remotely(task: StackTask, job: Job, packages: tuple[str, ...]) -> dict[str, Any]:
    with allowing(packages):
        return train_stack(task, job.config, job.data, job.run)


_temp_dir: str | None = None


def start(resources: Resources) -> Any:
    """Start a private Ray, or reuse the one this process started; returns the module."""
    global _temp_dir
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Without them Ray's behaviour would depend on a token file that an earlier run may have left at home.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    stale = os.environ.pop("RAY_ADDRESS", None)
    if stale:
        log.warning("RAY_ADDRESS=%s is ignored: cluster=ray_local starts its own Ray", stale)
    import ray

    if not ray.is_initialized():
        # Socket paths end at 107 bytes and Ray adds 62 to the folder: keep it short.
        _temp_dir = tempfile.mkdtemp(prefix="bdl-ray-", dir="/tmp")
        ray.init(
            num_cpus=resources.cpus,
            num_gpus=int(resources.gpus),
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            _temp_dir=_temp_dir,
        )
    return ray


def stop() -> None:
    """End the Ray that `start` started; nobody else's."""
    global _temp_dir
    if _temp_dir is not None:
        import ray

        ray.shutdown()
        shutil.rmtree(_temp_dir, ignore_errors=True)
        _temp_dir = None
