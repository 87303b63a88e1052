"""Showing and recording a run while it trains. Reads run directories only; one process, the driver, writes."""

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bdl_train.events import EventReader
from bdl_train.runs import RunDir
from bdl_train.tracking.silence import Sign, after, after_decisions, silent

log = logging.getLogger(__name__)
Event = TypeVar("Event")


class Tracker(ABC):
    """Receives what happens in a run. What it raises while a run goes on is contained: it never fails a training."""

    def check(self, num_members: int) -> None:  # noqa: B027  (most have nothing to refuse)
        """Called before any work.

        Raises:
            UsageError: it cannot track such a run here.
        """

    @abstractmethod
    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        """Called once, before the first stack starts."""

    def past(self, stack: str, event: Mapping[str, Any]) -> None:  # noqa: B027  (most have no use for it)
        """Called after `start` for every event of the sessions before this one, when a run is resumed."""

    @abstractmethod
    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        """Called for every event of every stack, in the order of each file."""

    def silent(self, stacks: Mapping[str, float]) -> None:  # noqa: B027  (most have no use for it)
        """Called at every tick while stacks that should write do not, with the seconds, and once when none is left."""

    @abstractmethod
    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        """Called once, with the run's status and its metrics."""


class Follower:
    """Reads new events and hands them to every listener. A listener that raises is logged once and heard no more.

    Args:
        run: Whose event files are followed.
        listeners: Trackers and progress views.

    Attributes:
        lost: The listeners that raised.
    """

    def __init__(self, run: RunDir, listeners: Sequence[Tracker]) -> None:
        self._run = run
        self._reader = EventReader(run)
        self._listeners = list(listeners)
        self._signs: dict[str, Sign] = {}
        self._silent: dict[str, float] = {}
        self.lost: list[Tracker] = []

    def start(self, config: Mapping[str, Any]) -> None:
        """Start every listener and tell it what earlier sessions of the run wrote."""
        self._tell(lambda listener: listener.start(self._run, config))
        for stack, event in self._new(self._reader.read()):
            self._tell(lambda listener, stack=stack, event=event: listener.past(stack, event))
        for _ in self._new(self._reader.read_decisions()):
            pass

    def tick(self) -> None:
        """Hand over what is new, and say which stacks should have written and have not."""
        now = time.monotonic()
        # Decisions first: a stack that was taken from one worker may speak from another since.
        self._signs = after_decisions(self._signs, self._new(self._reader.read_decisions()))
        events = list(self._new(self._reader.read()))
        self._signs = after(self._signs, events, now)
        for stack, event in events:
            self._tell(lambda listener, stack=stack, event=event: listener.event(stack, event))
        self._notice_silence(now)

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        self._tell(lambda listener: listener.finish(status, metrics))

    @staticmethod
    def _new(events: Iterator[Event]) -> Iterator[Event]:
        with contextlib.suppress(OSError):  # a file that cannot be read now is read at the next tick
            yield from events

    def _notice_silence(self, now: float) -> None:
        before, self._silent = self._silent, silent(self._signs, now)
        for stack in self._silent.keys() - before.keys():
            host = self._signs[stack].host
            log.warning(
                "stack %s%s has written nothing for %.0f s: it is busy with something long, or lost",
                stack,
                f" on {host}" if host else "",
                self._silent[stack],
            )
        for stack in before.keys() & self._signs.keys() - self._silent.keys():
            log.warning("stack %s is back after %.0f s", stack, before[stack])
        if before or self._silent:
            self._tell(lambda listener: listener.silent(self._silent))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for listener in list(self._listeners):
            try:
                call(listener)
            except Exception as error:
                name = type(listener).__name__
                log.warning(
                    "%s failed (%s: %s): the run goes on without it", name, type(error).__name__, error
                )
                self._listeners.remove(listener)
                self.lost.append(listener)
