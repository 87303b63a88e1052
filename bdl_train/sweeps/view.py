"""What a sweep shows: a line for every trial that runs and one for all, or plain lines where there is no terminal."""

import time
from collections.abc import Mapping
from typing import Any

from bdl_train.runs import RunDir
from bdl_train.tracking.progress import Progress

PLAIN_EVERY_S = 15.0


class TrialLine(Progress):
    """The progress of one trial as a text, kept and not shown; it is filled in the trial's thread.

    Args:
        stack_sizes: Members of each stack by id.

    Attributes:
        text: One line.
    """

    def __init__(self, stack_sizes: Mapping[str, int]) -> None:
        super().__init__(stack_sizes)
        self.text = "starting"

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        pass

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        self.text = f"scoring [{status}]"

    def _show(self) -> None:
        self.text = self._line()


def rows(total: str, lines: Mapping[str, str], width: int) -> list[str]:
    """What a terminal of this width shows: a row for every trial, the total last."""
    return [row[:width] for row in (*(f"{name}: {line}" for name, line in lines.items()), total)]


class SweepView:
    """Lines for people. One thread, the sweep's own, calls it."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._live: Any = None
        self._last = time.monotonic()

    def start(self) -> None:
        if self._console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)

    def show(self, total: str, lines: Mapping[str, str]) -> None:
        """The state now.

        Args:
            total: Of the sweep.
            lines: By trial.
        """
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text("\n".join(rows(total, lines, self._console.width - 1))))
        elif time.monotonic() - self._last >= PLAIN_EVERY_S:
            self._last = time.monotonic()
            self.say(total)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
