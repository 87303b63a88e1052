"""The `budget` config group: when an ensemble of `num_members=auto` is large enough, and what it has taken."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from bdl_train.distributed.follow_ups import in_the_end
from bdl_train.errors import UsageError
from bdl_train.training.prepared import StackTask

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Spent:
    """What members cost: seconds by the clock, and seconds of devices."""

    wall_s: float = 0.0
    device_s: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.wall_s + other.wall_s, self.device_s + other.device_s)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Members are added in waves until one more would gain less than `tolerance`, or a limit is reached.

    Limits are looked at between waves: a wave that would not fit, by what the last one took, is not begun. The first
    wave is always trained.

    Attributes:
        tolerance: Nats a row that one more member must gain, in validation NLL or in disagreement.
        wave: Members of a wave; null = as many as run at a time.
        min_members: That are trained before `tolerance` may end it.
        max_members: That are trained at most, whatever they gain.
        device_hours: Hours of GPUs, or of stacks on CPUs; null = no limit.
        wall_time_s: Seconds of all waves, over all sessions; null = no limit.
        cost: Device hours times `cost_per_device_hour`; null = no limit.
        cost_per_device_hour: In the currency of `cost`; null = unknown.
    """

    tolerance: Positive
    wave: Annotated[int, Field(ge=1)] | None
    min_members: Annotated[int, Field(ge=3)]
    max_members: Annotated[int, Field(ge=3)]
    device_hours: Positive | None
    wall_time_s: Positive | None
    cost: Positive | None
    cost_per_device_hour: Positive | None

    def __post_init__(self) -> None:
        if self.max_members < self.min_members:
            raise UsageError(
                f"budget.max_members={self.max_members} is below budget.min_members={self.min_members}: raise it."
            )
        if self.cost is not None and self.cost_per_device_hour is None:
            raise UsageError(
                f"budget.cost={self.cost:g} needs the price of a device: set budget.cost_per_device_hour too."
            )

    @property
    def limits(self) -> dict[str, float]:
        """The limits of resources that are set, by key."""
        known = {"device_hours": self.device_hours, "wall_time_s": self.wall_time_s, "cost": self.cost}
        return {name: value for name, value in known.items() if value is not None}

    def used(self, spent: Spent) -> dict[str, float]:
        """The same keys for what was spent; `cost` if a device has a price."""
        hours = spent.device_s / 3600
        found = {"device_hours": hours, "wall_time_s": spent.wall_s}
        return (
            found
            if self.cost_per_device_hour is None
            else {**found, "cost": hours * self.cost_per_device_hour}
        )

    def why_not(self, spent: Spent, more: Spent) -> str | None:
        """Why there is no room for `more`, or None.

        Args:
            spent: So far.
            more: What the next wave is expected to take.
        """
        now, then = self.used(spent), self.used(spent + more)
        for name, limit in self.limits.items():
            if now[name] >= limit:
                return f"budget.{name}={limit:g} is spent ({now[name]:.4g})"
            if then[name] > limit:
                return (
                    f"budget.{name}={limit:g} has no room for another wave: {now[name]:.4g} is spent, and that "
                    f"would take some {then[name] - now[name]:.3g}"
                )
        return None


def device_seconds(tasks: Iterable[StackTask], results: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds of GPUs that stacks took, shares of a GPU counted as such; a process on CPUs counts as one device.

    Args:
        tasks: As planned; what their results asked for next is counted with them.
        results: By stack id.
    """
    return sum(_each(in_the_end(tasks, results)))


def _each(ended: Iterable[tuple[StackTask, Mapping[str, Any]]]) -> Iterator[float]:
    for task, result in ended:
        yield result.get("seconds", 0.0) * task.ranks * (task.gpus or 1.0)
