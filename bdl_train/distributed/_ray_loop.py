"""The driver's loop over Ray tasks: one plain task a stack, or one for each of its ranks; retries, cuts, follow-ups.

Plain tasks, not actors, Tune or Train: they start in under a second, and a dead worker costs one task. Ray's own
retries are off: what a lost worker means is decided here, and recorded.
"""

import logging
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bdl_train.build import allowed_packages, allowing
from bdl_train.distributed import Job
from bdl_train.distributed.decisions import Decisions
from bdl_train.distributed.follow_ups import follow_ups
from bdl_train.distributed.split import split
from bdl_train.distributed.work import work
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.training.ranks import joined
from bdl_train.training.train_stack import STOPPED

log = logging.getLogger(__name__)

TICK_S = 0.25
RANKS_GRACE_S = 10.0
"""For the other ranks of a stack to end by themselves after one of them failed."""
NODE_LOSSES = 5
"""Of one stack that are nobody's fault; more of them count as crashes of the stack."""


@dataclass
class _Flight:
    """A stack that Ray works on: its tasks, and what came of those that ended."""

    task: StackTask
    open: list[Any]
    group: Any = None
    ended: list[dict[str, Any] | Exception] = field(default_factory=list)
    failed_at: float | None = None


class RayLoop:
    """Carries out a plan on the Ray that this process is connected to.

    Args:
        ray: The module, connected.
        job: Of the run.
        num_workers: Stacks at the same time; None = as many as Ray finds room for, also on nodes that join later.
        max_retries: Crashes of a stack that are answered by another try; then it is cut into halves.
    """

    def __init__(self, ray: Any, job: Job, *, num_workers: int | None, max_retries: int) -> None:
        self._ray, self._run = ray, job.run
        self._num_workers, self._max_retries = num_workers or math.inf, max_retries
        self._remote = ray.remote(max_retries=0)(work_remotely)
        # Once for all stacks, arrays as numpy: workers read them in place. They stand in another folder, too.
        self._shared = ray.put(replace(job, run=RunDir(job.run.path.absolute())))
        self._packages = allowed_packages()
        self._crashes: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()

    def run(self, tasks: Sequence[StackTask], tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
        """As `Launcher.launch`."""
        results: dict[str, dict[str, Any]] = {}
        waiting, flights = deque(tasks), []
        decisions, last_tick = Decisions(self._run), 0.0
        try:
            while waiting or flights:
                while waiting and len(flights) < self._num_workers:
                    flights.append(self._launch(waiting.popleft(), decisions))
                self._wait(flights)
                if time.monotonic() - last_tick >= TICK_S:
                    tick()
                    last_tick = time.monotonic()
                for flight in [one for one in flights if not one.open]:
                    flights.remove(flight)
                    self._free(flight)
                    result = self._result(flight, decisions)
                    if result is None:
                        waiting.appendleft(flight.task)
                        continue
                    results[flight.task.id] = result
                    more = follow_ups(flight.task, result)
                    if result.get("again"):
                        decisions.note("again", flight.task.id, members=result["again"], into=more[0].id)
                    waiting.extendleft(reversed(more))
        finally:
            for flight in flights:  # only when the loop was left by an exception
                self._cancel(flight)
                self._free(flight)
            decisions.close()
        tick()
        return results

    def _launch(self, task: StackTask, decisions: Decisions) -> _Flight:
        options: dict[str, Any] = {"num_cpus": task.cpus, "num_gpus": task.gpus, "name": f"stack-{task.id}"}
        decisions.note("launched", task.id, members=list(task.members), ranks=task.ranks)
        if task.ranks == 1:
            return _Flight(task, [self._remote.options(**options).remote(task, self._shared, self._packages)])
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": task.cpus, **({"GPU": task.gpus} if task.gpus else {})}
        group = placement_group([bundle] * task.ranks, strategy="PACK")
        token, open_ = secrets.token_hex(4), []
        for rank in range(task.ranks):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            remote = self._remote.options(**{**options, "scheduling_strategy": place})
            open_.append(remote.remote(task, self._shared, self._packages, rank, token))
        return _Flight(task, open_, group)

    def _wait(self, flights: list[_Flight]) -> None:
        """Until something ends, or for a tick; notes what ended."""
        references = [reference for flight in flights for reference in flight.open]
        ready, _ = self._ray.wait(references, timeout=TICK_S)
        if ready:  # the first one came; take all that are there
            ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        done = set(ready)
        for flight in flights:
            for reference in [one for one in flight.open if one in done]:
                flight.open.remove(reference)
                outcome = self._outcome(reference, flight.task)
                flight.ended.append(outcome)
                if isinstance(outcome, Exception) or outcome["status"] == "failed":
                    flight.failed_at = flight.failed_at or time.monotonic()
            if flight.open and flight.failed_at and time.monotonic() > flight.failed_at + RANKS_GRACE_S:
                self._cancel(flight)
                flight.open = []

    def _outcome(self, reference: Any, task: StackTask) -> dict[str, Any] | Exception:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UsageError):
                raise error.cause from None
            log.error("Stack %s failed before its work began:\n%s", task.id, error)
            return {"status": "failed", "reason": f"{type(error.cause).__name__}: {error.cause}"}
        except self._ray.exceptions.RayError as error:
            return error

    def _result(self, flight: _Flight, decisions: Decisions) -> dict[str, Any] | None:
        """What the stack came to, or None to start it again."""
        crashes = [one for one in flight.ended if isinstance(one, Exception)]
        if crashes:
            return self._after_crash(flight.task, crashes[0], decisions)
        results = [one for one in flight.ended if isinstance(one, dict)]
        failed = [one for one in results if one["status"] == "failed"]
        if failed:
            return failed[0]
        stopped = [one for one in results if one["status"] == "stopped"]
        # Of several ranks the first one alone knows the members.
        return stopped[0] if stopped else next(one for one in results if len(one) > 1 or len(results) == 1)

    def _after_crash(self, task: StackTask, error: Exception, decisions: Decisions) -> dict[str, Any] | None:
        if self._run.stop_file.exists():
            return dict(STOPPED)
        kind = type(error).__name__
        if isinstance(error, self._ray.exceptions.NodeDiedError) and self._losses[task.id] < NODE_LOSSES:
            self._losses[task.id] += 1
            log.warning("Stack %s: its node is gone, it starts again from its checkpoint", task.id)
            decisions.note("node_lost", task.id, reason=str(error).strip().splitlines()[0])
            return None
        self._crashes[task.id] += 1
        reason = f"its worker process died {self._crashes[task.id]} times ({kind})"
        if self._crashes[task.id] <= self._max_retries:
            log.warning("Stack %s: %s, it starts again from its checkpoint", task.id, reason)
            decisions.note("retry", task.id, reason=reason)
            return None
        if len(task.members) > 1:
            log.warning("Stack %s: %s, it is cut into halves", task.id, reason)
            decisions.note("split", task.id, reason=reason)
            return split(self._run, task, reason)
        log.error("Stack %s is given up: %s", task.id, reason)
        decisions.note("given_up", task.id, reason=reason)
        return {"status": "failed", "reason": reason}

    def _cancel(self, flight: _Flight) -> None:
        for reference in flight.open:
            self._ray.cancel(reference, force=True)

    def _free(self, flight: _Flight) -> None:
        if flight.group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(flight.group)


def work_remotely(
    task: StackTask, job: Job, packages: tuple[str, ...], rank: int = 0, token: str = ""
) -> dict[str, Any]:
    """What a Ray task runs: one rank of a stack."""
    with allowing(packages):
        if not job.run.config.is_file():
            import socket

            raise UsageError(
                f"The node {socket.gethostname()} does not see {job.run.path}: output_dir must lie on a file system "
                "that all nodes share."
            )
        if task.ranks == 1:
            return work(task, job)
        import ray

        address, gpu = ray.util.get_node_ip_address(), task.gpus > 0
        with joined(job.run.stack(task.id), rank, task.ranks, token, address, gpu=gpu) as ranks:
            return work(task, job, ranks)
