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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from bdl_train.build import allowed_packages
from bdl_train.distributed import Job
from bdl_train.distributed.decisions import Decisions
from bdl_train.distributed.follow_ups import follow_ups
from bdl_train.distributed.plan import count
from bdl_train.distributed.ray_places import Places, forget_places, places_of
from bdl_train.distributed.ray_work import BLIND, work_remotely
from bdl_train.distributed.split import split
from bdl_train.errors import UsageError
from bdl_train.runs import RunDir
from bdl_train.training.prepared import StackTask
from bdl_train.training.train_stack import STOPPED

log = logging.getLogger(__name__)

TICK_S = 0.25
LOOK_S = 1.0
"""Between two looks at the nodes."""
RANKS_GRACE_S = 10.0
"""For the other ranks of a stack to end by themselves after one of them failed."""
NODE_LOSSES = 5
"""Of one stack that are nobody's fault; more of them count as crashes of the stack."""


@dataclass
class _Flight:
    """A stack that Ray works on: its tasks, and what came of those that ended.

    Attributes:
        drained: A node under it was told to go, so it was asked to save and stop.
        waits: No node that is left can hold it, and that was said.
    """

    task: StackTask
    open: list[Any]
    group: Any = None
    ended: list[dict[str, Any] | Exception] = field(default_factory=list)
    failed_at: float | None = None
    drained: bool = False
    waits: bool = False


class RayLoop:
    """Carries out a plan on the Ray that this process is connected to.

    Args:
        ray: The module, connected.
        job: Of the run.
        num_workers: Stacks at the same time; None = as many as Ray finds room for, also on nodes that join later.
        max_retries: Crashes of a stack that are answered by another try; then it is cut into halves, or given up if
            its members interact.
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
        self._places = Places(ray)

    def run(self, tasks: Sequence[StackTask], tick: Callable[[], None]) -> dict[str, dict[str, Any]]:
        """As `Launcher.launch`."""
        results: dict[str, dict[str, Any]] = {}
        waiting: deque[StackTask] = deque(tasks)
        flights: list[_Flight] = []
        decisions, last_tick, last_look, stopping = Decisions(self._run), 0.0, time.monotonic(), False
        try:
            while waiting or flights:
                while waiting and len(flights) < self._num_workers:
                    flights.append(self._launch(waiting.popleft(), decisions))
                self._wait(flights)
                if time.monotonic() - last_tick >= TICK_S:
                    tick()
                    last_tick = time.monotonic()
                if not stopping and self._run.stop_file.exists():
                    stopping = True
                    self._call_back(flights)
                if stopping:
                    results.update({task.id: dict(STOPPED) for task in waiting})
                    waiting.clear()
                elif time.monotonic() - last_look >= LOOK_S:
                    self._look_at_nodes(flights, decisions)
                    last_look = time.monotonic()
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
        if allowed := self._places.allowed():
            options["label_selector"] = allowed
        folder = self._run.stack(task.id)
        forget_places(folder)
        (folder / self._run.stop_file.name).unlink(missing_ok=True)
        decisions.note("launched", task.id, members=list(task.members), ranks=task.ranks)
        if task.ranks == 1:
            return _Flight(task, [self._remote.options(**options).remote(task, self._shared, self._packages)])
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = {"CPU": task.cpus, **({"GPU": task.gpus} if task.gpus else {})}
        options.pop("label_selector", None)
        more: dict[str, Any] = {"bundle_label_selector": [allowed] * task.ranks} if allowed else {}
        group = placement_group([bundle] * task.ranks, strategy="PACK", **more)
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
                if isinstance(outcome, Exception) or outcome["status"] in ("failed", BLIND):
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
        results = [one for one in flight.ended if isinstance(one, dict)]
        blind = [one for one in results if one["status"] == BLIND]
        if blind:
            if self._run.stop_file.exists():
                return dict(STOPPED)
            return self._after_blind(flight.task, blind[0], decisions)
        if crashes:
            return self._after_crash(flight, crashes[0], decisions)
        failed = [one for one in results if one["status"] == "failed"]
        if failed:
            return failed[0]
        stopped = [one for one in results if one["status"] == "stopped"]
        if stopped and flight.drained and not self._run.stop_file.exists():
            return self._after_drain(flight.task, decisions)
        # Of several ranks the first one alone knows the members.
        return stopped[0] if stopped else next(one for one in results if len(one) > 1 or len(results) == 1)

    def _after_blind(self, task: StackTask, result: dict[str, Any], decisions: Decisions) -> None:
        """A node that joined late does not see the run: from now on nothing is placed there."""
        if result["id"] not in self._places.blind:
            log.error(
                "The node %s does not see %s: its stacks are placed elsewhere",
                result["node"],
                self._run.path.absolute(),
            )
            self._places.blind[result["id"]] = result["node"]
        decisions.note(
            "blind", task.id, reason="the node does not see the run directory", node=result["node"]
        )

    def _after_drain(self, task: StackTask, decisions: Decisions) -> None:
        log.warning("Stack %s: its node is taken out of service, it goes on elsewhere", task.id)
        decisions.note("drained", task.id, reason="its node is taken out of service")

    def _after_crash(self, flight: _Flight, error: Exception, decisions: Decisions) -> dict[str, Any] | None:
        task = flight.task
        if self._run.stop_file.exists():
            return dict(STOPPED)
        if flight.drained:  # its node was gone before it had saved
            return self._after_drain(task, decisions)
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
        if len(task.members) > 1 and task.together is not None:
            reason += f", and it is not cut: {task.together}"
        elif len(task.members) > 1:
            log.warning("Stack %s: %s, it is cut into halves", task.id, reason)
            decisions.note("split", task.id, reason=reason)
            return split(self._run, task, reason)
        log.error("Stack %s is given up: %s", task.id, reason)
        decisions.note("given_up", task.id, reason=reason)
        return {"status": "failed", "reason": reason}

    def _look_at_nodes(self, flights: Sequence[_Flight], decisions: Decisions) -> None:
        """Have stacks leave nodes that go, and say which ones no node can hold: Ray lets them wait without a word."""
        self._places.look()
        new = []
        for flight in [one for one in flights if one.open and not one.drained]:
            task, folder = flight.task, self._run.stack(flight.task.id)
            if self._places.draining and places_of(folder) & self._places.draining:
                with suppress(OSError):  # a full disk: the next look tries again, or the node is lost
                    (folder / self._run.stop_file.name).touch()
                    flight.drained = True
                continue
            held = self._places.can_hold(task)
            if not held and not flight.waits:
                new.append(flight)
                decisions.note("waiting", task.id, reason=f"no node has {_share(task)}")
            flight.waits = not held
        if new:
            log.warning(
                "No node that is left has %s: %s, until one joins. Ctrl-C stops the run, which can be resumed.",
                _share(new[0].task),
                f"stack {new[0].task.id} waits" if len(new) == 1 else f"{len(new)} stacks wait",
            )

    def _call_back(self, flights: Sequence[_Flight]) -> None:
        """Take back what no worker has begun; others may keep its nodes for hours. Who has begun does not listen."""
        for flight in flights:
            for reference in flight.open:
                self._ray.cancel(reference, force=False)

    def _cancel(self, flight: _Flight) -> None:
        for reference in flight.open:
            self._ray.cancel(reference, force=True)

    def _free(self, flight: _Flight) -> None:
        if flight.group is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(flight.group)


def _share(task: StackTask) -> str:
    share = f"{count(task.cpus, 'CPU')} and {count(task.gpus, 'GPU')}"
    return share if task.ranks == 1 else f"{task.ranks} times {share}"
