"""Calls that may hang, made in order on a thread of their own: who asks for them never waits longer than it wants."""

import queue
import threading
from collections.abc import Callable

MOST_WAITING = 100_000
"""Calls; whoever is further behind than that will not catch up before the end of the run."""


class Worker:
    """A queue of calls. After the first one that raises, the others are dropped.

    Attributes:
        error: What that call raised, or that too many wait; None as long as all is well.
    """

    def __init__(self, name: str, most_waiting: int = MOST_WAITING) -> None:
        self.error: BaseException | None = None
        self._most_waiting = most_waiting
        self._calls: queue.SimpleQueue[Callable[[], object] | threading.Event | None] = queue.SimpleQueue()
        # A daemon: a call that never returns must not keep the process alive.
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, call: Callable[[], object]) -> None:
        """Have it called soon."""
        if self.error is None and self._calls.qsize() >= self._most_waiting:
            self.error = RuntimeError(f"it does not keep up: {self._most_waiting:,} calls wait")
        if self.error is None:
            self._calls.put(call)

    def wait(self, timeout_s: float) -> bool:
        """Whether everything that was put before is over, one way or the other, within this time."""
        over = threading.Event()
        self._calls.put(over)
        return over.wait(timeout_s)

    def close(self) -> None:
        """End the thread after the calls that wait; returns at once."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if isinstance(call, threading.Event):
                call.set()
            elif self.error is None:
                try:
                    call()
                except (
                    BaseException
                ) as error:  # a library may call sys.exit, which here would end the thread only
                    self.error = error
