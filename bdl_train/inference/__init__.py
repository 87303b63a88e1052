"""Posterior methods. One module and one YAML a method; modules with an underscore are shared parts.

A method is `init`, `step`, `posterior` over an explicit state, in that order, and knows nothing of Lightning, Ray or
files. Shape letters: M members, P parameters of one member.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

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
        steps_per_epoch: Optimiser steps an epoch.
    """

    prior: Prior
    likelihood: Likelihood
    num_epochs: int
    steps_per_epoch: int


@dataclass(frozen=True)
class Problem:
    """What a method works on.

    Attributes:
        stack: Initial weights and buffers of M members.
        potential: Of section 5 of the design; carries N, the prior and the likelihood.
        make_optimizer: An elementwise torch optimiser over a list of tensors.
        schedule: Factor on its learning rate, a function of the step.
        steps_per_epoch, num_steps: Of the whole run at `trainer.max_epochs`.
        noise_seeds: One seed a member, for the method's own randomness.
        clip_norm: Largest gradient norm of one member, or None.
    """

    stack: Stack
    potential: Potential
    make_optimizer: Callable[[list[Tensor]], Optimizer]
    schedule: Schedule
    steps_per_epoch: int
    num_steps: int
    noise_seeds: Sequence[int]
    clip_norm: float | None = None


@dataclass(frozen=True)
class StepLog:
    """What one step reports, `[M]` each: potential and mean NLL of the batch in nats per example, gradient norm."""

    potential: Tensor
    nll: Tensor
    grad_norm: Tensor


class State(ABC):
    """What a method has learned so far. `state_dict` is whole: save, load, continue gives the same bits."""

    stack: Stack
    potential: Potential
    active: Tensor  # [M] bool: members that still train
    failed: Tensor  # [M] bool: members that diverged
    step: int

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them only."""

    @abstractmethod
    def load_state_dict(self, stored: dict[str, Any]) -> None: ...


S = TypeVar("S", bound=State)


class Method(ABC, Generic[S]):
    """A posterior method as configured; fields of the dataclass are the keys of its YAML."""

    num_draws: int
    """Posterior draws a member contributes to the predictive."""

    needs_per_example_likelihood: ClassVar[bool] = False
    """Whether batch norm in train mode, under which examples of a batch depend on each other, must be refused."""

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

    @abstractmethod
    def init(self, problem: Problem) -> S:
        """The state before the first step."""

    @abstractmethod
    def step(self, state: S, batch: Batch) -> StepLog:
        """One step of every active member; changes `state` in place."""

    @abstractmethod
    def posterior(self, state: S) -> list[MemberPosterior]:
        """What each member has learned, in the stack's order.

        Raises:
            RuntimeError: called too early.
        """
