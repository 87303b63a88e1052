"""The state of submitted runs, asked of the systems that have them."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any


def states_of(submissions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each `queued`, `running`, `ended`, or `unknown` when the system cannot be asked or does not remember.

    Args:
        submissions: As stored (`Submission`). `system` names the module that knows, of this package; it is asked once.
            Of a damaged one, whose `ids` is no list, nothing is known.
    """
    states = ["unknown"] * len(submissions)
    for system in sorted({str(one.get("system")) for one in submissions}):
        mine = [
            i
            for i, one in enumerate(submissions)
            if str(one.get("system")) == system and isinstance(one.get("ids"), list | tuple)
        ]
        for i, state in zip(mine, _asked(system, [submissions[i] for i in mine]), strict=True):
            states[i] = state
    return states


def state_of(submission: Mapping[str, Any]) -> str:
    """As `states_of`, of one."""
    return states_of([submission])[0]


def _asked(system: str, submissions: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        if system.isidentifier():
            return importlib.import_module(f"bdl_train.distributed.{system}").states_of(submissions)
    except (ImportError, AttributeError):
        pass
    return ["unknown"] * len(submissions)
