"""The Ray launcher on this machine: a private Ray, started for the run and ended with it."""

import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.distributed._ray_loop import RayLoop
from bdl_train.distributed._ray_map import ray_map
from bdl_train.errors import RunFailedError, UsageError
from bdl_train.training.prepared import StackTask

log = logging.getLogger(__name__)

QUIET = {
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
        ranks_per_stack: Processes that split the batches of a stack, each with these CPUs and GPUs.
        num_cpus, num_gpus: What Ray may hand out; null = what this process may use.
        max_retries: Times a stack whose worker died is started again, from its checkpoint; then it is cut into halves.
    """

    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]
    ranks_per_stack: Annotated[int, Field(ge=1)]
    num_cpus: Annotated[int, Field(ge=1)] | None
    num_gpus: Annotated[int, Field(ge=0)] | None
    max_retries: Annotated[int, Field(ge=0)]

    remote = True

    def resources(self) -> Resources:
        gpus = self.num_gpus
        if gpus is None:
            gpus = 0
            if self.gpus_per_stack > 0:
                import torch

                gpus = torch.cuda.device_count()
        return Resources(self.num_cpus or len(os.sched_getaffinity(0)), gpus)

    def open(self) -> None:
        start(self.resources())

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        ray = start(self.resources())
        loop = RayLoop(ray, job, num_workers=self.num_workers, max_retries=self.max_retries)
        return loop.run(tasks, tick)

    def map(
        self, function: Callable[..., Any], shared: tuple[Any, ...], tasks: Sequence[Any]
    ) -> Iterator[Any]:
        return ray_map(
            start(self.resources()),
            function,
            shared,
            tasks,
            cpus=self.cpus_per_stack or 1,
            gpus=self.gpus_per_stack,
            at_once=self.num_workers,
        )

    def close(self) -> None:
        stop()


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
    for name, value in QUIET.items():
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
