"""What a stack's result asks for next: its halves, or its diverged members once more. Values to values.

The result is on disk, so a resumed run comes to the same stacks.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from bdl_train.errors import UsageError
from bdl_train.training.prepared import StackTask


def halves(task: StackTask) -> tuple[StackTask, StackTask]:
    """The two stacks that take the place of one; members keep their numbers and so their seeds."""
    assert task.together is None, f"stack {task.id} is never cut: {task.together}"
    middle = len(task.members) // 2
    return (
        replace(task, id=f"{task.id}a", members=task.members[:middle]),
        replace(task, id=f"{task.id}b", members=task.members[middle:]),
    )


def follow_ups(task: StackTask, result: Mapping[str, Any]) -> tuple[StackTask, ...]:
    """The stacks to train after this one.

    Raises:
        UsageError: the result names members that the stack does not have, or takes apart members that interact.
    """
    again = result.get("again") or []
    if task.together is not None and (again or result["status"] == "split"):
        raise UsageError(
            f"result.json of stack {task.id} is damaged: it takes apart members that must be in one stack: "
            f"{task.together}."
        )
    if result["status"] == "split":
        return halves(task)
    if not again:
        return ()
    if not isinstance(again, list) or not set(again) <= set(task.members):
        raise UsageError(f"result.json of stack {task.id} is damaged: {again!r} are no members of it.")
    return (replace(task, id=f"{task.id}r", members=tuple(again), attempt=task.attempt + 1),)


def in_the_end(
    tasks: Iterable[StackTask], results: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[StackTask, Mapping[str, Any]]]:
    """Every stack that holds members, with its result; a retry comes after the stack whose members it takes over."""
    for task in tasks:
        result = results.get(task.id, {"status": "failed", "reason": "its stack was never started"})
        if result["status"] != "split":
            yield task, result
        yield from in_the_end(follow_ups(task, result), results)
