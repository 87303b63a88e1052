"""Showing and recording a run while it trains. Reads run directories only; one process, the driver, writes."""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bdl_train.runs import EventReader, RunDir

log = logging.getLogger(__name__)


class Tracker(ABC):
    """Receives what happens in a run. A tracker never fails a training."""

    @abstractmethod
    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        """Called once, before the first stack starts."""

    def past(self, stack: str, event: Mapping[str, Any]) -> None:  # noqa: B027  (most have no use for it)
        """Called after `start` for every event of the sessions before this one, when a run is resumed."""

    @abstractmethod
    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        """Called for every event of every stack, in the order of each file."""

    @abstractmethod
    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        """Called once, with the run's status and its metrics."""


class Follower:
    """Reads new events and hands them to every listener. A listener that raises is logged once and heard no more.

    Args:
        run: Whose event files are followed.
        listeners: Trackers and progress views.
    """

    def __init__(self, run: RunDir, listeners: Sequence[Tracker]) -> None:
        self._run = run
        self._reader = EventReader(run)
        self._listeners = list(listeners)

    def start(self, config: Mapping[str, Any]) -> None:
        """Start every listener and tell it what earlier sessions of the run wrote."""
        self._tell(lambda listener: listener.start(self._run, config))
        self._pass_on(lambda listener, stack, event: listener.past(stack, event))

    def tick(self) -> None:
        """Hand over what is new."""
        self._pass_on(lambda listener, stack, event: listener.event(stack, event))

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        self._tell(lambda listener: listener.finish(status, metrics))

    def _pass_on(self, call: Callable[[Tracker, str, Mapping[str, Any]], None]) -> None:
        with contextlib.suppress(OSError):  # a file that cannot be read now is read at the next tick
            for stack, event in self._reader.read():
                self._tell(lambda listener, stack=stack, event=event: call(listener, stack, event))

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
