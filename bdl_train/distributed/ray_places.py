"""What the driver knows of the nodes under its stacks while they train: which leave, which are no use, what is left."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bdl_train.distributed import Resources
from bdl_train.distributed.plan import room
from bdl_train.training.prepared import StackTask

log = logging.getLogger(__name__)

PLACE = "place-{rank}.txt"
"""File of a stack's folder: the id of the Ray node on which that rank began. Ray itself does not tell its driver."""


class Places:
    """Asked of Ray anew by each `look`.

    Args:
        ray: The module, connected.

    Attributes:
        draining: Ids of nodes that were told to go; Ray places nothing there any more.
        blind: Names of nodes that do not see the run directory, by id; nothing is placed there.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._ask_draining = draining_nodes(ray)
        self._left = Resources(0, 0)
        self.draining: frozenset[str] = frozenset()
        self.blind: dict[str, str] = {}

    def look(self) -> None:
        self.draining = frozenset(self._ask_draining())
        shut = self.draining | self.blind.keys()
        held = [one["Resources"] for one in self._ray.nodes() if one["Alive"] and one["NodeID"] not in shut]
        self._left = Resources.of_nodes((int(one.get("CPU", 0)), one.get("GPU", 0.0)) for one in held)

    def can_hold(self, task: StackTask) -> bool:
        """Whether the nodes that are left could, with nothing else on them."""
        return bool(self._left.nodes) and room(self._left, task.cpus, task.gpus) >= task.ranks

    def allowed(self) -> dict[str, str]:
        """The labels of nodes that a task may be placed on."""
        return {"ray.io/node-id": f"!in({','.join(sorted(self.blind))})"} if self.blind else {}


def draining_nodes(ray: Any) -> Callable[[], Iterable[str]]:
    """A function that gives the ids of the nodes that were told to go.

    Ray 2.60 knows them, and offers no public way to ask. Where its client has none, nodes leave unannounced: stacks
    start again from their last periodic checkpoint.
    """
    client = getattr(getattr(ray._private.worker, "global_worker", None), "gcs_client", None)
    ask = getattr(client, "get_draining_nodes", None)
    if ask is None:
        log.info("This Ray does not tell which nodes drain: stacks go on from their last checkpoint")
        return tuple
    return ask


def note_place(folder: Path, rank: int, node: str) -> None:
    """Say where a rank of a stack begins."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLACE.format(rank=rank)).write_text(node)


def places_of(folder: Path) -> set[str]:
    """Ids of the nodes on which ranks of a stack began since `forget_places`."""
    found = set()
    for path in folder.glob(PLACE.format(rank="*")):
        try:
            found.add(path.read_text())
        except OSError:
            continue
    return found


def forget_places(folder: Path) -> None:
    for path in folder.glob(PLACE.format(rank="*")):
        path.unlink(missing_ok=True)
