"""What benchmarks that train through the command share: the command, and rows of results kept in a file."""

import csv
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch

from bdl_train import cli

T = TypeVar("T")

# What torch knows of a GPU does not survive a fork.
PROCESSES = (
    multiprocessing.get_context("spawn")
    if torch.cuda.is_available()
    else multiprocessing.get_context("forkserver")
)
PROCESSES.set_forkserver_preload(["bdl_train.verbs.train", "bdl_train.verbs.evaluate"])


def bdl(*words: str) -> None:
    """The command, on one core; without a GPU in a process that has the imports already: half of a short run else.

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

    def fill(self, jobs: Sequence[T], run: Callable[[T], Mapping[str, object]], at_once: int) -> None:
        """Append the row of each job, so many jobs side by side; one that fails is shown and leaves no row."""
        lock, start = Lock(), time.monotonic()

        def one(job: T) -> None:
            try:
                row = run(job)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                return
            with lock:
                self.append(row)
                print(f"{time.monotonic() - start:7.0f} s  {row}", flush=True)

        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(one, jobs))


def cost(run_dir: Path) -> dict[str, object]:
    """What a run took, and the code that it ran."""
    manifest = json.loads((run_dir / "manifest.json").read_text())
    return {
        "device_time_s": round(manifest["device_time_s"], 1),
        "commit": manifest["code"].get("commit", "")[:10],
    }
