"""The Ray launcher on this machine: one plain task a stack, driven by our own loop over `ray.wait`.

Plain tasks, not actors, Tune or Train: they start in under a second, and a dead worker costs one task.
"""

import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from bdl_train.build import allowed_packages, allowing
from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.distributed.follow_ups import follow_ups
from bdl_train.distributed.split import split
from bdl_train.distributed.work import work
from bdl_train.errors import RunFailedError, UsageError
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import STOPPED

log = logging.getLogger(__name__)

TICK_S = 0.25
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run`, Ray would otherwise upload the current folder and start each worker with uv.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_DEDUP_LOGS": "0",
    # Despite its name, everywhere: a Ray without other machines listens on the loopback device only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
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
        max_retries: Times a stack whose worker died is started again, from its checkpoint; then it is cut into halves.
    """

    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]
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
        remote = ray.remote(max_retries=0)(_work_remotely)
        # Workers stand in the folder where Ray was started, which need not be this process's.
        shared = ray.put(replace(job, run=RunDir(job.run.path.absolute())))
        packages = allowed_packages()

        def submit(task: StackTask) -> Any:
            options = {"num_cpus": task.cpus, "num_gpus": task.gpus, "name": f"stack-{task.id}"}
            return remote.options(**options).remote(task, shared, packages)

        results: dict[str, dict[str, Any]] = {}
        crashes: Counter[str] = Counter()
        waiting, pending = deque(tasks), {}
        try:
            while waiting or pending:
                while waiting and len(pending) < (self.num_workers or math.inf):
                    task = waiting.popleft()
                    pending[submit(task)] = task
                ready, _ = ray.wait(list(pending), timeout=TICK_S)
                tick()
                for reference in ready:
                    task = pending.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        if isinstance(error.cause, UsageError):
                            raise error.cause from None
                        log.error("Stack %s failed before its work began:\n%s", task.id, error)
                        result = {
                            "status": "failed",
                            "reason": f"{type(error.cause).__name__}: {error.cause}",
                        }
                    except ray.exceptions.RayError as error:
                        crashes[task.id] += 1
                        result = self._after_crash(task, job.run, crashes[task.id], type(error).__name__)
                    if result is None:
                        waiting.appendleft(task)
                        continue
                    results[task.id] = result
                    waiting.extendleft(reversed(follow_ups(task, result)))
        finally:
            for reference in pending:  # only when the loop was left by an exception
                ray.cancel(reference, force=True)
        tick()
        return results

    def _after_crash(self, task: StackTask, run: RunDir, crashes: int, kind: str) -> dict[str, Any] | None:
        """What becomes of a stack whose worker process died: a result, or None to start it again."""
        if run.stop_file.exists():
            return dict(STOPPED)
        reason = f"its worker process died {crashes} times ({kind})"
        if crashes <= self.max_retries:
            log.warning("Stack %s: %s, it starts again from its checkpoint", task.id, reason)
            return None
        if len(task.members) > 1:
            log.warning("Stack %s: %s, it is cut into halves", task.id, reason)
            return split(run, task, reason)
        log.error("Stack %s is given up: %s", task.id, reason)
        return {"status": "failed", "reason": reason}

    def close(self) -> None:
        stop()


def _work_remotely(task: StackTask, job: Job, packages: tuple[str, ...]) -> dict[str, Any]:
    with allowing(packages):
        return work(task, job)


@dataclass(frozen=True)
class _Session:
    """The Ray that this process started; all its files lie below `folder`."""

    resources: Resources
    folder: str


_session: _Session | None = None


def start(resources: Resources) -> Any:
    """Start a private Ray, or reuse the running one; returns the module.

    Raises:
        UsageError: the Ray that runs in this process was started by others and has too little.
        RunFailedError: Ray does not start.
    """
    global _session
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # Without them Ray's behaviour would depend on a token file that an earlier run may have left at home.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    stale = os.environ.pop("RAY_ADDRESS", None)
    if stale:
        log.warning("RAY_ADDRESS=%s is ignored: cluster=ray_local starts its own Ray", stale)
    import ray

    if _session is not None and _session.resources != resources:
        stop()
    if not ray.is_initialized():
        # Ray opens its own folder to every user, so it lies in one that only we may enter. Socket paths end at 107
        # bytes and Ray adds 62 to its folder: keep both short.
        folder = tempfile.mkdtemp(prefix="bdl-ray-", dir="/tmp")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                num_cpus=resources.cpus,
                num_gpus=int(resources.gpus),
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=os.path.join(folder, "r"),
                _node_ip_address="127.0.0.1",
            )
        except (
            Exception
        ) as error:  # of many kinds: ports, sockets, memory, daemons that do not answer in time
            shutil.rmtree(folder, ignore_errors=True)
            raise RunFailedError(
                f"Ray could not start ({type(error).__name__}: {error}). "
                "The run can be resumed, also with cluster=inline."
            ) from error
        if threading.current_thread() is threading.main_thread():
            # Ray's own handler would end the driver at once, with the members unsaved.
            signal.signal(signal.SIGTERM, on_sigterm)
        _session = _Session(resources, folder)
    there = ray.cluster_resources()
    if there.get("CPU", 0) < resources.cpus or there.get("GPU", 0) < resources.gpus:
        # Ray would let such tasks wait for ever.
        raise UsageError(
            f"The plan is for {resources.cpus} CPUs and {resources.gpus:g} GPUs, the Ray that runs in this process has "
            f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}: set cluster.num_cpus and cluster.num_gpus."
        )
    return ray


def stop() -> None:
    """End the Ray that `start` started; nobody else's."""
    global _session
    if _session is not None:
        import ray

        ray.shutdown()
        for _ in range(20):  # its processes may still be writing their last words there
            shutil.rmtree(_session.folder, ignore_errors=True)
            if not os.path.exists(_session.folder):
                break
            time.sleep(0.1)
        _session = None
