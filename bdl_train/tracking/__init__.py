"""Showing and recording a run while it trains. Reads run directories only; one process, the driver, writes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from bdl_train.runs import EventReader, RunDir


class Tracker(ABC):
    """Receives what happens in a run. A tracker never fails a training."""

    @abstractmethod
    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        """Called once, before the first stack starts."""

    @abstractmethod
    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        """Called for every event of every stack, in the order of each file."""

    @abstractmethod
    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        """Called once, with the run's status and its metrics."""


class Follower:
    """Reads new events and hands them to every listener.

    Args:
        run: Whose event files are followed.
        listeners: Trackers and progress views.
    """

    def __init__(self, run: RunDir, listeners: list[Tracker]) -> None:
        self._reader = EventReader(run)
        self._listeners = listeners

    def tick(self) -> None:
        for stack, event in self._reader.read():
            for listener in self._listeners:
                listener.event(stack, event)
