"""What benchmarks that train through the command share: the command, and rows of results kept in a file."""

import csv
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdl_train import cli

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["bdl_train.verbs.train", "bdl_train.verbs.evaluate"])


def bdl(*words: str) -> None:
    """The command, on one core, in a process that has the imports already: they would be half of a short run.

    Raises:
        RuntimeError: the command failed; with the end of what it said.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.NamedTemporaryFile() as said:
        process = PROCESSES.Process(target=_command, args=(words, said.name))
        process.start()
        process.join()
        if process.exitcode:
            end = said.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"bdl {' '.join(words)}: status {process.exitcode}\n{end}")


def _command(words: tuple[str, ...], said: str) -> None:
    to = os.open(said, os.O_WRONLY)
    os.dup2(to, 1)
    os.dup2(to, 2)
    sys.exit(cli.main(list(words)))


@dataclass(frozen=True)
class Rows:
    """Rows of a CSV file, appended one by one: the file is the state of a benchmark, which goes on where it stopped."""

    path: Path
    fields: Sequence[str]

    def stored(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def append(self, row: Mapping[str, object]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.fields, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)
