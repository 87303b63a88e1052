"""What the driver decides about stacks, as events: the plan's afterlife, for the dashboard and for whoever asks why."""

import logging
from typing import Any

from bdl_train.events import EventWriter
from bdl_train.runs import RunDir

log = logging.getLogger(__name__)


class Decisions:
    """Appends to `driver.jsonl`. A disk that takes no more costs the record, not the run.

    Keys: `launched`, `retry`, `node_lost`, `drained`, `blind`, `waiting`, `split`, `again`,
    `given_up`; the value names the stack and the reason.

    Args:
        run: Whose driver this is.
    """

    def __init__(self, run: RunDir) -> None:
        self._writer: EventWriter | None = None
        try:
            self._writer = EventWriter(run.driver_events)
        except OSError as error:
            self._give_up(error)

    def note(self, key: str, stack: str, **more: Any) -> None:
        """Record one decision."""
        if self._writer is None:
            return
        self._writer.write(key, [(None, {"stack": stack, **more})], step=0)
        try:
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _give_up(self, error: OSError) -> None:
        log.warning("Decisions of the driver are not recorded: %s", error)
        self._writer = None
