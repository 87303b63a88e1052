"""What happens around the steps of a stack: events, checkpoints, and stopping on request.

None of it may cost the stack its training: what a full disk refuses is said once, and the steps go on.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from bdl_train.events import EventWriter
from bdl_train.training.checkpoints import save_checkpoint
from bdl_train.training.member_stack import MemberStack
from bdl_train.training.ownership import LostOwnershipError, Ownership
from bdl_train.training.ranks import ALONE, Ranks
from bdl_train.training.timeline import Timeline

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.5
RETRY_S = 5.0
"""Between two tries to save the checkpoint of a requested stop."""
MOST_LINES = 1000
"""Of events that wait in memory."""
CURVE_POINTS = 200
"""Most points of a learning curve that are written, over the whole run."""


class StackEvents:
    """The event file of a stack; events that cannot be written are lost, with one warning.

    Args:
        path: Of the file.
        owner: Of the stack; who lost it writes no more.
    """

    def __init__(self, path: Path, owner: Ownership) -> None:
        self._path, self._owner, self._writer, self._warned = path, owner, EventWriter(path), False

    def write(self, key: str, values: Iterable[tuple[int | None, Any]], *, step: int) -> None:
        self._writer.write(key, values, step=step)
        if len(self._writer.lines) > MOST_LINES:
            self.flush()

    def flush(self) -> None:
        """Write out what is buffered.

        Raises:
            LostOwnershipError: the stack is another process's now.
        """
        self._owner.check()
        with self._forgiving():
            self._writer.flush()

    def close(self) -> None:
        """Write out what is buffered, if the stack is still ours."""
        try:
            self._owner.check()
        except LostOwnershipError:
            self._writer.lines = []
        with self._forgiving():
            self._writer.close()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written, events are lost: %s", self._path, error)
            self._warned = True


class WriteEvents(pl.Callback):
    """Appends progress twice a second, and each member's curves at about 200 epochs of the run.

    Args:
        events: The stack's event file.
        members: Ensemble indices of the stack's members.
        timeline: The phases of the method.
        target_scale: Units of the target in one of the standardised target, whose densities training computes: NLLs are
            written for the target itself, as metrics are.
    """

    def __init__(
        self, events: StackEvents, members: list[int], timeline: Timeline, target_scale: float
    ) -> None:
        self._events, self._members, self._timeline = events, members, timeline
        self._offset = math.log(target_scale)
        self._every = max(1, timeline.num_epochs // CURVE_POINTS)
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if time.monotonic() - self._last >= PROGRESS_EVERY_S:
            self._progress(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MemberStack)
        state = pl_module.state
        last = trainer.should_stop or self._timeline.is_over(state)
        if not pl_module.at_epoch_end or (pl_module.epoch % self._every and not last):
            return
        step = self._timeline.step(state)
        alive = pl_module.state.active.tolist()
        loss = (pl_module.nll_sum / max(1, pl_module.num_logged) + self._offset).tolist()
        self._write("train/nll", loss, alive, step)
        if pl_module.val_nll is not None:
            self._write("val/nll", (pl_module.val_nll + self._offset).tolist(), alive, step)
            of_stack = pl_module.val_ensemble_nll
            of_stack = None if of_stack is None else of_stack + self._offset
            self._events.write("val/stack_nll", [(None, of_stack)], step=step)
            self._events.write("val/disagreement", [(None, pl_module.val_disagreement)], step=step)
        for name, trace in pl_module.traces.items():
            self._write(f"trace/{name}", trace.tolist(), alive, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress(pl_module)

    def _write(self, key: str, values: list[float], alive: list[bool], step: int) -> None:
        rows = zip(self._members, values, alive, strict=True)
        self._events.write(key, [(member, value) for member, value, is_alive in rows if is_alive], step=step)

    def _progress(self, module: pl.LightningModule) -> None:
        assert isinstance(module, MemberStack)
        self._last = time.monotonic()
        state = module.state
        sums = module.nll_sum[state.active]
        known = module.num_logged and len(sums)
        loss = float(sums.mean()) / module.num_logged + self._offset if known else None
        value = {
            "step": self._timeline.step(state),
            "num_steps": self._timeline.num_steps,
            "phase": self._timeline.phase(state).name,
            "epoch": module.epoch,
            "num_epochs": self._timeline.num_epochs,
            "active": int(state.active.sum()),
            "failed": int(state.failed.sum()),
            "nll": loss,
        }
        self._events.write("progress", [(None, value)], step=value["step"])
        self._events.flush()


class Checkpoint(pl.Callback):
    """Saves every `every_s` seconds and when a stop was requested; stops only what could be saved.

    Args:
        folder: Of the stack.
        owner: Of the stack; who lost it saves no more.
        content: What to save, called at the time.
        stop_files: The existence of one asks for a stop; they are looked for after each call of K steps.
        ranks: Of the stack: the first one decides and writes.

    Attributes:
        stopped: Whether training ended on request, with a checkpoint to go on from.
    """

    def __init__(
        self,
        folder: Path,
        owner: Ownership | None,
        content: Callable[[], dict[str, Any]],
        every_s: float,
        stop_files: Sequence[Path],
        ranks: Ranks = ALONE,
    ) -> None:
        self._folder, self._owner, self._content = folder, owner, content
        self._every_s, self._stop_files, self._ranks = every_s, stop_files, ranks
        self._due = time.monotonic() + every_s
        self._stop_due = time.monotonic()
        self._warned: set[str] = set()
        self.stopped = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        # At the end of an epoch the save waits for the validation, which belongs to the epoch's state.
        assert isinstance(pl_module, MemberStack)
        if not pl_module.at_epoch_end:
            self._maybe_save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.stopped:
            self._maybe_save(trainer)

    def _maybe_save(self, trainer: pl.Trainer) -> None:
        device = trainer.strategy.root_device
        asked = any(path.exists() for path in self._stop_files)
        stop = bool(self._ranks.decide(asked, device))
        now = time.monotonic()
        if not self._ranks.decide(now >= (self._stop_due if stop else self._due), device):
            return
        saved = self._save(stop) if self._ranks.is_first else False
        if self._ranks.decide(saved, device) and stop:
            self.stopped = trainer.should_stop = True
        self._due = time.monotonic() + self._every_s

    def _save(self, stop: bool) -> bool:
        """Whether the disk took it."""
        if self._owner is not None:
            self._owner.check()
        try:
            save_checkpoint(self._folder, self._content())
        except OSError as error:
            self._stop_due = time.monotonic() + RETRY_S
            then = "the requested stop waits until it can" if stop else "training goes on without"
            if then not in self._warned:
                log.warning("A checkpoint in %s cannot be saved (%s): %s", self._folder, error, then)
            self._warned.add(then)
            return False
        return True
