"""No tracker: events and metrics stay in the run directory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker


@dataclass(frozen=True, kw_only=True)
class NoTracker(Tracker):
    """Keeps nothing."""

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None: ...

    def event(self, stack: str, event: Mapping[str, Any]) -> None: ...

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None: ...
