"""Priors p(θ) over network weights. One module and one YAML a choice; declared once, used by every method."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Generator, Tensor

from bdl_train.stack import Layout


class BoundPrior(ABC):
    """A prior over the flat parameter vector of one architecture."""

    @abstractmethod
    def log_prob(self, flat: Tensor) -> Tensor:
        """Total log density in nats, `[..., P]` to `[...]`; normalised, differentiable in `flat`."""

    @abstractmethod
    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        """Independent draws `[num_samples, P]`, in the prior's dtype and on its device."""

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype) -> "BoundPrior": ...


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
    """Independent Gaussians: `mean` and `std` are `[P]`, or `[M, P]` when every member has its own."""

    mean: Tensor
    std: Tensor

    @cached_property
    def precision(self) -> Tensor:
        """Inverse variances, shaped like `std`."""
        return self.std.pow(-2)

    @cached_property
    def _log_normaliser(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def log_prob(self, flat: Tensor) -> Tensor:
        return -0.5 * ((flat - self.mean).square() * self.precision).sum(-1) - self._log_normaliser

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        z = torch.empty(num_samples, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device)
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

    def log_prob(self, flat: Tensor) -> Tensor:
        total = self.parts[0].log_prob(flat.index_select(-1, self.columns[0]))
        for part, columns in zip(self.parts[1:], self.columns[1:], strict=True):
            total = total + part.log_prob(flat.index_select(-1, columns))
        return total

    def sample(self, num_samples: int, generator: Generator) -> Tensor:
        drawn = [part.sample(num_samples, generator) for part in self.parts]
        flat = drawn[0].new_empty(num_samples, sum(len(columns) for columns in self.columns))
        for draws, columns in zip(drawn, self.columns, strict=True):
            flat[:, columns] = draws
        return flat

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "JointPrior":
        return JointPrior(
            tuple(part.to(device, dtype) for part in self.parts),
            tuple(columns.to(device) for columns in self.columns),
        )


def join(parts: list[tuple[BoundPrior, Tensor]]) -> BoundPrior:
    """One prior from independent blocks `(prior, columns)`; all-Gaussian blocks become one Gaussian."""
    num_params = sum(len(columns) for _, columns in parts)
    gaussians = [(part, columns) for part, columns in parts if isinstance(part, BoundGaussian)]
    if len(gaussians) == len(parts):
        mean = gaussians[0][0].mean.new_empty(num_params)
        std = torch.empty_like(mean)
        for part, columns in gaussians:
            mean[columns], std[columns] = part.mean, part.std
        return BoundGaussian(mean, std)
    return JointPrior(tuple(part for part, _ in parts), tuple(columns for _, columns in parts))
