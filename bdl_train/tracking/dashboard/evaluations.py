"""The evaluations of a run for its page: the words of every chapter, read again only where a file has changed."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from bdl_train.runs import RunDir
from bdl_train.tracking.chapters import NAME, chapter_files, chapters, evaluations

REPORT = "report.html"
Value = TypeVar("Value")
Stamp = tuple[tuple[str, int, int] | None, ...]


class Kept(Generic[Value]):
    """What was read from some files, as long as none of them changes."""

    def __init__(self) -> None:
        self._stamp: Stamp | None = None
        self._value: Value | None = None

    def get(self, files: Iterable[Path], read: Callable[[], Value]) -> Value:
        """The value of the last call if the files are what they were, else a new one."""
        stamp = tuple(_stamp(path) for path in files)
        if self._value is None or stamp != self._stamp:
            self._value, self._stamp = read(), stamp
        return self._value


def _stamp(path: Path) -> tuple[str, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (str(path), found.st_mtime_ns, found.st_size)


class Evaluations:
    """All evaluations of a run.

    Args:
        run: Its directory.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._kept: dict[str, Kept[list[dict[str, Any]]]] = {}

    def answer(self) -> list[dict[str, Any]]:
        """Of each that has chapters or a report: name, whether there is a report, chapters in words."""
        found = []
        for name in evaluations(self._run):
            kept = self._kept.setdefault(name, Kept())
            told = kept.get(chapter_files(self._run, name), lambda name=name: self._chapters(name))
            report = report_of(self._run, name) is not None
            if told or report:
                found.append({"name": name, "report": report, "chapters": told})
        return found

    def _chapters(self, name: str) -> list[dict[str, Any]]:
        return [asdict(one) for one in chapters(self._run, name)]


def report_of(run: RunDir, name: str) -> Path | None:
    """The report of an evaluation, or None: a file in its own place, not a link that leads elsewhere.

    Args:
        run: Its path is resolved.
        name: As a browser sent it.
    """
    path = run.evaluation(name) / REPORT
    if not NAME.fullmatch(name) or not path.is_file() or path.resolve() != path:
        return None
    return path
