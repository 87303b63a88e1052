"""What of a run's events a tracker has been handed, so that a later session does not hand it over once more."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bdl_train.files import write_json

SAVE_EVERY_S = 2.0
"""A driver that is killed has handed over this much that the file does not know of: those points come twice."""


class Handed:
    """Counts the events of every file, and knows how many of them the places in question already have.

    Args:
        path: Of the JSON file that remembers it.
        place: Where events are handed to now.
        instead: Other places whose events reach the same run, so that theirs count too.
    """

    def __init__(self, path: Path, place: str, instead: Sequence[str] = ()) -> None:
        self._path, self._place, self._saved = path, place, time.monotonic()
        self._all = _read(path)
        places = [self._all.get(name, {}) for name in (place, *instead)]
        self._events = _most(places, "events")
        self._curves = _most(places, "curves")
        self._seen: Counter[str] = Counter()

    def is_new(self, stack: str) -> bool:
        """Count the next event of this stack's file: was it never handed over?"""
        self._seen[stack] += 1
        return self._seen[stack] > self._events.get(stack, 0)

    def is_new_point(self, key: str, step: int) -> bool:
        """The same for a point of the ensemble's curve; points come in the order of steps."""
        return step > self._curves.get(key, -1)

    def position(self, stack: str) -> int:
        """How many events of this stack's file were counted."""
        return self._seen[stack]

    def handed_over(self, stack: str, position: int) -> None:
        """The place has the stack's events up to this position."""
        self._events[stack] = max(position, self._events.get(stack, 0))
        self._save_now_and_then()

    def point_handed_over(self, key: str, step: int) -> None:
        self._curves[key] = max(step, self._curves.get(key, -1))
        self._save_now_and_then()

    def _save_now_and_then(self) -> None:
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        self._saved = time.monotonic()
        self._all[self._place] = {"events": self._events, "curves": self._curves}
        write_json(self._path, self._all)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _most(places: Sequence[Any], what: str) -> dict[str, int]:
    """Of every name the largest count; what is damaged counts as nothing."""
    most: dict[str, int] = {}
    for place in places:
        found = place.get(what) if isinstance(place, dict) else None
        for name, count in (found if isinstance(found, dict) else {}).items():
            if type(count) is int:
                most[name] = max(count, most.get(name, count))
    return most
