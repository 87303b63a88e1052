"""A lost heartbeat: a stack that has started, has not ended, and writes nothing."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

SILENT_AFTER_S = 60.0
"""Twice a second is usual; a large validation part or the end of a stack may take longer than that."""

STACK_ENDS = ("stopped", "split")
DRIVER_ENDS = ("retry", "split", "given_up", "node_lost", "drained")


@dataclass(frozen=True)
class Sign:
    """The last sign of life of a stack that trains.

    Attributes:
        heard: When the driver read it, by the driver's own clock: those of other machines may differ.
        running: Members that have not ended.
        host: Where it trains.
    """

    heard: float
    running: frozenset[int]
    host: str


def after(
    signs: Mapping[str, Sign], events: Iterable[tuple[str, Mapping[str, Any]]], now: float
) -> dict[str, Sign]:
    """The signs of life after more events of stacks, read now; stacks that ended have none."""
    left = dict(signs)
    for stack, event in events:
        key, value = event["key"], event["value"]
        if key == "started":
            left[stack] = Sign(now, frozenset(value["members"]), str(value.get("host", "")))
        elif stack in left:
            ended = {event["member"]} if key == "member" else set()
            left[stack] = replace(left[stack], heard=now, running=left[stack].running - ended)
            if key in STACK_ENDS or not left[stack].running:
                del left[stack]
    return left


def after_decisions(signs: Mapping[str, Sign], events: Iterable[Mapping[str, Any]]) -> dict[str, Sign]:
    """The signs of life after decisions of the driver: a stack that it took from its worker need not speak."""
    over = {
        event["value"].get("stack")
        for event in events
        if event["key"] in DRIVER_ENDS and isinstance(event["value"], dict)
    }
    return {stack: sign for stack, sign in signs.items() if stack not in over}


def silent(signs: Mapping[str, Sign], now: float, after_s: float = SILENT_AFTER_S) -> dict[str, float]:
    """Stacks not heard of for so long, and for how many seconds."""
    ages = {stack: now - sign.heard for stack, sign in signs.items()}
    return {stack: age for stack, age in sorted(ages.items()) if age >= after_s}
