"""The progress of a run in the terminal: a live line, or plain lines where there is no terminal."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdl_train.runs import RunDir
from bdl_train.tracking import Tracker

PLAIN_EVERY_S = 5.0


@dataclass
class _StackView:
    """What is known of one stack: members, steps, how many run on, and its loss in nats."""

    size: int
    step: int = 0
    num_steps: int | None = None
    active: int = 0
    failed: int = 0
    nll: float | None = None
    first_step: int = 0  # of this session: what an earlier one did says nothing about today's speed

    def take(self, value: Mapping[str, Any]) -> None:
        self.step, self.num_steps = value["step"], value["num_steps"]
        self.active, self.failed, self.nll = value["active"], value["failed"], value["nll"]

    @property
    def share(self) -> float:
        """Of the stack's member-steps that are done; members that stopped early count as done."""
        if self.num_steps is None or self.size == 0:
            return 0.0
        running = self.active / self.size
        return 1 - running + running * self.step / self.num_steps


class Progress(Tracker):
    """Members, steps, loss, throughput and time left, over all stacks.

    Args:
        stack_sizes: Members of each stack by id.
    """

    def __init__(self, stack_sizes: Mapping[str, int]) -> None:
        from rich.console import Console

        self._stacks = {stack: _StackView(size) for stack, size in stack_sizes.items()}
        self._members: dict[int, str] = {}
        self._silent: Mapping[str, float] = {}
        self._first_event: float | None = None
        self._first_share = 0.0
        self._last_line = 0.0
        self._last_text = ""
        self._console = Console(highlight=False)
        self._live: Any = None

    @property
    def _num_members(self) -> int:
        return sum(one.size for one in self._stacks.values())

    def start(self, run: RunDir, config: Mapping[str, Any]) -> None:
        if not self._console.is_terminal:
            self._console.print(
                f"training {self._num_members} members in {len(self._stacks)} stacks", markup=False
            )
            return
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Live
        from rich.table import Column

        columns = (
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True)),
        )
        self._live = Live(*columns, console=self._console, transient=True, expand=True)
        self._live.add_task("training", total=1.0, line="starting workers")
        self._live.start()

    def past(self, stack: str, event: Mapping[str, Any]) -> None:
        self._take(stack, event)
        view = self._view(stack)
        view.first_step = view.step
        self._first_share = self._share()

    def event(self, stack: str, event: Mapping[str, Any]) -> None:
        if self._first_event is None:
            self._first_event = time.monotonic()
        if event["key"] == "started":
            # A stack that lost its worker starts again from its checkpoint: those steps are taken twice.
            view = self._view(stack)
            view.first_step -= view.step - event["step"]
            view.step = event["step"]
        self._take(stack, event)
        self._show()

    def silent(self, stacks: Mapping[str, float]) -> None:
        self._silent = stacks
        self._show()

    def finish(self, status: str, metrics: Mapping[str, float | None]) -> None:
        if self._live is not None:
            self._live.stop()
        self._console.print(f"{self._line(final=True)}  [{status}]", markup=False)

    def _view(self, stack: str) -> _StackView:
        return self._stacks.setdefault(stack, _StackView(0))

    def _take(self, stack: str, event: Mapping[str, Any]) -> None:
        if event["key"] == "progress":
            self._view(stack).take(event["value"])
        elif event["key"] == "started":
            self._view(stack).size = len(event["value"]["members"])
        elif event["key"] == "split":
            self._stacks.pop(stack, None)  # its halves announce themselves
        elif event["key"] == "again":
            view = self._view(stack)  # the retry announces itself
            view.size -= len(event["value"]["members"])
            view.failed -= len(event["value"]["members"])
        elif event["key"] == "member":
            self._members[event["member"]] = event["value"]

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=self._share(), line=self._line())
        elif time.monotonic() - self._last_line >= PLAIN_EVERY_S and self._line() != self._last_text:
            self._last_line, self._last_text = time.monotonic(), self._line()
            self._console.print(self._last_text, markup=False)

    def _share(self) -> float:
        """Of all member-steps of the run."""
        return sum(one.size * one.share for one in self._stacks.values()) / max(1, self._num_members)

    def _line(self, *, final: bool = False) -> str:
        """One line that fits into 80 columns beside a short bar."""
        views = [one for one in self._stacks.values() if one.num_steps is not None]
        finished = sum(status == "done" for status in self._members.values())
        parts = [f"{finished}/{self._num_members} members"]
        if failed := sum(one.failed for one in views):
            parts.append(f"{failed} failed")
        if self._silent and not final:
            longest = max(self._silent.values())
            parts.append(
                f"{len(self._silent)} stack{'s' * (len(self._silent) > 1)} silent for {longest:.0f} s"
            )
        if views:
            # Stacks that wait in line stand at step 0.
            mean_step = sum(one.size * one.step for one in views) / max(1, self._num_members)
            parts.append(f"step {mean_step:.0f}/{views[0].num_steps}")
        losses = [(one.nll, one.size) for one in views if one.nll is not None]
        if losses:
            parts.append(f"NLL {sum(nll * n for nll, n in losses) / sum(n for _, n in losses):.3g}")
        new = sum(one.size * (one.step - one.first_step) for one in views)
        elapsed = time.monotonic() - (self._first_event or time.monotonic())
        if new > 0 and elapsed > 0:
            parts.append(f"{new / elapsed:,.0f} member-steps/s")
            gained, left = self._share() - self._first_share, 1 - self._share()
            if gained > 0 and left > 0 and not final:
                # At most: early stopping may end a member before.
                parts.append(f"≤{_duration(elapsed * left / gained)} left")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
