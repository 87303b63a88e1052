"""What signals mean to a command whose work can be stopped and taken up again."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signal(is_asked: Callable[[], bool], ask: Callable[[], object], who: str) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGUSR1 asks the work to save and stop; a second Ctrl-C or SIGTERM ends at once.

    SIGUSR1 is how batch systems warn of the end of a job.

    Args:
        is_asked: Whether the work was asked to stop already, by a signal or otherwise.
        ask: Asks it.
        who: Saves, for the line that is printed: `members`.
    """

    def stop(signum: int, frame: Any) -> None:
        if is_asked():
            if signum == signal.SIGUSR1:
                return
            raise KeyboardInterrupt
        ask()
        os.write(2, f"\nstopping: {who} save their state (once more to end at once)\n".encode())

    before = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
