"""Which member trains where: a pure plan, and thin launchers that carry it out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdl_train.runs import RunDir

if TYPE_CHECKING:  # torch and Lightning, seconds; asking a queue needs neither
    from bdl_train.data import Data
    from bdl_train.training.prepared import StackTask


@dataclass(frozen=True)
class Resources:
    """What a launcher can hand out.

    Attributes:
        cpus, gpus: In all.
        nodes: (CPUs, GPUs) of each machine; empty = all of it is one machine.
    """

    cpus: int
    gpus: float
    nodes: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of_nodes(cls, nodes: Iterable[tuple[int, float]]) -> "Resources":
        each = tuple(nodes)
        return cls(sum(cpus for cpus, _ in each), sum(gpus for _, gpus in each), each)

    @property
    def machines(self) -> tuple[tuple[int, float], ...]:
        return self.nodes or ((self.cpus, self.gpus),)


@dataclass(frozen=True)
class Job:
    """What every stack of a run shares."""

    config: Mapping[str, Any]
    data: "Data"
    run: RunDir


class Cluster(ABC):
    """Where stacks run, as the plan sees it. The dataclass fields of a subclass are the keys of the `cluster` group."""

    num_workers: int | None
    members_per_stack: int | None
    cpus_per_stack: int | None
    gpus_per_stack: float
    ranks_per_stack: int

    @abstractmethod
    def resources(self) -> Resources:
        """What there is, before anything is started."""

    @property
    def needs_whole_plan(self) -> bool:
        """Whether every stack must be planned before the first one starts."""
        return False


class Launcher(Cluster):
    """Carries out a plan from this process, `bdl train`.

    Attributes:
        concurrent: Whether several threads may launch at the same time, after `open`.
        remote: Whether `map` uses other processes than this one.
    """

    concurrent = True
    remote = False

    def open(self) -> None:
        """Start what `launch` needs; `launch` by itself does so in time.

        Raises:
            UsageError, RunFailedError: it cannot be started.
        """

    @abstractmethod
    def launch(
        self, tasks: "Sequence[StackTask]", job: Job, tick: Callable[[], None]
    ) -> dict[str, dict[str, Any]]:
        """Train every stack; a stack that fails does not end the others.

        Args:
            tasks: Stacks that are still to be trained.
            job: Config, data and run directory.
            tick: Called a few times a second, to show progress.

        Returns:
            By stack id: the result of `train_stack`, or `{"status": "failed", "reason": ...}`.
        """

    def map(
        self, function: Callable[..., Any], shared: tuple[Any, ...], tasks: Sequence[Any]
    ) -> Iterator[Any]:
        """Call `function(*shared, task)` for every task, where stacks would run; the results come in any order.

        Args:
            function: Of a module, so that other processes find it.
            shared: The same for all tasks: handed to each process once, arrays without a copy.
            tasks: Small.
        """
        return (function(*shared, task) for task in tasks)

    def close(self) -> None:
        """Give back what `launch` started."""


@dataclass(frozen=True)
class Submission:
    """A run in somebody's queue, stored in its `submission.json`.

    Attributes:
        system: `slurm` or `ray_job`.
        ids: Jobs, in the order in which they start; the last one finishes the run.
        log: The file of the run directory that the job writes, relative to it.
        address: Of the service that was asked; "" where the system needs none.
    """

    system: str
    ids: tuple[str, ...]
    log: str
    address: str = ""


class Submitter(Cluster):
    """Hands a prepared run to a queue, `bdl submit`; there `bdl train resume=RUN` carries it out."""

    @abstractmethod
    def submit(self, run: RunDir) -> Submission:
        """Queue a run whose config and plan are written.

        Raises:
            UsageError: the system is not there or refuses, in its own words.
        """

    @abstractmethod
    def state(self, submission: Submission) -> str:
        """`queued`, `running`, `ended`, or `unknown` while the system does not answer."""
