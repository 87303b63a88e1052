"""Which trial is not worth its time: worse than the median of the others at the same epoch (Golovin et al., 2017).

The validation NLL of a trial is the mean over its stacks, each with its own best so far: early stopping keeps that one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Points = Sequence[tuple[int, float]]
"""(epoch, best validation NLL up to it), in nats, epochs rising."""


@dataclass
class Curve:
    """The validation NLL of a trial by epoch, put together from the events of its stacks.

    Args:
        max_epochs: Of its training.
    """

    max_epochs: int
    _stacks: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _num_steps: dict[str, int] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def take(self, stack: str, event: Mapping[str, Any]) -> None:
        """One event, in the order of its file."""
        if event["key"] == "progress" and isinstance(event["value"], Mapping):
            self._num_steps[stack] = event["value"]["num_steps"]
        elif event["key"] == "val/stack_nll" and self._num_steps.get(stack):
            epoch = round(event["step"] * self.max_epochs / self._num_steps[stack])
            value = math.inf if event["value"] is None else float(event["value"])  # null: not finite
            self._stacks.setdefault(stack, []).append((epoch, value))
        elif event["key"] == "member":
            self._ended.add(stack)

    def points(self) -> list[tuple[int, float]]:
        """The mean over the stacks, up to the epoch that all of them that train have reached: one that started late
        would otherwise be held against epochs it has not seen. A stack that has ended is left at its best.
        """
        items = list(self._stacks.items())  # copies: another thread takes events
        cut = {name[:-1] for name, _ in items if name[-1] in "ab"}  # halves stand for the stack that was cut
        named = {name: sorted(one) for name, one in items if name not in cut}
        stacks = list(named.values())
        end = min((one[-1][0] for name, one in named.items() if name not in self._ended), default=math.inf)
        epochs = sorted({epoch for one in stacks for epoch, _ in one if epoch <= end})
        found = []
        for epoch in epochs:
            values = [best(one, epoch) for one in stacks if one[0][0] <= epoch]
            found.append((epoch, sum(values) / len(values)))
        return found


def best(points: Points, epoch: int) -> float:
    """The lowest value up to an epoch; NaN if there is none yet."""
    return min((value for at, value in points if at <= epoch), default=math.nan)


def why_prune(
    own: Points,
    finished: Sequence[Points],
    running: Sequence[Points],
    *,
    after_trials: int,
    after_epochs: int,
) -> str:
    """The reason to stop a trial now, or an empty text.

    Args:
        own: Of the trial.
        finished: Of trials that have ended; they stay at their best.
        running: Of the other trials that run; they count up to the epoch that they have reached.
        after_trials: Other trials that must have a value at that epoch.
        after_epochs: Epochs that every trial is given.
    """
    if not own or own[-1][0] < after_epochs:
        return ""
    epoch, _ = own[-1]
    others = [best(one, epoch) for one in finished if one and one[0][0] <= epoch]
    others += [best(one, epoch) for one in running if one and one[0][0] <= epoch <= one[-1][0]]
    if len(others) < after_trials:
        return ""
    value, middle = best(own, epoch), median(others)
    if value <= middle:
        return ""
    return f"validation NLL {value:.4g} at epoch {epoch}, the median of {len(others)} others there is {middle:.4g}"
