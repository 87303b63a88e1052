"""One stack's work, the same under every launcher: train it, keep its log, turn what it raises into a result."""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bdl_train.distributed import Job
from bdl_train.errors import UsageError
from bdl_train.training.prepared import StackTask
from bdl_train.training.ranks import ALONE, Ranks
from bdl_train.training.train_stack import STOPPED, train_stack

log = logging.getLogger(__name__)

LOG_FILE = "log.txt"


def work(task: StackTask, job: Job, ranks: Ranks = ALONE) -> dict[str, Any]:
    """The result of `train_stack`, or `{"status": "failed", "reason": ...}`; the traceback goes to the stack's log.

    A stack that is reached after a stop was requested does not start.

    Raises:
        UsageError: what should have been refused before the launch; it ends the run.
    """
    if ranks.world == 1 and job.run.stop_file.exists():  # several have to agree: they meet first
        return dict(STOPPED)
    path = job.run.stack(task.id) / (LOG_FILE if ranks.is_first else f"log-{ranks.rank}.txt")
    with _logging_to(path):
        try:
            return train_stack(task, job.config, job.data, job.run, ranks)
        except UsageError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.error("Stack %s failed: %s (all of it: %s)", task.id, reason, path)
            with suppress(OSError), path.open("a") as file:
                traceback.print_exc(file=file)
            return {"status": "failed", "reason": reason}


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = logging.getLogger("bdl_train")
    handler = _LogFile(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = ours.level
    if not ours.isEnabledFor(logging.INFO):
        ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
        with suppress(OSError):  # a full disk: what the work came to counts, not its last log line
            handler.close()


class _LogFile(logging.FileHandler):
    """A line that a full disk refuses is lost; it stands on the terminal too."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        pass
