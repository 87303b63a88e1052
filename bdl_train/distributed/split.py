"""A stack that keeps killing its worker is cut into halves, from its last good checkpoint, until the culprit is alone.

The cut is the stack's result, so a resumed run goes on with the halves. Shape letter: M members of the stack.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bdl_train.distributed.follow_ups import halves
from bdl_train.events import EventWriter
from bdl_train.files import write_json
from bdl_train.runs import RunDir
from bdl_train.training.checkpoints import LATEST, PREVIOUS, save_checkpoint
from bdl_train.training.prepared import StackTask

log = logging.getLogger(__name__)


def split(run: RunDir, task: StackTask, reason: str) -> dict[str, Any]:
    """Cut the stack's checkpoint, if it has one, and record the cut as the stack's result.

    Args:
        run: The run.
        task: A stack of two members or more that nobody works on, and whose members do not interact.
        reason: Why it is cut.

    Returns:
        The result: status `split`, and `into`, the ids of the halves.
    """
    content = _last_good(run, task)
    for half in halves(task):
        if content is not None:
            rows = torch.tensor([task.members.index(member) for member in half.members])
            cut = _cut(content, rows, len(task.members))
            own = {**content["identity"]["task"], "id": half.id, "members": list(half.members)}
            cut["identity"] = {**content["identity"], "task": own}
            save_checkpoint(run.stack(half.id), cut)
    result = {"status": "split", "into": [half.id for half in halves(task)], "reason": reason}
    events = EventWriter(run.stack(task.id) / "events.jsonl")
    events.write("split", [(None, result["into"])], step=0)
    events.close()
    write_json(run.stack(task.id) / "result.json", result)
    return result


def _last_good(run: RunDir, task: StackTask) -> dict[str, Any] | None:
    for name in (LATEST, PREVIOUS):
        try:
            return torch.load(run.stack(task.id) / name, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # a truncated zip, a bad pickle, a refused type: each has its own class
            log.warning("%s of stack %s cannot be read: %s", name, task.id, error)
    return None


def _cut(node: Any, rows: Tensor, num_members: int) -> Any:
    """The rows of every tensor that has the member axis, which comes first: `[M, ...]`."""
    if isinstance(node, Tensor):
        return node[rows].clone() if node.ndim > 0 and node.shape[0] == num_members else node
    if isinstance(node, Mapping):
        return {name: _cut(value, rows, num_members) for name, value in node.items()}
    return node
