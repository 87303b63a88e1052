"""The state of a submitted run, asked of the system that has it."""

import importlib
from collections.abc import Mapping
from typing import Any


def state_of(submission: Mapping[str, Any]) -> str:
    """`queued`, `running`, `ended`, or `unknown` when the system cannot be asked or does not remember.

    Args:
        submission: A `Submission` as stored. Its `system` names the module that knows, of this package.
    """
    system = str(submission.get("system"))
    if not system.isidentifier():
        return "unknown"
    try:
        module = importlib.import_module(f"bdl_train.distributed.{system}")
        return module.state_of(submission)
    except (ImportError, AttributeError):
        return "unknown"
