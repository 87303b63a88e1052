"""Priors p(θ) over network weights. One module and one YAML a choice; declared once, used by every method."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bdl_train.stack import Layout


class BoundPrior(ABC):
    """A prior over the flat parameter vector of one architecture."""

    @property
    def lead(self) -> tuple[int, ...]:
        """`(M,)` when every member of the stack has a prior of its own, else `()`."""
        return ()

    @abstractmethod
    def log_prob(self, flat: Tensor) -> Tensor:
        """Total log density in nats, `[..., P]` to `[...]`; normalised, differentiable in `flat`.

        When every member has a prior of its own, `flat` is `[..., M, P]`.
        """

    def log_prob_and_grad(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """`log_prob` and its gradient in `flat`, `[...]` and `[..., P]`, detached."""
        leaf = flat.detach().requires_grad_(True)
        value = self.log_prob(leaf)
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    @abstractmethod
    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        """Independent draws `[num_samples, *lead, P]`, in the prior's dtype and on its device.

        That is `[num_samples, P]`, or `[num_samples, M, P]`: as many draws from the prior of each member.
        """

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BoundPrior":
        """The same prior on another device, in another dtype."""


class Prior(ABC):
    """A prior as configured, before it knows the architecture."""

    starts_members: ClassVar[bool] = False
    """Whether members start at a draw from this prior instead of the architecture's initial values."""

    @abstractmethod
    def bind(self, layout: Layout, members: Sequence[int]) -> BoundPrior:
        """The prior over parameters with this layout.

        Args:
            layout: Names and shapes of one member's network parameters.
            members: Indices, in the whole ensemble, of the members of this stack. Only a prior that differs
                between members looks at them; its bound form has a member axis of this length.
        """


@dataclass(frozen=True)
class BoundGaussian(BoundPrior):
    """Independent Gaussians: `mean` and `std` are `[P]`, or `[M, P]` when every member has its own.

    Attributes:
        precision: Inverse variances, shaped like `std`.
    """

    mean: Tensor
    std: Tensor
    # Made with the prior, not when first asked for: a lock, as of `cached_property`, cannot be compiled.
    precision: Tensor = field(init=False)
    _log_normaliser: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", self.std.pow(-2))
        normaliser = (self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
        object.__setattr__(self, "_log_normaliser", normaliser)

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(self.mean.shape, self.std.shape)[:-1])

    def log_prob(self, flat: Tensor) -> Tensor:
        return -0.5 * ((flat - self.mean).square() * self.precision).sum(-1) - self._log_normaliser

    def log_prob_and_grad(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        # By hand: the prior is in every step of every stack, and autograd would triple its passes over the weights.
        deviation = self.mean - flat.detach()
        grad = deviation * self.precision
        return -0.5 * torch.linalg.vecdot(deviation, grad) - self._log_normaliser, grad

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        z = self.mean.new_empty(num_samples, *self.lead, self.mean.shape[-1])
        return self.mean + self.std * z.normal_(generator=generator)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BoundGaussian":
        return BoundGaussian(self.mean.to(device, dtype), self.std.to(device, dtype))

    def recentred(self, mean: Tensor) -> "BoundGaussian":
        """The same spread around other means, `[P]` or `[M, P]`."""
        return BoundGaussian(mean, self.std)


@dataclass(frozen=True)
class JointPrior(BoundPrior):
    """Independent blocks: `parts[i]` governs the columns `columns[i]` of the flat vector."""

    parts: tuple[BoundPrior, ...]
    columns: tuple[Tensor, ...]

    @property
    def lead(self) -> tuple[int, ...]:
        return max((part.lead for part in self.parts), key=len)

    def log_prob(self, flat: Tensor) -> Tensor:
        total = self.parts[0].log_prob(flat.index_select(-1, self.columns[0]))
        for part, columns in zip(self.parts[1:], self.columns[1:], strict=True):
            total = total + part.log_prob(flat.index_select(-1, columns))
        return total

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        lead, num_params = self.lead, sum(len(columns) for columns in self.columns)
        pieces = []
        for part in self.parts:
            # A block that all members share is still drawn anew for each of them.
            repeats = 1 if part.lead == lead else math.prod(lead)
            pieces.append(part.sample(num_samples * repeats, generator).reshape(num_samples, *lead, -1))
        flat = pieces[0].new_empty(num_samples, *lead, num_params)
        for piece, columns in zip(pieces, self.columns, strict=True):
            flat[..., columns] = piece
        return flat

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "JointPrior":
        return JointPrior(
            tuple(part.to(device, dtype) for part in self.parts),
            tuple(columns.to(device) for columns in self.columns),
        )


def join(parts: Sequence[tuple[BoundPrior, Tensor]]) -> BoundPrior:
    """One prior from independent blocks `(prior, columns)` that together cover every column once.

    All-Gaussian blocks become one Gaussian, with a member axis if any block has one.
    """
    joint = JointPrior(tuple(part for part, _ in parts), tuple(columns for _, columns in parts))
    gaussians = [part for part in joint.parts if isinstance(part, BoundGaussian)]
    if len(gaussians) < len(joint.parts):
        return joint
    mean = gaussians[0].mean.new_empty(*joint.lead, sum(len(columns) for columns in joint.columns))
    std = torch.empty_like(mean)
    for part, columns in zip(gaussians, joint.columns, strict=True):
        mean[..., columns], std[..., columns] = part.mean, part.std
    return BoundGaussian(mean, std)
