"""Posterior methods. One module and one YAML a method; modules with an underscore are shared parts.

A method is `init`, `step`, `posterior` over an explicit state, in that order, and knows nothing of Lightning, Ray or
files. Shape letters: M members, P parameters of one member.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from bdl_train.likelihoods import Likelihood
from bdl_train.posteriors import MemberPosterior
from bdl_train.potential import Batch, Potential
from bdl_train.priors import BoundPrior, Prior
from bdl_train.schedulers import Schedule
from bdl_train.stack import Stack


@dataclass(frozen=True)
class Setting:
    """What a method may check before anything is launched.

    Attributes:
        num_epochs: `trainer.max_epochs`.
        num_data: N, training examples of one member.
        batch_size: Examples of one member in a step on shuffled batches, at most N.
    """

    prior: Prior
    likelihood: Likelihood
    num_epochs: int
    num_data: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps on shuffled batches, all full, in an epoch."""
        return self.num_data // self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps on shuffled batches in `trainer.max_epochs`."""
        return self.num_epochs * self.steps_per_epoch


Rows = Literal["shuffled", "all", "once"]


@dataclass(frozen=True)
class Phase:
    """A stretch of steps that see the data in one way.

    Attributes:
        name: For people: "train", "warm start", "sample".
        rows: What a step sees. `shuffled`: a full batch of each member's own order; `all`: every training example, the
            same tensors each time; `once`: batches in the order of the rows, the last one smaller, so that an epoch
            meets every example once.
        num_epochs: After each of them members are scored on the validation part.
        steps_per_epoch: Steps of one.
        early_stopping: Whether members stop at their best epoch and start the next phase, or end, with its weights.
    """

    name: str
    rows: Rows
    num_epochs: int
    steps_per_epoch: int
    early_stopping: bool = False

    @property
    def num_steps(self) -> int:
        return self.num_epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Problem:
    """What a method works on.

    Attributes:
        stack: Initial weights and buffers of M members.
        potential: Of section 5 of the design; carries N, the prior and the likelihood.
        make_optimizer: An elementwise torch optimiser over a list of tensors.
        schedule: Factor on its learning rate, a function of the step.
        setting: What `Method.check` saw.
        noise_seeds: One seed a member, for the method's own randomness.
        compile_steps: Whether a method whose whole step can be compiled is to do so.
        clip_norm: Largest gradient norm of one member, or None.
    """

    stack: Stack
    potential: Potential
    make_optimizer: Callable[[list[Tensor]], Optimizer]
    schedule: Schedule
    setting: Setting
    noise_seeds: Sequence[int]
    clip_norm: float | None = None
    compile_steps: bool = False

    @property
    def steps_per_epoch(self) -> int:
        return self.setting.steps_per_epoch

    @property
    def num_steps(self) -> int:
        return self.setting.num_steps


@dataclass(frozen=True)
class StepLog:
    """What one step reports, `[M]` each.

    Attributes:
        potential: Of the batch, nats per example.
        nll: Its likelihood part, the mean over the batch.
        grad_norm: Of the potential.
        traces: What else is worth a curve, by name: a step size, an energy error.
    """

    potential: Tensor
    nll: Tensor
    grad_norm: Tensor
    traces: Mapping[str, Tensor] = field(default_factory=dict)


class State(ABC):
    """What a method has learned so far. `state_dict` is whole: save, load, continue gives the same bits.

    Attributes:
        stack: Members as they are scored on the validation part.
        active: `[M]` bool, members that go on in this phase.
        failed: `[M]` bool, members that diverged.
        phase: Index into the method's phases.
        step: Steps taken in this phase.
    """

    stack: Stack
    potential: Potential
    active: Tensor
    failed: Tensor
    phase: int
    step: int

    @property
    def beside_weights(self) -> dict[str, Tensor]:
        """What else early stopping must take back with the best weights, `[M, ...]` each, changed in place."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and mappings of them only.

        Every tensor but scalars has the member axis first, `[M, ...]`: a stack is cut into halves by cutting them.
        """

    @abstractmethod
    def load_state_dict(self, stored: dict[str, Any]) -> None: ...


S = TypeVar("S", bound=State)


class Method(ABC, Generic[S]):
    """A posterior method as configured; fields of the dataclass are the keys of its YAML."""

    num_draws: int
    """Posterior draws a member contributes to the predictive."""

    needs_per_example_likelihood: ClassVar[bool] = False
    """Whether batch norm in train mode, under which examples of a batch depend on each other, must be refused."""

    when_diverged: ClassVar[str] = "lower optimizer.lr or set trainer.clip_norm"
    """What to try when a member's potential turned NaN or infinite."""

    needs_dropout: ClassVar[bool] = False
    """Whether the network must have dropout layers whose masks can be drawn again, those of `bdl_train.models`."""

    needs_fixed_potential: ClassVar[bool] = False
    """Whether dropout, under which the potential is another function at each call, must be refused."""

    unused_groups: ClassVar[tuple[str, ...]] = ()
    """Config groups that the method has no use for, whatever its settings: `optimizer`, `scheduler`."""

    members_interact: ClassVar[str | None] = None
    """Why all members must be in one stack, or None where each is on its own."""

    splits_batches: ClassVar[bool] = True
    """Whether several processes may each take a part of every batch (`cluster.ranks_per_stack`)."""

    @classmethod
    def unused_with(cls, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Config groups that the method has no use for under these settings, which may still be wrong."""
        return cls.unused_groups

    @property
    def target_temperature(self) -> float:
        """T of section 5 of the design: the posterior is proportional to exp(−N · potential / T)."""
        return 1.0

    @property
    def early_stopping(self) -> int | None:
        """Epochs without a better validation NLL after which a member stops, or None."""
        return None

    def check(self, setting: Setting) -> None:
        """Refuse settings that do not fit together, before anything is launched.

        Raises:
            UsageError: names the config keys to change.
        """

    def check_prior(self, prior: BoundPrior) -> None:
        """Refuse a prior that the method cannot use, before anything is launched.

        Raises:
            UsageError: names the config keys to change.
        """

    def phases(self, setting: Setting) -> list[Phase]:
        """What the method does, in order: as it stands here, `trainer.max_epochs` epochs of shuffled batches."""
        return [
            Phase(
                "train",
                "shuffled",
                setting.num_epochs,
                setting.steps_per_epoch,
                self.early_stopping is not None,
            )
        ]

    def steps_to_compile(self, setting: Setting) -> int:
        """Steps on the same tensors, each of which can be compiled as a whole: `trainer.compile=auto` asks."""
        return 0

    @abstractmethod
    def init(self, problem: Problem) -> S:
        """The state before the first step."""

    def enter(self, state: S) -> None:
        """Called once when `state.phase` has become 1, 2, ... and `state.step` 0, before the first step of that phase.

        Members that did not diverge are active again; after a phase with early stopping they stand at their best
        weights.
        """

    @abstractmethod
    def step(self, state: S, batch: Batch) -> StepLog:
        """One step of every active member; changes `state` in place."""

    @abstractmethod
    def posterior(self, state: S) -> list[MemberPosterior]:
        """What each member has learned, in the stack's order.

        Raises:
            RuntimeError: called too early.
        """
