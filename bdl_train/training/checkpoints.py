"""Checkpoints of a stack: whole, atomic, and loaded without unpickling code."""

import io
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bdl_train.files import write_bytes

log = logging.getLogger(__name__)

LATEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them; the checkpoint before is kept beside it.

    Raises:
        OSError: the disk takes no more; the checkpoint before can still be loaded.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    latest = folder / LATEST
    with suppress(FileNotFoundError):  # the first one, or a save that failed after this step
        latest.replace(folder / PREVIOUS)
    write_bytes(latest, buffer.getvalue())


def load_checkpoint(
    folder: Path, identity: dict[str, Any], device: torch.device | str
) -> dict[str, Any] | None:
    """The newest checkpoint that can be read and belongs to this work, or None.

    Args:
        folder: Of the stack.
        identity: What the checkpoint must have recorded under `identity` (members, attempt, N ...).
        device: Where its tensors go.
    """
    for path, content in _readable(folder, device):
        if content.get("identity") == identity:
            return content
        log.warning("%s belongs to other settings: it is not used", path)
    return None


def phase_of_checkpoint(folder: Path) -> int | None:
    """In which phase of its method a stack stood when it was saved last; None without a checkpoint."""
    return next((content["state"]["phase"] for _, content in _readable(folder, "cpu")), None)


def _readable(folder: Path, device: torch.device | str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints that can be read, the newest first."""
    for name in (LATEST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            yield path, torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a truncated zip, a bad pickle, a refused type: each has its own class
            log.warning("%s cannot be read (%s): falling back to the checkpoint before it", path, error)


def remove_checkpoints(folder: Path) -> None:
    """A finished stack needs none."""
    for name in (LATEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
