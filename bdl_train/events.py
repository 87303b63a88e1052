"""The event files of a run: what its stacks and its driver say while they work, appended line by line."""

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from bdl_train.files import to_json
from bdl_train.runs import RunDir


class EventWriter:
    """The append-only event file of one stack; one writer. A line: {time, member, step, key, value}.

    Lines wait in memory until `flush`, which appends them in one call.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed writer may leave half a line; what follows must not be glued to it.
        self._torn = path.is_file() and path.stat().st_size > 0 and not _ends_with_newline(path)
        self._file = path.open("ab", buffering=0)
        self.lines: list[str] = []

    def write(self, key: str, values: Iterable[tuple[int | None, Any]], *, step: int) -> None:
        """Add one event per (member, value); member None speaks of the whole stack."""
        now = round(time.time(), 3)
        for member, value in values:
            event = {"time": now, "member": member, "step": step, "key": key, "value": to_json(value)}
            self.lines.append(json.dumps(event, allow_nan=False) + "\n")

    def flush(self) -> None:
        """Append what waits.

        Raises:
            OSError: the disk takes no more; the lines are lost.
        """
        if not self.lines:
            return
        block = ("\n" * self._torn + "".join(self.lines)).encode()
        self.lines = []
        self._torn = True  # until all of it is there
        written = self._file.write(block)
        if written != len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        self._torn = False

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class EventReader:
    """Follows the event files of a run; each call gives what is new, whole lines only, damaged ones left out."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._offsets: dict[Path, int] = {}

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (stack id, event) for every line that a stack wrote since the last call."""
        for path in sorted(self._run.path.glob("stacks/*/events.jsonl")):
            for event in self._new(path):
                yield path.parent.name, event

    def read_decisions(self) -> Iterator[dict[str, Any]]:
        """Yield the events that the driver wrote since the last call."""
        with suppress(FileNotFoundError):
            yield from self._new(self._run.driver_events)

    def _new(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            file.seek(self._offsets.get(path, 0))
            block = file.read()
        end = block.rfind(b"\n") + 1
        self._offsets[path] = self._offsets.get(path, 0) + end
        for line in block[:end].splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event
