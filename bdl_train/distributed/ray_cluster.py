"""The launcher for a Ray cluster that others started: this process stands on one of its nodes."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.build import allowed_packages
from bdl_train.distributed import Job, Launcher, Resources
from bdl_train.distributed._ray_loop import RayLoop
from bdl_train.distributed._ray_map import ray_map
from bdl_train.distributed.ray_address import require_answer, settled
from bdl_train.distributed.ray_local import QUIET
from bdl_train.distributed.ray_token import token_of
from bdl_train.distributed.shared_folder import require_shared
from bdl_train.errors import UsageError
from bdl_train.training.prepared import StackTask

log = logging.getLogger(__name__)

_joined = False
"""Whether this process joined a cluster; Ray knows one cluster a process."""


@dataclass(frozen=True, kw_only=True)
class RayCluster(Launcher):
    """An existing Ray.

    Attributes:
        address: `IP:PORT` of its head, or `auto`: RAY_ADDRESS, else the Ray that runs on this machine.
        token_file: A file with its token, readable by its owner only; null = the environment's RAY_AUTH_TOKEN.
        connect_timeout_s: Seconds to wait for an answer at the address.
        num_workers: Stacks at the same time; null = as many as there is room for, also on nodes that join later.
        members_per_stack: Most members of a stack; null = chosen by the plan.
        cpus_per_stack: Threads a stack; null = an equal share.
        gpus_per_stack: Share of a GPU a stack; 0 = CPU.
        ranks_per_stack: Processes that split the batches of a stack, each with these CPUs and GPUs.
        max_retries: Times a stack whose worker died is started again, from its checkpoint; then it is cut into halves.
    """

    address: Annotated[str, Field(min_length=1)]
    token_file: str | None
    connect_timeout_s: Annotated[float, Field(gt=0)]
    num_workers: Annotated[int, Field(ge=1)] | None
    members_per_stack: Annotated[int, Field(ge=1)] | None
    cpus_per_stack: Annotated[int, Field(ge=1)] | None
    gpus_per_stack: Annotated[float, Field(ge=0, le=1)]
    ranks_per_stack: Annotated[int, Field(ge=1)]
    max_retries: Annotated[int, Field(ge=0)]

    remote = True

    def resources(self) -> Resources:
        """What its nodes have, from the cluster itself."""
        nodes = [node["Resources"] for node in self._connect().nodes() if node["Alive"]]
        held = Resources.of_nodes((int(node.get("CPU", 0)), node.get("GPU", 0.0)) for node in nodes)
        if held.cpus == 0:
            raise UsageError(f"The Ray at cluster.address={self.address} has no CPUs to hand out.")
        return held

    def open(self) -> None:
        self._connect()

    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        ray = self._connect()
        require_shared(ray, job.run)
        loop = RayLoop(ray, job, num_workers=self.num_workers, max_retries=self.max_retries)
        return loop.run(tasks, tick)

    def map(
        self, function: Callable[..., Any], shared: tuple[Any, ...], tasks: Sequence[Any]
    ) -> Iterator[Any]:
        return ray_map(
            self._connect(),
            function,
            shared,
            tasks,
            cpus=self.cpus_per_stack or 1,
            gpus=self.gpus_per_stack,
            at_once=self.num_workers,
        )

    def close(self) -> None:
        """Leave the cluster, which goes on."""
        global _joined
        if _joined:
            import ray

            ray.shutdown()
            _joined = False

    def _connect(self) -> Any:
        """The ray module, connected.

        Raises:
            UsageError: nobody answers at the address, or the token is not the cluster's.
        """
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        # How often Ray asks again, a second apart: a wrong token would otherwise take it 20 seconds.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
        self._take_token()
        address = settled(self.address)
        by_environment = self.address == "auto" and os.environ.get("RAY_ADDRESS")
        key = "RAY_ADDRESS" if by_environment else "cluster.address"
        require_answer(address, key, self.connect_timeout_s)
        import ray

        global _joined
        if ray.is_initialized():
            return ray
        settings: dict[str, Any] = {}
        if allowed_packages():
            # Its workers were started elsewhere: packages that the user allows may lie in this folder.
            path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
            settings["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(path)}}
        stale = os.environ.pop("RAY_ADDRESS", None) if self.address != "auto" else None
        if stale not in (None, address):
            log.warning("RAY_ADDRESS=%s is ignored: cluster.address=%s", stale, self.address)
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **settings)
        except Exception as error:  # of many kinds: refused, unknown session, authentication
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if "token" in str(cause).lower():
                raise UsageError(
                    f"The Ray at {key}={address} refuses the token: set RAY_AUTH_TOKEN or "
                    "cluster.token_file to the one that the cluster was started with."
                ) from error
            raise UsageError(
                f"{key}={address} cannot be joined ({type(error).__name__}: {error}). A driver runs on "
                "one of the cluster's nodes: log in there, or use `bdl submit cluster=ray_job`."
            ) from error
        _joined = True
        return ray

    def _take_token(self) -> None:
        if os.environ.get("RAY_AUTH_MODE") == "disabled":
            log.warning("RAY_AUTH_MODE=disabled: whoever reaches this Ray can run code on its nodes")
            return
        token = token_of(self.token_file)
        if token is None:
            raise UsageError(
                f"The Ray at cluster.address={self.address} asks for its token: set RAY_AUTH_TOKEN in the environment, "
                "or cluster.token_file."
            )
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
