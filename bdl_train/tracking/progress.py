"""The progress of a run in the terminal: a live view, or plain lines where there is no terminal."""

import time
from collections.abc import Mapping
from typing import Any

from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker

PLAIN_EVERY_S = 5.0


class Progress(Tracker):
    """Members, steps, loss, throughput and time left, over all stacks.

    Args:
        stack_sizes: Members of each stack by id, finished ones included.
    """

    def __init__(self, stack_sizes: Mapping[str, int]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._sizes = dict(stack_sizes)
        self._stacks: dict[str, Mapping[str, Any]] = {}
        self._members: dict[int, str] = {}
        self._start = time.monotonic()
        self._first_steps: dict[str, int] = {}
        self._first_event: float | None = None
        self._last_line = 0.0
        self._last_text = ""
        self._console = Console(highlight=False)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=1.0, line="starting workers")

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        self._start = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._console.print(f"training {sum(self._sizes.values())} members in {len(self._sizes)} stacks")

    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        if event["key"] == "progress":
            self._stacks[stack] = event["value"]
            self._first_event = self._first_event or time.monotonic()
            self._first_steps.setdefault(stack, event["value"]["step"])
        elif event["key"] == "member":
            self._members[event["member"]] = event["value"]
        self._show()

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        self._bar.stop()
        self._console.print(f"{self._line()}  [{status}]", markup=False)

    def _show(self) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=self._share(), line=self._line())
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S and self._line() != self._last_text:
            self._last_line, self._last_text = time.monotonic(), self._line()
            self._console.print(self._last_text, markup=False)

    def _share(self) -> float:
        """Share of all member-steps done; members that stopped early count as done."""
        total = sum(self._sizes.values())
        done = 0.0
        for stack, value in self._stacks.items():
            running = value["active"] / self._sizes[stack]
            done += self._sizes[stack] * (1 - running + running * value["step"] / value["num_steps"])
        return done / total

    def _line(self) -> str:
        total = sum(self._sizes.values())
        finished = sum(status == "done" for status in self._members.values())
        failed = sum(value["failed"] for value in self._stacks.values())
        parts = [f"{finished}/{total} members done"]
        if failed:
            parts.append(f"{failed} failed")
        losses = [value["nll"] for value in self._stacks.values() if value["nll"] is not None]
        steps = sum(value["step"] * self._sizes[stack] for stack, value in self._stacks.items())
        new = steps - sum(first * self._sizes[stack] for stack, first in self._first_steps.items())
        elapsed = time.monotonic() - (self._first_event or self._start)
        if losses:
            parts.append(f"training NLL {sum(losses) / len(losses):.4g} nats")
        if new > 0:
            parts.append(f"{new / elapsed:,.0f} member-steps/s")
            share = self._share()
            if 0 < share < 1:
                parts.append(f"{_duration(elapsed * (1 - share) / share)} left at most")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
