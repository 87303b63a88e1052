"""Which member trains where: a pure plan, and thin launchers that carry it out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdl_train.data import Data
from bdl_train.runs import RunDir
from bdl_train.training.train_stack import StackTask


@dataclass(frozen=True)
class Resources:
    """What a launcher can hand out."""

    cpus: int
    gpus: float


@dataclass(frozen=True)
class Job:
    """What every stack of a run shares."""

    config: Mapping[str, Any]
    data: Data
    run: RunDir


class Launcher(ABC):
    """Carries out a plan. Its dataclass fields are the keys of the `cluster` group."""

    num_workers: int | None
    members_per_stack: int | None
    cpus_per_stack: int | None
    gpus_per_stack: float

    @abstractmethod
    def resources(self) -> Resources:
        """What there is, before anything is started."""

    @abstractmethod
    def launch(
        self, tasks: Sequence[StackTask], job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        """Train every stack; a stack that fails does not end the others.

        Args:
            tasks: Stacks that are still to be trained.
            job: Config, data and run directory.
            tick: Called a few times a second, to show progress.

        Returns:
            By stack id: the result of `train_stack`, or `{"status": "failed", "reason": ...}`.
        """

    def close(self) -> None:  # noqa: B027  (most start nothing)
        """Give back what `launch` started."""
