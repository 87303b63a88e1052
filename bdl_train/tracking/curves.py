"""The learning curves of the whole ensemble: mean and spread over members, as soon as a step is complete.

A step of a curve is complete when every stack that still trains has gone beyond it. Stacks run at their own pace, and a
tracker cannot change a point that it has sent.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Point:
    """One point of one curve.

    Attributes:
        key: What the members reported, such as `train/nll`.
        step: Optimiser step.
        mean, std: Over the members that reported it; the members are the whole population.
        num_members: How many these are: fewer once some have stopped early or failed.
    """

    key: str
    step: int
    mean: float
    std: float
    num_members: int


class EnsembleCurves:
    """Fed with all events of a run, in the order of each file, it gives points in the order of steps.

    Args:
        stacks: Member numbers by stack id, of the plan. Stacks that are planned later announce themselves; of steps
            that were given before they have no part.
    """

    def __init__(self, stacks: Mapping[str, Sequence[int]]) -> None:
        self._running = {stack: set(members) for stack, members in stacks.items()}
        self._num_members = 1 + max((member for members in stacks.values() for member in members), default=0)
        self._values: dict[str, dict[int, np.ndarray]] = {}
        self._beyond: dict[str, dict[str, int]] = {}  # by key and stack: the last step it is done with
        self._count: dict[str, Counter[int]] = {}  # by key: running stacks at each of these steps
        self._block: dict[str, tuple[str, int]] = {}  # by stack: what it is reporting
        self._sent: dict[str, int] = {}

    def take(self, stack: str, event: Mapping[str, Any]) -> list[Point]:
        """The points that this event completes."""
        key, member, value, step = event["key"], event["member"], event["value"], event["step"]
        changed: set[str] = set()
        block = self._block.get(stack)
        if block is not None and block != (key, step):
            # Members report one after another: the block is whole when something else follows.
            del self._block[stack]
            changed |= self._pass(stack, *block)
        if key == "started":
            self._open(stack, value["members"])
        elif key == "split":
            for half in value:
                self._open(half, [-1])  # its members are not known yet
            changed |= self._close(stack)
        elif key == "member":
            running = self._running.get(stack, set())
            running.discard(member)
            changed |= self._close(stack) if not running else set()
        elif member is not None and is_number(value):
            self._block[stack] = (key, step)
            if step > self._sent.get(key, -1):
                self._row(key, step, member)[member] = value
        return [point for name in sorted(changed) for point in self._complete(name)]

    def rest(self) -> list[Point]:
        """The points that no more events will complete."""
        self._running.clear()
        return [
            point
            for key in sorted(self._values)
            for point in self._points(key, max(self._values[key], default=-1))
        ]

    def _open(self, stack: str, members: Sequence[int]) -> None:
        if stack not in self._running:
            for key, count in self._count.items():
                count[self._beyond[key].get(stack, -1)] += 1
        self._running[stack] = set(members)

    def _close(self, stack: str) -> set[str]:
        if self._running.pop(stack, None) is None:
            return set()
        for key, count in self._count.items():
            _take_away(count, self._beyond[key].get(stack, -1))
        return set(self._values)

    def _pass(self, stack: str, key: str, step: int) -> set[str]:
        """The stack is done with this step; returns the key if that may complete one."""
        if key not in self._count:
            self._count[key], self._beyond[key] = Counter({-1: len(self._running)}), {}
        before = self._beyond[key].get(stack, -1)
        if step <= before:  # again, from a checkpoint
            return set()
        self._beyond[key][stack] = step
        if stack in self._running:
            _take_away(self._count[key], before)
            self._count[key][step] += 1
        return {key} if before not in self._count[key] else set()

    def _complete(self, key: str) -> Iterator[Point]:
        count = self._count.get(key)
        return self._points(key, min(count) if count else max(self._values.get(key, {}), default=-1))

    def _points(self, key: str, last: int) -> Iterator[Point]:
        rows = self._values.get(key, {})
        for step in sorted(step for step in rows if step <= last):
            values = rows.pop(step)
            values = values[np.isfinite(values)]
            self._sent[key] = step
            if len(values):
                yield Point(key, step, float(values.mean()), float(values.std()), len(values))

    def _row(self, key: str, step: int, member: int) -> np.ndarray:
        rows = self._values.setdefault(key, {})
        if step not in rows:
            rows[step] = np.full(self._num_members, np.nan)
        if member >= len(rows[step]):  # of stacks that were planned later
            self._num_members = max(self._num_members, member + 1)
            rows[step] = np.concatenate([rows[step], np.full(self._num_members - len(rows[step]), np.nan)])
        return rows[step]


def is_number(value: Any) -> bool:
    """Whether a curve can have this value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _take_away(count: Counter[int], step: int) -> None:
    count[step] -= 1
    if count[step] <= 0:
        del count[step]
