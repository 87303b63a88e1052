"""Two processes never write one stack: who took it last owns it, and who lost it stops before its next write.

A stack is given to another worker when the first is thought dead. It may only have been cut off: a node that lost its
network for a minute trains on, and would write over the checkpoints and events of its successor.
"""

import json
import logging
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from bdl_train.files import write_json

log = logging.getLogger(__name__)

OWNER_FILE = "owner.json"


class LostOwnershipError(RuntimeError):
    """Another process took the stack over; this one must write nothing more."""

    def __init__(self, folder: str, owner: str) -> None:
        super().__init__(folder, owner)
        self.folder, self.owner = folder, owner

    def __str__(self) -> str:
        return f"{self.folder} was taken over by {self.owner}: this worker stops"


class Ownership:
    """Takes a stack's folder, and tells later whether it is still ours.

    Args:
        folder: Of the stack; made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._token = folder / OWNER_FILE, secrets.token_hex(8)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_json(self._file, {"token": self._token, **whereabouts()})
            self._held = True
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): another worker of the stack would go unnoticed", self._file, error
            )
            self._held = False

    def check(self) -> None:
        """Call before anything is written.

        Raises:
            LostOwnershipError: somebody took the stack since.
        """
        if not self._held:
            return
        try:
            owner = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return  # a file system that does not answer now says nothing about another owner
        if isinstance(owner, dict) and owner.get("token") != self._token:
            where = f"process {owner.get('pid')} on {owner.get('host')}"
            raise LostOwnershipError(str(self._file.parent), where)


def whereabouts() -> dict[str, Any]:
    """Where this process runs: `host`, `node` (a cluster's own name for the host, if it has one) and `pid`."""
    host = socket.gethostname()
    return {"host": host, "node": os.environ.get("BDL_NODE", host), "pid": os.getpid()}
